"""Looks at this machine as the pipeline will see it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at. "note" restricts what is possible; "bad" must be mended before a rig can run."""

    what: str
    state: Literal["ok", "note", "bad"]
    found: str


def examine() -> list[Finding]:
    """All findings, in the order of the data flow."""
    return [
        _python(),
        _processor(),
        *_packages(),
        _decoding(),
        _encoding(),
        *_gpu(),
        _openvino(),
        _cache(),
        *_engines(),
    ]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "bad", f"{platform.python_version()} (3.11 or newer is needed)")


def _processor() -> Finding:
    from engines.openvino_engine import usable_cores

    cores = usable_cores()
    return Finding("processor", "ok" if cores >= 2 else "note", f"{cores} cores (2 carry a 640x480 rig at 25 Hz)")


def _packages() -> list[Finding]:
    findings = []
    for name in ("torch", "openvino", "av", "opencv-python-headless", "pyzmq"):
        try:
            findings.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "bad", "not installed: run `make demo`, or pip install dspfusion-rt"))
    if _installed("opencv-python"):
        findings.append(Finding("opencv-python", "note", "installed beside the headless build: remove one of the two"))
    return findings


def _decoding() -> Finding:
    return _codec("h264 decoder", "h264", "r")


def _encoding() -> Finding:
    return _codec("h264 encoder", "libx264", "w")


def _codec(what: str, name: str, mode: Literal["r", "w"]) -> Finding:
    import av

    try:
        av.Codec(name, mode)
    except Exception:
        return Finding(what, "bad", f"this build of PyAV lacks {name}: install av from its wheel")
    return Finding(what, "ok", name)


def _gpu() -> list[Finding]:
    """The GPU, the packages that must fit one another to use it, and whether each runtime could, or why not."""
    from engines.gpu_probe import PARTNERS, nvidia_driver_present, partner_versions, probe, refusal

    versions = partner_versions()
    told = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    minor = ".".join((versions["torch"] or "").split(".")[:2])
    lowest, below = PARTNERS.get(minor, (None, None))
    needs = (
        f"torch {minor} goes with torch-tensorrt {minor} and tensorrt >={lowest},<{below}"
        if lowest
        else (f"no torch-tensorrt is known for torch {minor or '(absent)'}: those for {', '.join(PARTNERS)} are")
    )
    if not nvidia_driver_present():
        none = "none seen: nano runs on the processor; base needs a GPU for real time"
        return [Finding("nvidia gpu", "note", none), Finding("tensorrt", "note", f"not of use here; {told}; {needs}")]
    found = probe(False)
    gpu = found.no_gpu or f"{found.gpu}, {found.memory_mb} MB, CUDA {found.cuda}"
    findings = [Finding("nvidia gpu", "note" if found.no_gpu else "ok", gpu)]
    for runtime in ("tensorrt", "compile"):
        reason = refusal(runtime)
        more = f"{told}; {needs}" if runtime == "tensorrt" else f"torch {versions['torch']}"
        state: Literal["ok", "note"] = "ok" if reason is None else "note"
        findings.append(Finding(runtime, state, f"can be used ({more})" if reason is None else f"{reason} ({more})"))
    return findings


def _openvino() -> Finding:
    from engines.base import EngineError
    from engines.openvino_engine import default_threads, import_openvino, usable_cores

    try:
        core = import_openvino().Core()
        precisions = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (EngineError, RuntimeError) as error:
        return Finding("openvino engine", "bad", " ".join(str(error).split())[:200])
    half = "bf16" if "BF16" in precisions else "no bf16"
    return Finding("openvino engine", "ok", f"{half}; {default_threads()} threads of {usable_cores()} cores")


def _cache() -> Finding:
    from engines.cache import cache_folder, private_folder

    folder = cache_folder()
    try:
        private_folder(folder)
        entries = [path for path in folder.iterdir() if path.is_dir()]
    except OSError as error:
        return Finding("engine cache", "note", f"{error}: starts are slower without it")
    megabytes = sum(file.stat().st_size for entry in entries for file in entry.glob("*")) / 2**20
    return Finding("engine cache", "ok", f"{folder}: {len(entries)} entries, {megabytes:.0f} MB")


def _engines() -> list[Finding]:
    from engines.base import EngineError, fallbacks_of
    from engines.dspfusion.variants import VARIANTS, default_weights
    from engines.selection import create_engine

    shipped = [name for name in VARIANTS if default_weights(name).is_file()]
    findings = [Finding("weights", "ok" if "nano" in shipped else "bad", ", ".join(shipped) or "none")]
    if "nano" in shipped:
        try:
            engine = create_engine(variant="nano")
        except EngineError as error:
            return [*findings, Finding("engine", "bad", str(error))]
        description, fallbacks = engine.description, fallbacks_of(engine)
        psnr_db = getattr(engine, "psnr_db", float("inf"))
        engine.close()
        found = f"{description.runtime}, {description.precision}: {description.why}; {psnr_db:.0f} dB against PyTorch"
        findings.append(Finding("engine", "note" if fallbacks else "ok", found))
        findings += [Finding("fallback", "note", line) for line in fallbacks]
    return findings


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
