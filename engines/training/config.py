"""What a training is told: one YAML file, checked as a whole before any data are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engines.base import EngineError
from engines.dspfusion import variants
from engines.training.data import Draw
from engines.training.losses import LossWeights

STAGES = 4
FOLDERS = ("data", "fields", "output", "start", "videos")  # relative to the configuration's own file
# What may differ between a checkpoint and the configuration that goes on with it: where, for how long and how fast it
# learns. A training that diverged goes on from its checkpoint with lower rates or a lower clip.
FREE_TO_CHANGE = (
    "data", "fields", "output", "start", "videos", "minutes", "shares", "iterations", "rates", "clip", "threads",
    "drawing_threads", "checkpoint_s", "validate_minutes", "device", "precision", "warm_up_items", "warm_up_iterations",
)  # fmt: skip

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class TeacherConfig(BaseModel):
    """A larger network of the same kind that a smaller one learns from in stages I and III."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    weights: str | None = None  # a safetensors file; None takes the shipped weights
    share: float = Field(0.5, gt=0, le=1)  # of the image losses: the rest still looks at the clean sources
    steps: int = Field(4, ge=1, le=10)  # of its diffusion

    def binding(self) -> dict[str, Any]:
        """What a checkpoint is tied to: the weights themselves, wherever they lie."""
        path = variants.default_weights(self.variant) if self.weights is None else Path(self.weights)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return self.model_dump(mode="json", exclude={"weights"}) | {"sha256": sha256}


class TrainConfig(BaseModel):
    """One training. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = "nano"
    data: str  # folder with index.csv and tar parts
    fields: str | None = None  # npz of residual displacements of the infrared pictures, for those of its size
    subsets: tuple[str, ...] = Field(("msrs", "roadscene", "llvip", "tno", "m3fd", "fmb"), min_length=1)
    balance: Share = Field(0.5, le=1)  # 0 draws all pairs alike, 1 all subsets alike
    videos: str | None = None  # folder of registered clips *_ir.mkv and *_vi.mkv: for stage IV, and stills for the rest
    output: str  # folder of the checkpoint, the exported weights, the journal and the pictures
    minutes: float = Field(30.0, gt=0)  # of all stages, without warm-up and reading; unless iterations are given
    shares: tuple[Share, Share, Share, Share] = (0.6, 0.15, 0.25, 0.0)  # of the minutes, by stage; their ratio counts
    iterations: tuple[Count, Count, Count, Count] | None = None  # of each stage: exact, instead of minutes
    batch: int = Field(8, ge=1)  # of each process
    rates: tuple[Positive, Positive, Positive, Positive] = (1e-3, 5e-4, 5e-4, 2e-4)  # of each stage at its start
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    averaging: float = Field(0.998, ge=0, lt=1)  # of the exponential moving average that is exported
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network; losses and weights are always fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(1, ge=0)
    threads: int = Field(2, ge=1)
    drawing_threads: int = Field(1, ge=1)  # a GPU is faster than one thread can draw
    checkpoint_s: float = Field(120.0, gt=0)
    held_back: Count = 0  # pairs that are kept out of training to judge it
    validate_minutes: float = Field(10.0, gt=0)
    teacher: TeacherConfig | None = None
    start: str | None = None  # weights to begin with, instead of the warm-up; tensors that no longer fit begin anew
    warm_up_items: Count = 4096  # regions that the degradation encoder learns to name before stage I
    warm_up_iterations: Count = 400
    draw: Draw = Draw()
    weights: LossWeights = LossWeights()

    @field_validator("shares", "iterations", mode="before")
    @classmethod
    def _without_video(cls, value: Any) -> Any:
        """Three numbers: no stage IV."""
        return [*value, 0] if isinstance(value, list | tuple) and len(value) == STAGES - 1 else value

    @field_validator("rates", mode="before")
    @classmethod
    def _same_rate(cls, value: Any) -> Any:
        return [*value, value[-1]] if isinstance(value, list | tuple) and len(value) == STAGES - 1 else value

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        for variant in (self.variant, *([self.teacher.variant] if self.teacher else [])):
            if variant not in variants.VARIANTS:
                raise ValueError(f"there is no variant '{variant}': choose one of {', '.join(variants.VARIANTS)}")
        if self.draw.region_px < self.draw.crop_px:
            raise ValueError(
                f"a crop of {self.draw.crop_px} pixels does not fit into a region of {self.draw.region_px}: "
                "lower draw.crop_px or raise draw.region_px"
            )
        if sum(self.iterations or self.shares) == 0:
            raise ValueError("no stage is given any time: raise a number of shares or iterations")
        if (self.iterations or self.shares)[-1] > 0 and self.videos is None:
            raise ValueError("stage IV learns from video: name a folder in `videos`, or give it no share")
        return self

    def binding(self) -> dict[str, Any]:
        """What a checkpoint is tied to, as plain values: another seed or loss would be another training."""
        teacher = None if self.teacher is None else self.teacher.binding()
        return self.model_dump(mode="json", exclude={*FREE_TO_CHANGE, "teacher"}) | {"teacher": teacher}


def read_config(path: Path) -> TrainConfig:
    """Reads a YAML file; folders in it are relative to the file.

    Raises:
        EngineError: the file is missing or says something that cannot be run.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} cannot be read ({error}): name a training configuration") from error
    except yaml.YAMLError as error:
        raise EngineError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise EngineError(f"{path} is no training configuration: it needs at least `data` and `output`")
    _resolve(values, FOLDERS, path.parent)
    if isinstance(values.get("teacher"), dict):
        _resolve(values["teacher"], ("weights",), path.parent)
    return checked(values, str(path))


def inputs_of(config: TrainConfig) -> dict[str, str]:
    """The files and folders that a training reads, by the keys that name them."""
    named = {key: getattr(config, key) for key in FOLDERS if key != "output"}
    if config.teacher is not None:
        named["teacher.weights"] = config.teacher.weights
    return {key: value for key, value in named.items() if value is not None}


def require_files(config: TrainConfig) -> None:
    """Looks for every file and folder at once: reading the pairs takes a while, and a typing error should not.

    Raises:
        EngineError: one is not there.
    """
    for key, value in inputs_of(config).items():
        if not Path(value).exists():
            raise EngineError(f"there is no {value}: `{key}` of the training configuration names it")


def _resolve(values: dict[str, Any], keys: tuple[str, ...], folder: Path) -> None:
    for key in keys:
        if isinstance(values.get(key), str):
            values[key] = str(folder / values[key])


def checked(values: dict[str, Any], name: str) -> TrainConfig:
    """A configuration from plain values.

    Raises:
        EngineError: it cannot be run; one line that names every fault.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(
            ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")]))
            for fault in error.errors()
        )
        raise EngineError(f"{name} is no training configuration: {faults}") from error
