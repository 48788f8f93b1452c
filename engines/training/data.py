"""Training pairs: read once from tar parts into memory, then cropped and degraded anew for every iteration.

The draw of an iteration depends on the seed and its number alone, so a resumed training sees what it would have seen.
"""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, EngineError
from engines.degrade import degrade_infrared, degrade_visible

LARGE_PX = 700
DARK = 0.25  # mean luminance under which a picture counts as taken at night
SECOND_STRENGTH = 0.3  # at most
IGNORED = -100  # label of a missing modality: its kind is not to be named


Degrade = Callable[[NDArray[np.float32], str, int, float], NDArray[np.float32]]


class Pair(NamedTuple):
    infrared: NDArray[np.uint8]  # (H, W)
    visible: NDArray[np.uint8]  # RGB (H, W, 3)


@dataclass(frozen=True)
class Draw:
    """How a training item is drawn."""

    region_px: int = 256  # the priors are read from a region ...
    crop_px: int = 128  # ... and a crop of it is fused
    clean_share: float = 0.25  # of each modality, independently
    missing_share: float = 0.05  # of the items: one modality is black
    shift_px: int = 2  # the infrared region is moved by up to this much
    gamma_range: float = 0.25  # the clean infrared picture's curve is bent by up to this share, as gains differ
    second_share: float = 0.2  # of the degraded pictures of a modality: a second, weak degradation follows the first


class Batch(NamedTuple):
    """Pictures in [0, 1]; the regions feed the priors, the crops (cut from them) the network and the losses."""

    region_infrared: Tensor  # degraded, (B, 1, R, R)
    region_visible: Tensor  # (B, 3, R, R)
    clean_region_infrared: Tensor
    clean_region_visible: Tensor
    infrared: Tensor  # degraded, (B, 1, S, S)
    visible: Tensor  # (B, 3, S, S)
    clean_infrared: Tensor
    clean_visible: Tensor
    infrared_kind: Tensor  # (B,) index into INFRARED_DEGRADATIONS
    visible_kind: Tensor  # (B,) index into VISIBLE_DEGRADATIONS
    infrared_strength: Tensor  # (B,) in [0, 1]; 0 where the kind is "none"
    visible_strength: Tensor  # (B,)


def read_pairs(folder: Path, subsets: tuple[str, ...], fields: Path | None, least_px: int) -> list[Pair]:
    """Reads every pair of the subsets.

    Args:
        folder: holds index.csv and the tar parts it names.
        subsets: those to read.
        fields: an npz of residual displacements by subset, (H, W, 2) as (dx, dy): the infrared pictures of a subset
        named
            there are corrected by it. None corrects nothing.
        least_px: smaller pictures are enlarged until their shorter side has this many pixels.

    Raises:
        EngineError: there is no index, or nothing in it belongs to the subsets.
    """
    index = folder / "index.csv"
    if not index.is_file():
        raise EngineError(f"there is no training data in {folder}: it needs index.csv and the tar parts named there")
    with index.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["subset"] in subsets]
    if not rows:
        raise EngineError(f"{index} lists no pair of {', '.join(subsets)}: name other subsets")
    corrections = dict(np.load(fields)) if fields is not None else {}
    pairs = []
    for name in sorted({row["tar"] for row in rows}):
        with tarfile.open(folder / name) as tar:
            for row in rows:
                if row["tar"] == name:
                    pairs.append(_read_pair(tar, row, corrections.get(row["subset"]), least_px))
    return pairs


