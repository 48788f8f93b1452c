"""The command line. Each command imports what it needs when it is called, so that `view` starts without torch."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.bench import bench
from pipeline.commands.build_engine import build_engine
from pipeline.commands.calibrate import app as calibrate_app
from pipeline.commands.evaluate import evaluate
from pipeline.commands.options import engine_section
from pipeline.commands.train import train
from pipeline.errors import ConfigError, DspfusionError
from pipeline.redaction import redact
from pipeline.stopping import Stopped, asked, end_now, stopping_on_signals
from pipeline.terminal import console, progress

if TYPE_CHECKING:
    from pipeline.live import LivePipeline

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Real-time fusion of infrared and visible video, published over ZeroMQ.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check a rig's configuration, or print what it may contain.")
app.add_typer(config_app, name="config")
app.add_typer(calibrate_app, name="calibrate")
app.command()(bench)
app.command("build-engine")(build_engine)
app.command()(evaluate)
app.command()(train)

INTERRUPTED = 130  # the status that a shell gives to the end by Ctrl-C
LONGEST_S = 1e9  # that anything can wait: beyond 9e9 s, and for inf, a lock overflows
MACHINE_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO)

Report = Annotated[
    str | None, typer.Option("--report", help="Write the report as JSON to this file; - is the terminal.")
]
AsJson = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this file; - is the terminal.")]
Variant = Annotated[str, typer.Option(help="Size of the network: nano, small or base.")]
EngineName = Annotated[str, typer.Option("--engine", help="auto, openvino, pytorch, tensorrt or compile.")]
Calibration = Annotated[
    str | None, typer.Option(help="A dspfusion-calibration/1 file; without it, the input is taken as registered.")
]


def main() -> None:
    """Runs the command line: a user's mistake is one line and exit status 2, never a traceback."""
    from pipeline.redaction import RedactingFilter

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(RedactingFilter())
    threading.excepthook = tell_of_thread
    before = set(threading.enumerate())
    try:
        result = app(prog_name="dspfusion", standalone_mode=False)
        if result == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("dspfusion: stopped", file=sys.stderr)
        result = INTERRUPTED
    except Stopped as stopped:
        end_now(stopped.number)
    except Exception as error:
        line = users_mistake(error)
        if line is None:  # a bug of ours
            text, result = "".join(traceback.format_exception(error)), 1
        else:
            text, result = f"dspfusion: error: {line}\n" if line else "", 2
        print(redact(text), end="", file=sys.stderr)
    leave(result if isinstance(result, int) else 0, before)


def tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread that failed, without the passwords that an address in it may carry."""
    if failed.exc_value is not None:
        name = failed.thread.name if failed.thread else "unknown"
        text = "".join(traceback.format_exception(failed.exc_value))
        print(redact(f"thread {name} failed: {text}"), end="", file=sys.stderr)


def users_mistake(error: Exception) -> str | None:
    """The one line for an error that its reader can mend; None for a bug of ours, "" where all has been said.

    Looks types up by name: importing them may need torch, and typer's own parser moves between its versions.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if isinstance(error, DspfusionError) or kinds & {
        "EngineError", "CalibrationError", "ClientError", "ViewerError", "MessageError"
    }:  # fmt: skip
        return text
    if "UsageError" in kinds:
        if "NoArgsIsHelpError" in kinds:
            return ""  # the help is on the screen
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", None) or "dspfusion"
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        return f"{message.rstrip('.')}: see `{command} --help`"
    if isinstance(error, OSError) and error.strerror and (error.filename or error.errno in MACHINE_IS_FULL):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: check the path, its permissions and the space on the disk"
    return None


