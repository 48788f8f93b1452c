"""Trains one variant in three stages, within a budget of minutes.

Stage I trains everything but the diffusion: semantic tokens come from the clean pair, degradation tokens from the
degraded one. Stage II trains the denoiser alone: the tokens that it restores from the degraded pair take the place of
the clean ones. Stage III is ours, not the paper's: the U-Net learns to work with the tokens that it will be given,
because clean ones tell it more (how bright a darkened scene was) than any denoiser can restore.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.base import INFRARED_DEGRADATIONS, EngineError
from engines.dspfusion.diffusion import STEPS
from engines.dspfusion.network import DSPFusion, PriorTokens
from engines.dspfusion.priors import mosaic
from engines.dspfusion.variants import build
from engines.training.data import Batch, Draw, Pair, batches, draw_batch, read_pairs
from engines.training.losses import LossWeights, fusion_losses, info_nce

STAGES = 3
WARM_UP_RATE = 3e-3
SEMANTIC_STEP = 4  # a region is reduced by this, as a 640 x 480 frame is for its semantic view


class TrainConfig(BaseModel):
    """One training. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = "nano"
    data: str  # folder with index.csv and tar parts
    fields: str | None = None  # npz of residual displacements of the infrared pictures
    subsets: tuple[str, ...] = ("msrs", "roadscene", "llvip", "tno", "m3fd", "fmb")
    output: str  # folder of the checkpoint and the exported weights
    minutes: float = Field(30.0, gt=0)  # of all stages together, when no iterations are given
    shares: tuple[float, float, float] = (0.6, 0.15, 0.25)  # of the minutes, for each stage; their ratio counts
    iterations: tuple[int, int, int] | None = None  # of each stage: exact, instead of minutes
    batch: int = Field(8, ge=1)
    rates: tuple[float, float, float] = (1e-3, 5e-4, 5e-4)  # learning rate of each stage at its start
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    averaging: float = Field(0.998, ge=0, lt=1)  # of the exponential moving average that is exported
    seed: int = 1
    threads: int = Field(2, ge=1)
    checkpoint_s: float = Field(120.0, gt=0)
    start: str | None = None  # weights to begin with; tensors that no longer fit begin anew
    warm_up_items: int = Field(4096, ge=0)  # regions that the degradation encoder learns to name before stage I
    warm_up_iterations: int = Field(400, ge=0)
    draw: Draw = Draw()
    weights: LossWeights = LossWeights()


def read_config(path: Path) -> TrainConfig:
    """Reads a YAML file; folders in it are relative to the file.

    Raises:
        EngineError: the file is missing or says something that cannot be run.
    """
    try:
        values = yaml.safe_load(path.read_text())
        for key in ("data", "fields", "output", "start"):
            if isinstance(values, dict) and isinstance(values.get(key), str):
                values[key] = str(path.parent / values[key])
        return TrainConfig.model_validate(values)
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}): name a training configuration") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise EngineError(f"{path} is no training configuration: {error}") from error


def learns(parameter: str, stage: int) -> bool:
    """Whether a parameter of this name is trained in a stage: all but the diffusion, it alone, the U-Net alone."""
    if stage == 1:
        return not parameter.startswith("diffusion.")
    return parameter.startswith("diffusion." if stage == 2 else "unet.")


