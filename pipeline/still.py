"""Fuses still pairs: two images, or two folders with equal names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calibration.whole_file import written_whole
from engines.base import FusionEngine
from pipeline.config import GainConfig, PriorsConfig, RegistrationConfig
from pipeline.errors import ConfigError, SourceError
from pipeline.frame import Frame, FramePair
from pipeline.fuse import Fuse
from pipeline.gain import InfraredGain
from pipeline.recording import (
    RecordingInfo,
    colour_of,
    doubts,
    outline_of,
    refuse_one_for_both,
    refuse_overwriting,
    refuse_small,
    refuse_swapped,
    refuse_unless_there,
    refuse_unlikely,
)
from pipeline.register import Register
from pipeline.sources.folder import SUFFIXES, image_files, read_image

log = logging.getLogger("dspfusion.still")


def list_pairs(infrared: Path, visible: Path, output: Path) -> list[tuple[Path, Path, Path]]:
    """(infrared, visible, output) paths of every pair; folders are matched by the names without suffix.

    Raises:
        SourceError: something is missing, or names have no partner.
    """
    for path in (infrared, visible):
        refuse_unless_there(path)
    if infrared.is_dir() != visible.is_dir():
        raise SourceError("one input is a folder and the other a file: give two images or two folders")
    if not infrared.is_dir():
        target = output / f"{visible.stem}.png" if output.is_dir() else output
        return [(infrared, visible, target)]
    by_name = [_by_name(image_files(folder, none_allowed=True)) for folder in (infrared, visible)]
    unmatched = sorted(by_name[0].keys() ^ by_name[1].keys())
    if unmatched:
        raise SourceError(
            f"{len(unmatched)} of the names have no partner (first: {unmatched[0]}): give two folders with equal names"
        )
    if not by_name[0]:
        raise SourceError(f"{infrared} holds no images: give folders of PNG, JPEG, TIFF, BMP or WebP files")
    return [(by_name[0][name], by_name[1][name], output / f"{name}.png") for name in sorted(by_name[0])]


def _by_name(images: list[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for image in images:
        if image.stem in named:
            raise SourceError(f"{named[image.stem]} and {image.name} have one name: keep one of them in the folder")
        named[image.stem] = image
    return named


def read_pair(infrared: Path, visible: Path) -> FramePair:
    """One pair of images; 16-bit infrared stays 16-bit.

    Raises:
        SourceError: unreadable, too small, swapped, or one and the same.
    """
    thermal, colour = read_image(infrared, "infrared"), read_image(visible, "visible")
    for path, picture in ((infrared, thermal), (visible, colour)):
        refuse_small(path, (picture.shape[1], picture.shape[0]))
    refuse_one_for_both(infrared, visible)
    refuse_swapped(infrared, colour_of(read_image(infrared, "visible")), visible, colour_of(colour))
    bits = 8 if thermal.dtype == np.uint8 else 16
    return FramePair(
        Frame("infrared", thermal, 0, 0, clock="file", bits=bits), Frame("visible", colour, 0, 0, clock="file"), "fused"
    )


def fuse_stills(
    engine: FusionEngine,
    pairs: list[tuple[Path, Path, Path]],
    calibration: str | None = None,
    on_done: Callable[[Path], None] | None = None,
    on_doubt: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Fuses each pair by itself and writes a picture for each, whole or not at all. Returns one row a pair.

    Args:
        engine: serves.
        pairs: from `list_pairs`.
        calibration: a calibration file; None: the infrared pictures are resized.
        on_done: told of each fused picture.
        on_doubt: told what is strange about the pictures, as `replay` reports it of recordings; it is logged as well.

    Raises:
        DspfusionError, EngineError, CalibrationError: a pair that cannot be fused; those before it have been.
    """
    for infrared, visible, output in pairs:
        if output.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{output.name}: a picture ends in .png, .jpg, .tif, .bmp or .webp: choose one of them")
        refuse_overwriting(output, infrared, visible)
    infos = [_outline([files[camera] for files in pairs]) for camera in (0, 1)]
    refuse_unlikely(*infos)
    for line in doubts(*infos, calibrated=calibration is not None):
        log.warning(line)
        if on_doubt is not None:
            on_doubt(line)
    rows = []
    for infrared, visible, output in pairs:
        # Stills have no past: gain and priors start anew with each of them.
        register = Register(RegistrationConfig(calibration=calibration, refine=False), InfraredGain(GainConfig()))
        fuse = Fuse(engine, PriorsConfig(), background=False)
        fused = fuse(register(read_pair(infrared, visible)))
        _write(output, fused.image)
        rows.append(
            {
                "infrared": str(infrared),
                "visible": str(visible),
                "output": str(output),
                "fuse_ms": round(fused.latency_ms["fuse"], 2),
                "degradation": fused.degradation,
                "psnr_db": fuse.psnr_db,
            }
        )
        if on_done is not None:
            on_done(output)
    return rows


def _outline(files: list[Path]) -> RecordingInfo:
    return outline_of(files[0] if len(files) == 1 else files[0].parent, files)


def _write(path: Path, image: np.ndarray) -> None:
    try:
        try:
            encoded, content = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        except cv2.error:
            encoded = False
        if not encoded:
            height, width = image.shape[:2]
            raise OSError(None, f"{width}x{height} pixels do not fit into {path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            part.write_bytes(content.tobytes())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}: choose another place") from None
