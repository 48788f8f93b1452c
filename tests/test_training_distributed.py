"""Two processes that train one network are one process with the double batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from engines.dspfusion import variants
from engines.training.config import checked
from engines.training.data import Batch, draw_batch, numbers_of, read_pairs
from engines.training.distributed import Processes, processes
from engines.training.train import Training
from tests.rigs.training import TINY, write_dataset

ROOT = Path(__file__).resolve().parent.parent


class Double(Training):
    """One process that takes the items of two."""

    def _batches(self) -> Generator[Batch]:  # type: ignore[override]
        current = self.stage - 1
        for number in count(self.done[current]):
            halves = [
                draw_batch(self.pairs, self.config.batch, self.config.draw, self.config.seed * 4 + current, item)
                for item in (2 * number, 2 * number + 1)
            ]
            yield Batch._make(torch.cat(column) for column in zip(*halves, strict=True))


@pytest.mark.timeout(300)  # four interpreters import torch: seconds on idle cores, a minute and more on busy ones
def test_two_processes_end_with_the_weights_of_one_with_the_double_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(variants.VARIANTS, "tiny", TINY)
    torch.set_num_threads(1)
    settings = {
        "variant": "tiny",
        "data": str(write_dataset(tmp_path / "data")),
        "subsets": ["road", "wood"],
        "output": str(tmp_path / "out"),
        "iterations": [3, 0, 3],
        "batch": 2,
        "threads": 1,
        "device": "cpu",
        "warm_up_items": 0,
        # A missing modality and the contrast between the items of a batch do not divide into halves.
        "draw": {"region_px": 64, "crop_px": 32, "missing_share": 0},
        "weights": {"contrast": 0},
    }
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings))
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.rigs.training", str(config), str(tmp_path)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    together = checked(settings | {"output": str(tmp_path / "other")}, "test")
    double = Double(together, read_pairs(Path(together.data), together.subsets, None, 64))
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
