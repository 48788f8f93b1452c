"""The engine cache: only what is whole and our own is read, and nothing that goes wrong with it stops a start."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engines import cache as cache_module
from engines.base import fallbacks_of
from engines.cache import EngineCache, cache_folder, cache_key
from tests.rigs.engines import MaximumEngine

owners = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no file owners")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def store(cache: EngineCache, key: str = "key", content: str = "an engine") -> Path:
    entry = cache.store(key, lambda folder: (folder / "engine").write_text(content) and None)
    assert entry is not None
    return entry


def test_the_cache_is_the_owners_alone(tmp_path):
    cache = EngineCache(tmp_path / "engines")
    entry = cache.store("key", lambda folder: (folder / "a").write_text("b") and None)
    assert entry is not None
    assert cache.find("key") == entry
    assert (cache.folder.stat().st_mode & 0o777, entry.stat().st_mode & 0o777) == (0o700, 0o700)
    cache.folder.chmod(0o777)
    assert cache.find("key") is None
    assert "others may write" in cache.faults[0]


def test_a_cache_entry_that_fails_half_way_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("done")
        raise OSError("disk full")

    cache = EngineCache(tmp_path / "engines")
    assert cache.store("key", fail) is None
    assert list(cache.folder.iterdir()) == []


def test_the_cache_key_changes_with_every_part():
    parts = {"weights": "a", "size": (1, 2), "precision": "fp32"}
    keys = {cache_key(**parts)} | {cache_key(**{**parts, name: "other"}) for name in parts}
    assert len(keys) == 4
    assert cache_key(**parts) == cache_key(**dict(reversed(parts.items())))


def test_a_truncated_entry_is_removed_and_counted(cache):
    entry = store(cache)
    (entry / "engine").write_text("an eng")
    assert cache.find("key") is None
    assert not entry.exists()
    assert "damaged and is made again" in cache.faults[0]
    assert cache.find(store(cache).name) == entry


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": {}}', '{"files": {"missing": "0"}}', "\0"])
def test_an_entry_with_a_broken_manifest_is_removed_and_counted(cache, manifest):
    entry = store(cache)
    (entry / "manifest.json").write_text(manifest)
    assert cache.find("key") is None
    assert (entry.exists(), len(cache.faults)) == (False, 1)


@owners
def test_an_entry_under_the_name_of_another_one_is_not_read(cache):
    store(cache, "key").rename(cache.folder / "other")
    assert cache.find("other") is None
    assert "made for another key" in cache.faults[0]


@pytest.mark.parametrize("which", ["engines", "engines/key", "engines/key/engine", "engines/key/manifest.json"])
def test_what_others_may_write_is_neither_read_nor_removed(cache, tmp_path, which):
    entry = store(cache)
    (tmp_path / which).chmod(0o777)
    assert cache.find("key") is None
    assert "others may write" in cache.faults[0]
    assert (entry / "engine").read_text() == "an engine"


@owners
def test_what_another_user_owns_is_not_read(cache, monkeypatch):
    store(cache)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert cache.find("key") is None
    assert "belongs to another user" in cache.faults[0]


@owners
def test_a_link_to_somewhere_else_is_not_followed(cache, tmp_path):
    entry = store(cache)
    (tmp_path / "foreign").write_text("an engine")
    (entry / "engine").unlink()
    (entry / "engine").symlink_to(tmp_path / "foreign")
    assert cache.find("key") is None
    assert "no plain file" in cache.faults[0]


def test_a_folder_that_cannot_be_made_is_warned_of_once_and_every_fault_reaches_the_report(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    engine = MaximumEngine()
    engine.cache = EngineCache(tmp_path / "file" / "engines")
    with caplog.at_level(logging.WARNING, "dspfusion.engines"):
        for key in ("one", "two"):
            with engine.cache.building(key):
                assert engine.cache.find(key) is None
                assert engine.cache.store(key, lambda folder: None) is None
    assert len(caplog.records) == 1
    assert len(fallbacks_of(engine)) == 2
    assert all(line.startswith("engine cache: ") and "cannot be written" in line for line in fallbacks_of(engine))


def test_a_full_disk_leaves_the_older_entries(cache):
    store(cache, "old")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    assert cache.store("new", fail) is None
    assert "No space left" in cache.faults[0]
    assert cache.find("old") is not None
    assert {path.name for path in cache.folder.iterdir()} == {"old"}


def test_the_oldest_entries_by_use_go_first(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "ENTRIES_KEPT", 2)
    for age, key in enumerate(("one", "two")):
        os.utime(store(cache, key), (100 + age, 100 + age))
    assert cache.find("one") is not None  # used now
    store(cache, "three")
    assert (cache.find("one") is not None, cache.find("two")) == (True, None)


def test_leftovers_of_a_killed_build_are_removed_after_a_day(cache):
    store(cache)
    for name, age_s in ((".new-old", 2e5), (".new-young", 10), (".lock-old", 2e5)):
        path = cache.folder / name
        path.mkdir() if name.startswith(".new") else path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    store(cache, "another")
    assert {path.name for path in cache.folder.iterdir()} == {"key", "another", ".new-young"}


BUILDER = """
import sys, time
from pathlib import Path
from engines.cache import EngineCache
cache = EngineCache(Path(sys.argv[1]))
with cache.building("key"):
    found = cache.find("key")
    if found is None:
        def write(folder):
            time.sleep(0.5)
            (folder / "engine").write_text("an engine")
        assert cache.store("key", write)
        print("built", cache.faults)
    else:
        print("found", cache.faults)
