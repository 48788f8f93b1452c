"""A rig that comes to rest, and infrared cameras that only look so: what the visible camera tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import cv2
import numpy as np
import pytest

from pipeline.frame import Frame, FramePair
from pipeline.shutter import Shutter
from pipeline.standstill import Standstill
from pipeline.sync import Account, Sync, pair_recordings
from tests.test_shutter import SIZE, WORLD, exposed, through

PERIOD_NS = 40_000_000
STOP, GO, COUNT = 60, 200, 260  # pictures: the rig stands from the first to the second
ACCEPTED = 100  # pictures after the stop: 3.6 s, and what the cameras differ in telling it
TOLD = 20  # pictures by which a hanging camera is told when the rig drives off
Painting = Callable[[int, np.ndarray], None]


def place_px(index: int) -> float:
    """Of the view of a rig that drives, brakes for half a second, stands, and drives on."""
    speed_px = np.interp(np.arange(index), [0, STOP - 12, STOP, GO, GO + 12], [3.0, 3.0, 0.0, 0.0, 3.0])
    return float(speed_px.sum())


def filmed(noise: float, hangs: range = range(0), painted: Painting | None = None, contrast: float = 1.0):
    """Pictures of a camera on that rig."""

    def view(index: int) -> np.ndarray:
        shift = np.array([[1, 0, -10 - place_px(index)], [0, 1, -90.0]])
        seen = cv2.warpAffine(WORLD, shift, SIZE, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        seen = 100 + contrast * (seen - 100)
        if painted is not None:
            painted(index, seen)
        return seen

    return exposed(map(view, range(COUNT)), noise, hangs, seed=3)


def walker(index: int, view: np.ndarray) -> None:
    """Somebody who walks through the view while the rig stands."""
    if STOP <= index < GO:
        x = 2 * (index - STOP)
        view[70:190, x : x + 30] = 40


def infrared_frames(pictures: Iterable[np.ndarray]) -> list[Frame]:
    shutter = Shutter()
    return [shutter.judged(Frame("infrared", one, k * PERIOD_NS, k)) for k, one in enumerate(pictures)]


@cache
def coded(codec: str = "strong", hangs: range = range(0)) -> list[Frame]:
    """Infrared as it comes out of a codec."""
    return infrared_frames(through(codec, filmed(noise=0.7, hangs=hangs)))


def visible_frames(pictures: Iterable[np.ndarray]) -> list[Frame]:
    return [Frame("visible", np.dstack([one] * 3), k * PERIOD_NS, k) for k, one in enumerate(pictures)]


VISIBLE = visible_frames(filmed(noise=2.5, painted=walker))


def live(infrared: list[Frame], visible: list[Frame]) -> list[FramePair]:
    """Through a Sync: infrared arrives 60 ms after the visible picture of the same moment."""
    arrivals = [(one.captured_ns + 80_000_000, one) for one in infrared]
    arrivals += [(one.captured_ns + 20_000_000, one) for one in visible]
    sync, pairs = Sync(), []
    for now_ns, one in sorted(arrivals, key=lambda arrival: arrival[0]):
        sync.add(one, now_ns)
        pairs += sync.poll(now_ns)
    return pairs + sync.flush()


def replayed(infrared: list[Frame], visible: list[Frame]) -> list[FramePair]:
    return list(pair_recordings(infrared, visible))


def fused(pairs: list[FramePair]) -> set[int]:
    return {pair.visible.index for pair in pairs if pair.mode == "fused" and pair.visible is not None}


@pytest.mark.parametrize("paired", [live, replayed])
@pytest.mark.parametrize("codec", ["strong", "rtsp camera"])
def test_a_rig_that_stands_at_a_red_light_is_fused_again_after_the_longest_shutter_time(codec, paired):
    infrared = coded(codec)
    shown = fused(paired(infrared, VISIBLE))
    assert set(range(2, STOP - 8)) <= shown
    assert not shown & set(range(STOP + 2, STOP + 85))  # until then its shutter might be closed
    assert set(range(STOP + ACCEPTED, GO)) <= shown
    assert len(set(range(GO, COUNT)) - shown) <= 12


@pytest.mark.parametrize("paired", [live, replayed])
@pytest.mark.parametrize("hangs_at", [30, STOP - 25])
def test_a_camera_that_hung_before_the_rig_stopped_is_frozen_for_good(hangs_at, paired):
    infrared = coded(hangs=range(hangs_at, COUNT))
    assert not fused(paired(infrared, VISIBLE)) & set(range(hangs_at, COUNT))


@pytest.mark.parametrize("hangs_at", [STOP, STOP + 25, STOP + 110])
def test_a_camera_that_hangs_at_rest_is_frozen_when_the_rig_drives_off(hangs_at):
    infrared = coded(hangs=range(hangs_at, COUNT))
    assert not fused(live(infrared, VISIBLE)) & set(range(GO + TOLD, COUNT))


def hanging(infrared: list[Frame], visible: list[Frame]) -> list[bool]:
    """Of each infrared picture whether its camera is known to hang."""
    sync, found = Sync(), []
    for one, seen in zip(infrared, visible, strict=True):
        sync.add(seen, one.captured_ns)
        sync.add(one, one.captured_ns)
        found.append(sync.infrared_hangs)
    return found


@pytest.mark.parametrize("hangs_at", [30, STOP, STOP + 110])
def test_a_camera_that_hangs_while_the_rig_drives_is_known_to_hang(hangs_at):
    told = hanging(coded(hangs=range(hangs_at, COUNT)), VISIBLE)
    assert not any(told[:hangs_at])
    assert all(told[GO + TOLD :])


@pytest.mark.parametrize("seen", [VISIBLE, visible_frames(filmed(noise=2.5, contrast=0.01))], ids=["day", "night"])
def test_a_live_camera_is_never_taken_for_one_that_hangs(seen):
    assert not any(hanging(coded(), seen))


def test_a_sixteen_bit_camera_that_repeats_for_longer_than_any_shutter_hangs():
    still = visible_frames(filmed(noise=2.5, contrast=0.01))
    pictures = [one.astype(np.uint16) for one in filmed(noise=1.5, hangs=range(STOP, COUNT))]
    told = hanging(infrared_frames(pictures), still)
    assert not any(told[: STOP + 90])
    assert all(told[STOP + 92 :])


def test_a_closed_shutter_at_rest_is_never_fused():
    closed = range(STOP + 15, STOP + 90)  # 3 s
    infrared = coded(hangs=closed)
    assert not fused(live(infrared, VISIBLE)) & set(closed)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_without_a_codec_a_picture_that_repeats_is_frozen_whatever_the_visible_camera_sees(kind):
    pictures = filmed(noise=1.5, hangs=range(STOP, COUNT))
    infrared = infrared_frames(one.astype(kind) for one in pictures)
    assert not fused(live(infrared, VISIBLE)) & set(range(STOP, COUNT))


@pytest.mark.parametrize("noise", [0.0, 2.5])
def test_a_dark_visible_picture_tells_nothing_and_infrared_stays_frozen(noise):
    infrared = coded()
    dark = visible_frames(filmed(noise, contrast=0.01))
    assert not fused(live(infrared, dark)) & set(range(STOP + 2, GO))


def test_what_was_taken_for_new_is_counted():
    account = Account()
    infrared = coded()
    list(pair_recordings(infrared, VISIBLE, account=account))
    assert GO - STOP - ACCEPTED <= account.resting <= GO - STOP - 80
    assert account.balanced()


# The verdict alone: infrared is told to repeat, the visible pictures vary


def resting(visible: list[Frame], infrared: Callable[[int], tuple[int, int]]) -> list[bool]:
    """Of each moment whether infrared, with its repeats and still pictures, is taken for new because nothing moves."""
    standstill, found = Standstill(), []
    image = np.zeros((16, 16), np.uint8)
    for k, one in enumerate(visible):
        standstill.judged(one)
        repeats, still = infrared(k)
        standstill.judged(Frame("infrared", image, one.captured_ns, k, repeats=repeats, still=still))
        found.append(standstill.resting)
    return found


def repeats_from(first: int) -> Callable[[int], tuple[int, int]]:
    return lambda index: (max(0, index - first + 1),) * 2


@pytest.mark.parametrize(("began", "expected"), [(STOP - 30, False), (STOP - 5, True), (STOP + 5, True)])
def test_both_views_come_to_rest_within_half_a_second_of_each_other(began, expected):
    assert any(resting(VISIBLE, repeats_from(began))) == expected


def zoomed() -> list[Frame]:
    """Forward all the time."""
    pictures = []
    for index in range(COUNT):
        size = np.exp(0.003 * index)
        matrix = np.array([[size, 0, SIZE[0] / 2 - 320 * size], [0, size, SIZE[1] / 2 - 240 * size]])
        pictures.append(cv2.warpAffine(WORLD, matrix, SIZE, flags=cv2.INTER_LINEAR).astype(np.uint8))
    return visible_frames(pictures)


def test_driving_straight_on_is_motion():
    assert not any(resting(zoomed(), repeats_from(STOP)))
    standstill = Standstill()
    judged = [standstill.judged(one) for one in zoomed()[:150]]
    hung = Frame("infrared", np.zeros((16, 16), np.uint8), judged[40].captured_ns, 40, still=40)
    standstill.judged(hung)
    later = Frame("infrared", hung.image, judged[-1].captured_ns, 150, still=150)
    assert standstill.judged(later).frozen  # though it counted as live


def test_a_lamp_that_is_switched_on_is_no_motion():
    def lamp(index: int, view: np.ndarray) -> None:
        if index >= 180:
            view[:] = view * 1.3 + 10

    brightened = visible_frames(filmed(noise=2.5, painted=lamp))
    assert all(resting(brightened, repeats_from(STOP))[STOP + ACCEPTED : 180])
    standstill = Standstill()
    image = np.zeros((16, 16), np.uint8)
    for one in brightened[:GO]:
        standstill.judged(one)
        told = standstill.judged(Frame("infrared", image, one.captured_ns, one.index, still=max(0, one.index - STOP)))
        assert not told.frozen


def test_while_the_visible_camera_is_silent_nothing_is_taken_for_new():
    cut = [one for one in VISIBLE if not 170 <= one.index < 190]
    found = dict(zip((one.index for one in cut), resting(cut, repeats_from(STOP)), strict=True))
    assert found[169]
    assert not found[190]
    standstill, image = Standstill(), np.zeros((16, 16), np.uint8)
    for index in range(GO):
        if index < 170:
            standstill.judged(VISIBLE[index])
        repeats, still = repeats_from(STOP)(index)
        standstill.judged(Frame("infrared", image, index * PERIOD_NS, index, repeats=repeats, still=still))
    assert not standstill.resting
