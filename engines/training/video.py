"""Two neighbouring frames of one scene, spoiled alike: what the network must learn not to flicker on.

What a camera or the weather does to both frames alike (stripes, dead pixels, haze, darkness) is drawn once. What
changes from frame to frame (the noise of a pixel, where the drops fall) is drawn anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import cv2
import numpy as np
import torch
from av.error import FFmpegError
from numpy.typing import NDArray
from torch import Tensor

from engines.base import EngineError
from engines.training.data import IGNORED, Batch, Draw, Framing, Pair, Picture, Spoiling, collate, draw_corner, item_of

CONSISTENT_PX = 1.0  # forward and backward flow may disagree by this much
MOVE_PX = 3  # a still pair is moved by up to this much between its two frames

Clip = list[Pair]


class VideoBatch(NamedTuple):
    """Neighbouring frames. The priors are read from the first one's region, and serve both."""

    first: Batch
    second: Batch
    flow: Tensor  # where a pixel of the second crop comes from, in pixels from itself: (B, 2, S, S) as (dx, dy)
    trusted: Tensor  # 1 where that is to be believed, (B, 1, S, S)


def read_clips(folder: Path, least_px: int) -> list[Clip]:
    """Decodes every registered clip of a folder: `<name>_ir.*` and `<name>_vi.*`, frame by frame one pair.

    Raises:
        EngineError: there is no folder, no clip in it, or one cannot be used.
    """
    thermal = sorted(folder.glob("*_ir.*"))
    if not thermal:
        raise EngineError(f"there are no clips in {folder}: it needs <name>_ir.mkv and <name>_vi.mkv")
    return [_read_clip(path, least_px) for path in thermal]


def _read_clip(thermal: Path, least_px: int) -> Clip:
    colour = thermal.with_name(thermal.name.replace("_ir.", "_vi."))
    if not colour.is_file():
        raise EngineError(f"{thermal.name} has no visible partner {colour.name} beside it: add it or remove the clip")
    infrared, visible = list(_decoded(thermal, "gray")), list(_decoded(colour, "rgb24"))
    if len(infrared) != len(visible):
        raise EngineError(
            f"{thermal.name} has {len(infrared)} frames and {colour.name} {len(visible)}: "
            "cut both to the frames that belong together"
        )
    if len(infrared) < 2:
        raise EngineError(f"{thermal.name} and {colour.name} have fewer than two frames: remove the clip")
    if len({frame.shape[:2] for frame in (*infrared, *visible)}) > 1:
        raise EngineError(
            f"the frames of {thermal.name} and {colour.name} differ in size: stage IV needs registered clips"
        )
    clip = [Pair(*frames) for frames in zip(infrared, visible, strict=True)]
    if min(clip[0].infrared.shape) < least_px:
        raise EngineError(f"{thermal.name} is smaller than draw.region_px, {least_px}: remove the clip or lower that")
    return clip


def stills(clips: list[Clip]) -> list[Pair]:
    """The first and the middle frame of each clip, for the stages that learn from pairs: a clip is one more scene."""
    return [clip[index]._replace(subset="video") for clip in clips for index in (0, len(clip) // 2)]


def _decoded(path: Path, pixels: str) -> Iterator[NDArray[np.uint8]]:
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format=pixels), np.uint8)
    except (FFmpegError, IndexError) as error:
        raise EngineError(f"{path} is no video that can be decoded ({error}): fetch it again or remove it") from error