class Training:
    """The state of a training: everything that a checkpoint holds."""

    def __init__(self, config: TrainConfig, pairs: list[Pair]) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.pairs = pairs
        self.network = build(config.variant)
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.stage = 1
        self.done = [0, 0, 0]  # iterations of each stage
        self.spent_s = [0.0, 0.0, 0.0]
        self.recent: dict[str, float] = {}
        self.optimizer = self._optimizer()

    def begin(self) -> None:
        """Before the first iteration: the weights to start from, and the warm-up of the degradation encoder."""
        if self.config.start is not None:
            print(f"{take_fitting(self.network, Path(self.config.start))} tensors from {Path(self.config.start).name}")
        warm_up(self.network, self.pairs, self.config)
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}

    def _optimizer(self) -> torch.optim.Optimizer:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(learns(name, self.stage))
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            trained, lr=self._full_rate(), weight_decay=self.config.weight_decay, betas=(0.9, 0.99)
        )

    def _full_rate(self) -> float:
        return self.config.rates[min(self.stage, STAGES) - 1]

    def progress(self) -> float:
        """How much of the current stage is done, from 0 to 1."""
        current = self.stage - 1
        if self.config.iterations is not None:
            planned = self.config.iterations[current]
            return min(1.0, self.done[current] / planned) if planned else 1.0
        shares = self.config.shares
        budget_s = 60 * self.config.minutes * shares[current] / sum(shares)
        return min(1.0, self.spent_s[current] / budget_s) if budget_s else 1.0

    def run(self, checkpoint: Path | None = None, stop_after: int | None = None) -> None:
        """Trains to the end of the last stage, or for `stop_after` iterations."""
        left = stop_after
        saved = time.monotonic()
        while self.stage <= STAGES:
            current = self.stage - 1
            seed = self.config.seed * 4 + current
            source = batches(self.pairs, self.config.batch, self.config.draw, seed, self.done[current])
            while self.progress() < 1 and left != 0:
                began = time.monotonic()
                self.step(next(source))
                self.spent_s[current] += time.monotonic() - began
                self.done[current] += 1
                left = None if left is None else left - 1
                if self.done[current] % 50 == 0:
                    self._report()
                if checkpoint is not None and time.monotonic() - saved > self.config.checkpoint_s:
                    self.save(checkpoint)
                    saved = time.monotonic()
            if left == 0:
                break
            self._next_stage()
        if checkpoint is not None:
            self.save(checkpoint)

    def _next_stage(self) -> None:
        self.stage += 1
        # A stage goes on with the averaged network, which is the one that is exported.
        self.network.load_state_dict(self.average)
        if self.stage <= STAGES:
            self.optimizer = self._optimizer()

    def step(self, batch: Batch) -> None:
        """One iteration of the current stage."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._full_rate() * _schedule(self.progress(), self.done[self.stage - 1])
        losses = stage_losses(self.network, batch, self.stage, self._noise(batch))
        weights = self.config.weights
        total = torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.optimizer.step()
        self._average()
        for name, value in losses.items():
            self.recent[name] = 0.95 * self.recent.get(name, value.item()) + 0.05 * value.item()

    def _noise(self, batch: Batch) -> tuple[int, Tensor | None]:
        """How many diffusion steps this iteration takes, and the noise it starts from (None: the stored one)."""
        number = self.config.seed * 1_000_003 + self.done[self.stage - 1]
        generator = torch.Generator().manual_seed(number)
        steps = int(torch.randint(1, STEPS + 1, (1,), generator=generator))
        if self.stage != 2:
            return steps, None
        shape = (len(batch.infrared), *self.network.diffusion.noise.shape[1:])
        return steps, torch.randn(shape, generator=generator)

    @torch.no_grad()
    def _average(self) -> None:
        done = self.done[self.stage - 1]
        keep = min(self.config.averaging, (1 + done) / (10 + done))
        for name, value in self.network.state_dict().items():
            if value.dtype.is_floating_point:
                self.average[name].lerp_(value, 1 - keep)

    def _report(self) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.recent.items())
        current = self.stage - 1
        print(
            f"stage {self.stage}  {self.done[current]:6d}  {self.spent_s[current] / 60:6.2f} min  {values}", flush=True
        )

    def save(self, path: Path) -> None:
        """Writes everything needed to go on, and the averaged weights beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "done": self.done,
            "spent_s": self.spent_s,
            "recent": self.recent,
            "variant": self.config.variant,
        }
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(path)
        self.export(path.with_name(f"{self.config.variant}.safetensors"))

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            EngineError: the checkpoint is missing or belongs to another variant.
        """
        if not path.is_file():
            raise EngineError(f"there is no checkpoint {path} to resume from: start without --resume")
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["variant"] != self.config.variant:
            raise EngineError(f"{path} is a checkpoint of '{state['variant']}', not of '{self.config.variant}'")
        self.stage, self.done, self.spent_s = state["stage"], state["done"], state["spent_s"]
        self.recent = state["recent"]
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, path: Path) -> None:
        """Writes the averaged weights as safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.average.items()}
        metadata = {
            "variant": self.config.variant,
            "iterations": "+".join(str(done) for done in self.done),
            "minutes": "+".join(f"{spent / 60:.1f}" for spent in self.spent_s),
        }
        save_file(tensors, path, metadata=metadata)
        path.chmod(0o644)  # the library keeps it to its owner, and a package is read by others


def take_fitting(network: DSPFusion, path: Path) -> int:
    """Takes over the tensors of a weights file that fit by name and shape.

    Returns:
        How many were taken.
    """
    state = network.state_dict()
    fitting = {
        name: value for name, value in load_file(path).items() if name in state and state[name].shape == value.shape
    }
    network.load_state_dict(state | fitting)
    return len(fitting)


