"""Files that a training leaves behind: whole or not at all, and never taken for those of another training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.base import EngineError
from engines.training.config import FREE_TO_CHANGE, TrainConfig

KEYS = ("network", "average", "optimizer", "stage", "done", "spent_s", "recent", "variant", "processes", "config")
# Options that came later, and the value that stands for what was done without them: checkpoints may not know them yet.
LATER_OPTIONS: dict[str, Any] = {
    "balance": 0,
    "draw": {"camera_share": 0, "coded_share": 0, "colour_share": 0, "dim_share": 0},
}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and moves it there: an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a training's state, with the `TrainConfig.binding` that it is tied to as its `config`."""
    write_whole(path, lambda partial: torch.save(state, partial))


def read_checkpoint(path: Path, config: TrainConfig) -> dict[str, Any]:
    """The state to go on from, on the CPU.

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
    changed = differing(_completed(state["config"]), config.binding())
    if changed:
        raise EngineError(
            f"{path} was trained with another configuration ({', '.join(changed)}): "
            "set it back, or begin anew without --resume, with its weights as `start`"
        )
    return state


def _completed(binding: dict[str, Any]) -> dict[str, Any]:
    """What an older version bound a checkpoint to, in the words of this one."""
    bound = {key: value for key, value in binding.items() if key not in FREE_TO_CHANGE}
    return LATER_OPTIONS | bound | {"draw": LATER_OPTIONS["draw"] | bound["draw"]}


def differing(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what is said differently; what one of them does not know counts as None."""
    names = []
    for key in sorted(before.keys() | now.keys()):
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            names += differing(was, is_now, f"{prefix}{key}.")
        elif was != is_now:
            names.append(f"{prefix}{key}: {was} then, {is_now} now")
    return names


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