class Moment(np.random.Generator):
    """Draws the scene from `seed` alone and what changes from frame to frame from `seed` and `moment`.

    The noise of pixels is what `engines.degrade` draws as a normal field, and rain falls where a uniform field says;
    everything else belongs to the scene or to the camera.
    """

    def __init__(self, kind: str, seed: int, moment: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self._kind = kind
        self._anew = np.random.default_rng((seed, moment))

    def standard_normal(self, size: Any = None, *arguments: Any, **options: Any) -> Any:
        if _is_field(size):
            return self._anew.standard_normal(size, *arguments, **options)
        return super().standard_normal(size, *arguments, **options)

    def random(self, size: Any = None, *arguments: Any, **options: Any) -> Any:
        if _is_field(size) and self._kind == "rain":
            return self._anew.random(size, *arguments, **options)
        return super().random(size, *arguments, **options)


def _is_field(size: Any) -> bool:
    return isinstance(size, tuple) and len(size) > 1


def draw_video_batch(
    clips: list[Clip], pairs: list[Pair], size: int, draw: Draw, seed: int, iteration: int
) -> VideoBatch:
    """The batch of one iteration: the same for the same seed and number."""
    random = np.random.default_rng((seed, iteration))
    items = [_draw_item(clips, pairs, draw, random) for _ in range(size)]
    first, second, flow, trusted = zip(*items, strict=True)
    return VideoBatch(
        collate(list(first)),
        collate(list(second)),
        torch.from_numpy(np.stack(flow)),
        torch.from_numpy(np.stack(trusted)),
    )


def _draw_item(
    clips: list[Clip], pairs: list[Pair], draw: Draw, random: np.random.Generator
) -> tuple[tuple[object, ...], tuple[object, ...], Picture, Picture]:
    if not clips or random.random() < draw.still_share:
        clean, flow, trusted = _from_still(pairs[int(random.integers(len(pairs)))], draw, random)
    else:
        clean, flow, trusted = _from_clip(clips[int(random.integers(len(clips)))], draw, random)
    spoiling = Spoiling.drawn(clean[0][1], draw, random)
    kinds = [spoiling.infrared_kind, spoiling.visible_kind]
    missing = -1
    if random.random() < draw.missing_share:
        missing = int(random.integers(2))
        kinds[missing] = IGNORED
    corner = draw_corner(draw, random)
    items = []
    for moment, (infrared, visible) in enumerate(clean):
        spoiled = spoiling.spoil(infrared, visible, partial(_at, moment))
        pictures = [*spoiled, infrared, visible]
        for index in (missing, missing + 2) if missing >= 0 else ():
            pictures[index] = np.zeros_like(pictures[index])
        items.append(item_of(cast(Any, tuple(pictures)), kinds, spoiling.strength, corner, draw))
    window = (slice(None), *(slice(start, start + draw.crop_px) for start in corner))
    flow = np.ascontiguousarray(flow[window])
    return items[0], items[1], flow, np.ascontiguousarray(trusted[window]) * _inside(flow)


def _at(moment: int, kind: str, seed: int) -> int:
    # numpy makes a generator of a seed, and takes one as it is.
    return cast(int, Moment(kind, seed, moment))


def _from_clip(
    clip: Clip, draw: Draw, random: np.random.Generator
) -> tuple[list[tuple[Picture, Picture]], Picture, Picture]:
    start = int(random.integers(len(clip) - 1))
    framing = Framing.drawn(clip[0].infrared.shape, draw, random)
    clean = [framing.cut(pair) for pair in clip[start : start + 2]]
    return clean, *flow_between(clean[0][1], clean[1][1])


def _from_still(
    pair: Pair, draw: Draw, random: np.random.Generator
) -> tuple[list[tuple[Picture, Picture]], Picture, Picture]:
    """A camera that turns a little: here the flow is known. Half of the time it stands still."""
    framing = Framing.drawn(pair.infrared.shape, draw, random)
    down, right = (int(step) for step in random.integers(-MOVE_PX, MOVE_PX + 1, size=2))
    if random.random() < 0.5:
        down = right = 0
    height, width = pair.infrared.shape
    down = _that_fits(down, (framing.top, framing.infrared_top), height - framing.size)
    right = _that_fits(right, (framing.left, framing.infrared_left), width - framing.size)
    moved = replace(
        framing,
        top=framing.top + down,
        infrared_top=framing.infrared_top + down,
        left=framing.left + right,
        infrared_left=framing.infrared_left + right,
    )
    flow = np.empty((2, framing.size, framing.size), np.float32)
    flow[0], flow[1] = -right if framing.mirrored else right, down
    return [framing.cut(pair), moved.cut(pair)], flow, np.ones_like(flow[:1])


def _that_fits(step: int, starts: tuple[int, int], most: int) -> int:
    return int(np.clip(step, -min(starts), most - max(starts)))


def flow_between(first: Picture, second: Picture) -> tuple[Picture, Picture]:
    """Where the second picture's pixels come from in the first, and where that is to be believed.

    Args:
        first, second: clean visible pictures, (H, W, 3) in [0, 1].

    Returns:
        The flow, (2, H, W) as (dx, dy), and a mask of ones and zeros, (1, H, W): forward and backward flow agree.
    """
    grey = [cv2.cvtColor(np.rint(picture * 255).astype(np.uint8), cv2.COLOR_RGB2GRAY) for picture in (first, second)]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    still = np.zeros((*grey[0].shape, 2), np.float32)
    forward, backward = search.calc(grey[0], grey[1], still.copy()), search.calc(grey[1], grey[0], still)
    y, x = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)
    there = cv2.remap(forward, x + backward[..., 0], y + backward[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE)
    agree = np.linalg.norm(there + backward, axis=-1) < CONSISTENT_PX
    return np.ascontiguousarray(backward.transpose(2, 0, 1)), agree[None].astype(np.float32)


def _inside(flow: Picture) -> Picture:
    """Where the flow points into the crop, (1, S, S)."""
    y, x = np.mgrid[: flow.shape[1], : flow.shape[2]]
    right, down = x + flow[0], y + flow[1]
    inside = (right >= 0) & (right <= flow.shape[2] - 1) & (down >= 0) & (down <= flow.shape[1] - 1)
    return inside[None].astype(np.float32)
