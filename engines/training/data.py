"""Training pairs: read once from tar parts into memory, then cropped and degraded anew for every iteration.

The draw of an iteration depends on the seed and its number alone, so a resumed training sees what it would have seen.
"""

from __future__ import annotations

import csv
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, EngineError
from engines.degrade import CAMERA, CODED, degrade_infrared, degrade_visible
from engines.dspfusion.head import BLUE, GREEN, RED

COLUMNS = ("subset", "tar", "ir", "vi")  # of index.csv; more of them are fine
LARGE_PX = 700
DARK = 0.25  # mean luminance under which a picture counts as taken at night
SECOND_STRENGTH = 0.3  # at most
MOST_SATURATION = 2.2
MOST_TINT = 0.12  # gains of the colours differ from 1 by up to this share
LEAST_EXPOSURE = 0.5
IGNORED = -100  # label of a missing modality: its kind is not to be named


Picture = NDArray[np.float32]
Share = Annotated[float, Field(ge=0, le=1)]
Drawn = TypeVar("Drawn")
Tensors = TypeVar("Tensors", bound=Tensor | tuple[Any, ...])


class Pair(NamedTuple):
    infrared: NDArray[np.uint8]  # (H, W)
    visible: NDArray[np.uint8]  # RGB (H, W, 3)
    subset: str = ""  # the recordings that it belongs to


@dataclass(frozen=True)
class Draw:
    """How a training item is drawn."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelled key is refused, here as in the whole configuration

    region_px: Annotated[int, Field(ge=64)] = 256  # the priors are read from a region ...
    crop_px: Annotated[int, Field(ge=16)] = 128  # ... and a crop of it is fused
    clean_share: Share = 0.25  # of each modality, independently
    missing_share: Share = 0.05  # of the items: one modality is black
    shift_px: Annotated[int, Field(ge=0)] = 2  # the infrared region is moved by up to this much
    gamma_range: Share = 0.25  # the clean infrared picture's curve is bent by up to this share, as gains differ
    colour_share: Share = 0.5  # the colours of so many clean visible pictures are made paler, stronger or warmer
    dim_share: Share = 0.3  # so many clean visible pictures are taken with less light: what is dark may stay dark
    camera_share: Share = 0.25  # of each modality: also a camera's own sharpening and noise; more of it softens
    coded_share: Share = 0.4  # of each modality: also sent as JPEG, after all that
    second_share: Share = 0.2  # of the degraded pictures of a modality: a second, weak degradation follows the first
    still_share: Share = 0.5  # stage IV, of the items: a still pair, moved by a few pixels, instead of two video frames


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
            named there are corrected by it where they have its size. None corrects nothing.
        least_px: smaller pictures are enlarged until their shorter side has this many pixels.

    Raises:
        EngineError: there is no index, nothing in it belongs to the subsets, or a file that is named is not there or
            not what it should be.
    """
    return list(reading_pairs(folder, subsets, fields, least_px)[1])


