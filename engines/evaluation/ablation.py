"""Do the priors earn their cost? The same network and pictures, with its priors replaced one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.base import FusionEngine, Priors
from engines.evaluation.cases import Case
from engines.evaluation.evaluate import Image, Row, score_cases
from engines.evaluation.metrics import intensity_error

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.float32]

# "neutral" tokens are the mean over all the judged inputs: they say nothing about this one.
BOTH_PRIORS = "both priors"  # the network as it runs
MODES = {
    BOTH_PRIORS: "semantic prior restored by the diffusion, degradation prior of the picture",
    "unrestored": "semantic prior as read from the degraded pair",
    "clean": "semantic prior read from the clean pair: what a perfect diffusion would give",
    "no semantic": "neutral semantic prior",
    "no degradation": "neutral degradation prior, in the diffusion, too",
    "no priors": "both neutral",
}
STEPS_MODE = "steps "
# How far the semantic tokens are from the clean pair's (root mean square), and the picture from the clean sources.
ERRORS = ("prior_error", "intensity_error")


class Ablation:
    """Fuses cases with the priors that `Case.mode` asks for: one of `MODES`, or "steps N".

    Args:
        engine: fuses.
        variant, weights: the same network's, to read single priors with.
        steps: of the diffusion, where the mode does not say.
    """

    def __init__(self, engine: FusionEngine, variant: str, weights: Path | None, steps: int) -> None:
        from engines.dspfusion.loading import load

        self._engine, self.steps = engine, steps
        self._network, _ = load(variant, weights)
        self._neutral: tuple[Tensor, Tensor, Tensor] | None = None
        self._read: tuple[Case, Priors, tuple[Tensor, Tensor, Tensor], Tensor] | None = None
        self.errors: dict[tuple[str, str, str], dict[str, float]] = {}

    def learn_neutral(self, cases: Iterable[Case], on_done: Callable[[], None] = lambda: None) -> None:
        """Takes the mean tokens of these inputs as neutral ones."""
        import torch

        read = []
        for case in cases:
            read.append(self._tokens(case.infrared, case.visible))
            on_done()
        if not read:
            raise ValueError("there is no pair to evaluate")
        infrared, visible, semantic = (torch.stack(tokens).mean(0) for tokens in zip(*read, strict=True))
        self._neutral = infrared, visible, semantic

    def __call__(self, case: Case) -> Image:
        """Fuses one case, and notes how far its semantic tokens and its picture are from what they should be."""
        priors, tokens, clean = self._reading(case)
        infrared, visible, semantic = self._replaced(case.mode, tokens, clean)
        changed = replace(
            priors,
            degradation_infrared=infrared[0].numpy(),
            degradation_visible=visible[0].numpy(),
            semantic=semantic[0].numpy(),
        )
        fused = self._engine.fuse(case.infrared, case.visible, changed)
        self.errors[case.pair.name, case.condition, case.mode] = {
            "prior_error": float((semantic - clean).pow(2).mean().sqrt()),
            "intensity_error": intensity_error(fused, case.pair.infrared, case.pair.visible),
        }
        return fused

    def _replaced(
        self, mode: str, tokens: tuple[Tensor, Tensor, Tensor], clean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        infrared, visible, semantic = tokens
        if mode in ("no degradation", "no semantic", "no priors"):
            if self._neutral is None:
                raise ValueError("the neutral priors are not known: call learn_neutral first")
            if mode != "no semantic":
                infrared, visible = self._neutral[:2]
            if mode != "no degradation":
                return infrared, visible, self._neutral[2]
        if mode == "unrestored":
            return infrared, visible, semantic
        if mode == "clean":
            return infrared, visible, clean
        steps = int(mode.removeprefix(STEPS_MODE)) if mode.startswith(STEPS_MODE) else self.steps
        return infrared, visible, self._restored(semantic, infrared, visible, steps)

    def _reading(self, case: Case) -> tuple[Priors, tuple[Tensor, Tensor, Tensor], Tensor]:
        """The priors of a case; those of the last one are kept, because its modes come one after the other."""
        last = self._read
        if last is None or last[0].infrared is not case.infrared or last[0].visible is not case.visible:
            priors = self._engine.estimate_priors(case.infrared, case.visible)
            clean = self._tokens(case.pair.infrared, case.pair.visible)[2]
            last = self._read = case, priors, self._tokens(case.infrared, case.visible), clean
        return last[1], last[2], last[3]

    def _tokens(self, infrared: Image, visible: Image) -> tuple[Tensor, Tensor, Tensor]:
        """Degradation tokens of both pictures and the semantic ones, not restored, each (1, 16, width)."""
        import torch

        from engines.pytorch_engine import tensor_of, unit_infrared, unit_visible

        with torch.inference_mode():
            thermal, optical = unit_infrared(tensor_of(infrared)), unit_visible(tensor_of(visible))
            read = self._network.estimate_priors(thermal, optical, 1)
            return read.degradation_infrared, read.degradation_visible, self._network.encode_semantics(thermal, optical)

    def _restored(self, semantic: Tensor, infrared: Tensor, visible: Tensor, steps: int) -> Tensor:
        import torch

        with torch.inference_mode():
            restored: Tensor = self._network.diffusion(semantic, infrared, visible, steps)
            return restored


def in_modes(cases: Iterable[Case], modes: Sequence[str]) -> Iterator[Case]:
    """Every case once in each mode."""
    for case in cases:
        for mode in modes:
            yield replace(case, mode=mode)


def compare(
    ablation: Ablation, cases: Iterable[Case], modes: Sequence[str], on_done: Callable[[], None] = lambda: None
) -> list[Row]:
    """Scores every case in each mode; rows have `mode` and what is in `ERRORS` besides."""
    rows = score_cases(ablation, in_modes(cases, modes), lambda *_: on_done())
    for row in rows:
        row |= ablation.errors[row["name"], row["degradation"], row["mode"]]
    return rows
