"""One YAML file per rig. Unknown keys and impossible values are refused before anything starts."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from calibration.strict_yaml import KeyTwice, load_yaml
from engines.base import EngineError
from engines.sizes import range_of
from pipeline.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
READ_FILES = {  # section -> keys whose files are read, beside the recordings
    "registration": ("calibration",),
    "engine": ("weights",),
    "publish": ("curve_secret_key_file", "authorized_keys_dir"),
}
ADDRESS_KEYS = {"stream": "url", "device": "path", "folder": "path"}  # kind of source -> the key that says which one
VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
CUTS_CREDENTIALS = "the user or password has a / ? or #: write it as %2F %3F %23"


def are_one_file(one: str | None, other: str | None) -> bool:
    """Whether two places to write to are the same, by whichever of its names."""
    return bool(one and other) and os.path.realpath(str(one)) == os.path.realpath(str(other))


def is_loopback(host: str) -> bool:
    """Whether an address or name leads to this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StreamSource(Section):
    """Network video (rtsp, rtsps, udp, rtp) or a video file, read through PyAV."""

    kind: Literal["stream"] = "stream"
    url: str = Field(min_length=1)  # rtsp://user:password@host/path, udp://..., or a file's path
    transport: Literal["tcp", "udp"] = "tcp"  # of RTSP
    connect_timeout_s: float = Field(30.0, gt=0, le=300)
    read_timeout_s: float = Field(2.0, gt=0, le=60)
    loop: bool = False  # files only: start again at the end
    realtime: bool = True  # files only: hand frames out at the recorded rate; a rig needs that

    @field_validator("url")
    @classmethod
    def _credentials_are_whole(cls, value: str) -> str:
        # Such a character ends the host, and half of the password is taken for a port.
        _, separator, address = value.partition("://")
        host, *behind = re.split("[/?#]", address, maxsplit=1) if separator else [""]
        _, colon, port = host.rpartition(":")
        is_port = not colon or port.isdecimal() or host.endswith("]")  # ]: of an IPv6 address
        if not is_port and "@" not in host and "@" in "".join(behind):
            raise ValueError(CUTS_CREDENTIALS)
        return value


class DeviceSource(Section):
    """A V4L2 device."""

    kind: Literal["device"] = "device"
    path: str = Field("/dev/video0", min_length=1)
    pixel_format: str | None = None  # "gray16le" for Y16, "yuyv422", ...; None: the driver's own
    width: int | None = Field(None, ge=32, le=8192)
    height: int | None = Field(None, ge=32, le=8192)
    rate_hz: float | None = Field(None, gt=0, le=1000)


class FolderSource(Section):
    """A folder of images, in name order."""

    kind: Literal["folder"] = "folder"
    path: str = Field(min_length=1)
    rate_hz: float = Field(25.0, gt=0, le=1000)
    loop: bool = False
    realtime: bool = True


class SyntheticSource(Section):
    """One camera of the simulated rig. Both cameras with the same seed and scene look at the same street."""

    kind: Literal["synthetic"] = "synthetic"
    scene: Literal["day", "night", "fog", "rain", "headlights"] = "night"
    width: int = Field(640, ge=64, le=4096)
    height: int = Field(480, ge=64, le=4096)
    rate_hz: float = Field(25.0, gt=0, le=240)
    seed: int = 7
    frames: int | None = Field(None, ge=1)  # None: endless
    time_offset_ms: float = Field(0.0, ge=-1000, le=1000)  # this camera's clock against the true time
    drift_ppm: float = Field(0.0, ge=-1000, le=1000)
    jitter_ms: float = Field(0.0, ge=0, le=50)
    drop_share: float = Field(0.0, ge=0, lt=1)
    shutter_every_s: float | None = Field(None, gt=0)  # thermal: shutter freezes at this interval
    shutter_s: float = Field(0.5, gt=0, le=10)
    stripe_counts: float = Field(0.0, ge=0)  # thermal: sigma of the column offsets, in 14-bit counts
    dead_pixels: int = Field(0, ge=0, le=10000)
    realtime: bool = True


