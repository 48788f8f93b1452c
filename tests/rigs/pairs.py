"""Pictures of both cameras whose residual transform is known: drawn ones, and real ones that are moved."""

from __future__ import annotations

import csv
import itertools
import tarfile
from pathlib import Path

import av
import cv2
import numpy as np

SIZE = (640, 480)
Pair = tuple[np.ndarray, np.ndarray]  # infrared, visible: uint8 (480, 640)


def scene(seed: int = 0, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Infrared and visible picture of the same shapes, aligned; each shape has grey levels of its own in either."""
    random = np.random.default_rng(seed)
    infrared, visible = np.full(size[::-1], 90, np.uint8), np.full(size[::-1], 120, np.uint8)
    for _ in range(60):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        half = tuple(int(side) for side in random.integers(8, 60, 2))
        box = cv2.boxPoints(((float(x), float(y)), half, float(random.uniform(0, 180)))).astype(np.int32)
        for picture in (infrared, visible):
            cv2.fillConvexPoly(picture, box, int(random.integers(20, 235)), cv2.LINE_AA)
    pictures = (cv2.GaussianBlur(picture, (0, 0), 1.0) for picture in (infrared, visible))
    noisy = [np.clip(picture + random.normal(0, 2, picture.shape), 0, 255).astype(np.uint8) for picture in pictures]
    return noisy[0], noisy[1]


def warped(infrared: np.ndarray, truth: np.ndarray, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """The infrared picture as a rig would hand it over that is off by `truth`: its pixel p belongs to truth p."""
    size = (infrared.shape[1], infrared.shape[0])
    return cv2.warpPerspective(infrared, truth, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=border)


def error_px(found: np.ndarray, truth: np.ndarray, size: tuple[int, int] = SIZE) -> float:
    x, y = np.meshgrid(np.linspace(0, size[0] - 1, 9), np.linspace(0, size[1] - 1, 7))
    grid = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    one, other = found @ grid, truth @ grid
    return float(np.linalg.norm(one[:2] / one[2] - other[:2] / other[2], axis=0).mean())


def person(x: int, level: int, background: int) -> np.ndarray:
    """A near person and nothing else."""
    picture = np.full(SIZE[::-1], background, np.uint8)
    cv2.ellipse(picture, (320 + x, 140), (90, 115), 0, 0, 360, level, -1, cv2.LINE_AA)
    cv2.ellipse(picture, (320 + x, 480), (230, 240), 0, 0, 360, level, -1, cv2.LINE_AA)
    noise = np.random.default_rng(level).normal(0, 2, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def blank(level: int) -> np.ndarray:
    return np.full(SIZE[::-1], level, np.uint8)


def real_pairs(data_dir: Path, dataset: str, light: str, count: int) -> list[Pair]:
    """Evaluation pairs at 640x480, with the displacement that a whole data set shares taken out."""
    rows = _rows(data_dir / "eval" / "index.csv", dataset=dataset)
    chosen = [row for row in rows if row["light"] in (light, "")][:count]
    return [
        _in_place(
            data_dir,
            dataset,
            *(cv2.imread(str(data_dir / "eval" / row[key]), cv2.IMREAD_GRAYSCALE) for key in ("ir", "vi")),
        )
        for row in chosen
    ]


def training_pairs(data_dir: Path, dataset: str, light: str, every: int = 1) -> list[Pair]:
    """The same of the training part."""
    pairs = []
    for row in _rows(data_dir / "train" / "index.csv", subset=dataset, light=light)[::every]:
        with tarfile.open(data_dir / "train" / row["tar"]) as archive:
            stored = [np.frombuffer(archive.extractfile(row[key]).read(), np.uint8) for key in ("ir", "vi")]
        pairs.append(_in_place(data_dir, dataset, *(cv2.imdecode(one, cv2.IMREAD_GRAYSCALE) for one in stored)))
    return pairs


def clip_pairs(data_dir: Path, name: str, every: int) -> list[Pair]:
    """Every so manieth frame of the registered clips whose name begins so, at 640x480."""
    pairs: list[Pair] = []
    for part in ("eval", "train"):
        for file in sorted((data_dir / "video" / part).glob(f"{name}*_ir.mkv")):
            clips = (_grey(file), _grey(file.with_name(file.name.replace("_ir", "_vi"))))
            pairs += itertools.islice(zip(*clips, strict=True), 0, None, every)
    return pairs


def _grey(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def _rows(index: Path, **wanted: str) -> list[dict[str, str]]:
    with index.open() as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def _in_place(data_dir: Path, dataset: str, infrared: np.ndarray, visible: np.ndarray) -> Pair:
    field = np.load(data_dir / "registration_residual_fields.npz")[dataset].astype(np.float32)
    row, column = np.mgrid[0:480, 0:640].astype(np.float32)
    map_x, map_y = column + field[..., 0], row + field[..., 1]
    infrared, visible = (cv2.resize(picture, SIZE) for picture in (infrared, visible))
    return cv2.remap(infrared, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE), visible