def leave(status: int, before: set[threading.Thread]) -> None:
    """Ends the process.

    A thread that a driver still holds would abort it on the way, with status 134; and whoever gave a signal does not
    wait until all libraries are taken down, which takes a second or two.
    """
    if asked.is_set() or any(thread.daemon and thread not in before for thread in threading.enumerate()):
        with suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def positive(option: str, value: float | None, most: float = math.inf) -> None:
    """Refuses a number of seconds or messages that is not above zero, or larger than `most`."""
    if value is not None and not 0 < value <= most:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise ConfigError(f"{option} {value:g}: give a number above 0{limit}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The rig's YAML file.")],
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
    report: Report = None,
) -> None:
    """Run a live rig until Ctrl-C (or SIGTERM), then write its report and end with status 0.

    A video and a report that an earlier run left in their places are kept as NAME.previous.*.

    A signal that comes before the network is ready ends it with status 130 (SIGTERM: 143) and no report; a second one
    ends it at once.
    """
    from pipeline.config import load_config

    positive("--duration", duration)
    run_rig(load_config(config), duration, report, config)


def run_rig(
    config: Any, duration: float | None, report: str | None, file: Path | None = None, keep_earlier: bool = True
) -> dict[str, Any]:
    """Runs a rig with its viewer, shows how it goes, and writes the report.

    Args:
        config: the rig.
        duration: seconds; None: until it is stopped.
        report: where to write it, besides the place that the configuration names.
        file: that the configuration was read from.
        keep_earlier: the video and the report of an earlier run are kept under other names, not replaced.
    """
    with stopping_on_signals() as stopping:
        from engines.base import EngineError
        from pipeline.config import are_one_file
        from pipeline.live import LivePipeline
        from pipeline.process import carry_frames
        from pipeline.recording import check_recordings
        from pipeline.telemetry import write_report

        carry_frames()
        reports = [target for target in (report, config.output.report) if target]
        if are_one_file(report, config.output.report):
            reports.pop()
        check_outputs(config, file, *reports)
        doubts = check_recordings(config)
        pipeline = LivePipeline(config, keep_earlier=keep_earlier)
        for line in doubts:
            pipeline.telemetry.fallback(line)
        with viewer_of(config, pipeline) as address:
            console.print(f"rig [bold]{config.rig}[/]: fused frames at {pipeline.endpoint or 'no endpoint'}")
            if address:
                console.print(f"viewer: [bold cyan]{address}[/]")
            stopping.ask(pipeline.stop, lambda: pipeline.compiling, lambda: not pipeline.telemetry.fused)
            failure: Exception | None = None
            try:
                pipeline.run(duration)
            except (DspfusionError, EngineError) as error:
                if not pipeline.telemetry.fused:
                    raise
                failure = error  # what was done until then is worth its report
            result = pipeline.report()
        summarize(result)
        for target in reports:
            write_report(result, target, keep_earlier)
        if failure is not None:
            raise failure
    return result


@contextmanager
def viewer_of(config: Any, pipeline: LivePipeline) -> Iterator[str | None]:
    """The viewer that a configuration asks for, as its address. It is given keys where the rig publishes encrypted."""
    if not (config.viewer.enabled and pipeline.endpoint):
        yield None
        return
    from pipeline.viewer.server import Viewer

    with tempfile.TemporaryDirectory(prefix="dspfusion-") as folder:
        server_key, secret_key = pipeline.invite(Path(folder)) or (None, None)
        viewer = Viewer(
            pipeline.endpoint,
            config.viewer.host,
            config.viewer.port,
            rig=config.rig,
            server_key=server_key,
            secret_key=secret_key,
        )
        viewer.start()  # reads the keys: no copy of them is left when the folder goes
    try:
        yield viewer.url
    finally:
        viewer.stop()


def summarize(result: dict[str, Any]) -> None:
    """Prints the outline of a report for people."""
    modes = ", ".join(f"{count} {mode}" for mode, count in result["modes"].items() if count)
    engine = result["engine"]
    console.print(f"fused {result['fused']} frames ({modes or 'none'}), {result['fps']} frames a second")
    latency = result["latency_ms"].get("capture_to_publish")
    if latency:
        console.print("capture to publish: " + ", ".join(f"{name} {value:.0f} ms" for name, value in latency.items()))
    dropped = [f"{n} {stage}/{why}" for stage, reasons in result["dropped"].items() for why, n in reasons.items() if n]
    console.print(f"dropped: {', '.join(dropped) or 'nothing'}")
    console.print(f"engine: {engine['variant']} on {engine['runtime']} in {engine['precision']} ({engine['why']})")
    for line in result["fallbacks"]:
        console.print(f"[yellow]fallback:[/] {redact(line)}", highlight=False, soft_wrap=True)


