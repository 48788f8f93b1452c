"""A network and a data set small enough to train in a test. As a program: one process of several, under torchrun."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import torch

from engines.dspfusion import variants
from engines.dspfusion.variants import VARIANTS
from engines.training.data import Draw

DRAW = Draw(region_px=64, crop_px=32, colour_share=0, dim_share=0, camera_share=0, coded_share=0)
TINY = dataclasses.replace(
    VARIANTS["nano"],
    name="tiny",
    widths=(8, 8, 8),
    degradation_width=8,
    degradation_blocks=1,
    semantic_width=8,
    semantic_blocks=1,
    denoiser_width=16,
    denoiser_layers=1,
)


def write_dataset(folder: Path) -> Path:
    """Three synthetic pairs of two subsets in one tar part."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    with tarfile.open(folder / "part.tar", "w") as tar:
        for name, subset, size in (("a", "road", (80, 96)), ("b", "road", (40, 48)), ("c", "wood", (80, 80))):
            visible = cv2.resize(random.integers(0, 255, (6, 6, 3), np.uint8), size[::-1])
            for kind, picture in (("ir", visible[..., 0]), ("vi", visible)):
                encoded = cv2.imencode(".png", picture)[1].tobytes()
                member = tarfile.TarInfo(f"{subset}/{kind}/{name}.png")
                member.size = len(encoded)
                tar.addfile(member, io.BytesIO(encoded))
            paths = {"ir": f"{subset}/ir/{name}.png", "vi": f"{subset}/vi/{name}.png"}
            rows.append({"subset": subset, "name": name, "tar": "part.tar", **paths})
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def main(config: Path, folder: Path) -> None:
    """Trains as the command does, and keeps this process's own weights."""
    from engines.training import train
    from engines.training.config import read_config

    variants.VARIANTS["tiny"] = TINY
    run = train.Training.run

    def kept(training: train.Training, *arguments: object, **options: object) -> bool:
        finished = run(training, *arguments, **options)  # type: ignore[arg-type]
        torch.save(training.network.state_dict(), folder / f"rank{training.team.rank}.pt")
        return finished

    train.Training.run = kept  # type: ignore[method-assign]
    train.train(read_config(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
