"""What a training tells: lines or a bar on the terminal, log.jsonl always, TensorBoard where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, track

from engines.training.checkpoint import write_whole
from engines.training.data import Drawn

LOG = "log.jsonl"
PICTURES = "pictures"
BOARD = "tensorboard"


class Journal:
    """Writes into `folder` once it is opened; None writes and says nothing (every process but the first)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.console = Console(stderr=True, quiet=folder is None, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._board: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, step: int = 0) -> None:
        """Goes on after `step` iterations: what was logged later is dropped, it will come again."""
        if self.folder is None:
            return
        _keep_until(self.folder / LOG, step)
        if find_spec("tensorboard") is None:
            self.say(f"TensorBoard is not installed: the journal is {self.folder / LOG} alone")
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / BOARD), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def say(self, line: str) -> None:
        """A line for people."""
        self.console.print(line, markup=False)

    def reading(self, items: Iterable[Drawn], number: int, what: str) -> Iterator[Drawn]:
        """Passes items on, with a bar on a terminal."""
        yield from track(items, what, number, console=self.console, disable=not self.console.is_terminal)

    def advance(self, stage: str, progress: float, losses: dict[str, float]) -> None:
        """Moves the bar of a stage; there is none where the output is no terminal."""
        if not self.console.is_terminal:
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:5.1f} %"))
            more = (TimeElapsedColumn(), TextColumn("{task.fields[losses]}"))
            self._bar = Progress(*columns, *more, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, losses="")
        assert self._task is not None
        shown = "  ".join(f"{name} {value:.3f}" for name, value in list(losses.items())[:3])
        self._bar.update(self._task, description=f"stage {stage}", completed=progress, losses=shown)

    def note(self, what: str, stage: str, iteration: int, step: int, minutes: float, values: dict[str, float]) -> None:
        """Logs numbers.

        Args:
            what: train, validation or priors.
            stage: I to IV.
            iteration: of this stage.
            step: iterations of all stages so far.
            minutes: of all stages so far.
        """
        if self.folder is None:
            return
        row = {"what": what, "stage": stage, "iteration": iteration, "step": step, "minutes": round(minutes, 3)}
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(row | values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{what}/{name}", value, step)
        if what != "train" or not self.console.is_terminal:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.say(f"{what}  stage {stage}  {iteration:6d}  {minutes:6.2f} min  {shown}")

    def show(self, picture: np.ndarray, stage: str, step: int) -> None:
        """Keeps a picture, uint8 RGB (H, W, 3)."""
        if self.folder is None:
            return
        import cv2

        encoded = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        path = self.folder / PICTURES / f"{step:07d}_stage_{stage}.png"
        write_whole(path, lambda partial: partial.write_bytes(encoded))
        if self._board is not None:
            self._board.add_image("validation/pictures", picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()


def _keep_until(log: Path, step: int) -> None:
    """Drops rows of iterations after `step`, and a last row that was cut off."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= step and step > 0:
            kept.append(line + "\n")
    write_whole(log, lambda partial: partial.write_text("".join(kept)))