def _read_pair(tar: tarfile.TarFile, row: dict[str, str], field: np.ndarray | None, least_px: int) -> Pair:
    infrared: np.ndarray = _decoded(tar, row["ir"], cv2.IMREAD_GRAYSCALE)
    visible: np.ndarray = cv2.cvtColor(_decoded(tar, row["vi"], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    if field is not None and field.shape[:2] == infrared.shape:
        y, x = np.mgrid[: infrared.shape[0], : infrared.shape[1]].astype(np.float32)
        shift = field.astype(np.float32)
        infrared = cv2.remap(infrared, x + shift[..., 0], y + shift[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)
    height, width = visible.shape[:2]
    # Large pictures (1280 x 1024) are halved: their pixels are blurred more than a 640 x 480 camera's.
    scale = max(0.5 if min(height, width) >= LARGE_PX else 1.0, least_px / min(height, width))
    if scale != 1:
        size = (max(least_px, round(width * scale)), max(least_px, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        infrared, visible = cv2.resize(infrared, size, interpolation=how), cv2.resize(visible, size, interpolation=how)
    return Pair(np.asarray(infrared, np.uint8), np.asarray(visible, np.uint8))


def _decoded(tar: tarfile.TarFile, name: str, how: int) -> NDArray[np.uint8]:
    file = tar.extractfile(name)
    picture = None if file is None else cv2.imdecode(np.frombuffer(file.read(), np.uint8), how)
    if picture is None:
        raise EngineError(f"{name} in {tar.name!s} is no picture: fetch the tar part again")
    return np.asarray(picture, np.uint8)


def draw_batch(pairs: list[Pair], size: int, draw: Draw, seed: int, iteration: int) -> Batch:
    """The batch of one iteration: the same for the same seed and number."""
    random = np.random.default_rng((seed, iteration))
    items = [_draw_item(pairs[int(random.integers(len(pairs)))], draw, random) for _ in range(size)]
    columns = list(zip(*items, strict=True))
    pictures = [torch.from_numpy(np.stack(column)) for column in columns[:8]]
    return Batch._make((*pictures, *(torch.tensor(column) for column in columns[8:])))


def _draw_item(pair: Pair, draw: Draw, random: np.random.Generator) -> tuple[object, ...]:
    clean_infrared, clean_visible = _region(pair, draw, random)
    kinds = [
        _kind(INFRARED_DEGRADATIONS, draw.clean_share, random),
        _kind(VISIBLE_DEGRADATIONS, draw.clean_share, random),
    ]
    strength = random.random(2)
    if VISIBLE_DEGRADATIONS[kinds[1]] == "low_light" and clean_visible.mean() < DARK:
        strength[1] *= 0.4  # a night scene darkened further shows nothing to restore
    infrared = _degraded(degrade_infrared, INFRARED_DEGRADATIONS, clean_infrared, kinds[0], strength[0], draw, random)
    visible = _degraded(degrade_visible, VISIBLE_DEGRADATIONS, clean_visible, kinds[1], strength[1], draw, random)
    if random.random() < draw.missing_share:
        if random.random() < 0.5:
            infrared, clean_infrared, kinds[0] = np.zeros_like(infrared), np.zeros_like(infrared), IGNORED
        else:
            visible, clean_visible, kinds[1] = np.zeros_like(visible), np.zeros_like(visible), IGNORED
    regions = [
        picture[None] if picture.ndim == 2 else np.ascontiguousarray(picture.transpose(2, 0, 1))
        for picture in (infrared, visible, clean_infrared, clean_visible)
    ]
    top, left = random.integers(draw.region_px - draw.crop_px + 1, size=2)
    crops = [region[:, top : top + draw.crop_px, left : left + draw.crop_px] for region in regions]
    strengths = [float(value) if kind > 0 else 0.0 for value, kind in zip(strength, kinds, strict=True)]
    return (*regions, *crops, *kinds, *strengths)


def _degraded(
    degrade: Degrade,
    kinds: tuple[str, ...],
    clean: NDArray[np.float32],
    kind: int,
    strength: float,
    draw: Draw,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """The picture with its degradation; what a camera delivers in bad weather is seldom spoiled in one way alone."""
    spoiled = degrade(clean, kinds[kind], int(random.integers(1 << 31)), float(strength))
    if kind > 0 and random.random() < draw.second_share:
        second = kinds[int(random.integers(1, len(kinds)))]
        spoiled = degrade(spoiled, second, int(random.integers(1 << 31)), SECOND_STRENGTH * float(random.random()))
    return spoiled


def _kind(kinds: tuple[str, ...], clean_share: float, random: np.random.Generator) -> int:
    return 0 if random.random() < clean_share else int(random.integers(1, len(kinds)))


def _region(pair: Pair, draw: Draw, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    size, shift = draw.region_px, draw.shift_px
    height, width = pair.infrared.shape
    top, left = int(random.integers(height - size + 1)), int(random.integers(width - size + 1))
    # Real registration is never exact: the network must not break at a pixel of disparity.
    down = int(np.clip(top + random.integers(-shift, shift + 1), 0, height - size))
    right = int(np.clip(left + random.integers(-shift, shift + 1), 0, width - size))
    infrared = pair.infrared[down : down + size, right : right + size]
    visible = pair.visible[top : top + size, left : left + size]
    if random.random() < 0.5:
        infrared, visible = infrared[:, ::-1], visible[:, ::-1]
    bend = np.float32(1 + draw.gamma_range * random.uniform(-1, 1))
    return (infrared * np.float32(1 / 255)) ** bend, visible * np.float32(1 / 255)


def batches(pairs: list[Pair], size: int, draw: Draw, seed: int, start: int) -> Iterator[Batch]:
    """Endless batches from iteration `start` on, drawn one ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(draw_batch, pairs, size, draw, seed, start)
        iteration = start
        while True:
            batch = following.result()
            iteration += 1
            following = pool.submit(draw_batch, pairs, size, draw, seed, iteration)
            yield batch
