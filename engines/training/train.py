"""Trains one variant in four stages, within a budget of minutes; `stages.py` says what each of them teaches.

One process, or several under torchrun. The draws of an iteration depend on the seed and its number alone, so that a
resumed training ends where an unbroken one does.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.arrays import weights_sha256
from engines.base import EngineError
from engines.dspfusion.diffusion import STEPS
from engines.dspfusion.loading import build
from engines.dspfusion.network import DSPFusion
from engines.training.checkpoint import read_checkpoint, write_checkpoint, write_whole
from engines.training.config import STAGES, TrainConfig, checked, read_config, require_files
from engines.training.data import (
    Batch,
    Pair,
    balanced,
    draw_batch,
    drawn_ahead,
    hold_back,
    moved,
    numbers_of,
    reading_pairs,
)
from engines.training.distributed import ALONE, Processes, processes
from engines.training.journal import BOARD, LOG, PICTURES, Journal
from engines.training.stages import (
    NAMES,
    Noise,
    Teacher,
    image_losses,
    keep_precise,
    learns,
    video_losses,
    warm_up,
    weighted,
)
from engines.training.validation import Validation
from engines.training.video import Clip, VideoBatch, draw_video_batch, read_clips, stills

REPORTED_ITERATIONS = 50
NAMED_TENSORS = 8  # at most, of those that did not fit


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    weights: Path | None  # None: it was stopped during the warm-up, and has written nothing
    checkpoint: Path | None
    finished: bool  # False: it was asked to stop, and can go on with --resume
    iterations: list[int]  # of each stage
    minutes: list[float]
    validation: dict[str, float]  # the last one; empty where no pairs are held back


class Training:
    """The state of a training: everything that a checkpoint holds, and how it moves on."""

    def __init__(
        self,
        config: TrainConfig,
        pairs: list[Pair],
        clips: list[Clip] | None = None,
        team: Processes = ALONE,
        journal: Journal | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.team = config, team
        kept, held = hold_back(pairs, config.held_back)
        self.clips = clips or []
        self.pairs = balanced([*kept, *stills(self.clips)], config.balance)
        self.journal = Journal(None) if journal is None else journal
        self.half = config.precision == "bf16"
        self.network = build(config.variant).to(team.device)
        if team.device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.judged = copy.deepcopy(self.network).eval()  # takes over the averaged weights when it is looked at
        if self.half:
            keep_precise(self.network.unet.head)
        self.validation = Validation(held, config, team.device) if held and team.first else None
        self.last_validation: dict[str, float] = {}
        self.teacher = Teacher(config.teacher, team.device) if config.teacher else None
        self.binding = config.binding()
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.stage = 1
        self.done = [0] * STAGES  # iterations of each stage
        self.spent_s = [0.0] * STAGES
        self.recent: dict[str, float] = {}
        self.started_from: str | None = None  # SHA-256 of the weights to start from
        self.optimizer = self._optimizer()

    def begin(self, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Before the first iteration: the weights to start from, or else the warm-up of the degradation encoder.

        Returns:
            Whether it came to its end, that is, was not asked to stop.
        """
        ended = True
        if self.config.start is not None:
            anew = take_fitting(self.network, Path(self.config.start))
            self.started_from = weights_sha256(self.config.variant, Path(self.config.start))
            self.journal.say(_told(anew, len(self.average), Path(self.config.start)))
        else:
            ended = warm_up(
                self.network,
                self.pairs,
                self.config,
                self.team.device,
                self.journal.say,
                lambda: self.team.agree(0, stopping())[1],
            )
        self.team.share(self.network.state_dict())
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        return ended

    def _optimizer(self) -> torch.optim.Optimizer:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(learns(name, self.stage))
            parameter.grad = None  # of the stage before
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            trained, lr=self._full_rate(), weight_decay=self.config.weight_decay, betas=(0.9, 0.99)
        )

    def _full_rate(self) -> float:
        return self.config.rates[min(self.stage, STAGES) - 1]

    def progress(self) -> float:
        """How much of the current stage is done, from 0 to 1."""
        planned, passed = self._planned()[self.stage - 1], self._passed()[self.stage - 1]
        return min(1.0, passed / planned) if planned else 1.0

    def _planned(self) -> list[float]:
        """What each stage is given: iterations, or else seconds."""
        if self.config.iterations is not None:
            return [*self.config.iterations]
        return [60 * self.config.minutes * share / sum(self.config.shares) for share in self.config.shares]

    def _passed(self) -> list[float]:
        return self.spent_s if self.config.iterations is None else [*self.done]

    def left(self) -> float:
        """What the current stage and those after it have left: iterations, or else seconds."""
        stages = zip(self._planned(), self._passed(), strict=True)
        return sum(max(0.0, planned - passed) for planned, passed in [*stages][self.stage - 1 :])

    def run(
        self,
        checkpoint: Path | None = None,
        stop_after: int | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to the end of the last stage, for `stop_after` iterations, or until `stopping` says so.

        Returns:
            Whether the last stage came to its end.
        """
        last = None if stop_after is None else sum(self.done) + stop_after
        clock = _Clock(self.config)
        stopped = False
        while self.stage <= STAGES and not stopped:
            stopped = self._run_stage(checkpoint, clock, lambda: stopping() or sum(self.done) == last)
            if not stopped:
                self._end_stage()
        if checkpoint is not None:
            self.save(checkpoint)
        return not stopped

    def _run_stage(self, checkpoint: Path | None, clock: _Clock, stopping: Callable[[], bool]) -> bool:
        """Trains to the end of the current stage.

        Returns:
            Whether it was stopped before.
        """
        current = self.stage - 1
        with closing(self._batches()) as source:
            while True:
                progress, stop = self.team.agree(self.progress(), stopping())
                if progress >= 1 or stop:
                    if self.recent and self.done[current] % REPORTED_ITERATIONS:
                        self._note("train", self.recent)
                    return progress < 1
                began = time.monotonic()
                self.step(moved(next(source), self.team.device), progress)
                self.spent_s[current] += time.monotonic() - began
                self.done[current] += 1
                self.journal.advance(NAMES[current], progress, self.recent)
                if self.done[current] % REPORTED_ITERATIONS == 0:
                    self._note("train", self.recent)
                if checkpoint is not None and clock.save_due():
                    self.save(checkpoint)
                if clock.validation_due():
                    self.validate()

    def _batches(self) -> Generator[Batch | VideoBatch]:
        """This process's batches of the current stage, from the next iteration on."""
        config, current = self.config, self.stage - 1
        seed = config.seed * 4 + current
        numbers = numbers_of(self.done[current], self.team.rank, self.team.size)

        def still(number: int) -> Batch:
            return draw_batch(self.pairs, config.batch, config.draw, seed, number)

        def moving(number: int) -> VideoBatch:
            return draw_video_batch(self.clips, self.pairs, config.batch, config.draw, seed, number)

        if self.stage == STAGES:
            return drawn_ahead(moving, numbers, config.drawing_threads)
        return drawn_ahead(still, numbers, config.drawing_threads)

    def _end_stage(self) -> None:
        """Looks at what a stage has reached, and goes on with the averaged network, which is the exported one."""
        if self.recent:
            self.validate()
            if self.stage in (2, 3):
                self._report_priors()
        self.stage += 1
        self.network.load_state_dict(self.average)
        self.recent = {}
        if self.stage <= STAGES:
            self.optimizer = self._optimizer()

    def step(self, batch: Batch | VideoBatch, progress: float | None = None) -> None:
        """One iteration of the current stage.

        Raises:
            EngineError: the loss is not a number any more.
        """
        for group in self.optimizer.param_groups:
            share = _schedule(self.progress() if progress is None else progress, self.done[self.stage - 1])
            group["lr"] = self._full_rate() * share
        losses = self._losses(batch)
        total = weighted(losses, self.config.weights, self.teacher.share if self.teacher else 0.0)
        values = dict(zip(losses, torch.stack([*losses.values()]).detach().tolist(), strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.team.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        if not bool(torch.isfinite(norm)):
            raise EngineError(
                f"the gradients of stage {NAMES[self.stage - 1]} are no numbers any more after "
                f"{self.done[self.stage - 1]} iterations: lower its rate, and go on with --resume"
            )
        self.optimizer.step()
        self._average()
        for name, value in values.items():
            self.recent[name] = 0.95 * self.recent.get(name, value) + 0.05 * value

    def _losses(self, batch: Batch | VideoBatch) -> dict[str, Tensor]:
        if isinstance(batch, VideoBatch):
            return video_losses(self.network, batch, self._noise(batch.first), self.half)
        few_steps = self.config.weights.few_steps > 0
        return image_losses(
            self.network, batch, self.stage, self._noise(batch), self.teacher, self.half, few_steps=few_steps
        )

    def _noise(self, batch: Batch) -> Noise:
        """How many diffusion steps this iteration takes, in all processes, and in stage II the noise it starts from."""
        number = self.config.seed * 1_000_003 + self.done[self.stage - 1]
        generator = torch.Generator().manual_seed(number)
        steps = int(torch.randint(1, STEPS + 1, (1,), generator=generator))
        if self.stage != 2:
            return Noise(steps)
        shape = (len(batch.infrared), *self.network.diffusion.noise.shape[1:])
        for _ in range(self.team.rank):  # every process starts from noise of its own
            torch.randn(shape, generator=generator)
        return Noise(steps, moved(torch.randn(shape, generator=generator), self.team.device))

    @torch.no_grad()
    def _average(self) -> None:
        done = self.done[self.stage - 1]
        keep = min(self.config.averaging, (1 + done) / (10 + done))
        state = self.network.state_dict()
        names = [name for name, value in state.items() if value.dtype.is_floating_point]
        torch._foreach_lerp_([self.average[name] for name in names], [state[name] for name in names], 1 - keep)

    def validate(self) -> None:
        """Judges the averaged network, where pairs are held back; the first process does, the others wait."""
        if self.validation is None:
            return
        self.judged.load_state_dict(self.average)
        stage = min(self.stage, STAGES)
        self.last_validation, sheet = self.validation.judge(self.judged, stage)
        self._note("validation", self.last_validation)
        self.journal.show(sheet, NAMES[stage - 1], sum(self.done))

    def _report_priors(self) -> None:
        if self.validation is None:
            return
        self.judged.load_state_dict(self.average)
        for steps, values in self.validation.prior_errors(self.judged).items():
            self._note(f"priors_{steps}_steps", values)

    def _note(self, what: str, values: dict[str, float]) -> None:
        current = min(self.stage, STAGES) - 1
        minutes = sum(self.spent_s) / 60
        self.journal.note(what, NAMES[current], self.done[current], sum(self.done), minutes, values)

    def save(self, path: Path) -> None:
        """Writes everything needed to go on, and the averaged weights beside it."""
        if not self.team.first:
            return
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "done": self.done,
            "spent_s": self.spent_s,
            "recent": self.recent,
            "started_from": self.started_from,
            "variant": self.config.variant,
            "processes": self.team.size,
            "config": self.binding,
        }
        write_checkpoint(path, state)
        self.export(path.with_name(f"{self.config.variant}.safetensors"))

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            EngineError: it is missing, damaged, belongs to another training or another version's network, or has
                nothing left to do.
        """
        state = read_checkpoint(path, self.config)
        if state["processes"] != self.team.size:
            self.journal.say(
                f"{path.name} was written by {state['processes']} processes, and {self.team.size} go on: "
                "their draws are others than an unbroken training would have seen"
            )
        # A finished training goes on with its last stage, should that have been given more to do.
        finished = state["stage"] > STAGES
        self.stage, self.done, self.spent_s = min(state["stage"], STAGES), state["done"], state["spent_s"]
        self.recent = {} if finished else state["recent"]
        self.started_from = state.get("started_from")  # older checkpoints do not know it
        if finished and self.left() == 0:
            raise EngineError(
                f"{path} is of a finished training with nothing left to do: only stage {NAMES[-1]} could go on, and is "
                "given no more. Begin anew without --resume, with its weights as `start`"
            )
        try:
            self.network.load_state_dict(state["network"])
            self.average = {name: value.to(self.team.device) for name, value in state["average"].items()}
            self.optimizer = self._optimizer()
            if self.done[self.stage - 1] > 0:
                self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"{path} holds a '{self.config.variant}' network of another version, which does not fit this one: "
                f"begin anew without --resume, with {path.with_suffix('.safetensors')} as `start`"
            ) from error
        left = f"{self.left() / 60:.1f} minutes" if self.config.iterations is None else f"{self.left():.0f} iterations"
        self.journal.say(
            f"{'of a finished training only the last stage goes on: ' if finished else 'going on in '}"
            f"stage {NAMES[self.stage - 1]} after {self.done[self.stage - 1]} iterations, with {left} left to the end"
        )

    def export(self, path: Path) -> None:
        """Writes the averaged weights as safetensors."""
        tensors = {name: value.contiguous() for name, value in self.average.items()}
        metadata = {
            "variant": self.config.variant,
            "iterations": "+".join(str(done) for done in self.done),
            "minutes": "+".join(f"{spent / 60:.1f}" for spent in self.spent_s),
        }
        if self.started_from is not None:
            metadata["started_from"] = self.started_from
        if self.teacher is not None and self.config.teacher is not None:
            metadata["teacher"] = f"{self.config.teacher.variant} {self.teacher.sha256}"
        write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))
        path.chmod(0o644)  # the library keeps it to its owner, and a package is read by others


class _Clock:
    """When the next checkpoint and the next validation are due."""

    def __init__(self, config: TrainConfig) -> None:
        self._save_s, self._validate_s = config.checkpoint_s, 60 * config.validate_minutes
        self._saved = self._validated = time.monotonic()

    def save_due(self) -> bool:
        due = time.monotonic() - self._saved > self._save_s
        self._saved = time.monotonic() if due else self._saved
        return due

    def validation_due(self) -> bool:
        due = time.monotonic() - self._validated > self._validate_s
        self._validated = time.monotonic() if due else self._validated
        return due


def take_fitting(network: DSPFusion, path: Path) -> list[str]:
    """Takes over the tensors of a weights file that fit by name and shape.

    Returns:
        The names of the network's tensors that found none, and begin anew.

    Raises:
        EngineError: the file cannot be read, or nothing in it fits.
    """
    state = network.state_dict()
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path} holds no weights to start from ({error}): name another file in `start`") from error
    fitting = {name: value for name, value in tensors.items() if name in state and state[name].shape == value.shape}
    if not fitting:
        raise EngineError(f"no tensor of {path} fits this variant: name weights of the same size in `start`")
    network.load_state_dict(state | fitting)
    return [name for name in state if name not in fitting]


def _told(anew: list[str], number: int, start: Path) -> str:
    """What was taken of the network's tensors from the weights to start from, in a line."""
    taken = f"{number - len(anew)} of {number} tensors from {start.name}"
    more = [f"and {len(anew) - NAMED_TENSORS} more"] if len(anew) > NAMED_TENSORS else []
    return f"{taken}; anew: {', '.join([*anew[:NAMED_TENSORS], *more])}" if anew else taken


def _schedule(progress: float, iteration: int) -> float:
    """Share of the full rate: a short rise, then half a cosine down to 1 %."""
    rise = min(1.0, (iteration + 1) / 50)
    return rise * (0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress)))))