Source = Annotated[StreamSource | DeviceSource | FolderSource | SyntheticSource, Field(discriminator="kind")]
KINDS = tuple(
    str(source.model_fields["kind"].default) for source in (StreamSource, DeviceSource, FolderSource, SyntheticSource)
)


class CaptureConfig(Section):
    """How long a camera may be silent, and how it is called back."""

    stall_ms: float = Field(250.0, gt=0)  # at least three frame periods are always granted
    backoff_s: float = Field(0.2, gt=0)  # first wait before reconnecting; doubles up to
    max_backoff_s: float = Field(10.0, gt=0)


class SyncConfig(Section):
    """When an infrared and a visible frame count as one moment."""

    max_skew_ms: float = Field(40.0, gt=0)  # farther apart in capture time is no pair
    # Then the visible frame is passed on alone. None: as long as the nearest infrared frame takes to come, 250 at most.
    max_wait_ms: float | None = Field(None, gt=0)
    infrared_offset_ms: float = 0.0  # subtracted from the infrared capture time
    visible_offset_ms: float = 0.0  # subtracted from the visible capture time
    infrared_drift_ppm: float = Field(0.0, ge=-1000, le=1000)  # recordings: by how much the infrared clock runs fast
    # Live: watch what is left of the offset, and take it off when it is certain.
    track_offset: bool = True
    hold_ms: float = Field(100.0, ge=0)  # an infrared frame may be used again up to this age, flagged "held"


class RegistrationConfig(Section):
    calibration: str | None = None  # dspfusion-calibration/1 file; None: resize, flagged uncalibrated
    feather_px: float = Field(16.0, ge=0, le=200)
    refine: bool = True  # follow a mount that moves; off: the calibration stays as it is
    refine_every_s: float = Field(0.3, gt=0, le=60)  # least time between two comparisons of the cameras
    max_shift_px: float = Field(12.0, gt=0, le=64)  # the correction goes no further, for a picture 640 pixels wide
    slew_px: float = Field(0.25, gt=0, le=64)  # a frame: the picture does not jump


class GainConfig(Section):
    """Infrared conditioning, and 16-bit counts to 8 bits, smoothed over time.

    A configuration that names percentiles but no method means the method "percentile".
    """

    # By edges and pixels up to a plateau (robust under a cold sky), or linear between two percentiles.
    method: Literal["plateau", "percentile"] = "plateau"
    plateau: float = Field(1.0, gt=0, le=10)  # most that one count may have, in multiples of the average
    low_percentile: float = Field(1.0, ge=0, lt=50)
    high_percentile: float = Field(99.0, gt=50, le=100)
    smoothing: float = Field(0.1, gt=0, le=1)  # share of the newest frame's limits
    min_span_counts: float = Field(200.0, gt=0)  # a flat wall is not stretched into noise
    polarity: Literal["white_hot", "black_hot"] = "white_hot"
    stripes: Literal["auto", "off", "columns", "rows", "both"] = "auto"  # auto: columns of 16-bit cameras
    dead_pixels: Literal["auto", "off", "on"] = "auto"  # auto: of 16-bit cameras

    @model_validator(mode="before")
    @classmethod
    def _percentiles_mean_their_method(cls, values: Any) -> Any:
        if isinstance(values, dict) and "method" not in values and {"low_percentile", "high_percentile"} & set(values):
            return values | {"method": "percentile"}
        return values


class EngineConfig(Section):
    runtime: Literal["auto", "tensorrt", "compile", "openvino", "pytorch"] = "auto"
    variant: Literal["nano", "small", "base"] = "nano"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: int = Field(0, ge=0, le=256)  # for a frame; 0: chosen from the cores that the other stages leave free
    at_once: int = Field(0, ge=0, le=8)  # frames of a live rig that are fused at the same time; 0: chosen
    diffusion_steps: int = Field(4, ge=1, le=10)
    weights: str | None = None  # a safetensors file; None: the shipped weights of the variant
    # TensorRT: one engine for SMALLEST-USUAL-LARGEST, as 320x240-640x480-1280x720; None: one for every size that comes.
    sizes: str | None = None

    @field_validator("sizes")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        try:
            return value if value is None else str(range_of(value))
        except EngineError as error:
            raise ValueError(str(error)) from None


