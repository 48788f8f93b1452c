"""Converted networks, kept between runs so that a start takes a second instead of ten.

An entry is a folder named by the hash of everything that it depends on, with a manifest of its files' digests. It is
written aside and renamed, so it is whole or not there. A cache that cannot be used costs time and never a frame: it is
warned of once, counted, and done without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("dspfusion.engines")

MANIFEST = "manifest.json"
ENTRIES_KEPT = 24  # the oldest go; nano takes 5 MB an entry, base 60 MB


def cache_folder() -> Path:
    """Where engines are kept: $DSPFUSION_CACHE, $XDG_CACHE_HOME/dspfusion or ~/.cache/dspfusion, then `engines`."""
    if own := os.environ.get("DSPFUSION_CACHE"):
        return Path(own).expanduser() / "engines"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache") / "dspfusion" / "engines"


def cache_key(**parts: object) -> str:
    """The name of the entry that depends on these parts: 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def processor_fingerprint() -> str:
    """What the processor can do, as one short hash; compiled engines do not move between different ones."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        abilities = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        import platform

        abilities = " ".join((platform.system(), platform.machine(), platform.processor()))
    return hashlib.sha256(abilities.encode()).hexdigest()[:16]


class EngineCache:
    """Folders of files by key. Safe for several threads and processes; never raises for a cache that is unfit."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() if folder is None else folder
        self.faults: list[str] = []  # what went wrong, in order
        self._warned = False
        self._lock = threading.Lock()

    def find(self, key: str) -> Path | None:
        """The folder of a whole entry, its digests checked; None if there is none. A damaged one is removed."""
        entry = self.folder / key
        try:
            if not entry.is_dir():
                return None
            self._refuse_foreign(self.folder)
            digests = json.loads((entry / MANIFEST).read_text())
            damaged = [name for name, digest in digests["files"].items() if _digest(entry / name) != digest]
            if damaged:
                raise ValueError(f"{', '.join(damaged)} changed since it was written")
            os.utime(entry)  # the oldest by use are removed first
            return entry
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            self.report(f"entry {key[:8]} is damaged and is made again ({error})")
            shutil.rmtree(entry, ignore_errors=True)
            return None

    def store(self, key: str, write: Callable[[Path], None]) -> Path | None:
        """Lets `write` fill a new folder and makes it the entry of `key`; None if that cannot be done here."""
        aside: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._refuse_foreign(self.folder)
            aside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))  # mkdtemp: mode 0700
            write(aside)
            files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
            (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
            entry = self.folder / key
            shutil.rmtree(entry, ignore_errors=True)
            aside.rename(entry)
            self._prune()
            return entry
        except (OSError, RuntimeError) as error:
            if (self.folder / key / MANIFEST).is_file():
                return self.folder / key  # another process was faster
            self.report(f"{self.folder} cannot be written ({error})")
            return None
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)

    def report(self, fault: str) -> None:
        """Counts a fault, and warns of the first one."""
        with self._lock:
            self.faults.append(fault)
            first, self._warned = not self._warned, True
        if first:
            log.warning("engine cache: %s; starts are slower until this is mended", fault)

    def _prune(self) -> None:
        entries = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".new-")]
        for old in sorted(entries, key=lambda path: path.stat().st_mtime)[:-ENTRIES_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _refuse_foreign(folder: Path) -> None:
        """What is loaded here is executed in the end: nobody else may be able to write it."""
        if not hasattr(os, "getuid"):
            return
        status = folder.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user: set DSPFUSION_CACHE to a folder of your own")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others may write to {folder}: make it yours with chmod 700")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
