"""The figures of geometry and time: how right calibration, registration, pairing and gain control are, and how fast.

    python -m pytest -s -m benchmarks tests/test_geometry_figures.py

prints one table for each claim. What is an accuracy is asserted as well; a speed is only printed. Everything runs on
one thread.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from calibration.refine import Refiner
from calibration.residual import displacement_px, similarity, survey
from calibration.rig import CalibrationError
from calibration.solve import DISTANCES_M, solve
from calibration.targets import Board
from calibration.time_offset import estimate_offset
from calibration.views import Detections, detect_view
from calibration.warp import Warp
from engines.evaluation.tables import Cell, Table, as_text
from pipeline.board_views import CAMERAS, detect_boards, pair_up
from pipeline.commands.check import check_each
from pipeline.config import GainConfig, RegistrationConfig, SyntheticSource
from pipeline.frame import Frame, FramePair
from pipeline.gain import InfraredGain
from pipeline.register import Register
from pipeline.shutter import Shutter
from pipeline.sources.synthetic import SyntheticCamera
from pipeline.sync import Sync, pair_recordings
from tests.rigs import counts
from tests.rigs.boards import Scene, draw_pair, map_error_px, random_poses, synthetic_rig
from tests.rigs.motion import first_picture, hand_held, moved_picture, seen
from tests.rigs.network_cameras import HOUR, NetworkCamera, run_a_day, skew_errors_ms
from tests.rigs.pairs import SIZE, Pair, clip_pairs, error_px, real_pairs, scene, training_pairs, warped
from tests.test_shutter import CODECS, carried, filmed, through
from tests.test_sync import Rig

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(threads)


def show(title: str, columns: str, rows: list[tuple[Cell, ...]], note: str = "") -> None:
    """Prints a table; `columns` are separated by bars."""
    print("\n" + as_text([Table(title, tuple(columns.split(" | ")), tuple(rows), note)]))


def p95(values: list[float] | np.ndarray) -> float:
    return float(np.percentile(values, 95))


def median_ms(call: Callable[[], object], times: int = 100) -> float:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - started))
    return float(np.median(spent))


# Registration


@pytest.fixture(scope="module")
def real(data_dir: Path) -> dict[str, list[Pair]]:
    return {
        "MSRS day": real_pairs(data_dir, "msrs", "day", 40),
        "MSRS night": real_pairs(data_dir, "msrs", "night", 40),
        "RoadScene": real_pairs(data_dir, "roadscene", "day", 40),
        "M3SVD": clip_pairs(data_dir, "m3svd", every=4),
    }


@pytest.mark.realdata
def test_single_keyframes(data_dir: Path, real: dict[str, list[Pair]]):
    more = {f"MSRS {light}, training": training_pairs(data_dir, "msrs", light) for light in ("day", "night")}
    rows: list[tuple[Cell, ...]] = []
    for name, pairs in (real | more).items():
        random, before, after = np.random.default_rng(100), [], []
        for _ in range(math.ceil(300 / len(pairs)) if name in real else 1):
            for infrared, visible in pairs:
                drift = [*random.uniform(-6, 6, 2), np.radians(random.uniform(-0.5, 0.5)), random.uniform(-5e-3, 5e-3)]
                truth = similarity(np.array(drift), SIZE)
                before.append(error_px(np.eye(3), truth))
                after.append(error_px(survey(warped(infrared, truth), visible).residual.matrix, truth))
        share = float(np.mean(np.array(after) < 3))
        rows.append((name, len(pairs), len(after), np.median(before), np.median(after), p95(after), 100 * share))
    columns = "pairs of | pairs | warps | before px | median px | p95 px | below 3 px %"
    show("Single keyframes: translation +-6 px, roll +-0.5 deg, scale +-0.5 %; goal 1.4 px and 87 %", columns, rows)
    for *_, median_px, _, share in rows:
        assert share >= 87
        assert median_px <= 1.4


SEEDS, KEYFRAMES, KNOCK = 6, 100, 50


@pytest.mark.realdata
def test_a_creeping_mount_and_a_knock(real: dict[str, list[Pair]]):
    """Up to 6 px of drift over 80 keyframes, 4 px at once in the middle; and cameras that do not move at all."""
    followed: list[tuple[Cell, ...]] = []
    idle: list[tuple[Cell, ...]] = []
    for name, pairs in real.items():
        lefts, recoveries, moved = [], [], []
        for seed in range(SEEDS):
            random = np.random.default_rng(seed)
            toward, bump = (
                length * np.array([np.cos(angle), np.sin(angle), 0, 0])
                for length, angle in zip((6, 4), random.uniform(0, 2 * np.pi, 2), strict=True)
            )
            toward[2:] = random.uniform(-0.005, 0.005), random.uniform(-0.003, 0.003)
            order = np.concatenate([random.permutation(len(pairs)) for _ in range(-(-KEYFRAMES // len(pairs)))])
            shown = [pairs[number] for number in order[:KEYFRAMES]]
            truths = [toward * min(1, step / 80) + bump * (step >= KNOCK) for step in range(KEYFRAMES)]
            left = left_px(shown, truths)
            recoveries.append(next(n for n in range(KNOCK, KEYFRAMES) if max(left[n : n + 3]) < 2) - KNOCK + 1)
            lefts += left[5:KNOCK] + left[KNOCK + 6 :]
            moved += left_px(shown, [np.zeros(4)] * KEYFRAMES)
        within = f"{sum(one <= 6 for one in recoveries)} of {SEEDS}"
        followed.append((name, len(lefts), np.median(lefts), p95(lefts), max(lefts), np.median(recoveries), within))
        idle.append((name, len(moved), np.median(moved), p95(moved), max(moved)))
    note = "without the first 5 keyframes and the 6 after the knock"
    columns = "pairs of | keyframes | median px | p95 px | worst px | recovered after | within 6"
    show("Filtered: slow drift and a 4 px knock; goal 0.8 and 1.5 px, 6 keyframes", columns, followed, note)
    columns = "pairs of | keyframes | median px | p95 px | largest px"
    show("Identity control: how far aligned cameras are moved; goal 0.5 px", columns, idle)
    for _, _, median_px, worse_px, *_ in followed:
        assert median_px <= 0.8
        assert worse_px <= 1.5
    assert max(row[-1] for row in idle) <= 0.5
    assert all(row[-1] == f"{SEEDS} of {SEEDS}" for row in followed)


def left_px(pairs: list[Pair], truths: list[np.ndarray]) -> list[float]:
    """What the correction leaves of the truth after each keyframe."""
    refiner, left = Refiner(SIZE), []
    for (infrared, visible), truth in zip(pairs, truths, strict=True):
        before = similarity(refiner.correction, SIZE)
        hidden = similarity(truth, SIZE) @ np.linalg.inv(before)
        refiner.add(survey(warped(infrared, hidden), visible), refiner.correction)
        after = similarity(refiner.correction, SIZE)
        left.append(displacement_px(similarity(truth, SIZE) @ np.linalg.inv(after), SIZE))
    return left


@pytest.mark.realdata
def test_pictures_that_tell_nothing(real: dict[str, list[Pair]]):
    """The rig is right: whatever moves is moved falsely. M3SVD pairs, since the others are off by themselves."""
    random = np.random.default_rng(0)
    pairs = [real["M3SVD"][number] for _ in range(3) for number in random.permutation(len(real["M3SVD"]))]

    def noisy(level: float | np.ndarray, sigma: float = 3.0) -> np.ndarray:
        return np.clip(random.normal(0, sigma, SIZE[::-1]) + level, 0, 255).astype(np.uint8)

    def near_person(pair: Pair) -> Pair:
        """Fills four fifths of the view, and has moved by up to 30 px between the two exposures."""
        step = random.integers(-30, 31)
        drawn = []
        for picture, moved, level in zip(pair, (0, step), random.integers(30, 226, 2), strict=True):
            picture = picture.copy()
            for centre, axes in (((320 + int(moved), 150), (150, 190)), ((320 + int(moved), 480), (370, 330))):
                cv2.ellipse(picture, centre, axes, 0, 0, 360, int(level), -1, cv2.LINE_AA)
            drawn.append(noisy(picture, 2.0))
        return drawn[0], drawn[1]

    cases: dict[str, Callable[[Pair], Pair]] = {
        "visible black": lambda pair: (pair[0], noisy(0, 1.0)),
        "visible blank": lambda pair: (pair[0], noisy(128)),
        "infrared blank": lambda pair: (noisy(110), pair[1]),
        "both black": lambda pair: (noisy(0, 1.0), noisy(0, 1.0)),
        "fog, 2 % of the contrast": lambda pair: (pair[0], noisy(0.02 * pair[1] + 190)),
        "fog, 10 % of the contrast": lambda pair: (pair[0], noisy(0.1 * pair[1] + 180)),
        "a person fills the view": near_person,
    }
    rows: list[tuple[Cell, ...]] = []
    for name, changed in cases.items():
        refiner, moved = Refiner(SIZE), []
        for pair in pairs:
            refiner.add(survey(*warped_by(changed(pair), refiner.correction)), refiner.correction)
            moved.append(displacement_px(similarity(refiner.correction, SIZE), SIZE))
        counts = refiner.counts
        false = sum(one > 0.5 for one in moved)
        rows.append((name, len(pairs), counts["no_information"], counts["used"] + counts["jumped"], false, max(moved)))
    columns = "picture | keyframes | told nothing | used | off by over 0.5 px | largest px"
    show("False updates: keyframes after which an aligned rig is off; goal 0", columns, rows)
    assert sum(row[4] for row in rows) == 0


def warped_by(pair: Pair, correction: np.ndarray) -> Pair:
    return warped(pair[0], np.linalg.inv(similarity(correction, SIZE))), pair[1]


@pytest.mark.realdata
def test_pairs_with_a_known_displacement(data_dir: Path):
    rows: list[tuple[Cell, ...]] = []
    for dataset in ("msrs", "roadscene"):
        part = data_dir / "misaligned" / f"warped_{dataset}"
        visible = data_dir / "eval" / "msrs" / "vi" if dataset == "msrs" else part / "vi"
        result = check_each(part / "ir_warp", visible, displacement=part / "disp")
        pairs = result["pairs"]
        better = sum(row["after_px"] < row["before_px"] for row in pairs)
        worst = (max(row[key] for row in pairs) for key in ("before_px", "after_px"))
        rows.append((dataset, len(pairs), *result["median"].values(), *worst, better))
    columns = "set | pairs | before px, median | after px | before px, worst | after px | better"
    show("Pairs that were bent by a known displacement", columns, rows)
    assert all(row[1] == row[-1] for row in rows)


def test_cost_of_registration():
    streets = [scene(seed) for seed in range(6)]
    truth = np.array([4.0, -3.0, 0.005, 0.002])
    warp = Warp.of_aligned(SIZE, feather_px=16)
    maps, refiner = warp.corrected(truth), Refiner(SIZE)
    hidden = [(warped(infrared, similarity(truth, SIZE)), visible) for infrared, visible in streets]

    def keyframe() -> None:
        refiner.add(survey(*hidden[refiner.keyframes % 6]), np.zeros(4))

    rows: list[tuple[Cell, ...]] = [
        ("remap, infrared 640x480", median_ms(lambda: maps.remap(hidden[0][0]), 300), "0.6"),
        ("refinement, a keyframe", median_ms(keyframe), "10"),
        ("new maps after a correction", median_ms(lambda: warp.corrected(truth)), "-"),
    ]
    colours = [np.dstack([visible] * 3) for _, visible in hidden]
    for name, refine in (("corrected meanwhile", True), ("not refined", False)):
        register = Register(RegistrationConfig(refine=refine), InfraredGain(), background=True)
        numbers = itertools.count()

        def frame(register: Register = register, numbers: Iterator[int] = numbers) -> None:
            number = next(numbers)
            street, captured_ns = number // 10 % 6, number * 40_000_000
            infrared = Frame("infrared", hidden[street][0], captured_ns, number)
            register(FramePair(infrared, Frame("visible", colours[street], captured_ns, number), "fused"))

        frame()
        deadline = time.monotonic() + 20
        while refine and not any(register.report()["correction"]["shift_px"]) and time.monotonic() < deadline:
            frame()
            time.sleep(0.01)
        rows.append((f"the frames' own thread, {name}", median_ms(frame, 300), "-"))
        register.close()
    show("Cost of registration on one thread", "step | median ms | goal", rows)


# Calibration


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "board", [Board("chessboard", 9, 6, 0.05), Board("circles", 4, 11, 0.04)], ids=["chessboard", "circles"]
)
def test_calibration_from_rendered_boards(board: Board):
    """Sixty views are also four times fifteen and twice thirty: their medians are shown."""
    truth = synthetic_rig()
    seen_board = Scene(board, random_poses(board, 60, truth, seed=11))
    views = []
    for index in range(60):
        infrared, visible = draw_pair(truth, seen_board, index)
        views.append(detect_view(str(index), {"infrared": infrared, "visible": visible}, board))
    sizes = {"infrared": truth.infrared.size, "visible": truth.visible.size}
    rows: list[tuple[Cell, ...]] = []
    for count in (15, 30, 60):
        parts = [
            Detections(board, sizes, {"infrared": 16, "visible": 8}, tuple(views[start :: 60 // count]))
            for start in range(60 // count)
        ]
        solved = [solve(part) for part in parts]
        errors = [[map_error_px(one.rig, truth, distance_m) for distance_m in DISTANCES_M] for one in solved]
        found = 100 * np.mean([view.paired for view in views])
        heldout = np.median([one.heldout_px["rms"] for one in solved])
        rms = [np.median([one.rms_px[camera] for one in solved]) for camera in CAMERAS]
        rows.append((count, found, *rms, heldout, *np.median(errors, axis=0), np.max(errors)))
    columns = "views | found in both % | rms ir px | rms vis px | held-out px | 2 m | 5 m | 20 m | inf | worst"
    note = "2 m to inf: error of the map against the true rig, infrared pixels"
    show(f"Calibration from rendered boards, {board.name}", columns, rows, note)
    assert max(max(row[5:9]) for row in rows) <= 1.0


@pytest.mark.realdata
@pytest.mark.timeout(600)
def test_calibration_from_real_boards(data_dir: Path):
    rows: list[tuple[Cell, ...]] = []
    notes = []
    for infrared, visible, board in (
        ("uav_board/ir", "uav_board/vi", Board("chessboard", 6, 5, 0.03)),
        ("quad_rig/thermal_5003", "quad_rig/rgb_13232653", Board("chessboard", 9, 6, 0.03)),
        ("quad_rig/thermal_5270", "quad_rig/rgb_13232653", Board("chessboard", 9, 6, 0.03)),
    ):
        views = detect_boards(pair_up(data_dir / "calib" / infrared, data_dir / "calib" / visible), board)
        shares = [100 * views.found(camera) / len(views.views) for camera in CAMERAS]
        try:
            solution = solve(views)
            figures = [solution.rms_px["infrared"], solution.rms_px["visible"], *solution.heldout_px.values()]
        except CalibrationError as error:
            figures = [None] * 5
            notes.append(f"{infrared}: {error}")
        rows.append((infrared, len(views.views), *shares, *figures))
    columns = "set | views | ir found % | vis found % | rms ir px | rms vis px | held-out median | rms | p95"
    show("Calibration from real boards", columns, rows, "\n".join(notes))
    assert min(min(row[2:4]) for row in rows) >= 85


# Time


def test_offset_and_drift_of_two_clocks():
    rows: list[tuple[Cell, ...]] = []
    cases: dict[str, dict[str, float]] = {
        "25 and 30 Hz": {},
        "jitter 8 ms, 10 % lost": {"jitter_ms": 8, "drops": 0.1, "noise_px": 0.05},
    }
    for name, quality in cases.items():
        errors_ms = [
            estimate_offset(
                seen(path, 30, 25, seed, offset_ms=offset_ms, scale=0.7, roll_deg=3, **quality),
                seen(path, 30, 30, seed + 50, **quality),
            ).offset_ms
            - offset_ms
            for offset_ms in (0.0, 12.3, -47.0, 480.0, -1300.0)
            for seed in range(6)
            for path in (hand_held(seed),)
        ]
        errors_ppm = [
            estimate_offset(
                seen(path, 120, 25, seed, offset_ms=20, drift_ppm=drift_ppm, **quality),
                seen(path, 120, 30, seed + 50, **quality),
            ).drift_ppm
            - drift_ppm
            for drift_ppm in (-100.0, -30.0, 0.0, 60.0, 100.0)
            for seed in range(4)
            for path in (hand_held(seed),)
        ]
        rows.append((name, *summed(errors_ms), *summed(errors_ppm)))
    columns = "clocks | runs | median ms | p95 ms | worst | runs | median ppm | p95 ppm | worst"
    show("Offset after 30 s (goal 2 ms) and drift after 120 s (goal 20 ppm), from measured motion", columns, rows)
    assert max(row[2] for row in rows) <= 2
    assert max(row[6] for row in rows) <= 20


def summed(errors: list[float]) -> tuple[int, float, float, float]:
    size = np.abs(errors)
    return len(size), float(np.median(size)), p95(size), float(size.max())


@pytest.mark.realdata
@pytest.mark.timeout(600)
def test_offset_of_two_clocks_from_real_pictures(data_dir: Path):
    """Stills of each camera, moved as a hand moves a rig, and measured with themselves only."""
    errors_ms = []
    for number, (name, offset_ms) in enumerate((("0115_1834", 31.0), ("0111_1753", -12.0), ("0114_1609", 140.0))):
        stills = [first_picture(data_dir / "video" / "eval" / f"m3svd_{name}_{kind}.mkv") for kind in ("ir", "vi")]
        path = hand_held(20 + number)
        infrared = moved_picture(stills[0], path, 30, 25, number, offset_ms=offset_ms)
        visible = moved_picture(stills[1], path, 30, 30, number + 10)
        errors_ms.append(estimate_offset(infrared, visible).offset_ms - offset_ms)
    show("Offset after 30 s, from pictures", "pictures | runs | median ms | p95 ms | worst",
         [("M3SVD, moved", *summed(errors_ms))])  # fmt: skip
    assert np.median(np.abs(errors_ms)) <= 2


def test_pairing():
    rows: list[tuple[Cell, ...]] = []
    for visible_hz, infrared_hz in ((30, 30.02), (30, 25), (60, 50), (30, 9)):
        errors, best, waits_ms, accounts, modes = [], [], [], [], Counter[str]()
        for seed in range(3):
            rig = (
                Rig(seed)
                .camera("infrared", infrared_hz, 60, 45, phase_ms=7 + seed)
                .camera("visible", visible_hz, 60, 20)
            )
            arrived = {one.index: at for at, _, one in rig.arrivals if one.camera == "visible"}
            sync = Sync()
            pairs = rig.run(sync)
            errors += list(np.abs(rig.errors_ms(pairs)))
            best += list(rig.smallest_errors_ms(pairs))
            waits_ms += [(one.released_ns - arrived[one.visible.index]) / 1e6 for one in pairs[8:-8] if one.visible]
            modes.update(one.mode for one in pairs)
            accounts.append(sync.account)
        captured = sum(account.captured.total() for account in accounts)
        lost = sum(not account.balanced() for account in accounts)
        half_ms = 500 / min(visible_hz, infrared_hz)
        shares = [100 * modes[mode] / modes.total() for mode in ("fused", "held", "vis_only")]
        row = (f"{visible_hz}/{infrared_hz}", np.median(errors), p95(errors), p95(best), half_ms)
        rows.append((*row, np.median(waits_ms), p95(waits_ms), *shares, captured, lost))
    columns = (
        "visible/infrared Hz | true error ms | p95 | nearest p95 | half period | added wait ms | p95 "
        "| fused % | held % | alone % | frames | unaccounted runs"
    )
    note = "jitter 1.5 ms, 1 % lost, latencies 45 and 20 ms: a wait of 25 ms cannot be avoided; goal 30"
    show("Pairing of free-running cameras: true distance of the capture times", columns, rows, note)
    for _, _, error_ms, nearest_ms, half_ms, wait_ms, *_, unaccounted in rows:
        # A lost or late frame puts even the truly nearest one farther away than half a period.
        assert error_ms <= max(half_ms, nearest_ms + 0.1)
        assert wait_ms <= 25 + 5
        assert unaccounted == 0


def test_recovery_from_a_stall():
    rows: list[tuple[Cell, ...]] = []
    for stalled in ("infrared", "visible", "this process"):
        recoveries_ms, fused = [], []
        for seed in range(5):
            rig = Rig(seed).camera("infrared", 25, 12, 45, drops=0).camera("visible", 25, 12, 20, drops=0)
            rig.arrivals = [
                (max(at, 6_000_000_000 + order) if one.camera == stalled and 5e9 <= at < 6e9 else at, order, one)
                for at, order, one in rig.arrivals
            ]
            pairs = rig.run(Sync(), pause_s=(5.0, 6.0) if stalled == "this process" else None)
            recoveries_ms.append(recovered_after_ms(pairs, 5e9, 6e9))
            late = [one.mode for one in pairs if 7e9 <= one.released_ns < 11.8e9]
            fused.append(100 * late.count("fused") / len(late))
        rows.append((stalled, np.median(recoveries_ms), max(recoveries_ms), min(fused)))
    columns = "stalled for 1 s | latency is back after ms | longest | fused from 1 s on %"
    show("Recovery from a stall; goal 1000 ms", columns, rows)
    assert max(row[2] for row in rows) <= 1000


def recovered_after_ms(pairs: list[FramePair], stall_ns: float, end_ns: float) -> float:
    """From the end of a stall to the pair from which latency is as before, also in the second after it."""
    latencies = [(one.released_ns, one.released_ns - one.captured_ns) for one in pairs]
    before = [latency for at, latency in latencies if 1e9 < at < stall_ns]
    after = [(at, latency) for at, latency in latencies if at >= end_ns]
    return next(
        (at - end_ns) / 1e6
        for number, (at, latency) in enumerate(after)
        if latency <= p95(before)
        and np.median([later for _, later in after[number : number + 25]]) <= 1.1 * np.median(before)
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("drift_ppm", [-100.0, 100.0])
def test_a_day_of_drifting_clocks_that_are_set(drift_ppm: float):
    steps = {"none before": 0.0, "1 s ahead": 5 * HOUR, "3 s back": 10 * HOUR, "reset": 15 * HOUR}

    def jumps_s(now_s: float) -> float:
        return [0.0, 1.0, -2.0, -80_000.0][sum(now_s >= at for at in steps.values()) - 1]

    cameras = [
        NetworkCamera("infrared", 45, drift_ppm, counter_jump_s=jumps_s, phase_s=0.011, seed=1),
        NetworkCamera("visible", 20, -drift_ppm, seed=2),
    ]
    _, bursts = run_a_day(cameras, offset_ms=25)
    rows: list[tuple[Cell, ...]] = []
    ends = [*list(steps.values())[1:], 24 * HOUR]
    for (name, start_s), end_s in zip(steps.items(), ends, strict=True):
        chosen = [pairs for at, pairs in bursts if start_s + (720 if start_s else 0) <= at < end_s]
        errors = np.concatenate([np.abs(skew_errors_ms(pairs, cameras)) for pairs in chosen])
        fused = 100 * np.mean([pair.mode == "fused" for pairs in chosen for pair in pairs])
        rows.append((f"{start_s / HOUR:.0f} to {end_s / HOUR:.0f} h, clock {name}", len(errors), np.median(errors),
                     p95(errors), errors.max(), fused))  # fmt: skip
    columns = "hours | pairs | error of the stated distance, median ms | p95 | worst | fused %"
    show(f"A day at {drift_ppm:+.0f} and {-drift_ppm:+.0f} ppm, with steps", columns, rows)
    assert max(row[4] for row in rows) <= 10


# The shutter


@pytest.mark.parametrize("freeze_s", [0.5, 2.5])
def test_stale_infrared_is_never_called_fused(freeze_s: float):
    """Pictures that a closed shutter repeats, exact and behind codecs, live and from a recording."""
    closed = range(50, 50 + round(25 * freeze_s))
    count = closed.stop + 40
    clips = [filmed(speed_px, 1.5, count, closed) for speed_px in (0.3, 1.0, 1.8)] + [carried(count, closed)]
    rows: list[tuple[Cell, ...]] = []
    for name in ("exact", *CODECS):
        stale, wrong, live, refused = 0, 0, 0, 0
        for clip in clips:
            pictures = clip if name == "exact" else through(name, clip)
            shutter = Shutter()
            frames = [
                shutter.judged(Frame("infrared", one, 40_000_000 * index, index)) for index, one in enumerate(pictures)
            ]
            for pair in (*live_pairs(frames), *recorded_pairs(frames)):
                if pair.visible is None:
                    continue
                during, fused = pair.visible.index in closed, pair.mode == "fused"
                stale += during
                wrong += fused and pair.infrared.index in closed
                live += not during
                refused += not during and not fused
        rows.append((name, stale, wrong, live, refused))
    columns = "pictures | pairs while closed | stale and called fused | other pairs | not fused"
    show(
        f"Shutter closed for {freeze_s} s, live and recorded, turning by 0.3 to 1.8 px a frame and in a hand; goal 0",
        columns,
        rows,
    )
    # Behind strong compression, the first picture of a shutter that closes on a slow view may pass.
    assert all(row[2] == 0 for row in rows if row[0] != "strong")


def live_pairs(frames: list[Frame]) -> list[FramePair]:
    """The infrared frames of a rig at 25 Hz, as they come, with a visible camera beside it."""
    seconds = (len(frames) + 0.5) / 25
    rig = Rig(1).camera("infrared", 25, seconds, 45, drops=0).camera("visible", 25, seconds, 20, drops=0)
    rig.arrivals = [
        (at, order, replace(frames[one.index], captured_ns=one.captured_ns) if one.camera == "infrared" else one)
        for at, order, one in rig.arrivals
    ]
    return rig.run(Sync())


def recorded_pairs(frames: list[Frame]) -> list[FramePair]:
    black = np.zeros((8, 8, 3), np.uint8)
    return list(pair_recordings(frames, (Frame("visible", black, one.captured_ns, one.index) for one in frames)))


# Gain control


def test_the_background_when_a_hot_object_enters():
    rows: list[tuple[Cell, ...]] = []
    for method in ("plateau", "percentile"):
        for hot_counts in (9000, 12000, 16000):
            gain, pictures = InfraredGain(GainConfig(method=method)), []
            for index in range(220):
                picture = counts.scene(index)
                if 20 <= index < 120:
                    picture[100:160, 40:91] = hot_counts
                pictures.append(gain(counts.frame(picture, index))[0])
            change = counts.background_change(pictures)
            rows.append((method, hot_counts, change.mean(), np.percentile(change, 99), change.max()))
    columns = "method | counts of the hot object | mean levels a frame | p99 | worst"
    show("Background, of 8000 to 8400 counts, when a hot object enters and leaves; goal 2 levels", columns, rows)
    assert max(row[3] for row in rows) <= 2


def test_time_of_conditioning():
    config = SyntheticSource(
        scene="night", width=640, height=512, realtime=False, stripe_counts=12.0, dead_pixels=60, rate_hz=25
    )
    camera = SyntheticCamera(config, "infrared")
    camera.open()
    frames = [camera.grab() for _ in range(60)]
    eight_bit = [InfraredGain()(frame)[0] for frame in frames]
    rows: list[tuple[Cell, ...]] = []
    for method in ("plateau", "percentile"):
        gain = InfraredGain(GainConfig(method=method))
        times = [gain(frame)[1]["times_ms"] for frame in frames]
        rows += [(f"{step}, {method}" if step == "gain" else step, np.median([one[step] for one in times]))
                 for step in times[0] if method == "plateau" or step == "gain"]  # fmt: skip
    for name, pictures in (("shutter, 16 bits", [frame.image for frame in frames]), ("shutter, 8 bits", eight_bit)):
        shutter, left = Shutter(), iter(pictures)
        rows.append((name, median_ms(lambda shutter=shutter, left=left: shutter.add(next(left)), len(pictures))))
    show("Conditioning of a 640x512 picture with stripes and dead pixels", "step | median ms", rows)