class PriorsConfig(Section):
    every_frames: int = Field(10, ge=1, le=1000)
    smoothing: float = Field(0.3, gt=0, le=1)  # share of the newest estimate
    scene_change: float = Field(12.0, gt=0)  # mean thumbnail difference (grey levels) that asks for new priors at once


class SteadyConfig(Section):
    enabled: bool = True
    share: float = Field(0.25, gt=0, le=1)  # of its newest value, that a pixel takes on where nothing moves


class PublishConfig(Section):
    endpoint: str = "tcp://127.0.0.1:5560"  # XPUB; "" publishes nothing
    streams: tuple[Literal["fused", "ir", "vis"], ...] = ("fused", "ir", "vis")
    jpeg_quality: int = Field(85, ge=1, le=100)
    curve_secret_key_file: str | None = None  # Z85 server key; needed for any endpoint that leaves this machine
    authorized_keys_dir: str | None = None  # public keys of clients that may subscribe


class ViewerConfig(Section):
    enabled: bool = False
    host: str = "127.0.0.1"
    port: int = Field(8870, ge=0, le=65535)
    public: bool = False  # the page knows no keys: whoever reaches a host beyond this machine sees the video

    @model_validator(mode="after")
    def _is_public_on_purpose(self) -> ViewerConfig:
        if self.enabled and not self.public and not is_loopback(self.host):
            raise ValueError(
                "host can be reached from other machines, and the page shows the video to everybody there, also of an "
                "encrypted rig: set public: true if that is meant, or host: 127.0.0.1"
            )
        return self


class OutputConfig(Section):
    video: str | None = None  # path of a video file of the fused frames
    report: str | None = None

    @model_validator(mode="after")
    def _files_differ(self) -> OutputConfig:
        if are_one_file(self.video, self.report):
            raise ValueError("video and report are the same file: give each its own")
        return self


class RigConfig(Section):
    """A whole rig, as written in one YAML file."""

    version: Literal[1] = 1
    rig: str = "rig"
    infrared: Source
    visible: Source
    capture: CaptureConfig = CaptureConfig()
    sync: SyncConfig = SyncConfig()
    registration: RegistrationConfig = RegistrationConfig()
    gain: GainConfig = GainConfig()
    engine: EngineConfig = EngineConfig()
    priors: PriorsConfig = PriorsConfig()
    steady: SteadyConfig = SteadyConfig()
    publish: PublishConfig = PublishConfig()
    viewer: ViewerConfig = ViewerConfig()
    output: OutputConfig = OutputConfig()

    @field_validator("rig")
    @classmethod
    def _name_is_a_topic(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9_-]{1,32}", value):
            raise ValueError("the rig's name becomes a topic: use 1 to 32 of a-z, 0-9, _ and -")
        return value

    @model_validator(mode="after")
    def _cameras_differ(self) -> RigConfig:
        address = _address(self.infrared)
        if address is not None and address == _address(self.visible):
            kind = self.infrared.kind
            raise ValueError(f"infrared and visible are the same {kind}: give each camera its own {ADDRESS_KEYS[kind]}")
        return self

    @model_validator(mode="after")
    def _cameras_keep_time(self) -> RigConfig:
        for name in ("infrared", "visible"):
            if not getattr(getattr(self, name), "realtime", True):
                raise ValueError(
                    f"{name}.realtime is false, and a rig shows what happens now: remove it; `dspfusion replay` fuses "
                    "recordings at any rate"
                )
        return self

    @model_validator(mode="after")
    def _viewer_has_something_to_show(self) -> RigConfig:
        if self.viewer.enabled and not self.publish.endpoint:
            raise ValueError(
                "viewer.enabled shows what is published, and publish.endpoint is empty: give one, such as "
                "tcp://127.0.0.1:5560, or switch the viewer off"
            )
        return self


