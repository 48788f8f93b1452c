"""Files that a training leaves behind: whole or not at all, and never taken for those of another training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.base import EngineError
from engines.training.config import STAGES, TrainConfig

KEYS = ("network", "average", "optimizer", "stage", "done", "spent_s", "recent", "variant")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and moves it there: an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_checkpoint(path: Path, state: dict[str, Any], config: TrainConfig) -> None:
    """Writes a training's state together with the configuration that it is tied to."""
    write_whole(path, lambda partial: torch.save(state | {"config": config.binding()}, partial))


def read_checkpoint(path: Path, config: TrainConfig) -> dict[str, Any]:
    """The state to go on from, on the CPU. Checkpoints of three stages are read as if the fourth had not begun.

    Raises:
        EngineError: there is none, it is damaged, or it belongs to another training.
    """
    if not path.is_file():
        raise EngineError(f"there is no checkpoint {path} to resume from: start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in many ways
        raise EngineError(f"{path} is damaged ({_short(error)}): start without --resume") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise EngineError(f"{path} is no checkpoint of a training: name the folder of one in `output`")
    if state["variant"] != config.variant:
        raise EngineError(f"{path} is a checkpoint of '{state['variant']}', not of '{config.variant}'")
    changed = differing(state.get("config", {}), config.binding())
    if changed:
        raise EngineError(
            f"{path} was trained with another configuration ({', '.join(changed)}): "
            "set it back, or name another folder in `output` and begin with `start`"
        )
    for key in ("done", "spent_s"):
        state[key] = [*state[key], *[0] * (STAGES - len(state[key]))]
    return state


def differing(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what both know and say differently."""
    names = []
    for key in sorted(before.keys() & now.keys()):
        if isinstance(before[key], dict) and isinstance(now[key], dict):
            names += differing(before[key], now[key], f"{prefix}{key}.")
        elif before[key] != now[key]:
            names.append(f"{prefix}{key}: {before[key]} then, {now[key]} now")
    return names


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