def train(config: TrainConfig, resume: bool = False) -> Outcome | None:
    """Trains to the end of the budget, or until SIGINT or SIGTERM asks for an end.

    Returns:
        How it ended; None in every process but the first, which alone writes.

    Raises:
        EngineError: the data, the checkpoint or the teacher cannot be used, or the loss diverged.
    """
    require_files(config)
    torch.set_num_threads(config.threads)
    cv2.setNumThreads(1)  # the draws have threads of their own
    with stop_requested() as stopping, processes(config.device) as team:
        output = Path(config.output)
        checkpoint = output / f"{config.variant}.checkpoint"
        if resume:
            read_checkpoint(checkpoint, config)  # reading the pairs takes a while, and a refusal should not
        with closing(Journal(output if team.first else None)) as journal:
            fields = None if config.fields is None else Path(config.fields)
            least_px = config.draw.region_px
            number, read = reading_pairs(Path(config.data), config.subsets, fields, least_px, journal.say)
            pairs = list(journal.reading(read, number, "reading pairs"))
            clips = [] if config.videos is None else read_clips(Path(config.videos), least_px)
            training = Training(config, pairs, clips, team, journal)
            ready = True
            if resume:
                training.load(checkpoint)
            else:
                ready = training.begin(stopping)
            if not ready:
                journal.say("stopped during the warm-up: there is nothing to save yet")
                return _outcome(training, None, False)
            # Only now: whatever fails before leaves the files of an earlier training where they are.
            kept = keep_aside(output, config.variant) if team.first and not resume else []
            if kept:
                journal.say(f"an earlier training is kept as {', '.join(kept)}")
            journal.open(sum(training.done))
            finished = training.run(checkpoint, stopping=stopping)
            if not finished:
                current = training.stage - 1
                journal.say(
                    f"stopped in stage {NAMES[current]} after {training.done[current]} iterations, "
                    f"saved to {checkpoint}: go on with --resume"
                )
            return _outcome(training, checkpoint, finished)