@app.command()
def replay(
    infrared: Annotated[str, typer.Argument(metavar="IR", help="Infrared video file or image folder.")],
    visible: Annotated[str, typer.Argument(metavar="VIS", help="Visible video file or image folder.")],
    calibration: Calibration = None,
    rate: Annotated[str, typer.Option(help="Frames a second, or max.")] = "max",
    output: Annotated[str | None, typer.Option(help="Write the fused video here (.mp4 or .mkv).")] = None,
    publish: Annotated[str | None, typer.Option(help="Publish at this endpoint, such as tcp://127.0.0.1:5560.")] = None,
    variant: Variant = "nano",
    engine: EngineName = "auto",
    report: Report = None,
) -> None:
    """Fuse recordings: nothing is dropped, and equal input gives equal output.

    A video that is cut off or damaged is fused as far as it can be read. That is no error (status 0): it is said once,
    and the report has it in `fallbacks` and counts the lost frames in `cameras`.
    """
    with stopping_on_signals() as stopping:
        from pipeline.config import PublishConfig
        from pipeline.process import carry_frames
        from pipeline.replay import ReplayConfig
        from pipeline.replay import replay as replay_recordings
        from pipeline.telemetry import check_targets, write_report

        carry_frames()
        check_targets(report, inputs=(infrared, visible, calibration), others=(output,))
        config = ReplayConfig(
            infrared=infrared,
            visible=visible,
            calibration=calibration,
            rate_hz=rate_of(rate),
            output=output,
            publish=PublishConfig(endpoint=publish) if publish else None,
            engine=engine_section(runtime=engine, variant=variant),
        )
        asked = threading.Event()
        with progress("replay") as (start, advance):

            def fused(_: Any) -> None:
                stopping.ask(asked.set)  # from the first frame on there is something to finish
                advance()

            result = replay_recordings(config, on_start=start, on_fused=fused, stopped=asked.is_set)
        summarize(result)
        if report:
            write_report(result, report)


def rate_of(text: str) -> float | None:
    """Frames a second as given on the command line; None for "max"."""
    if text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1000:
        raise ConfigError(f"--rate {text}: give frames a second (0 to 1000), or max")
    return rate


@app.command()
def fuse(
    infrared: Annotated[Path, typer.Argument(metavar="IR", help="Infrared image, or folder of images.")],
    visible: Annotated[Path, typer.Argument(metavar="VIS", help="Visible image, or folder with equal names.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Fused image, or folder.")],
    variant: Variant = "nano",
    engine: EngineName = "auto",
    calibration: Calibration = None,
    as_json: AsJson = None,
) -> None:
    """Fuse still pairs."""
    from engines.base import fallbacks_of
    from pipeline.live import describe_engine, engine_for
    from pipeline.recording import refuse_overwriting
    from pipeline.still import fuse_stills, list_pairs
    from pipeline.telemetry import check_targets, write_report

    pairs = list_pairs(infrared, visible, output)
    if infrared.is_dir():
        refuse_overwriting(output, infrared, visible)
    check_targets(as_json, inputs=(infrared, visible, calibration), others=[fused for _, _, fused in pairs])
    said: list[str] = []
    with stopping_on_signals():
        serving = engine_for(engine_section(runtime=engine, variant=variant))
    try:
        with progress("fuse") as (start, advance):
            start(len(pairs))
            rows = fuse_stills(serving, pairs, calibration, on_done=lambda _: advance(), on_doubt=said.append)
        console.print(f"fused {len(rows)} pair{'s' if len(rows) != 1 else ''} into {output}")
        if as_json:
            said += fallbacks_of(serving)
            write_report({"rows": rows, "engine": describe_engine(serving), "fallbacks": said}, as_json)
    finally:
        serving.close()