def reading_pairs(
    folder: Path,
    subsets: tuple[str, ...],
    fields: Path | None,
    least_px: int,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[int, Iterator[Pair]]:
    """As `read_pairs`, one pair at a time: how many there are, and the pairs.

    At their end `say` is told how many pictures the fields fitted.
    """
    index = folder / "index.csv"
    if not index.is_file():
        raise EngineError(f"there is no training data in {folder}: it needs index.csv and the tar parts named there")
    rows = [row for row in _listed(index) if row["subset"] in subsets]
    if not rows:
        raise EngineError(f"{index} lists no pair of {', '.join(subsets)}: name other subsets")
    return len(rows), _read_rows(folder, rows, _corrections(fields), least_px, say)


def _listed(index: Path) -> list[dict[str, str]]:
    try:
        with index.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EngineError(f"{index} cannot be read ({error}): fetch it again") from error
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise EngineError(f"{index} has no column {', '.join(missing)}: it needs {', '.join(COLUMNS)}")
    for number, row in enumerate(rows, 1):
        if any(row[column] is None for column in COLUMNS):
            raise EngineError(f"row {number} of {index} is cut off: it needs {', '.join(COLUMNS)}")
    return rows


def _corrections(fields: Path | None) -> dict[str, np.ndarray]:
    if fields is None:
        return {}
    try:
        corrections = dict(np.load(fields))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise EngineError(
            f"{fields} holds no displacement fields ({error}): name an npz, or leave `fields` out"
        ) from error
    for subset, field in corrections.items():
        if field.ndim != 3 or field.shape[2] != 2 or field.dtype.kind not in "fiu":
            raise EngineError(
                f"`{subset}` in {fields} is no displacement field: it needs numbers of shape (height, width, 2), "
                f"and is {field.dtype} of {field.shape}"
            )
    return corrections


def _read_rows(
    folder: Path,
    rows: list[dict[str, str]],
    corrections: dict[str, np.ndarray],
    least_px: int,
    say: Callable[[str], None],
) -> Iterator[Pair]:
    corrected: Counter[str] = Counter()
    for name in sorted({row["tar"] for row in rows}):
        try:
            with tarfile.open(folder / name) as tar:
                for row in rows:
                    if row["tar"] != name:
                        continue
                    infrared, visible = _read_pair(tar, row)
                    field = corrections.get(row["subset"])
                    if field is not None and field.shape[:2] == infrared.shape:
                        infrared = _corrected(infrared, field)
                        corrected[row["subset"]] += 1
                    yield _sized(infrared, visible, row["subset"], least_px)
        except (OSError, EOFError, tarfile.TarError, zlib.error, KeyError) as error:
            raise EngineError(f"{folder / name} cannot be read ({error}): fetch the tar part again") from error
    if corrections:
        listed = Counter(row["subset"] for row in rows)
        fits = [f"{subset} fits {corrected[subset]} of {listed[subset]} pictures" for subset in corrections]
        say(f"fields: {', '.join(fits)}")


def _read_pair(tar: tarfile.TarFile, row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    infrared = _decoded(tar, row["ir"], cv2.IMREAD_GRAYSCALE)
    visible = cv2.cvtColor(_decoded(tar, row["vi"], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    if infrared.shape != visible.shape[:2]:
        (height, width), (visible_height, visible_width) = infrared.shape, visible.shape[:2]
        raise EngineError(
            f"{row['ir']} has {width}x{height} pixels and {row['vi']} {visible_width}x{visible_height}: "
            "a pair needs one size, register it first or take it out of index.csv"
        )
    return infrared, visible


def _corrected(infrared: np.ndarray, field: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: infrared.shape[0], : infrared.shape[1]].astype(np.float32)
    shift = field.astype(np.float32)
    return cv2.remap(infrared, x + shift[..., 0], y + shift[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)


def _sized(infrared: np.ndarray, visible: np.ndarray, subset: str, least_px: int) -> Pair:
    height, width = infrared.shape
    # Large pictures (1280 x 1024) are halved: their pixels are blurred more than a 640 x 480 camera's.
    scale = max(0.5 if min(height, width) >= LARGE_PX else 1.0, least_px / min(height, width))
    if scale != 1:
        size = (max(least_px, round(width * scale)), max(least_px, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        infrared, visible = cv2.resize(infrared, size, interpolation=how), cv2.resize(visible, size, interpolation=how)
    return Pair(np.asarray(infrared, np.uint8), np.asarray(visible, np.uint8), subset)


def _decoded(tar: tarfile.TarFile, name: str, how: int) -> NDArray[np.uint8]:
    file = tar.extractfile(name)
    encoded = b"" if file is None else file.read()
    try:
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), how)
    except cv2.error:  # nothing to decode, or more pixels than it takes
        picture = None
    if picture is None:
        raise EngineError(f"{name} in {tar.name!s} is no picture: fetch the tar part again")
    return np.asarray(picture, np.uint8)


def hold_back(pairs: list[Pair], number: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into those to learn from and `number` that are only looked at, spread evenly over the list.

    Raises:
        EngineError: nothing would be left to learn from.
    """
    if number >= len(pairs):
        raise EngineError(f"{number} of {len(pairs)} pairs cannot be held back: nothing is left to learn from")
    held = {(2 * index + 1) * len(pairs) // (2 * number) for index in range(number)}
    return [pair for i, pair in enumerate(pairs) if i not in held], [pairs[i] for i in sorted(held)]


def balanced(pairs: list[Pair], balance: float) -> list[Pair]:
    """The pairs, those of small subsets listed several times, so that uniform draws do not see one camera alone.

    Args:
        balance: 0 lists every pair once, 1 all subsets about equally often, between them: by that power of their sizes.
    """
    sizes = Counter(pair.subset for pair in pairs)
    most = max(sizes.values())
    return [pair for pair in pairs for _ in range(round((most / sizes[pair.subset]) ** balance))]


def draw_batch(pairs: list[Pair], size: int, draw: Draw, seed: int, iteration: int) -> Batch:
    """The batch of one iteration: the same for the same seed and number."""
    random = np.random.default_rng((seed, iteration))
    return collate([draw_item(pairs[int(random.integers(len(pairs)))], draw, random) for _ in range(size)])


def collate(items: list[tuple[object, ...]]) -> Batch:
    """Items of `draw_item` as one batch."""
    columns = list(zip(*items, strict=True))
    pictures = [torch.from_numpy(np.stack(column)) for column in columns[:8]]
    return Batch._make((*pictures, *(torch.tensor(column) for column in columns[8:])))


def draw_item(pair: Pair, draw: Draw, random: np.random.Generator) -> tuple[object, ...]:
    """One item: the fields of `Batch` without the first axis."""
    clean_infrared, clean_visible = Framing.drawn(pair.infrared.shape, draw, random).cut(pair)
    spoiling = Spoiling.drawn(clean_visible, draw, random)
    infrared, visible = spoiling.spoil(clean_infrared, clean_visible)
    kinds = [spoiling.infrared_kind, spoiling.visible_kind]
    if random.random() < draw.missing_share:
        if random.random() < 0.5:
            infrared, clean_infrared, kinds[0] = np.zeros_like(infrared), np.zeros_like(infrared), IGNORED
        else:
            visible, clean_visible, kinds[1] = np.zeros_like(visible), np.zeros_like(visible), IGNORED
    return item_of(
        (infrared, visible, clean_infrared, clean_visible), kinds, spoiling.strength, draw_corner(draw, random), draw
    )


def draw_corner(draw: Draw, random: np.random.Generator) -> tuple[int, int]:
    """Top and left of the crop within its region."""
    top, left = random.integers(draw.region_px - draw.crop_px + 1, size=2)
    return int(top), int(left)


def item_of(
    pictures: tuple[Picture, Picture, Picture, Picture],
    kinds: list[int],
    strength: tuple[float, float],
    corner: tuple[int, int],
    draw: Draw,
) -> tuple[object, ...]:
    """Regions, the crops at `corner`, and the labels, in the order of `Batch`."""
    regions = [
        picture[None] if picture.ndim == 2 else np.ascontiguousarray(picture.transpose(2, 0, 1)) for picture in pictures
    ]
    top, left = corner
    crops = [region[:, top : top + draw.crop_px, left : left + draw.crop_px] for region in regions]
    strengths = [value if kind > 0 else 0.0 for value, kind in zip(strength, kinds, strict=True)]
    return (*regions, *crops, *kinds, *strengths)


@dataclass(frozen=True)
class Spoiling:
    """What one item's pictures suffer: kinds and strengths as labels, and the steps that lead there."""

    infrared_kind: int
    visible_kind: int
    strength: tuple[float, float]  # infrared, visible
    infrared_steps: list[tuple[str, int, float]]  # kind, seed, strength
    visible_steps: list[tuple[str, int, float]]

    @classmethod
    def drawn(cls, clean_visible: Picture, draw: Draw, random: np.random.Generator) -> Spoiling:
        infrared = _kind(INFRARED_DEGRADATIONS, draw.clean_share, random)
        visible = _kind(VISIBLE_DEGRADATIONS, draw.clean_share, random)
        strength = random.random(2)
        if VISIBLE_DEGRADATIONS[visible] == "low_light" and clean_visible.mean() < DARK:
            strength[1] *= 0.4  # a night scene darkened further shows nothing to restore
        infrared_steps = _steps(INFRARED_DEGRADATIONS, infrared, float(strength[0]), draw, random)
        visible_steps = _steps(VISIBLE_DEGRADATIONS, visible, float(strength[1]), draw, random)
        return cls(infrared, visible, (float(strength[0]), float(strength[1])), infrared_steps, visible_steps)

    def spoil(
        self, infrared: Picture, visible: Picture, seeded: Callable[[str, int], int] = lambda _, seed: seed
    ) -> tuple[Picture, Picture]:
        """Spoils a pair. `seeded` turns a step's kind and seed into what that degradation draws from."""
        for kind, seed, strength in self.infrared_steps:
            infrared = degrade_infrared(infrared, kind, seeded(kind, seed), strength)
        for kind, seed, strength in self.visible_steps:
            visible = degrade_visible(visible, kind, seeded(kind, seed), strength)
        return infrared, visible


def _kind(kinds: tuple[str, ...], clean_share: float, random: np.random.Generator) -> int:
    return 0 if random.random() < clean_share else int(random.integers(1, len(kinds)))


def _steps(
    kinds: tuple[str, ...], kind: int, strength: float, draw: Draw, random: np.random.Generator
) -> list[tuple[str, int, float]]:
    """The degradation; what a camera delivers in bad weather is seldom spoiled in one way alone."""
    steps = [(kinds[kind], int(random.integers(1 << 31)), strength)]
    if kind > 0 and random.random() < draw.second_share:
        second = int(random.integers(1, len(kinds) - 1))
        second += second >= kind  # the same kind twice would be stronger than its label says
        steps.append((kinds[second], int(random.integers(1 << 31)), SECOND_STRENGTH * float(random.random())))
    for last, share in ((CAMERA, draw.camera_share), (CODED, draw.coded_share)):
        if share > 0 and random.random() < share:
            steps.append((last, int(random.integers(1 << 31)), float(random.random())))
    return steps


@dataclass(frozen=True)
class Framing:
    """Where a region lies in its pictures, and how the clean infrared one is bent."""

    top: int
    left: int
    infrared_top: int
    infrared_left: int
    size: int
    mirrored: bool
    bend: np.float32
    recolour: Picture | None  # (3, 3), applied to RGB: the network must keep whatever colours a camera has

    @classmethod
    def drawn(cls, shape: tuple[int, ...], draw: Draw, random: np.random.Generator) -> Framing:
        size, shift = draw.region_px, draw.shift_px
        height, width = shape
        top, left = int(random.integers(height - size + 1)), int(random.integers(width - size + 1))
        # Real registration is never exact: the network must not break at a pixel of disparity.
        down = int(np.clip(top + random.integers(-shift, shift + 1), 0, height - size))
        right = int(np.clip(left + random.integers(-shift, shift + 1), 0, width - size))
        mirrored = random.random() < 0.5
        bend = np.float32(1 + draw.gamma_range * random.uniform(-1, 1))
        recolour = _recolouring(random) if draw.colour_share > 0 and random.random() < draw.colour_share else None
        if draw.dim_share > 0 and random.random() < draw.dim_share:
            exposure = np.float32(random.uniform(LEAST_EXPOSURE, 1))
            recolour = exposure * (np.eye(3, dtype=np.float32) if recolour is None else recolour)
        return cls(top, left, down, right, size, mirrored, bend, recolour)

    def cut(self, pair: Pair) -> tuple[Picture, Picture]:
        """The region of both pictures, in [0, 1]."""
        rows, columns = (slice(start, start + self.size) for start in (self.infrared_top, self.infrared_left))
        infrared = pair.infrared[rows, columns]
        rows, columns = (slice(start, start + self.size) for start in (self.top, self.left))
        visible = pair.visible[rows, columns]
        if self.mirrored:
            infrared, visible = infrared[:, ::-1], visible[:, ::-1]
        colours: Picture = visible * np.float32(1 / 255)
        if self.recolour is not None:
            colours = np.clip(colours @ self.recolour.T, 0, 1).astype(np.float32)
        return (infrared * np.float32(1 / 255)) ** self.bend, colours


def _recolouring(random: np.random.Generator) -> Picture:
    """Another white balance, then colours from none to strong: (3, 3), for RGB."""
    saturation = random.uniform(0, MOST_SATURATION)
    gains = 1 + MOST_TINT * random.uniform(-1, 1, 3)
    grey = np.tile([RED, GREEN, BLUE], (3, 1))
    return np.asarray((saturation * np.eye(3) + (1 - saturation) * grey) * gains, np.float32)


def drawn_ahead(draw: Callable[[int], Drawn], numbers: Iterable[int], threads: int = 1) -> Generator[Drawn]:
    """What `draw` makes of each number, in order, drawn ahead in as many threads. Endless numbers are fine."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Drawn]] = deque()
        for number in numbers:
            waiting.append(pool.submit(draw, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def numbers_of(start: int, rank: int, processes: int) -> Iterator[int]:
    """The endless draws of one of several processes: no draw is made twice."""
    return count(start * processes + rank, processes)


def moved(tensors: Tensors, device: torch.device) -> Tensors:
    """A tensor, or a named tuple of them, on a device; the copy overlaps with what the device still computes."""
    if device.type == "cpu":
        return tensors
    if isinstance(tensors, Tensor):
        layout = torch.channels_last if tensors.ndim == 4 else torch.preserve_format
        return cast(Tensors, tensors.pin_memory().to(device, non_blocking=True, memory_format=layout))
    return cast(Tensors, type(tensors)(*(moved(tensor, device) for tensor in tensors)))
