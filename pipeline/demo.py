"""The bundled rig: two simulated cameras through the real pipeline."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from calibration.rig_file import save_rig
from pipeline.config import OutputConfig, RigConfig, ViewerConfig, first_problem
from pipeline.errors import ConfigError

PLANE_DISTANCE_M = 20.0  # where people walk in the simulated street


def demo_config(output: Path, scene: str) -> RigConfig:
    """The demo's rig, with its calibration written into `output`.

    The cameras are unlike on purpose: other sizes, rates, clocks and lenses, a shutter, stripes and dead pixels.
    """
    from pipeline.sources.synthetic import true_rig

    sections: dict[str, Any] = {
        "rig": "demo",
        "infrared": {
            "kind": "synthetic", "scene": scene, "width": 640, "height": 512, "rate_hz": 25,
            "jitter_ms": 1.0, "stripe_counts": 6, "dead_pixels": 40, "shutter_every_s": 15, "shutter_s": 0.5,
        },
        "visible": {"kind": "synthetic", "scene": scene, "width": 640, "height": 480, "rate_hz": 25, "jitter_ms": 1.0},
    }  # fmt: skip
    try:
        config = RigConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(f"--{first_problem(error).split('.')[-1]}") from None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create {output}: {error.strerror}: choose another folder with --output") from None
    calibration = output / "demo_calibration.yaml"
    save_rig(true_rig(config.infrared, config.visible, PLANE_DISTANCE_M), calibration)  # type: ignore[arg-type]
    return config.model_copy(
        update={
            "registration": config.registration.model_copy(update={"calibration": str(calibration)}),
            "publish": config.publish.model_copy(update={"endpoint": f"tcp://127.0.0.1:{free_port(5560)}"}),
            "viewer": ViewerConfig(enabled=True, port=free_port(8870)),
            "output": OutputConfig(video=str(output / "demo.mp4"), report=str(output / "demo_report.json")),
        }
    )


def free_port(preferred: int) -> int:
    """The preferred port of this machine, or any free one if that is taken."""
    for port in (preferred, 0):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise ConfigError("no free port on 127.0.0.1: close a program that listens there")