@app.command()
def demo(
    duration: Annotated[float, typer.Option(help="Seconds to run.")] = 20.0,
    scene: Annotated[str, typer.Option(help="day, night, fog, rain or headlights.")] = "night",
    output: Annotated[Path, typer.Option(help="Folder for the video, the report and the calibration.")] = Path(
        "output"
    ),
) -> None:
    """Show the whole product with two simulated cameras: no camera, no GPU."""
    from pipeline.demo import demo_config

    positive("--duration", duration)
    config = demo_config(output, scene)
    result = run_rig(config, duration, None, keep_earlier=False)
    console.print(f"fused video: {config.output.video if result['fused'] else 'none, it was too short'}")
    console.print(f"report: {config.output.report}")


@app.command()
def subscribe(
    endpoint: Annotated[str, typer.Argument(help="Such as tcp://127.0.0.1:5560.")],
    count: Annotated[int | None, typer.Option(help="End after so many messages.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save every picture in this folder.")] = None,
    stream: Annotated[str, typer.Option(help="fused, ir, vis, health or event.")] = "fused",
    codec: Annotated[str, typer.Option(help="raw or jpeg (msg for health and event).")] = "raw",
    rig: Annotated[str | None, typer.Option(help="Only this rig.")] = None,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
    timeout: Annotated[float, typer.Option(help="Give up after so many seconds without a message.")] = 10.0,
    server_key: Annotated[Path | None, typer.Option(help="Public key of an encrypted publisher.")] = None,
    secret_key: Annotated[Path | None, typer.Option(help="This client's secret key.")] = None,
    as_json: AsJson = None,
) -> None:
    """Print one line per message, and how old it was."""
    from pipeline.client import subscribe as subscribe_to
    from pipeline.telemetry import check_targets, write_report

    positive("--count", count)
    positive("--duration", duration)
    positive("--timeout", timeout, most=LONGEST_S)
    check_targets(as_json, inputs=(server_key, secret_key))
    summary = subscribe_to(
        endpoint,
        count,
        save,
        rig=rig,
        stream=stream,
        codec="msg" if stream in ("health", "event") else codec,
        server_key=server_key,
        secret_key=secret_key,
        duration_s=duration,
        timeout_s=timeout,
        echo=None if as_json == "-" else print,
    )
    if as_json:
        write_report(summary, as_json)


@app.command()
def view(
    endpoint: Annotated[str, typer.Argument(help="Such as tcp://127.0.0.1:5560.")] = "tcp://127.0.0.1:5560",
    host: Annotated[str, typer.Option(help="Address to serve the page on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.")] = 8870,
    rig: Annotated[str | None, typer.Option(help="Show this rig; otherwise the first one heard.")] = None,
    server_key: Annotated[Path | None, typer.Option(help="Public key of an encrypted publisher.")] = None,
    secret_key: Annotated[Path | None, typer.Option(help="This client's secret key.")] = None,
) -> None:
    """Serve a page that shows infrared, visible and fused side by side, live."""
    from pipeline.viewer.server import run as run_viewer

    run_viewer(
        endpoint,
        host,
        port,
        rig=rig,
        server_key=server_key,
        secret_key=secret_key,
        on_ready=lambda address: console.print(f"viewer: [bold cyan]{address}[/]  (Ctrl-C ends it)"),
    )


@app.command()
def doctor(as_json: AsJson = None) -> None:
    """Check this machine: versions, engines, weights, codecs. Exit status 1 if something needed is missing."""
    from pipeline.doctor import examine
    from pipeline.telemetry import check_targets, write_report

    check_targets(as_json)
    findings = examine()
    if as_json:
        write_report({"findings": [finding._asdict() for finding in findings]}, as_json)
    else:
        for finding in findings:
            mark = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]BAD [/]"}[finding.state]
            console.print(f"{mark} {finding.what:<18} {finding.found}", highlight=False)
    raise typer.Exit(1 if any(finding.state == "bad" for finding in findings) else 0)


