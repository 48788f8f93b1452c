"""Looks at this machine as the pipeline will see it."""

from __future__ import annotations

import importlib.metadata
import os
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
    return [_python(), _processor(), *_packages(), _decoding(), _encoding(), _gpu(), *_engines()]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "bad", f"{platform.python_version()} (3.11 or newer is needed)")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("nvidia gpu", "note", "none seen: nano runs on the processor; base needs a GPU for real time")
    tensorrt = f"torch-tensorrt {_installed('torch-tensorrt')}" if _installed("torch-tensorrt") else "no torch-tensorrt"
    return Finding("nvidia gpu", "ok", f"{torch.cuda.get_device_name(0)}, {tensorrt}")


def _engines() -> list[Finding]:
    from engines.base import EngineError
    from engines.dspfusion.variants import VARIANTS, default_weights
    from engines.selection import create_engine

    shipped = [name for name in VARIANTS if default_weights(name).is_file()]
    findings = [Finding("weights", "ok" if "nano" in shipped else "bad", ", ".join(shipped) or "none")]
    if "nano" in shipped:
        try:
            engine = create_engine(variant="nano")
        except EngineError as error:
            return [*findings, Finding("engine", "bad", str(error))]
        description = engine.description
        engine.close()
        found = f"{description.runtime}, {description.precision}: {description.why}"
        findings.append(Finding("engine", "note" if description.fallbacks else "ok", found))
    return findings


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