def _outcome(training: Training, checkpoint: Path | None, finished: bool) -> Outcome | None:
    if not training.team.first:
        return None
    return Outcome(
        None if checkpoint is None else checkpoint.with_suffix(".safetensors"),
        checkpoint,
        finished,
        training.done,
        [spent / 60 for spent in training.spent_s],
        training.last_validation,
    )


def results_of(output: Path, variant: str) -> list[Path]:
    """The files by which a training is known: its checkpoint, its weights and its journal."""
    return [output / name for name in (f"{variant}.checkpoint", f"{variant}.safetensors", LOG)]


def keep_aside(output: Path, variant: str) -> list[str]:
    """Renames what an earlier training left, so that a new one does not overwrite it.

    Returns:
        The new names, all with one number; none where there was nothing to keep.
    """
    telling = results_of(output, variant)
    if not any(path.exists() for path in telling):
        return []
    left = [path for path in (*telling, output / PICTURES, output / BOARD) if path.exists()]
    for number in count(1):
        word = "previous" if number == 1 else f"previous{number}"
        aside = [path.with_name(f"{path.stem}.{word}{path.suffix}") for path in left]
        if not any(path.exists() for path in aside):
            break
    for path, new in zip(left, aside, strict=True):
        path.replace(new)
    return [path.name for path in aside]


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has asked for an orderly end; a second signal is immediate."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_minutes(config: TrainConfig, minutes: float | None) -> TrainConfig:
    """The configuration with another budget, in place of exact iterations too.

    Raises:
        EngineError: the budget is not above zero.
    """
    if minutes is None:
        return config
    return checked(config.model_dump() | {"minutes": minutes, "iterations": None}, "--minutes")


def main(arguments: list[str] | None = None) -> None:
    """The command for torchrun: `torchrun --nproc-per-node 2 -m engines.training.train CONFIG`."""
    parser = argparse.ArgumentParser(prog="python -m engines.training.train", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--minutes", type=float, help="budget of all stages together")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args(arguments)
    try:
        outcome = train(with_minutes(read_config(options.config), options.minutes), options.resume)
    except EngineError as error:
        sys.exit(f"error: {error}")
    if outcome is not None and outcome.weights is not None:
        print(outcome.weights)


if __name__ == "__main__":
    main()
