"""The closed thermal shutter behind a lossy codec: clips that libx264 and others have coded, with the truth known."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cache

import av
import cv2
import numpy as np
import pytest

from pipeline.clock import MotionLog
from pipeline.frame import FROZEN_REPEATS, Frame
from pipeline.shutter import BLOCK_PX, Shutter
from pipeline.sync import pair_recordings

SIZE = (320, 240)
CLOSED = range(50, 80)
CODECS = {
    "rtsp camera": ("libx264", {"crf": "23", "preset": "veryfast", "tune": "zerolatency"}),
    "constant bit rate": ("libx264", {"b": "1M", "maxrate": "1M", "bufsize": "500k", "tune": "zerolatency"}),
    "film": ("libx264", {"crf": "25", "preset": "medium"}),
    "key pictures often": ("libx264", {"qp": "20", "g": "12", "preset": "veryfast", "tune": "zerolatency"}),
    "mpeg4": ("mpeg4", {"b": "1M"}),
    "600 kbit/s": ("libx264", {"b": "600k", "maxrate": "600k", "bufsize": "300k", "tune": "zerolatency"}),
    "150 kbit/s": ("libx264", {"b": "150k", "maxrate": "150k", "bufsize": "75k", "tune": "zerolatency"}),
    "strong": ("libx264", {"crf": "30", "preset": "veryfast", "tune": "zerolatency"}),
}


def world() -> np.ndarray:
    random = np.random.default_rng(4)
    picture = np.full((480, 640), 90, np.uint8)
    for _ in range(90):
        middle = tuple(float(random.integers(0, side)) for side in (640, 480))
        box = cv2.boxPoints((middle, tuple(random.uniform(8, 60, 2)), float(random.uniform(0, 180)))).astype(np.int32)
        cv2.fillConvexPoly(picture, box, int(random.integers(40, 200)), cv2.LINE_AA)
    return cv2.GaussianBlur(picture, (0, 0), 1.2).astype(np.float32)


WORLD = world()


def filmed(
    speed_px: float, noise: float, count: int = 110, closed: range = CLOSED, rest: int = 10_000
) -> list[np.ndarray]:
    """Pictures of a camera that turns until picture `rest`, with its shutter closed for some of them."""
    places_px = (30 + speed_px * min(index, rest) for index in range(count))
    views = (
        cv2.warpAffine(WORLD, np.array([[1, 0, -x], [0, 1, -90.0]]), SIZE, flags=cv2.INTER_LINEAR) for x in places_px
    )
    return exposed(views, noise, closed, seed=0)


def exposed(views: Iterable[np.ndarray], noise: float, closed: range, seed: int) -> list[np.ndarray]:
    """What a camera with this noise makes of its views; while its shutter is closed it repeats the last picture."""
    random = np.random.default_rng(seed)
    pictures: list[np.ndarray] = []
    for index, view in enumerate(views):
        if index in closed:
            pictures.append(pictures[-1])
        else:
            pictures.append(np.clip(view + random.normal(0, noise, view.shape), 0, 255).astype(np.uint8))
    return pictures


@cache
def coded(
    codec: str, speed_px: float = 2.0, noise: float = 1.5, closed: range = CLOSED, count: int = 110
) -> list[np.ndarray]:
    """What `filmed` gives, as it comes out of a codec."""
    return through(codec, filmed(speed_px, noise, count, closed))


def through(codec: str, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures as they come out of a codec."""
    name, options = CODECS[codec]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(name, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def repeats(pictures: list[np.ndarray]) -> list[bool]:
    shutter = Shutter()
    return [shutter.add(picture) > 0 for picture in pictures]


@pytest.mark.parametrize("codec", CODECS)
def test_a_closed_shutter_is_seen_through_a_lossy_codec(codec: str):
    found = repeats(coded(codec))
    assert all(found[CLOSED.start : CLOSED.stop])
    assert not any(found[: CLOSED.start])
    assert not any(found[CLOSED.stop + 1 :])  # one picture of doubt: it could have been a key picture


@pytest.mark.parametrize("speed_px", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("codec", ["rtsp camera", "600 kbit/s", "150 kbit/s"])
def test_the_first_picture_of_a_closed_shutter_is_told_at_any_speed(codec: str, speed_px: float):
    found = repeats(coded(codec, speed_px))
    assert all(found[CLOSED.start : CLOSED.stop])
    assert not any(found[: CLOSED.start])
    assert not any(found[CLOSED.stop + 1 :])


def carried(count: int, closed: range) -> list[np.ndarray]:
    """Pictures of a camera in a hand: it turns this way and that, and never by the same amount twice."""
    random = np.random.default_rng(13)
    place, turn, pictures = np.array([160.0, 120.0]), np.zeros(2), []
    for index in range(count):
        turn = 0.9 * turn + random.normal(0, 0.45, 2)
        place = place + turn
        x, y = place
        view = cv2.warpAffine(WORLD, np.array([[1, 0, -x], [0, 1, -y]]), SIZE, flags=cv2.INTER_LINEAR)
        noisy = np.clip(view + random.normal(0, 1.5, view.shape), 0, 255).astype(np.uint8)
        pictures.append(pictures[-1] if index in closed else noisy)
    return pictures


@pytest.mark.parametrize("codec", ["rtsp camera", "600 kbit/s", "150 kbit/s"])
def test_a_camera_that_is_carried_in_a_hand_is_live_and_its_closed_shutter_is_told(codec: str):
    found = repeats(through(codec, carried(200, range(110, 140))))
    assert sum(found[:110]) + sum(found[141:]) <= 6  # where it rests between two turns
    assert all(found[110:140])


@pytest.mark.parametrize("noise", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("codec", ["600 kbit/s", "150 kbit/s", "mpeg4"])
def test_a_night_scene_that_stands_still_is_live_behind_any_rate(codec: str, noise: float):
    assert sum(repeats(coded(codec, 0.0, noise, closed=range(0)))) <= 2


def test_a_scene_that_a_codec_repeats_exactly_is_live_again_before_four_seconds_and_stays_so():
    found = repeats(coded("strong", 0.0, closed=range(0)))
    assert not any(found[95:])


@pytest.mark.parametrize(
    ("codec", "speed_px"), [("rtsp camera", 0.0), ("rtsp camera", 0.3), ("constant bit rate", 0.0), ("mpeg4", 0.0)]
)
def test_a_noisy_scene_that_stands_still_or_nearly_so_is_live(codec: str, speed_px: float):
    pictures = coded(codec, speed_px, noise=3.0, closed=range(0))
    assert sum(repeats(pictures)) <= 2


def test_a_scene_that_comes_to_rest_is_live_again_after_a_few_pictures():
    found = repeats(filmed(2.0, noise=1.5, closed=range(0), rest=50))
    assert not any(found[:50])
    assert not any(found[62:])


@pytest.mark.parametrize("hangs_at", [1, 30])
def test_a_camera_that_hangs_is_never_taken_for_a_live_one(hangs_at: int):
    found = repeats(filmed(1.0, noise=1.5, count=hangs_at + 500, closed=range(hangs_at, hangs_at + 500)))
    assert all(found[hangs_at:])  # for 20 s


@pytest.mark.parametrize("codec", ["rtsp camera", "constant bit rate", "600 kbit/s", "mpeg4", "strong"])
def test_a_camera_that_hangs_behind_a_codec_is_not_taken_for_a_live_one(codec: str):
    found = repeats(coded(codec, 1.0, closed=range(40, 240), count=240))
    assert sum(found[40:]) == 200


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_of_an_exact_recording_only_equal_pictures_are_repeats(kind: type):
    found = repeats([picture.astype(kind) for picture in filmed(1.0, noise=1.5)])
    assert [index for index, repeat in enumerate(found) if repeat] == list(CLOSED)


def test_a_picture_of_another_size_begins_anew():
    shutter = Shutter()
    pictures = coded("rtsp camera")
    for picture in pictures[:60]:
        shutter.add(picture)
    assert shutter.count >= FROZEN_REPEATS
    assert shutter.add(np.ascontiguousarray(pictures[60][: -4 * BLOCK_PX])) == 0


def test_the_motion_of_a_view_is_not_measured_while_the_shutter_is_closed():
    shutter, log = Shutter(), MotionLog()
    for index, picture in enumerate(filmed(1.0, noise=1.5)):
        log.add(shutter.judged(Frame("infrared", picture, index * 40_000_000, index)))
    measured = [round(time_s * 25) for time_s in log.signal().times_s]
    assert measured == [index for index in range(log.frames) if index not in CLOSED]


@pytest.mark.parametrize("codec", ["rtsp camera", "constant bit rate", "600 kbit/s", "150 kbit/s", "strong"])
def test_no_pair_of_a_coded_recording_with_a_closed_shutter_is_called_fused(codec: str):
    infrared = coded(codec)
    black = np.zeros((*SIZE[::-1], 3), np.uint8)
    shutter = Shutter()
    pairs = pair_recordings(
        (shutter.judged(Frame("infrared", one, index * 40_000_000, index)) for index, one in enumerate(infrared)),
        (Frame("visible", black, index * 40_000_000, index) for index in range(len(infrared))),
    )
    modes = [pair.mode for pair in pairs]
    assert "fused" not in modes[CLOSED.start : CLOSED.stop]
    assert set(modes[: CLOSED.start]) == {"fused"}
    assert set(modes[CLOSED.stop + 1 :]) == {"fused"}
