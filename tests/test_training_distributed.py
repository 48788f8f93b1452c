"""Two processes that train one network, with a stop between, are one process with the double batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from engines.dspfusion import variants
from engines.training import train
from engines.training.config import checked
from engines.training.data import Batch, draw_batch, numbers_of, read_pairs
from engines.training.distributed import Processes, processes
from engines.training.stages import Noise
from engines.training.train import Training
from engines.training.video import VideoBatch, draw_video_batch, read_clips
from tests.rigs import training as rig
from tests.rigs.recordings import write_video
from tests.rigs.rtsp_server import free_port
from tests.rigs.training import TINY, write_dataset

ROOT = Path(__file__).resolve().parent.parent


STOPPED_AFTER = 3  # iterations: within stage II


class Double(Training):
    """One process that takes the items of two, and the noise that each of them would start from."""

    def _batches(self) -> Generator[Batch | VideoBatch]:
        current = self.stage - 1
        how = (self.config.batch, self.config.draw, self.config.seed * 4 + current)
        draw = partial(draw_video_batch, self.clips, self.pairs) if self.stage == 4 else partial(draw_batch, self.pairs)
        for number in count(self.done[current]):
            yield joined([draw(*how, item) for item in (2 * number, 2 * number + 1)])

    def _noise(self, batch: Batch) -> Noise:
        halves = []
        for rank in (0, 1):
            self.team = Processes(rank)
            halves.append(super()._noise(Batch._make(column.chunk(2)[rank] for column in batch)))
        self.team = Processes()
        starts = [half.start for half in halves if half.start is not None]
        return Noise(halves[0].steps, torch.cat(starts) if starts else None)


def joined(halves: list[Any]) -> Any:
    """Tensors, or named tuples of them, one after the other."""
    if isinstance(halves[0], Tensor):
        return torch.cat(halves)
    return type(halves[0])._make(joined(list(column)) for column in zip(*halves, strict=True))


def main(config: Path, folder: Path, port: str) -> None:
    """One of two processes: the second alone is asked to stop, both do, and go on."""
    run = Training.run

    def stopped(training: Training, *arguments: Any, **options: Any) -> bool:
        def asked() -> bool:
            return training.team.rank == 1 and sum(training.done) == STOPPED_AFTER

        return run(training, *arguments, **options | {"stopping": asked})

    Training.run = stopped  # type: ignore[method-assign]
    rig.main(config, folder)
    Training.run = run  # type: ignore[method-assign]
    # As if launched again: where torchrun lets them meet, they would find the addresses of the first time.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
    train.train = partial(train.train, resume=True)
    rig.main(config, folder)


@pytest.mark.timeout(300)  # four interpreters import torch: seconds on idle cores, a minute and more on busy ones
def test_two_processes_that_stop_and_go_on_end_with_the_weights_of_one_with_the_double_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(variants.VARIANTS, "tiny", TINY)
    torch.set_num_threads(1)
    for kind in ("ir", "vi"):
        write_video(tmp_path / f"street_{kind}.mkv", 3, size=(80, 72), colour=kind == "vi")
    settings = {
        "variant": "tiny",
        "data": str(write_dataset(tmp_path / "data")),
        "subsets": ["road", "wood"],
        "output": str(tmp_path / "out"),
        "videos": str(tmp_path),
        "iterations": [2, 2, 2, 2],
        "held_back": 1,
        "batch": 2,
        "threads": 1,
        "device": "cpu",
        "warm_up_items": 0,
        # A missing modality, the contrast between the items of a batch, and means over what stands still or is trusted
        # do not divide into halves.
        "draw": {"region_px": 64, "crop_px": 32, "missing_share": 0},
        "weights": {"contrast": 0, "flicker": 0, "warped": 0},
    }
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings))
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.test_training_distributed", str(config), str(tmp_path), str(free_port())),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert "stopped in stage II after 1 iterations" in launched.stderr
    assert "going on in stage II after 1 iterations, with 5 iterations left" in launched.stderr
    assert torch.load(tmp_path / "out" / "tiny.checkpoint")["done"] == [2, 2, 2, 2]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    together = checked(settings | {"output": str(tmp_path / "other")}, "test")
    double = Double(together, read_pairs(Path(together.data), together.subsets, None, 64), read_clips(tmp_path, 64))
    before = {name: value.clone() for name, value in double.network.state_dict().items()}
    double.run()
    learned, off = distance(first, before), distance(first, double.network.state_dict())
    assert off < 1e-3 * learned  # what differs is the order of the sums
    assert (tmp_path / "out" / "tiny.safetensors").is_file()


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum(float((value - second[name]).square().sum()) for name, value in first.items()) ** 0.5


def test_no_two_processes_draw_the_same_item():
    drawn = [next_three(numbers_of(5, rank, 2)) for rank in (0, 1)]
    assert drawn == [[10, 12, 14], [11, 13, 15]]
    assert next_three(numbers_of(5, 0, 1)) == [5, 6, 7]


def next_three(numbers: Generator[int]) -> list[int]:
    return [next(numbers) for _ in range(3)]


def test_a_process_alone_decides_for_itself():
    with processes("cpu") as alone:
        assert alone == Processes()
        assert alone.agree(0.25, False) == (0.25, False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
