"""The command line, called within the test's own process."""

from __future__ import annotations

import sys

import pytest

from pipeline import cli


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Runs `dspfusion ARGUMENTS` in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["dspfusion", *arguments])
    monkeypatch.setattr(cli, "leave", lambda status, _: sys.exit(status))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err
