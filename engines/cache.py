"""Converted networks, kept between runs so that a start takes a second instead of ten.

An entry is a folder named by the hash of everything that it depends on, with a manifest of its files' digests. It is
written aside and renamed, so it is whole or not there, and one process at a time builds it. What is kept here is run in
the end (an engine file is a program), so nothing is read that anybody else could have written. A cache that cannot be
used costs time and never a frame: it is warned of once, counted, and done without.
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
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

log = logging.getLogger("dspfusion.engines")

MANIFEST = "manifest.json"
ENTRIES_KEPT = 48  # the oldest go; nano takes 5 MB an entry, base 60 MB
BUILD_PATIENCE_S = 900.0  # for another process that builds the same engine; TensorRT takes minutes
SWAP_PATIENCE_S = 10.0  # for another one that looks at an entry or replaces it: milliseconds, on a slow disk a second
LEFTOVER_S = 86400.0  # what a killed build left behind is removed after a day
_NEW, _LOCK = ".new-", ".lock-"


class ForeignFileError(PermissionError):
    """A file or folder that somebody else owns or may write: it is never read."""


def cache_folder() -> Path:
    """Where engines are kept: $DSPFUSION_CACHE, $XDG_CACHE_HOME/dspfusion or ~/.cache/dspfusion, then `engines`.

    A user without a home folder (a bare container's, a service's) gets one of his own below the temporary folder.
    """
    return (_lasting_folder() or _temporary_folder()) / "engines"


def _lasting_folder() -> Path | None:
    """None for a user whose home folder nobody knows. A variable that is empty counts as not set."""
    for given, below in (
        (os.environ.get("DSPFUSION_CACHE"), ""),
        (os.environ.get("XDG_CACHE_HOME"), "dspfusion"),
        (os.environ.get("HOME", "~"), ".cache/dspfusion"),
    ):
        if given:
            # Path.expanduser would raise where there is no home; this leaves the tilde there.
            folder = os.path.expanduser(given)
            return None if folder.startswith("~") else Path(folder) / below
    return None


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"dspfusion-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


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


def source_sha256(*more: Path) -> str:
    """The network's code as one hash: it is part of what is converted. `more` names a runtime's own files."""
    digest = hashlib.sha256()
    engines = Path(__file__).resolve().parent
    for path in (*sorted((engines / "dspfusion").glob("*.py")), engines / "pytorch_engine.py", *more):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def private_folder(folder: Path) -> Path:
    """Makes a folder that only this user may enter.

    Raises:
        ForeignFileError: it is there, and others own it or may write to it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_foreign(folder)
    return folder