def _address(source: Source) -> tuple[str, str] | None:
    """What a source opens, by whichever of its names; None where two may be alike, as simulated cameras."""
    if source.kind not in ADDRESS_KEYS:
        return None
    place = getattr(source, ADDRESS_KEYS[source.kind])
    return source.kind, place if "://" in place else os.path.realpath(os.path.expanduser(place))


def load_config(path: str | Path) -> RigConfig:
    """Reads and checks a rig's YAML file.

    `${env:NAME}` in a value is replaced by that environment variable, so that passwords stay out of the file.
    Paths of what is read (recordings, calibration, weights, keys) are taken relative to the file's own folder; what is
    written goes where the user stands, unless its path is absolute.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or has an unknown key or an impossible value.
    """
    path = Path(path)
    values = read_yaml(path)
    try:
        config = RigConfig.model_validate(_substitute(values))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or into itself: correct that") from None
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {first_problem(error)}") from None
    return _anchor_paths(config, path.parent)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a small YAML file holds.

    Raises:
        ConfigError: missing, larger than 1 MiB, no YAML, with a key that is there twice, or no mapping.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: no file: give the rig's YAML file")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than 1 MiB, so this is no configuration: give the rig's YAML file")
        values = load_yaml(_text_of(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}: check the path") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or into itself: correct that") from None
    except KeyTwice as error:
        raise ConfigError(f"{path} {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: correct the syntax there") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}: see configs/demo.yaml")
    return values


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    wrong = content.find(b"\0")  # plain letters in UTF-16 are UTF-8 with zeros between them
    if wrong < 0:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = error.start
    line = content.count(b"\n", 0, wrong) + 1
    raise ConfigError(f"{path} line {line}: not UTF-8 text: save it as UTF-8")


def _substitute(value: Any, where: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _substitute(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, where) for item in value]
    if not isinstance(value, str):
        return value
    if "${" in VARIABLE.sub("", value):
        raise ConfigError(
            f"{where}: ${{ begins the name of an environment variable: write ${{env:NAME}}, with letters, digits and _ "
            "in its name"
        )

    def look_up(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"the configuration needs the environment variable {name}: set it before starting")
        of_credentials = re.search("://[^/?#]*$", value[: match.start()]) and re.match("[^/?#]*@", value[match.end() :])
        if of_credentials and re.search("[/?#]", os.environ[name]):
            raise ConfigError(f"{where}: the environment variable {name}: {CUTS_CREDENTIALS}")
        return os.environ[name]

    return VARIABLE.sub(look_up, value)


def first_problem(error: ValidationError) -> str:
    """One line for the first thing that is wrong, with the key's path; never repeats a value (it may be secret)."""
    problems = error.errors(include_input=False, include_url=False)
    # The discriminator's tag is part of pydantic's path but not of the file's.
    where = ".".join(str(part) for part in problems[0]["loc"] if part not in KINDS) or "the configuration"
    message = problems[0]["msg"].removeprefix("Value error, ")
    match problems[0]["type"]:
        case "extra_forbidden":
            message = "unknown key: remove it, or see `dspfusion config schema` for the keys there are"
        case "union_tag_not_found" | "union_tag_invalid":
            message = f"write kind: {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        case "string_too_short":
            message = "nothing is written there: give one"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {message}{more}"


def _anchor_paths(config: RigConfig, folder: Path) -> RigConfig:
    def anchored(path: str) -> str:
        expanded = Path(os.path.expanduser(path))
        return str(expanded) if expanded.is_absolute() else str((folder / expanded).resolve())

    def source(camera: Any) -> Any:
        if isinstance(camera, FolderSource) or (isinstance(camera, StreamSource) and "://" not in camera.url):
            key = "path" if isinstance(camera, FolderSource) else "url"
            return camera.model_copy(update={key: anchored(getattr(camera, key))})
        return camera

    updates: dict[str, Any] = {"infrared": source(config.infrared), "visible": source(config.visible)}
    for name, keys in READ_FILES.items():
        section = getattr(config, name)
        given = {key: anchored(path) for key in keys if (path := getattr(section, key))}
        updates[name] = section.model_copy(update=given)
    return config.model_copy(update=updates)
