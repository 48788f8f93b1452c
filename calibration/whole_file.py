"""Files that appear whole or not at all: written beside their place, and given their name when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def part_of(path: Path) -> Path:
    """Where to write a file until it is whole; another place each time, for two writers may have one target."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives the place to write to, which becomes `path` at the end; after an error nothing is left of it.

    A link stays, and what it points to is replaced. A pipe or a device is written to as it is.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    part = part_of(target)
    try:
        yield part
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file that took its maker a while: its folder is made, and a loss of power leaves the old one or the new.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if part != path:  # a pipe keeps nothing
            os.fsync(file.fileno())
