"""`dspfusion bench`: the engines of this machine, and the live pipeline around them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import engine_section
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from engines.base import FusionEngine

COLUMNS = ("median_ms", "p95_ms", "p99_ms", "cpu_ms", "fps", "rss_mb")
AsJson = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")]
Size = tuple[int, int]


def bench(
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="auto, tensorrt, compile, openvino or pytorch; openvino:fp32 names a precision. Repeat it."
        ),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="nano, small or base; repeat the option.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT; repeat the option.")] = None,
    what: Annotated[str, typer.Option(help="network, pipeline (all stages, live) or both.")] = "network",
    frames: Annotated[int, typer.Option(min=3, max=100_000, help="Timed frames of a row.")] = 60,
    warm_up: Annotated[int, typer.Option(min=1, max=10_000, help="Frames before, not counted.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="Longest time of a row; a pipeline runs on.")] = 20,
    rate: Annotated[float, typer.Option(min=1, max=240, help="Frames a second of the pipeline's two cameras.")] = 30,
    threads: Annotated[int, typer.Option(min=0, max=256, help="Of engines on the processor; 0 chooses.")] = 0,
    at_once: Annotated[
        int, typer.Option(min=0, max=8, help="Frames that an engine on the processor takes at once; 0 chooses.")
    ] = 0,
    against: Annotated[
        str | None,
        typer.Option(help="module:function of another fuser (infrared, visible) -> picture, timed in turns with ours."),
    ] = None,
    as_json: AsJson = None,
) -> None:
    """Time the engines of this machine: the network alone, and the live pipeline around it."""
    from engines.bench import bench as time_network
    from pipeline.live import engine_for
    from pipeline.process import carry_frames
    from pipeline.telemetry import check_targets, write_report
    from pipeline.terminal import console

    check_targets(as_json)
    if what not in ("network", "pipeline", "both"):
        raise ConfigError(f"--what {what}: choose network, pipeline or both")
    carry_frames()
    sizes = [size_of(text) for text in size or ["640x480"]]
    other = callable_of(against) if against else None
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    orders = [(name, one) for one in variant or ["nano"] for name in engine or default_engines()]
    with rows_done(len(orders)) as done:
        for name, one in orders:
            with section_of(name, one, threads, at_once) as (section, weights):
                rows: list[dict[str, Any]] = []
                if what != "pipeline" or other is not None:
                    with closing(engine_for(section)) as serving:
                        if what != "pipeline":
                            rows += time_network([serving], sizes, frames, warm_up, seconds)
                        if other is not None:
                            result.setdefault("side_by_side", []).extend(
                                compared(serving, other, against or "", at, frames, warm_up, seconds) for at in sizes
                            )
                if what != "network":
                    rows += [pipeline_row(section, size, seconds, rate) for size in sizes]
                result["rows"] += [row | {"weights": weights} for row in rows]
            done()
    if as_json != "-":
        for line in table(result["rows"]):
            console.print(line, highlight=False, soft_wrap=True)
        for entry in result.get("side_by_side", []):
            console.print(comparison(entry), highlight=False, soft_wrap=True)
    if as_json:
        write_report(result, as_json)


def pipeline_row(section: Any, size: Size, seconds: float, rate: float) -> dict[str, Any]:
    """Runs the live pipeline on the simulated rig, with one subscriber to the raw and one to the JPEG pictures.

    `median_ms` and `p99_ms` are from capture to publication, `cpu_ms` is the processor time of a fused frame with all
    stages, the simulated cameras and the subscribers in it, `fps` what was sustained. `stages` are the medians.
    """
    import time

    from engines.bench import resident_mb
    from pipeline.config import RigConfig
    from pipeline.live import LivePipeline

    width, height = size
    camera = {"kind": "synthetic", "scene": "night", "width": width, "height": height, "rate_hz": rate}
    config = RigConfig.model_validate(
        {"rig": "bench", "infrared": camera, "visible": camera, "publish": {"endpoint": "tcp://127.0.0.1:*"}}
    )
    pipeline = LivePipeline(config.model_copy(update={"engine": section}))
    with subscribers(pipeline.endpoint):
        cpu = time.process_time()
        report = pipeline.run(seconds)
        cpu = time.process_time() - cpu
    engine, latency = report["engine"], report["latency_ms"].get("capture_to_publish", {})
    return {
        "engine": engine["runtime"],
        "precision": engine["precision"],
        "variant": engine["variant"],
        "width": width,
        "height": height,
        "what": "pipeline",
        "median_ms": latency.get("p50"),
        "p99_ms": latency.get("p99"),
        "cpu_ms": cpu * 1000 / report["fused"] if report["fused"] else None,
        "fps": report["fps"],
        "rss_mb": resident_mb(),
        "threads": engine["threads"],
        "at_once": engine["at_once"],
        "frames": report["fused"],
        "rate_hz": rate,
        "p95_ms": latency.get("p95"),
        "stages": {name: stage["p50"] for name, stage in report["latency_ms"].items()},
        "stages_p95": {name: stage["p95"] for name, stage in report["latency_ms"].items()},
        "dropped": report["dropped"],
        "fallbacks": report["fallbacks"],
    }


@contextmanager
def subscribers(endpoint: str) -> Iterator[None]:
    """Reads the raw and the JPEG pictures, as consumers would."""
    import threading

    from pipeline.client import Client

    stop = threading.Event()

    def read(codec: str) -> None:
        with Client(endpoint, rig="bench", codec=codec) as client:
            while not stop.is_set():
                try:
                    _ = client.latest(timeout_s=0.5).image.shape
                except TimeoutError:
                    continue

    threads = [threading.Thread(target=read, args=(codec,), daemon=True) for codec in ("raw", "jpeg")]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=3)


def compared(
    serving: FusionEngine, other: Callable[..., Any], name: str, size: Size, frames: int, warm_up: int, seconds: float
) -> dict[str, Any]:
    """Ours and another callable in turns, in this process."""
    from engines.arrays import reference_pair
    from engines.bench import side_by_side

    priors = serving.estimate_priors(*reference_pair(size[::-1]))
    ours = f"{serving.description.runtime}:{serving.description.precision}"
    try:
        result = side_by_side(
            {ours: lambda infrared, visible: serving.fuse(infrared, visible, priors), name: other},
            size,
            frames,
            warm_up,
            seconds,
        )
    except Exception as error:
        if type(error).__name__ == "EngineError":
            raise
        raise ConfigError(
            f"--against {name} failed ({type(error).__name__}: {error}): it is given uint8 infrared (H, W) and visible "
            "(H, W, 3)"
        ) from error
    return {"variant": serving.description.variant, "width": size[0], "height": size[1], "contenders": result}


def callable_of(text: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working folder are found, too."""
    import importlib

    module, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # it is the user's code: whatever its import raises
        raise ConfigError(
            f"--against {text}: {type(error).__name__}: {error}: give module:function of something that can be imported"
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ConfigError(f"--against {text}: {name} is no function: give module:function")
    called: Callable[..., Any] = found
    return called


@contextmanager
def section_of(name: str, variant: str, threads: int = 0, at_once: int = 0) -> Iterator[tuple[Any, str]]:
    """The engine section of runtime or runtime:precision, and whose weights it names ("shipped" or "random").

    A variant without shipped weights is timed with random ones: time does not depend on them.
    """
    import tempfile

    from engines.dspfusion.variants import VARIANTS, default_weights

    runtime, _, precision = name.partition(":")
    config = engine_section(
        runtime=runtime, variant=variant, precision=precision or "auto", threads=threads, at_once=at_once
    )
    with ExitStack() as stack:
        shipped = variant not in VARIANTS or default_weights(variant).is_file()
        if not shipped:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dspfusion-"))
            config = config.model_copy(update={"weights": str(random_weights(variant, Path(folder)))})
        yield config, "shipped" if shipped else "random"


def random_weights(variant: str, folder: Path) -> Path:
    """Weights of a fresh network, always the same."""
    import torch
    from safetensors.torch import save_file

    from engines.dspfusion.loading import build

    torch.manual_seed(0)
    path = folder / f"{variant}.safetensors"
    save_file(build(variant).state_dict(), path, metadata={"variant": variant})
    return path


def default_engines() -> list[str]:
    """What is worth comparing here: on a GPU its runtimes, everywhere the processor's and the reference."""
    from engines.gpu_probe import refusal

    return [name for name in ("tensorrt", "compile") if refusal(name) is None] + ["openvino", "pytorch"]


def size_of(text: str) -> Size:
    """(width, height) of a text such as 640x480."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 32 <= int(width) <= 8192 and 32 <= int(height) <= 8192):
        raise ConfigError(f"--size {text}: give WIDTHxHEIGHT, such as 640x480; 32 to 8192 pixels a side")
    return int(width), int(height)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    import importlib.metadata
    import os
    import platform

    from engines.gpu_probe import nvidia_driver_present, probe
    from engines.openvino_engine import usable_cores

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {
        "processor": processor,
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": probe(False).gpu if nvidia_driver_present() else None,
        "versions": {name: importlib.metadata.version(name) for name in ("dspfusion-rt", "torch", "openvino")},
    }


@contextmanager
def rows_done(total: int) -> Iterator[Callable[[], None]]:
    from pipeline.terminal import progress

    with progress("bench") as (start, advance):
        start(total)
        yield advance


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for people, as lines of one width."""
    lines = [("engine", "variant", "size", "what", *COLUMNS, "threads")]
    for row in rows:
        figures = ("-" if row[name] is None else f"{row[name]:.1f}" for name in COLUMNS)
        variant = row["variant"] + ("*" if row.get("weights") == "random" else "")
        size = f"{row['width']}x{row['height']}"
        threads = f"{row['at_once']} x {row['threads']}" if row["at_once"] > 1 else str(row["threads"])
        lines.append((f"{row['engine']} {row['precision']}", variant, size, row["what"], *figures, threads))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    told = []
    for line in lines:
        named = [cell.ljust(width) for cell, width in zip(line[:4], widths[:4], strict=True)]
        counted = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
        told.append("  ".join([*named, *counted]))
    starred = any(row.get("weights") == "random" for row in rows)
    return [*told, "* random weights: none are shipped, and time does not depend on them"] if starred else told


def comparison(entry: dict[str, Any]) -> str:
    """A comparison as one line."""
    (ours, first), *others = entry["contenders"].items()
    told = [f"{name} {times['median_ms']:.1f} ms, {times['ratio']:.2f} times ours" for name, times in others]
    return f"{entry['width']}x{entry['height']}, in turns: {ours} {first['median_ms']:.1f} ms; {'; '.join(told)}"