def refuse_foreign(path: Path) -> None:
    """Makes sure that nobody but this user (or the system's administrator) can have written a file or folder.

    Raises:
        ForeignFileError: others own it or may write it, or it is a link to somewhere else.
        OSError: it cannot be looked at.
    """
    if not hasattr(os, "getuid"):
        return
    if path.parent == _temporary_folder():  # everybody can foresee its name, and make it first
        refuse_foreign(path.parent)
    status = path.lstat()
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        raise ForeignFileError(f"{path} is no plain file or folder: set DSPFUSION_CACHE to a folder of your own")
    if status.st_uid != os.getuid():
        raise ForeignFileError(f"{path} belongs to another user: set DSPFUSION_CACHE to a folder of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ForeignFileError(f"others may write to {path}: make it yours with chmod -R go-w")


class EngineCache:
    """Folders of files by key. Safe for several threads and processes; never raises for a cache that is unfit."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() if folder is None else folder
        self.faults: list[str] = []  # what went wrong, in order
        self._warned = False
        self._lock = threading.Lock()
        if folder is None and _lasting_folder() is None:
            self.report(f"this user has no home folder, so engines are kept in {self.folder}: set DSPFUSION_CACHE")

    def find(self, key: str) -> Path | None:
        """The folder of a whole entry, its owner and its digests checked; None if there is none.

        A damaged entry is removed. A foreign one is left where it is, and not read.
        """
        if not os.path.isdir(self.folder):  # unlike Path, this raises nothing where a folder above may not be entered
            return None
        with self._swapping():
            return self._whole(self.folder / key)

    def _whole(self, entry: Path) -> Path | None:
        try:
            if not entry.is_dir():
                return None
            for path in (self.folder, entry, entry / MANIFEST):
                refuse_foreign(path)
            manifest = json.loads((entry / MANIFEST).read_text())
            if manifest.get("key") != entry.name:
                raise ValueError("it was made for another key, or by an earlier version")
            files = manifest["files"]
            for name in files:
                refuse_foreign(entry / name)
            damaged = [name for name, digest in files.items() if _digest(entry / name) != digest]
            if damaged or not files:
                raise ValueError(f"{', '.join(damaged) or MANIFEST} changed since it was written")
            os.utime(entry)  # the oldest by use are removed first
            return entry
        except ForeignFileError as error:
            self.report(f"entry {entry.name[:8]} is not read ({error})")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            self.report(f"entry {entry.name[:8]} is damaged and is made again ({error})")
            shutil.rmtree(entry, ignore_errors=True)
        return None

    def store(self, key: str, write: Callable[[Path], None]) -> Path | None:
        """Lets `write` fill a new folder and makes it the entry of `key`; None if that cannot be done here."""
        aside: Path | None = None
        try:
            private_folder(self.folder)
            aside = Path(tempfile.mkdtemp(prefix=_NEW, dir=self.folder))  # mkdtemp: mode 0700
            write(aside)
            files = {}
            for path in sorted(aside.iterdir()):
                path.chmod(0o600)
                files[path.name] = _digest(path)
            (aside / MANIFEST).write_text(json.dumps({"key": key, "files": files}, indent=1))
            (aside / MANIFEST).chmod(0o600)
            entry = self.folder / key
            with self._swapping():
                if entry.exists():
                    refuse_foreign(entry)
                    shutil.rmtree(entry, ignore_errors=True)
                aside.rename(entry)
                self._prune()
            return entry
        except ForeignFileError as error:
            self.report(f"{self.folder} is not used ({error})")
        except (OSError, RuntimeError) as error:
            self.report(f"{self.folder} cannot be written ({error})")
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
        return None

    @contextmanager
    def building(self, key: str, patience_s: float = BUILD_PATIENCE_S) -> Iterator[None]:
        """While one process (or thread) is inside for a key, others wait, and then find what it built.

        Where that cannot be arranged, or after `patience_s`, both build: `store` keeps a whole entry in any case.
        """
        with _locked(self._lock_file(key), patience_s) as alone:
            if not alone:
                self.report(f"the lock of entry {key[:8]} cannot be had: it may be built twice")
            yield

    def report(self, fault: str) -> None:
        """Counts a fault, and warns of the first one."""
        with self._lock:
            self.faults.append(fault)
            first, self._warned = not self._warned, True
        if first:
            log.warning("engine cache: %s; starts are slower until this is mended", fault)

    def _swapping(self) -> AbstractContextManager[bool]:
        """Held while an entry is looked at or changes places: a folder cannot be replaced in one step.

        The lock is the folder's own, so that a cache that may only be read needs no file for it.
        """
        return _locked(self.folder, SWAP_PATIENCE_S)

    def _lock_file(self, key: str) -> Path | None:
        try:
            return private_folder(self.folder) / f"{_LOCK}{key}"
        except OSError:
            return None  # what is wrong with the folder is reported when the entry is stored

    def _prune(self) -> None:
        entries: list[tuple[float, Path]] = []
        for path in self.folder.iterdir():
            try:
                used = path.stat().st_mtime
            except OSError:
                continue  # another process removed it
            if path.name.startswith((_NEW, _LOCK)):
                if used < time.time() - LEFTOVER_S:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            elif path.is_dir():
                entries.append((used, path))
        for _, old in sorted(entries)[:-ENTRIES_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(path: Path | None, patience_s: float) -> Iterator[bool]:
    """Holds an exclusive lock on a file or folder; False if it was not to be had. A process that dies frees it."""
    try:
        import fcntl
    except ImportError:  # Windows: engines are built twice there at worst
        yield True
        return
    if path is None:
        yield True
        return
    try:
        access = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, access | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        deadline, alone = time.monotonic() + patience_s, False
        while not alone:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.01)
            except OSError:  # a network disk that locks no folders: waiting would not help
                break
        yield alone
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