@config_app.command("check")
def config_check(config: Annotated[Path, typer.Argument(help="The rig's YAML file.")]) -> None:
    """Check a configuration, and the recordings that it names, without starting anything."""
    from pipeline.config import load_config
    from pipeline.publish import refuse_open_endpoint
    from pipeline.recording import inputs_of
    from pipeline.sources.opening import open_source

    checked = load_config(config)
    open_source(checked.infrared, "infrared")  # only looks at the description
    open_source(checked.visible, "visible")
    if checked.publish.endpoint:
        refuse_open_endpoint(checked.publish)
    check_calibration(checked)
    check_keys(checked.publish)
    check_weights(checked.engine)
    check_outputs(checked, config, checked.output.report)
    doubts = check_what_is_recorded(checked)
    console.print(
        f"{config}: rig '{checked.rig}' is valid ({checked.infrared.kind} and {checked.visible.kind} sources)"
    )
    for path in inputs_of(checked):
        if not Path(path).exists():
            console.print(f"[yellow]note:[/] {path} is not there yet", highlight=False, soft_wrap=True)
    for line in doubts:
        console.print(f"[yellow]note:[/] {line}", highlight=False, soft_wrap=True)


def check_calibration(config: Any) -> None:
    """Refuses a calibration that cannot be read, or is for another resolution than the configured one."""
    from calibration.rig_file import load_rig

    path = config.registration.calibration
    if not path or not Path(path).exists():
        return
    rig = load_rig(path)
    for camera, section, model in (
        ("infrared", config.infrared, rig.infrared),
        ("visible", config.visible, rig.visible),
    ):
        size = getattr(section, "width", None), getattr(section, "height", None)
        if all(size) and size != model.size:
            raise ConfigError(
                f"{path} is for a {camera} picture of {model.size[0]}x{model.size[1]}, but {camera} is set to "
                f"{size[0]}x{size[1]}: set that size, or calibrate at this one"
            )


def check_keys(config: Any) -> None:
    """Refuses keys that are there and cannot be used, and an encrypted publisher without a list of its guests."""
    from pipeline.publish import read_guest_keys, read_secret_key

    if not (config.endpoint and config.curve_secret_key_file):
        return
    if Path(config.curve_secret_key_file).exists():
        read_secret_key(Path(config.curve_secret_key_file))
    if not config.authorized_keys_dir:
        raise ConfigError(
            "publish.curve_secret_key_file encrypts, but publish.authorized_keys_dir does not say who may subscribe: "
            "give a folder with their public keys"
        )
    if Path(config.authorized_keys_dir).exists():
        read_guest_keys(Path(config.authorized_keys_dir))


def check_weights(config: Any) -> None:
    """Refuses weights that are there and do not fit the network, and a variant for which none are shipped."""
    from engines.dspfusion.loading import load

    if config.weights is None or Path(config.weights).exists():
        load(config.variant, config.weights)


def check_what_is_recorded(config: Any) -> list[str]:
    """Refuses recordings that `run` would refuse, once all of them are there. Returns what is strange about them."""
    from pipeline.recording import check_recordings, path_of

    needed = (path_of(config.infrared), path_of(config.visible), config.registration.calibration)
    return check_recordings(config) if all(Path(path).exists() for path in needed if path) else []


def check_outputs(config: Any, file: Path | None, *reports: str | None) -> None:
    """Refuses a video and reports that could not be written from here, or not without destroying what a run reads."""
    from pipeline.record import VideoFile
    from pipeline.recording import inputs_of, refuse_overwriting
    from pipeline.telemetry import check_targets

    inputs: list[str | Path] = [*inputs_of(config), *([file] if file else [])]
    check_targets(*reports, inputs=inputs, others=(config.output.video,))
    refuse_overwriting(config.output.video, *inputs)
    if config.output.video:
        VideoFile(config.output.video)  # opens no file before the first frame


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a rig's configuration."""
    from pipeline.config import RigConfig

    print(json.dumps(RigConfig.model_json_schema(), indent=2))


if __name__ == "__main__":
    main()
