"""What is judged: real pairs, and degraded versions of them whose clean sources are known.

A data folder holds `eval/<data set>/ir/<name>.*` and `.../vi/<name>.*` with `eval/index.csv`, `degraded/index.csv`
beside it, and `official_dspfusion_outputs`, pictures that others published.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.evaluation.degradations import DEGRADATIONS, degrade

Image = NDArray[np.uint8]

PUBLIC_PAIRS = tuple(
    [f"msrs/{name}" for name in ["00095D", "00349D", "00537D", "01413D", "00020N", "00862N", "01016N", "01238N"]]
    + [f"roadscene/FLIR_{name}" for name in ["00288", "05245", "07190", "08874"]]
)
CONDITIONS = ("clean", *DEGRADATIONS)
PairFiles = tuple[str, Path, Path]  # name, infrared picture, visible picture
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
# The published pictures whose clean pair is public, by their folder, which names the degradation of the inputs.
PUBLISHED_SCENES = (
    ("LL_SN", "01016N"),
    ("Rain_SN", "01478D"),
    ("ir_LC", "00345D"),
    ("ir_RN", "00555D"),
    ("ir_SN", "01559D"),
    ("vi_Blur", "00404D"),
    ("vi_Rain", "00571D"),
    ("vi_Rain", "01502D"),
)
# Scenes of `degraded` whose clean source is among the training pairs of any subset, also of those not used by default.
TRAINED_ON = frozenset({"00001D", "00002D", "00005N", "00264D", "00269D", "00006", "04269", "04598", "04602", "010001"})


@dataclass(frozen=True)
class Pair:
    """One registered pair of clean pictures."""

    name: str
    infrared: Image  # uint8 (H, W)
    visible: Image  # uint8 RGB (H, W, 3)

    def __post_init__(self) -> None:
        if self.infrared.shape != self.visible.shape[:2]:
            sizes = f"infrared {_text(self.infrared.shape)}, visible {_text(self.visible.shape)}"
            raise ValueError(f"{self.name}: the pictures of a pair have one size, these differ ({sizes} pixels)")


@dataclass(frozen=True)
class Case:
    """One picture to be judged: what is fused, and the clean pair that it is judged by."""

    pair: Pair
    condition: str  # "clean", or what was done to the inputs
    infrared: Image  # the inputs, uint8 (H, W) ...
    visible: Image  # ... and RGB (H, W, 3)
    ready: Image | None = None  # a picture of the same scene that others made
    mode: str = ""  # how to fuse it, where ways are compared

    def __post_init__(self) -> None:
        pictures = {"infrared input": self.infrared, "visible input": self.visible, "fused picture": self.ready}
        size = self.pair.infrared.shape
        for name, picture in pictures.items():
            if picture is not None and picture.shape[:2] != size:
                raise ValueError(
                    f"{self.pair.name}, {self.condition}: the {name} has {_text(picture.shape)} pixels, "
                    f"the clean pair {_text(size)}"
                )


def degraded_cases(
    pairs: Iterable[Pair], conditions: Sequence[str] = CONDITIONS, first_seed: int = 0
) -> Iterator[Case]:
    """Every pair under every condition; seeds count up from pair to pair, so equal lists give equal pixels.

    Raises:
        KeyError: if there is no such condition.
    """
    for index, pair in enumerate(pairs, first_seed):
        for condition in conditions:
            yield Case(pair, condition, *degrade(condition, pair.infrared, pair.visible, seed=index))


def public_pairs(data_dir: Path, names: Sequence[str] = PUBLIC_PAIRS) -> Iterator[Pair]:
    """The pairs `data set/name` of a folder, in that order.

    Raises:
        FileNotFoundError: if one of them is not there.
    """
    for files in pair_files(data_dir, names):
        yield read_pair(*files)


def pair_files(data_dir: Path, names: Sequence[str]) -> list[PairFiles]:
    """Where the pairs `data set/name` of a folder lie, in that order.

    Raises:
        FileNotFoundError: if one of them is not there.
    """
    root = eval_folder(data_dir)
    parts = [(name, *name.split("/")) for name in names]
    return [
        (name, one_file(root / data_set / "ir", stem), one_file(root / data_set / "vi", stem))
        for name, data_set, stem in parts
    ]


def set_names(data_dir: Path, light: str | None = None) -> dict[str, list[str]]:
    """The names `data set/name` of all evaluation pairs, by data set, as the index lists them.

    Args:
        light: "day" or "night" keeps only those.

    Raises:
        FileNotFoundError: if there is no index.
    """
    names: dict[str, list[str]] = {}
    for row in _index(eval_folder(data_dir) / "index.csv", ("dataset", "name", "light")):
        if light is None or row["light"] == light:
            names.setdefault(row["dataset"], []).append(f"{row['dataset']}/{row['name']}")
    return names


def folder_pairs(infrared_dir: Path, visible_dir: Path) -> Iterator[Pair]:
    """The pairs of two folders whose files have equal names, extension aside, in the order of the names.

    Raises:
        FileNotFoundError: if a picture has no partner, or there is none at all.
    """
    for stem in stems(infrared_dir, visible_dir):
        yield read_pair(stem, one_file(infrared_dir, stem), one_file(visible_dir, stem))


def fused_cases(fused_dir: Path, infrared_dir: Path, visible_dir: Path) -> Iterator[Case]:
    """Ready-made pictures, with the clean pair of the same name for each.

    Raises:
        FileNotFoundError: if there is no picture, or a picture has no clean pair.
    """
    for stem in stems(fused_dir):
        pair = read_pair(stem, one_file(infrared_dir, stem), one_file(visible_dir, stem))
        yield Case(pair, "clean", pair.infrared, pair.visible, read_colour(one_file(fused_dir, stem)))


def twin_cases(pairs: Iterable[Pair], infrared_dir: Path | None, visible_dir: Path | None) -> Iterator[Case]:
    """Clean pairs whose degraded twins lie in other folders under the same names; None: that camera is not degraded.

    Raises:
        FileNotFoundError: if a twin is missing.
    """
    for pair in pairs:
        infrared = pair.infrared if infrared_dir is None else read_grey(one_file(infrared_dir, pair.name))
        visible = pair.visible if visible_dir is None else read_colour(one_file(visible_dir, pair.name))
        yield Case(pair, "degraded", infrared, visible)


@dataclass(frozen=True)
class RealScene:
    """A scene whose degraded pictures were published together with clean ones of both cameras."""

    clean: PairFiles
    degraded: tuple[tuple[str, str, Path], ...]  # "ir" or "vi", kind, picture

    @property
    def trained_on(self) -> bool:
        return self.clean[0].split("/")[-1] in TRAINED_ON


def real_scenes(data_dir: Path) -> list[RealScene]:
    """The published degraded scenes that have clean twins.

    Raises:
        FileNotFoundError: if there is no index, or a picture that it names is not there.
    """
    root = data_dir / "degraded"
    files: dict[tuple[str, str], dict[tuple[str, str], Path]] = {}
    for row in _index(root / "index.csv", ("set", "scene", "modality", "kind", "file")):
        files.setdefault((row["set"], row["scene"]), {})[row["modality"], row["kind"]] = root / row["file"]
    scenes = []
    for (folder, scene), pictures in sorted(files.items()):
        if not {("ir", "Clean"), ("vi", "Clean")} <= pictures.keys():
            continue
        if gone := [path for path in pictures.values() if not path.is_file()]:
            raise FileNotFoundError(f"{root / 'index.csv'} names {gone[0]}, which is not there")
        name = f"{folder.removeprefix('dspfusion_')}/{scene}"
        degraded = [(*key, path) for key, path in sorted(pictures.items()) if key[1] not in ("Clean", "Norm")]
        scenes.append(RealScene((name, pictures["ir", "Clean"], pictures["vi", "Clean"]), tuple(degraded)))
    return scenes


def real_cases(scenes: Iterable[RealScene]) -> Iterator[Case]:
    """Every scene clean, then each of its degraded pictures with the clean picture of the other camera."""
    for scene in scenes:
        pair = read_pair(*scene.clean)
        yield Case(pair, "clean", pair.infrared, pair.visible)
        for modality, kind, path in scene.degraded:
            infrared = read_grey(path) if modality == "ir" else pair.infrared
            visible = read_colour(path) if modality == "vi" else pair.visible
            yield Case(pair, f"{modality}_{kind}", infrared, visible)


def published_cases(data_dir: Path) -> Iterator[Case]:
    """The scenes of `PUBLISHED_SCENES`: the degraded inputs, the clean pair, and the authors' fused picture.

    Raises:
        FileNotFoundError: if something of it is missing.
    """
    for condition, clean, infrared, visible, fused in published_files(data_dir):
        yield Case(read_pair(*clean), condition, read_grey(infrared), read_colour(visible), read_colour(fused))


def published_files(data_dir: Path) -> Iterator[tuple[str, PairFiles, Path, Path, Path]]:
    """Of every scene of `PUBLISHED_SCENES` its condition, the clean pair, both inputs, and the fused picture.

    Raises:
        FileNotFoundError: if something of it is missing.
    """
    for condition, scene in PUBLISHED_SCENES:
        (clean,) = pair_files(data_dir, [f"msrs/{scene}"])
        inputs = data_dir / "degraded" / "dspfusion_test" / scene
        first, _, second = condition.rpartition("_")
        kinds = {"ir": "Input", "vi": "Input"}
        kinds.update({first: second} if first in kinds else {"vi": first, "ir": second})
        yield (
            condition,
            clean,
            one_file(inputs, f"ir_{kinds['ir']}"),
            one_file(inputs, f"vi_{kinds['vi']}"),
            one_file(data_dir / "official_dspfusion_outputs" / condition, scene),
        )


def spared_clean(case: Case) -> Case:
    """A published case with the clean picture of a camera that its condition spares.

    The inputs as published lost colour resolution to compression; the pictures that the authors fused of them follow
    the colours of the clean pictures to 0.4 to 1.4 levels where these inputs are 2 to 4 levels away (seven of eight).
    """
    degraded = case.condition.partition("_")[0]
    if degraded == "ir":
        return replace(case, visible=case.pair.visible)
    return replace(case, infrared=case.pair.infrared) if degraded == "vi" else case


def eval_folder(data_dir: Path) -> Path:
    """The folder of the evaluation pairs, whether it or the folder around it was named."""
    return data_dir / "eval" if (data_dir / "eval").is_dir() else data_dir


def one_file(folder: Path, stem: str) -> Path:
    """The one file of that name, extension aside.

    Raises:
        FileNotFoundError: if there is none, or more than one.
    """
    matches = [path for path in sorted(folder.glob(f"{glob.escape(stem)}.*")) if path.suffix.lower() in PICTURES]
    matches = [path for path in matches if path.stem == stem]
    if len(matches) != 1:
        raise FileNotFoundError(f"expected one picture {stem}.* in {folder}, found {len(matches)}: is this the data?")
    return matches[0]


def stems(*folders: Path) -> list[str]:
    """The names of all pictures of these folders, extensions aside, sorted.

    Raises:
        FileNotFoundError: if one is no folder, or there is no picture.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
    files = [path for folder in folders for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    if not files:
        raise FileNotFoundError(f"{' and '.join(map(str, folders))} hold no pictures")
    return sorted({path.stem for path in files})


def read_pair(name: str, infrared: Path, visible: Path) -> Pair:
    """Reads two pictures of one size.

    Raises:
        ValueError: if one cannot be read, or the sizes differ.
    """
    return Pair(name, read_grey(infrared), read_colour(visible))


def read_grey(path: Path) -> Image:
    """A picture as uint8 (H, W)."""
    return _read(path, cv2.IMREAD_GRAYSCALE)


def read_colour(path: Path) -> Image:
    """A picture as uint8 RGB (H, W, 3)."""
    return _read(path, cv2.IMREAD_COLOR_RGB)


def _read(path: Path, how: int) -> Image:
    image = cv2.imread(str(path), how | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise ValueError(f"{path} is not a picture that can be read")
    if image.dtype != np.uint8:
        raise ValueError(f"{path} has {image.dtype} pixels: the scores are of 8-bit pictures, convert it first")
    return np.asarray(image, dtype=np.uint8)


def _text(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _index(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not set(columns) <= rows[0].keys():
        raise ValueError(f"{path} needs the columns {', '.join(columns)}")
    return rows
