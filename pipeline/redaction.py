"""Keeps passwords out of every text that leaves the process: errors, logs, reports.

A camera's password travels inside its URL, so it turns up wherever the URL is echoed. FFmpeg echoes decoded forms as
well (`file:rtsp://name:p@ss@host`), so a mask for the written form alone is not enough.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

MASK = "***"
# The last "@" before the host ends the password: a decoded password may itself hold "@", ":" or "/".
# One slash is what is left of a URL that was taken for a file's path.
_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*:/{1,2})[^\s'\"<>]*@")
_SECRET_KEYS = r"pass(?:word|wd)?|pwd|secret|token|api_?key|auth|key|user(?:name)?|login"
_QUERY = re.compile(rf"(?P<key>[?&;](?:{_SECRET_KEYS})=)[^&;\s'\"<>]+", re.IGNORECASE)
# Recorders want them in the path: /user=admin_password=s3cret_channel=1.
_IN_PATH = re.compile(rf"(?P<key>[/_](?:{_SECRET_KEYS})=)[^&;/\s'\"<>]+?(?=_[a-z]+=|[&;/\s'\"<>]|$)", re.IGNORECASE)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the credentials of any URL in it, nor any of the given secrets in any of their spellings.

    >>> redact("cannot open rtsp://admin:s3cret@10.0.0.5/main")
    'cannot open rtsp://***@10.0.0.5/main'
    """
    for spelling in sorted({s for secret in secrets for s in _spellings(secret)}, key=len, reverse=True):
        text = text.replace(spelling, MASK)
    text = _CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)
    return _IN_PATH.sub(rf"\g<key>{MASK}", _QUERY.sub(rf"\g<key>{MASK}", text))


def secrets_of(url: str) -> tuple[str, ...]:
    """The passwords that a URL carries, as written: hand them to `redact` for texts that do not echo the whole URL."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query)
        found = [parts.password or "", parts.netloc.rpartition("@")[0]]
    except ValueError:  # not a URL at all, e.g. a bracket in the password
        return ()
    found += [value for key, value in query if re.fullmatch(_SECRET_KEYS, key, re.IGNORECASE) and "user" not in key]
    return tuple(secret for secret in found if secret)


class RedactingFilter(logging.Filter):
    """Rewrites log records so that no credential gets out. Add it to handlers: a logger's filter misses children."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = redact(record.getMessage())
        record.args = ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


def _spellings(secret: str) -> set[str]:
    # One or two letters would blank out half of any sentence.
    decoded = unquote(secret)
    spellings = {secret, decoded, quote(decoded, safe=""), quote(decoded), quote_plus(decoded)}
    return {spelling for spelling in spellings if len(spelling) >= 3}