def warm_up(network: DSPFusion, pairs: list[Pair], config: TrainConfig) -> None:
    """Teaches the degradation encoder to name degradations, on small views drawn once and shown again and again.

    A prior that says nothing would be ignored by the U-Net; alongside the image losses it takes thousands of
    iterations to say something, alone a few hundred cheap ones.
    """
    if config.warm_up_items == 0 or config.warm_up_iterations == 0:
        return
    views: list[tuple[Tensor, ...]] = []
    for number in range(-(-config.warm_up_items // config.batch)):
        batch = draw_batch(pairs, config.batch, config.draw, config.seed * 4 + STAGES, number)
        pictures = (mosaic(picture).half() for picture in (batch.region_infrared, batch.region_visible))
        views.append((*pictures, batch.infrared_kind, batch.visible_kind))
    infrared, visible, infrared_kind, visible_kind = (torch.cat(column) for column in zip(*views, strict=True))
    generator = torch.Generator().manual_seed(config.seed)
    parts = (network.degradation_encoder, network.name_infrared, network.name_visible)
    optimizer = torch.optim.AdamW([parameter for part in parts for parameter in part.parameters()], lr=WARM_UP_RATE)
    for iteration in range(config.warm_up_iterations):
        for group in optimizer.param_groups:
            group["lr"] = WARM_UP_RATE * (1 - iteration / config.warm_up_iterations)
        chosen = torch.randint(len(infrared), (4 * config.batch,), generator=generator)
        encoder = network.degradation_encoder
        infrared_names = network.name_infrared(encoder(infrared[chosen].float().expand(-1, 3, -1, -1)).mean(1))
        visible_names = network.name_visible(encoder(visible[chosen].float()).mean(1))
        loss = F.cross_entropy(infrared_names, infrared_kind[chosen]) + F.cross_entropy(
            visible_names, visible_kind[chosen]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (iteration + 1) % 50 == 0:
            print(f"warm-up  {iteration + 1:6d}  naming {loss.item():.3f}", flush=True)


def _schedule(progress: float, iteration: int) -> float:
    """Share of the full rate: a short rise, then half a cosine down to 1 %."""
    rise = min(1.0, (iteration + 1) / 50)
    return rise * (0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress)))))


def stage_losses(network: DSPFusion, batch: Batch, stage: int, noise: tuple[int, Tensor | None]) -> dict[str, Tensor]:
    """The losses of one batch by the names of `LossWeights`.

    Args:
        noise: number of diffusion steps and starting tokens; not used in stage I.
    """
    clean = network.encode_semantics(*_reduced(batch.clean_region_infrared, batch.clean_region_visible))
    if stage == 1:
        priors = network.complete_priors(batch.region_infrared, batch.region_visible, clean, 0)
    else:
        seen = network.encode_semantics(*_reduced(batch.region_infrared, batch.region_visible))
        priors = network.complete_priors(batch.region_infrared, batch.region_visible, seen, *noise)
    fused = network(
        batch.infrared,
        batch.visible,
        priors.degradation_infrared,
        priors.degradation_visible,
        priors.semantic,
    )
    losses = fusion_losses(fused, batch.clean_infrared, batch.clean_visible)
    if stage == 1:
        losses |= _degradation_losses(priors, batch)
    elif stage == 2:
        losses["tokens"] = F.l1_loss(priors.semantic, clean)
    return losses


def _reduced(infrared: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(infrared, SEMANTIC_STEP), F.avg_pool2d(visible, SEMANTIC_STEP)


def _degradation_losses(priors: PriorTokens, batch: Batch) -> dict[str, Tensor]:
    embeddings = torch.cat([priors.infrared_embedding, priors.visible_embedding])
    # The same kind in the other modality is another label.
    visible = torch.where(batch.visible_kind >= 0, batch.visible_kind + len(INFRARED_DEGRADATIONS), batch.visible_kind)
    naming = F.cross_entropy(priors.infrared_logits, batch.infrared_kind) + F.cross_entropy(
        priors.visible_logits, batch.visible_kind
    )
    return {
        "contrast": info_nce(embeddings, torch.cat([batch.infrared_kind, visible])),
        "naming": naming,
        "rating": _rating(priors.infrared_strength, batch.infrared_strength, batch.infrared_kind)
        + _rating(priors.visible_strength, batch.visible_strength, batch.visible_kind),
    }


def _rating(found: Tensor, true: Tensor, kind: Tensor) -> Tensor:
    """L1 of the strengths where the modality is there."""
    there = (kind >= 0).to(found)
    return ((found - true).abs() * there).sum() / there.sum().clamp(min=1)


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Trains to the end of the budget.

    Returns:
        The exported weights.
    """
    torch.set_num_threads(config.threads)
    fields = None if config.fields is None else Path(config.fields)
    pairs = read_pairs(Path(config.data), config.subsets, fields, config.draw.region_px)
    training = Training(config, pairs)
    checkpoint = Path(config.output) / f"{config.variant}.checkpoint"
    if resume:
        training.load(checkpoint)
    else:
        training.begin()
    training.run(checkpoint)
    return checkpoint.with_name(f"{config.variant}.safetensors")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m engines.training.train", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--minutes", type=float, help="budget of all stages together")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args(arguments)
    config = read_config(options.config)
    if options.minutes is not None:
        config = config.model_copy(update={"minutes": options.minutes})
    print(train(config, options.resume))


if __name__ == "__main__":
    main()