"""


def test_of_two_processes_that_need_an_engine_one_builds_it(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "engines")]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=root) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in both]
    assert sorted(out.strip() for out, _ in answers) == ["built []", "found []"], answers


def test_a_lock_is_free_again_when_its_process_was_killed(tmp_path):
    holder = (
        "import sys, time\nfrom pathlib import Path\nfrom engines.cache import EngineCache\n"
        "with EngineCache(Path(sys.argv[1])).building('key'):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "engines")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    cache = EngineCache(tmp_path / "engines")
    with cache.building("key", patience_s=0.1):
        assert "may be built twice" in cache.faults[0]  # waited, and went on without it
    process.kill()
    process.wait(10)
    process.stdout.close()
    with cache.building("key", patience_s=5):
        assert len(cache.faults) == 1


def test_threads_that_store_and_read_one_key_never_meet_half_an_entry(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "SWAP_PATIENCE_S", 60.0)  # a slow disk is not what this is about
    store(cache, "key")
    found: list[Path | None] = []

    def both() -> None:
        for _ in range(20):
            store(cache, "key")
            found.append(cache.find("key"))

    threads = [threading.Thread(target=both) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [cache.folder / "key"] * 120
    assert cache.faults == []
    assert [path.name for path in cache.folder.iterdir()] == ["key"]


def test_where_the_disk_locks_nothing_nobody_waits_for_the_lock(cache, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # what a network disk says of a folder

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(cache_module, "SWAP_PATIENCE_S", 3600.0)
    entry = store(cache)
    assert cache.find("key") == entry
    with cache.building("key", patience_s=3600.0):
        assert len(cache.faults) == 1


def test_the_folder_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DSPFUSION_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "engines"
    monkeypatch.delenv("DSPFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dspfusion" / "engines"


def nobodys_home(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """A user with neither HOME nor an entry in the list of users."""
    for variable in ("DSPFUSION_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    monkeypatch.setattr("tempfile.tempdir", str(temporary))


@owners
def test_without_a_home_folder_engines_are_kept_in_the_temporary_one_and_that_is_counted(monkeypatch, tmp_path, caplog):
    nobodys_home(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING, "dspfusion.engines"):
        cache = EngineCache()
    assert cache.folder == tmp_path / f"dspfusion-{os.getuid()}" / "engines"
    assert len(caplog.records) == len(cache.faults) == 1
    assert "no home folder" in cache.faults[0]
    assert "set DSPFUSION_CACHE" in cache.faults[0]
    entry = store(cache)
    assert EngineCache().find("key") == entry


@owners
def test_a_temporary_folder_that_somebody_else_made_first_is_not_used(monkeypatch, tmp_path):
    nobodys_home(monkeypatch, tmp_path)
    cache = EngineCache()
    store(cache)
    cache.folder.parent.chmod(0o777)
    assert cache.find("key") is None
    assert cache.store("other", lambda folder: None) is None
    assert "others may write" in cache.faults[1]


@pytest.mark.parametrize("variable", ["DSPFUSION_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_folder_named_by_a_tilde_is_never_made_where_the_user_stands(monkeypatch, tmp_path, variable):
    nobodys_home(monkeypatch, tmp_path)
    monkeypatch.setenv(variable, "~nobody-of-this-name/cache")
    assert cache_folder().is_relative_to(tmp_path)
    monkeypatch.setenv(variable, "")
    assert cache_folder().is_relative_to(tmp_path)
