"""From a decoded frame to the arrays that the pipeline works on."""

from __future__ import annotations

import numpy as np
from av import VideoFrame
from av.video.reformatter import Colorspace

from pipeline.errors import SourceError
from pipeline.frame import Camera
from pipeline.sources.base import MAX_PIXELS

_UNSPECIFIED = 2
_HD_ROWS = 720


def to_image(frame: VideoFrame, camera: Camera) -> tuple[np.ndarray, int]:
    """The picture and the number of significant bits of its samples.

    Returns:
        visible: uint8 RGB (H, W, 3), 8. infrared: uint8 or uint16 (H, W): the luminance as it is in the stream,
        neither stretched nor clipped, because a camera's counts say more than a guess about their range.
    """
    if frame.width * frame.height > MAX_PIXELS:
        raise SourceError(f"the picture has {frame.width}x{frame.height} pixels, more than {MAX_PIXELS}: refused")
    if camera == "infrared":
        return infrared_image(frame)
    return visible_image(frame), 8


def visible_image(frame: VideoFrame) -> np.ndarray:
    """uint8 RGB (H, W, 3). A stream that does not name its matrix is BT.709 from 720 rows on, and BT.601 below."""
    # swscale reads matrix and range from the frame. It is as fast as OpenCV here (0.12 ms for 640x480) and,
    # other than OpenCV's conversion, right for full-range and BT.709 streams.
    if int(frame.colorspace) == _UNSPECIFIED and frame.height >= _HD_ROWS and not frame.format.is_rgb:
        return frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709)
    return frame.to_ndarray(format="rgb24")


def infrared_image(frame: VideoFrame) -> tuple[np.ndarray, int]:
    """uint8 or uint16 (H, W) and its significant bits. Colour is dropped, sixteen bits stay sixteen."""
    layout = frame.format
    bits = layout.components[0].bits if layout.components else 8
    name = layout.name
    if layout.is_rgb or layout.has_palette or not _luma_is_plane_zero(name):
        if bits > 8:
            return np.ascontiguousarray(frame.to_ndarray(format="gray16le")), 16
        return np.ascontiguousarray(frame.to_ndarray(format="gray")), 8
    kind = np.dtype(np.uint8) if bits <= 8 else np.dtype(">u2" if name.endswith("be") else "<u2")
    plane = frame.planes[0]
    samples = np.frombuffer(memoryview(plane), dtype=kind).reshape(-1, plane.line_size // kind.itemsize)
    image = samples[: frame.height, : frame.width]
    return image.astype(np.uint8 if bits <= 8 else np.uint16), bits  # a copy: the decoder uses its buffer again


def _luma_is_plane_zero(name: str) -> bool:
    planar = ("gray", "yuv4", "yuvj4", "yuva4", "nv12", "nv21", "nv16")
    # ya8 and yuyv422 interleave; p010 keeps its ten bits in the upper end of sixteen.
    return name.startswith(planar) and "f32" not in name and "f16" not in name
