"""`dspfusion build-engine`: compiles ahead of the first start, and says whether the result is PyTorch's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.bench import AsJson, Size, size_of
from pipeline.commands.options import engine_section
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from engines.base import FusionEngine


def build_engine(
    config: Annotated[
        Path | None, typer.Argument(help="The rig's YAML file; its engine and picture size are built.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT of the visible camera; repeat it.")] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="auto, tensorrt, compile, openvino, pytorch.")] = None,
    variant: Annotated[str | None, typer.Option(help="nano, small or base.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="TensorRT: one engine for SMALLEST-USUAL-LARGEST, as 320x240-640x480-1280x720."),
    ] = None,
    pair: Annotated[
        tuple[Path, Path] | None, typer.Option(help="A real infrared and visible picture to check the engine on.")
    ] = None,
    as_json: AsJson = None,
) -> None:
    """Build the engines of a rig ahead of its first start, and compare them with PyTorch."""
    from engines.selection import create_engine
    from pipeline.recording import inputs_of
    from pipeline.telemetry import check_targets, write_report
    from pipeline.terminal import console

    rig, section = sections(config, runtime=engine, variant=variant, precision=precision, sizes=sizes)
    check_targets(as_json, inputs=(config, *([] if rig is None else inputs_of(rig)), *(pair or ())))
    wanted = [size_of(text) for text in size or []] or sizes_of(rig, config)
    rows = []
    with console.status("building"):
        started = time.perf_counter()
        serving = create_engine(**section.model_dump())
        started_s = time.perf_counter() - started
        try:
            for one in wanted:
                rows.append(built(serving, section, one, pair) | {"start_s": round(started_s, 2)})
        finally:
            serving.close()
    if as_json != "-":
        for row in rows:
            console.print(
                f"{row['engine']} {row['precision']}, {row['variant']} {row['width']}x{row['height']}: "
                f"start {row['start_s']:.1f} s, build {row['build_s']:.1f} s; {row['psnr_db']:.1f} dB against PyTorch"
                f"\n  {row['why']}; kept in {row['cache']}",
                highlight=False,
            )
            for line in row["fallbacks"]:
                console.print(f"[yellow]fallback:[/] {line}", highlight=False)
    if as_json:
        write_report({"rows": rows}, as_json)


def sections(config: Path | None, **given: str | None) -> tuple[Any, Any]:
    """The rig, if there is one, and the engine section with what the command line changes in it."""
    from pipeline.config import load_config

    rig = load_config(config) if config else None
    values = rig.engine.model_dump() if rig is not None else {}
    return rig, engine_section(**(values | {key: value for key, value in given.items() if value is not None}))


def sizes_of(rig: Any, config: Path | None) -> list[Size]:
    """The size that a rig's pictures will have."""
    if rig is None:
        return [(640, 480)]
    from pipeline.gain import InfraredGain
    from pipeline.live import expected_size
    from pipeline.register import Register

    size = expected_size(rig, Register(rig.registration, InfraredGain(rig.gain)))
    if size is None:
        raise ConfigError(f"{config}: the visible camera's size is not known before it sends: give it with --size")
    return [size]


def built(serving: FusionEngine, section: Any, size: Size, pair: tuple[Path, Path] | None) -> dict[str, Any]:
    """Builds for one size, and compares a picture with PyTorch's."""
    from engines.arrays import agreement
    from engines.base import fallbacks_of
    from engines.pytorch_engine import PyTorchEngine

    infrared, visible = pictures(pair, size)
    started = time.perf_counter()
    serving.fuse(infrared, visible, serving.estimate_priors(infrared, visible))
    build_s = time.perf_counter() - started
    weights = None if section.weights is None else Path(section.weights)
    reference = PyTorchEngine(section.variant, weights, "fp32", 0, section.diffusion_steps)
    psnr_db = agreement(serving, reference, infrared, visible)
    description, cache = serving.description, getattr(serving, "cache", None)
    return {
        "engine": description.runtime,
        "precision": description.precision,
        "variant": description.variant,
        "width": size[0],
        "height": size[1],
        "build_s": round(build_s, 2),
        "psnr_db": round(min(psnr_db, 999.0), 2),
        "why": description.why,
        "cache": "nowhere: this runtime builds nothing" if cache is None else str(cache.folder),
        "fallbacks": fallbacks_of(serving),
    }


def pictures(pair: tuple[Path, Path] | None, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """The pair to check on: the user's, brought to size, or the built-in one."""
    from engines.arrays import reference_pair

    if pair is None:
        return reference_pair(size[::-1])
    import cv2

    from pipeline.config import GainConfig
    from pipeline.gain import InfraredGain
    from pipeline.still import read_pair

    frames = read_pair(*pair)
    assert frames.infrared is not None
    assert frames.visible is not None
    infrared, _ = InfraredGain(GainConfig())(frames.infrared)
    return cv2.resize(infrared, size), cv2.resize(frames.visible.image, size)
