"""What GPU there is and which runtimes can use it, asked in another process.

A driver, a CUDA build and TensorRT's libraries that do not fit one another end in anything from a bare Exception to a
crash. So they are loaded in a process of their own first, one step after another, and the step at which it ended is
the reason that people read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

TIMEOUT_S = 120.0  # CUDA's first start on a cold disk takes half a minute

# torch-tensorrt, torch and TensorRT only work in these sets; each wheel names its own.
PARTNERS: dict[str, tuple[str, str]] = {
    "2.11": ("10.15.1", "10.16"),
    "2.12": ("10.16.1", "10.17"),
    "2.13": ("11.0", "11.1"),
    "2.14": ("11.1", "11.2"),
}

_QUESTION = """
import json
def say(**found): print(json.dumps(found), flush=True)
say(step="importing torch")
import torch
say(torch=torch.__version__, cuda=torch.version.cuda, step="starting CUDA")
if torch.version.cuda and torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    say(gpu=torch.cuda.get_device_name(0), capability=list(torch.cuda.get_device_capability(0)),
        memory_mb=total >> 20, free_mb=free >> 20)
    (torch.ones(8, device="cuda") * 2).sum().item()
    say(computes=True)
if {tensorrt}:
    say(step="importing torch_tensorrt")
    import torch_tensorrt
    say(torch_tensorrt=torch_tensorrt.__version__, step="importing tensorrt")
    import tensorrt
    say(tensorrt=tensorrt.__version__)
say(step="done")
"""


@dataclass(frozen=True)
class Probe:
    """What was found. A reason of None means that nothing speaks against the runtime."""

    gpu: str | None = None
    capability: tuple[int, int] | None = None
    memory_mb: int | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    no_gpu: str | None = None  # why no runtime can use a GPU
    no_tensorrt: str | None = None  # why TensorRT cannot serve, where a GPU can


def nvidia_driver_present() -> bool:
    """Whether an NVIDIA driver is loaded (Linux, and Linux inside Windows)."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def refusal(runtime: str) -> str | None:
    """Why a GPU runtime ("tensorrt" or "compile") does not serve here; None if it may be tried."""
    if not nvidia_driver_present():
        return "it needs an NVIDIA GPU, and this machine has none (or no driver for it)"
    if runtime == "tensorrt" and (reason := partners_refusal()) is not None:
        return reason
    found = probe(runtime == "tensorrt")
    return found.no_gpu or (found.no_tensorrt if runtime == "tensorrt" else None)


def partners_refusal() -> str | None:
    """Why the installed versions of TensorRT's partners cannot work together, read without loading any."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "torch_tensorrt is not installed: install the extra 'tensorrt'"
    versions = partner_versions()
    torch, torch_tensorrt = _minor(versions["torch"]), _minor(versions["torch-tensorrt"])
    if torch_tensorrt is None:
        return "torch_tensorrt lies there without its metadata: install the extra 'tensorrt' again"
    if torch_tensorrt not in PARTNERS:
        return (
            f"torch-tensorrt {versions['torch-tensorrt']} is not one of the versions that this product knows "
            f"({', '.join(PARTNERS)}): install the extra 'tensorrt'"
        )
    if torch != torch_tensorrt:
        return (
            f"torch-tensorrt {versions['torch-tensorrt']} needs torch {torch_tensorrt}, but torch {versions['torch']} "
            "is installed: install both in one minor version"
        )
    lowest, below = PARTNERS[torch_tensorrt]
    found = versions["tensorrt"]
    if found is None:
        return f"TensorRT is not installed: torch-tensorrt {torch_tensorrt} needs tensorrt >={lowest},<{below}"
    if not _numbers(lowest) <= _numbers(found) < _numbers(below):
        return f"torch-tensorrt {torch_tensorrt} needs tensorrt >={lowest},<{below}, but {found} is installed"
    return None


def partner_versions() -> dict[str, str | None]:
    """The installed versions of the packages that must fit; None where one is missing."""
    # TensorRT's main package is only a name for the one that belongs to a CUDA version.
    tensorrt = next(
        (v for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings") if (v := _version(name))), None
    )
    return {"torch": _version("torch"), "torch-tensorrt": _version("torch-tensorrt"), "tensorrt": tensorrt}


@cache
def probe(tensorrt: bool) -> Probe:
    """Asks another process, once: it loads torch and CUDA, and if `tensorrt` also that."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _QUESTION.replace("{tensorrt}", str(tensorrt))],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return _read(_found(error.stdout), f"took longer than {TIMEOUT_S:g} s")
    except OSError as error:
        return Probe(no_gpu=f"the GPU could not be probed ({error.strerror})")
    return _read(_found(answer.stdout), _ending(answer.returncode, answer.stderr))


def _found(output: str | bytes | None) -> dict[str, Any]:
    """What the probe said before it ended; libraries print between its lines."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.update(json.loads(line))
            except ValueError:
                continue
    return found


def _ending(status: int, errors: str) -> str | None:
    if status == 0:
        return None
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"crashed ({name})"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"failed ({lines[-1][:200]})" if lines else f"failed with status {status}"


def _read(found: dict[str, Any], ending: str | None) -> Probe:
    step = str(found.get("step", "starting Python"))
    at_tensorrt = "tensorrt" in step
    no_gpu = None
    if not found.get("computes"):
        if found.get("torch") and not found.get("cuda"):
            no_gpu = f"the installed PyTorch ({found['torch']}) has no CUDA: install its CUDA build"
        elif found.get("gpu") is None and (ending is None or at_tensorrt):
            no_gpu = "PyTorch finds no GPU that it can use: look at `nvidia-smi` and the driver's version"
        else:
            no_gpu = f"{step} {ending or 'ended early'}: the driver and PyTorch's CUDA build may not fit"
    no_tensorrt = None
    if at_tensorrt:
        no_tensorrt = f"{step} {ending or 'ended early'}: install the extra 'tensorrt' again, in one minor version"
    capability = found.get("capability")
    return Probe(
        gpu=found.get("gpu"),
        capability=(int(capability[0]), int(capability[1])) if capability else None,
        memory_mb=found.get("memory_mb"),
        cuda=found.get("cuda"),
        tensorrt=found.get("tensorrt"),
        no_gpu=no_gpu,
        no_tensorrt=no_tensorrt,
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str | None) -> str | None:
    return None if version is None else ".".join(version.split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    """11.0.0.114 -> (11, 0, 0, 114); what is no number ends it."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
