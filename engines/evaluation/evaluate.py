"""Judges an engine on public pairs, clean and degraded, against the clean sources.

    python -m engines.evaluation.evaluate DATA_DIR --json scores.json

DATA_DIR holds `eval/<data set>/ir/<name>.*` and `.../vi/<name>.*`, or is such a folder `eval` itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.base import EngineError, FusionEngine
from engines.evaluation.degradations import DEGRADATIONS, degrade
from engines.evaluation.metrics import METRICS, evaluate_pair

Image = NDArray[np.uint8]
Fuse = Callable[[Image, Image], Image]  # infrared (H, W), visible RGB (H, W, 3) -> fused, RGB or grey

PUBLIC_PAIRS = tuple(
    [f"msrs/{name}" for name in ["00095D", "00349D", "00537D", "01413D", "00020N", "00862N", "01016N", "01238N"]]
    + [f"roadscene/FLIR_{name}" for name in ["00288", "05245", "07190", "08874"]]
)
CONDITIONS = ("clean", *DEGRADATIONS)


@dataclass(frozen=True)
class Pair:
    """One registered pair of clean pictures."""

    name: str
    infrared: Image  # uint8 (H, W)
    visible: Image  # uint8 RGB (H, W, 3)

    def __post_init__(self) -> None:
        if self.infrared.shape != self.visible.shape[:2]:
            raise ValueError(f"{self.name}: {self.infrared.shape = } does not fit {self.visible.shape = }")


def public_pairs(data_dir: Path, names: Sequence[str] = PUBLIC_PAIRS) -> Iterator[Pair]:
    """The pairs `data set/name` of a folder, in that order.

    Raises:
        FileNotFoundError: if one of them is not there.
    """
    root = data_dir / "eval" if (data_dir / "eval").is_dir() else data_dir
    for name in names:
        data_set, stem = name.split("/")
        yield _read_pair(name, _one_file(root / data_set / "ir", stem), _one_file(root / data_set / "vi", stem))


def folder_pairs(infrared_dir: Path, visible_dir: Path) -> Iterator[Pair]:
    """The pairs of two folders whose files have equal names, extension aside, in the order of the names.

    Raises:
        FileNotFoundError: if a picture has no partner, or there is none at all.
    """
    stems = sorted({path.stem for folder in (infrared_dir, visible_dir) for path in folder.iterdir() if path.is_file()})
    if not stems:
        raise FileNotFoundError(f"{infrared_dir} and {visible_dir} hold no pictures")
    for stem in stems:
        yield _read_pair(stem, _one_file(infrared_dir, stem), _one_file(visible_dir, stem))


def evaluate_pairs(
    engine: FusionEngine | Fuse, pairs: Iterable[Pair], degradation: str | None = None
) -> dict[str, Any]:
    """Fuses every pair, degraded or not, and scores it against the clean sources.

    Args:
        engine: an engine (priors are estimated anew for every pair), or any function of infrared and visible.
        degradation: one of `DEGRADATIONS`; None leaves the pairs clean.

    Returns:
        `rows`, one for each pair (`name`, `degradation` and the metrics by name), and `mean` by metric name.
    """
    condition = degradation or "clean"
    rows: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        infrared, visible = degrade(condition, pair.infrared, pair.visible, seed=index)
        fused = _fuse(engine, infrared, visible)
        rows.append({"name": pair.name, "degradation": condition, **evaluate_pair(fused, pair.infrared, pair.visible)})
    if not rows:
        raise ValueError("there is no pair to evaluate")
    return {"rows": rows, "mean": mean_scores(rows)}


def evaluate_folder(
    engine: FusionEngine | Fuse, data_dir: Path, degradations: Sequence[str] = CONDITIONS
) -> dict[str, Any]:
    """The twelve public pairs under each of the conditions ("clean" or a name of `DEGRADATIONS`).

    Returns:
        `rows` of all of them, `mean` by metric name over all rows, and `mean_by_degradation`.
    """
    pairs = list(public_pairs(data_dir))
    parts = {
        condition: evaluate_pairs(engine, pairs, None if condition == "clean" else condition)
        for condition in degradations
    }
    rows = [row for part in parts.values() for row in part["rows"]]
    return {
        "rows": rows,
        "mean": mean_scores(rows),
        "mean_by_degradation": {condition: part["mean"] for condition, part in parts.items()},
    }


def mean_scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The plain mean of every metric over the rows."""
    return {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr where the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m engines.evaluation.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--json", default="-", metavar="FILE", help="where the scores go; - is standard output")
    parser.add_argument("--degradation", choices=CONDITIONS, action="append", help="default: clean and all six")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--diffusion-steps", type=int, default=4)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args(arguments)
    try:
        scores = _evaluate(options)
    except (EngineError, OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    text = json.dumps(scores, indent=1)
    if options.json == "-":
        print(text)
    else:
        Path(options.json).write_text(text + "\n")
    return 0


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from engines.selection import create_engine  # here, so that judging ready pictures needs no runtime

    engine = create_engine(
        options.runtime,
        options.variant,
        options.precision,
        options.threads,
        options.diffusion_steps,
        options.weights,
    )
    try:
        scores = evaluate_folder(engine, options.data_dir, options.degradation or CONDITIONS)
    finally:
        engine.close()
    description = engine.description
    return {
        "engine": {
            "runtime": description.runtime,
            "precision": description.precision,
            "variant": description.variant,
            "weights_sha256": description.weights_sha256,
        },
        **scores,
    }


def _fuse(engine: FusionEngine | Fuse, infrared: Image, visible: Image) -> Image:
    if callable(engine):
        return engine(infrared, visible)
    return engine.fuse(infrared, visible, engine.estimate_priors(infrared, visible))


def _one_file(folder: Path, stem: str) -> Path:
    matches = sorted(folder.glob(f"{stem}.*"))
    if len(matches) != 1:
        raise FileNotFoundError(f"expected one picture {stem}.* in {folder}, found {len(matches)}: is this the data?")
    return matches[0]


def _read_pair(name: str, infrared: Path, visible: Path) -> Pair:
    return Pair(name, _read(infrared, cv2.IMREAD_GRAYSCALE), _read(visible, cv2.IMREAD_COLOR_RGB))


def _read(path: Path, how: int) -> Image:
    image = cv2.imread(str(path), how)
    if image is None:
        raise ValueError(f"{path} is not a picture that can be read")
    return np.asarray(image, dtype=np.uint8)


if __name__ == "__main__":
    sys.exit(main())
