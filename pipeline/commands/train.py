"""`dspfusion train`: the network's training, from the first iteration or from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="A training configuration, such as configs/train_nano.yaml.")],
    minutes: Annotated[
        float | None,
        typer.Option(help="Budget of all stages, without warm-up and reading, in place of the configuration's."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write how it ended as JSON to this file; - is the terminal.")
    ] = None,
) -> None:
    """Train the network in four stages: priors and fusion, diffusion, fusion with restored priors, video.

    Ctrl-C saves a checkpoint and ends. Beginning anew keeps what an earlier training left in the same folder, as
    *.previous*. Several GPUs, or processes on one machine:
    torchrun --nproc-per-node 2 -m engines.training.train CONFIG [--minutes M] [--resume]
    """
    from engines.training.config import inputs_of, read_config
    from engines.training.train import results_of, with_minutes
    from engines.training.train import train as train_network
    from pipeline.telemetry import check_targets, write_report

    asked = with_minutes(read_config(config), minutes)
    left = results_of(Path(asked.output), asked.variant)
    check_targets(as_json, inputs=(config, *inputs_of(asked).values()), others=left)
    outcome = train_network(asked, resume=resume)
    if outcome is None:  # the first process tells
        return
    if as_json:
        write_report({name: str(v) if isinstance(v, Path) else v for name, v in asdict(outcome).items()}, as_json)
    if as_json != "-" and outcome.weights is not None:
        print(outcome.weights)
