"""`dspfusion evaluate`: scores against a second, slow implementation; people, flicker, readout; the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, Priors
from engines.dspfusion.loading import load
from engines.evaluation import cases, evaluate, metrics, parts, people, readout
from engines.evaluation.degradations import degrade
from engines.evaluation.sheets import Sheets
from engines.evaluation.tables import Table, as_markdown, as_text
from engines.evaluation.video import StaticScene
from engines.pytorch_engine import PyTorchEngine
from pipeline.cli import app
from tests.rigs.engines import MaximumEngine

HEIGHT, WIDTH = 64, 80


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fused, infrared and visible luminance: blobs with grain, flat and saturated parts, as real pictures have them."""
    random = np.random.default_rng(3)
    layers = [cv2.GaussianBlur(random.normal(0, 1, (HEIGHT, WIDTH)), (0, 0), 4) for _ in range(3)]
    grain = random.normal(0, 3, (3, HEIGHT, WIDTH))
    sources = [
        np.clip(128 + 900 * layer + noise, 0, 255).astype(np.uint8) for layer, noise in zip(layers, grain, strict=True)
    ]
    sources[1][:20, :20] = 7
    fused = np.clip(0.5 * sources[1] + 0.6 * sources[2] + grain[0], 0, 255).astype(np.uint8)
    fused[50:, 60:] = 255
    return fused, sources[1], sources[2]


# --- the scores, written out as their papers say, in loops and without OpenCV ---


def valid_filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
    return np.einsum("ijkl,kl->ij", windows, kernel)


def slow_vif(source: np.ndarray, fused: np.ndarray) -> float:
    source, fused, kept, total = source.astype(float), fused.astype(float), 0.0, 0.0
    for scale in range(1, 5):
        side = 2 ** (5 - scale) + 1
        axis = np.arange(side) - side // 2
        bell = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * (side / 5) ** 2))
        bell /= bell.sum()
        if scale > 1:
            source, fused = valid_filter(source, bell)[::2, ::2], valid_filter(fused, bell)[::2, ::2]
        mean_s, mean_f = valid_filter(source, bell), valid_filter(fused, bell)
        var_s = valid_filter(source * source, bell) - mean_s**2
        var_f = valid_filter(fused * fused, bell) - mean_f**2
        cov = valid_filter(source * fused, bell) - mean_s * mean_f
        for s, f, c in zip(np.maximum(var_s, 0).flat, np.maximum(var_f, 0).flat, cov.flat, strict=True):
            g = c / (s + 1e-10)
            v = f - g * c
            if s < 1e-10:
                g, v, s = 0.0, f, 0.0
            if f < 1e-10:
                g, v = 0.0, 0.0
            if g < 0:
                g, v = 0.0, f
            kept += np.log10(1 + g * g * s / (max(v, 1e-10) + 2.0))
            total += np.log10(1 + s / 2.0)
    return kept / total


def slow_qabf(fused: np.ndarray, sources: tuple[np.ndarray, ...]) -> float:
    def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.pad(image.astype(float), 1)
        right = valid_filter(padded, np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], float))
        down = valid_filter(padded, np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]], float))
        angle = np.array(
            [np.pi / 2 if r == 0 else np.arctan(-d / r) for r, d in zip(right.flat, down.flat, strict=True)]
        )
        return np.sqrt(right**2 + down**2).ravel(), angle

    strength_f, angle_f = edges(fused)
    above = below = 0.0
    for source in sources:
        for s, a, f, b in zip(*edges(source), strength_f, angle_f, strict=True):
            ratio = s if s == f else min(s, f) / max(s, f)
            turn = 1 - abs(a - b) / (np.pi / 2)
            kept = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (turn - 0.8)))
            above, below = above + kept * s, below + s
    return above / below


def slow_information(one: np.ndarray, other: np.ndarray) -> float:
    joint = np.zeros((256, 256))
    for a, b in zip(one.flat, other.flat, strict=True):
        joint[a, b] += 1 / one.size
    return sum(
        joint[a, b] * np.log(joint[a, b] / joint[a].sum() / joint[:, b].sum())
        for a, b in zip(*np.nonzero(joint), strict=True)
    )


def test_vif_agrees_with_the_formula_written_out_pixel_by_pixel(pictures):
    fused, infrared, visible = pictures
    expected = slow_vif(infrared, fused) + slow_vif(visible, fused)
    assert metrics.visual_information_fidelity(fused, infrared, visible) == pytest.approx(expected, rel=1e-9)


def test_qabf_agrees_with_the_formula_written_out_pixel_by_pixel(pictures):
    fused, infrared, visible = pictures
    expected = slow_qabf(fused, (infrared, visible))
    assert metrics.edge_preservation(fused, infrared, visible) == pytest.approx(expected, rel=1e-9)


def test_mutual_information_agrees_with_the_sum_over_the_joint_histogram(pictures):
    fused, infrared, visible = pictures
    expected = slow_information(fused, infrared) + slow_information(fused, visible)
    assert metrics.mutual_information(fused, infrared, visible) == pytest.approx(expected, rel=1e-9)


def test_scd_agrees_with_numpys_correlation(pictures):
    fused, infrared, visible = (picture.astype(float) for picture in pictures)
    expected = sum(
        np.corrcoef(source.ravel(), (fused - other).ravel())[0, 1]
        for source, other in ((infrared, visible), (visible, infrared))
    )
    assert metrics.sum_of_correlations_of_differences(fused, infrared, visible) == pytest.approx(expected, rel=1e-9)


def test_sharing_terms_between_pictures_changes_no_score(pictures):
    fused, infrared, visible = pictures
    sources = metrics.Sources(infrared, visible)
    sources.score(visible)
    again = sources.score(fused)
    assert again == metrics.Sources(infrared, visible).score(fused)
    assert again["VIF"] == metrics.visual_information_fidelity(fused, infrared, visible)
    assert again["Qabf"] == metrics.edge_preservation(fused, infrared, visible)
    assert again["SSIM"] == metrics.structural_similarity(fused, infrared, visible)


def test_colour_error_is_the_root_mean_square_distance_in_cb_and_cr():
    visible = np.full((50, 50, 3), 100, np.uint8)
    fused = visible.copy()
    fused[..., 0] += 10  # 10 more red: Cb -1.69, Cr +5
    assert metrics.colour_error(fused, visible) == pytest.approx(np.hypot(1.68736, 5.0), abs=1e-6)
    brighter = visible + 50
    assert metrics.colour_error(brighter, visible) == pytest.approx(0, abs=1e-6)


# --- cases and rows ---


def grey_to_colour(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, -1)


def data_folder(root: Path, pictures: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Path:
    """A data folder with one night pair of the set msrs, one labelled person, and a second set."""
    _, infrared, visible = pictures
    hot = np.full_like(infrared, 40)
    hot[20:44, 30:40] = 200
    index = ["dataset,name,ir,vi,width,height,light,aligned,official_split"]
    for data_set, name, light in (("msrs", "00020N", "night"), ("tno", "one", "day")):
        for folder, picture in (("ir", hot), ("vi", visible)):
            (root / "eval" / data_set / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / "eval" / data_set / folder / f"{name}.png"), picture)
        index.append(f"{data_set},{name},,,80,64,{light},yes,test")
    (root / "eval" / "index.csv").write_text("\n".join(index) + "\n")
    (root / "eval" / "msrs" / "boxes_infrared").mkdir()
    label = f"0 {35 / 80} {32 / 64} {10 / 80} {24 / 64}\n2 0.1 0.1 0.1 0.1\n"
    (root / "eval" / "msrs" / "boxes_infrared" / "00020N.txt").write_text(label)
    return root


def save_public_pair(root: Path, infrared: np.ndarray, visible: np.ndarray) -> None:
    """The first of the public pairs, with grey colours."""
    data_set, name = cases.PUBLIC_PAIRS[0].split("/")
    for folder, picture in (("ir", infrared), ("vi", visible)):
        (root / data_set / folder).mkdir(parents=True)
        cv2.imwrite(str(root / data_set / folder / f"{name}.png"), picture)


def test_rows_come_in_the_order_of_the_cases_and_condition_means_count_alike(pictures):
    _, infrared, visible = pictures
    pairs = [cases.Pair(name, infrared, grey_to_colour(visible)) for name in ("a", "b")]
    method = evaluate.fusing_with(lambda thermal, seen: np.maximum(thermal, metrics.luminance(seen)))
    rows = evaluate.score_cases(method, cases.degraded_cases(pairs, ["clean", "vis_blur", "ir_stripe"]))
    order = [(row["name"], row["degradation"]) for row in rows]
    assert order == [(name, kind) for name in "ab" for kind in ("clean", "vis_blur", "ir_stripe")]
    found = evaluate.summary([*rows, rows[1]])  # one condition has a row more than the others
    both = [found["mean_by_degradation"][kind]["VIF"] for kind in ("vis_blur", "ir_stripe")]
    assert found["mean_degraded"]["VIF"] == pytest.approx(np.mean(both))


def test_pictures_of_unfit_size_depth_or_name_are_named(tmp_path: Path):
    for name in ("ir", "vi"):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / "ir" / "a.png"), np.zeros((50, 60), np.uint16))
    cv2.imwrite(str(tmp_path / "vi" / "a.png"), np.zeros((60, 60, 3), np.uint8))
    (tmp_path / "ir" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png has uint16 pixels"):
        list(cases.folder_pairs(tmp_path / "ir", tmp_path / "vi"))
    cv2.imwrite(str(tmp_path / "ir" / "a.png"), np.zeros((50, 60), np.uint8))
    with pytest.raises(ValueError, match=r"a: .*infrared 60x50, visible 60x60"):
        list(cases.folder_pairs(tmp_path / "ir", tmp_path / "vi"))


# --- people ---


def test_a_warm_person_is_measured_against_the_ring_around_the_box():
    infrared = np.full((100, 100), 50, np.uint8)
    infrared[40:60, 45:55] = 180
    (person,) = people.warm_people(infrared, [people.Box(0.5, 0.5, 0.1, 0.2)])
    assert person.contrast(infrared) == pytest.approx(130)
    fused = np.where(infrared == 180, 90, 100).astype(np.uint8)
    assert person.contrast(fused) == pytest.approx(-10)


def test_a_person_as_cold_as_the_wall_is_not_counted():
    assert people.warm_people(np.full((100, 100), 50, np.uint8), [people.Box(0.5, 0.5, 0.1, 0.2)]) == []


def test_only_people_are_read_from_labels(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("0 0.5 0.5 0.1 0.2\n2 0.1 0.1 0.1 0.1\n")
    assert people.read_boxes(file) == [people.Box(0.5, 0.5, 0.1, 0.2)]
    file.write_text("0 0.5 half 0.1 0.2\n")
    with pytest.raises(ValueError, match=r"a\.txt"):
        people.read_boxes(file)


# --- video ---


def test_flicker_counts_only_where_both_clean_sources_stand_still(pictures):
    _, infrared, visible = pictures
    dim = visible // 2
    left = np.arange(WIDTH) < 40
    scene = StaticScene([infrared, infrared], [dim, np.where(left, dim, dim + 40).astype(np.uint8)])
    flickering = np.where(left, dim + 3, dim + 90).astype(np.uint8)  # by 3 where it is static; the rest does not count
    assert scene.flicker([dim, flickering]) == 3
    assert scene.flicker([dim, dim]) == 0
    assert scene.static_share == 0.5


@pytest.mark.parametrize("moving", ["infrared", "visible"])
def test_a_pixel_stands_still_whose_sources_change_by_less_than_two_levels(moving: str):
    grey = np.full((HEIGHT, WIDTH), 100, np.uint8)
    by = np.repeat(np.uint8([0, 1, 2, 3]), WIDTH // 4)  # levels that the source changes by: four parts of the picture
    changed = np.tile(100 + by, (HEIGHT, 1))
    scene = StaticScene(
        [grey, changed if moving == "infrared" else grey], [grey, changed if moving == "visible" else grey]
    )
    assert scene.static_share == 0.5  # by 0 and by 1
    assert scene.flicker([grey, np.tile(100 + 4 * by, (HEIGHT, 1))]) == 2  # the mean of 0 and 4


def test_a_clip_that_never_stands_still_has_no_flicker_figure(pictures):
    _, infrared, visible = pictures
    shaken = (visible // 2) + 60
    assert np.isnan(StaticScene([infrared, infrared], [visible // 2, shaken]).flicker([visible, visible]))


def test_warped_error_forgives_motion_and_not_lag():
    random = np.random.default_rng(0)
    wall = cv2.GaussianBlur(random.integers(0, 256, (120, 200)).astype(np.uint8), (0, 0), 3)
    wall = cv2.normalize(wall, None, 0, 255, cv2.NORM_MINMAX)
    moving = [np.ascontiguousarray(wall[10:110, shift : shift + 150]) for shift in (0, 3, 6, 9)]
    still = [np.zeros((100, 150), np.uint8)] * 4
    scene = StaticScene(still, moving)
    assert scene.warped_error(moving) < 2
    assert scene.warped_error([moving[0]] * 4) > 4 * scene.warped_error(moving)


def moving_right(px_a_frame: int) -> list[np.ndarray]:
    """Three grey frames of a textured wall that goes by."""
    wall = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (100, 200)).astype(np.uint8), (0, 0), 3)
    wall = cv2.normalize(wall, None, 0, 255, cv2.NORM_MINMAX)
    starts = [40 - px_a_frame * index for index in range(3)]
    return [np.ascontiguousarray(wall[:, start : start + 150]) for start in starts]


def test_warped_error_of_a_ramp_that_stands_still_is_what_the_scene_moves():
    moving = moving_right(3)
    scene = StaticScene([np.zeros_like(moving[0])] * 3, moving)
    ramp = np.tile(np.arange(150, dtype=np.uint8), (100, 1))  # one level a pixel
    assert scene.warped_error([ramp] * 3) == pytest.approx(3, abs=0.05)  # the motion is found to a part of a pixel
    assert scene.warped_error([ramp // 50, 7 + ramp // 50, 14 + ramp // 50]) == pytest.approx(7, abs=0.1)


def test_only_what_was_seen_before_counts_for_the_warped_error(monkeypatch: pytest.MonkeyPatch):
    """A frame all of which was covered before says nothing: neither good nor bad."""
    still = [np.full((50, 60), 100, np.uint8)] * 3
    scene = StaticScene(still, still)
    brighter = [np.full((50, 60), level, np.uint8) for level in (100, 104, 112)]
    assert scene.warped_error(brighter) == 6
    (flow, everything), _ = scene._motion()
    nothing = np.zeros_like(everything)
    monkeypatch.setattr(scene, "_motion", lambda: [(flow, nothing), (flow, everything)])
    assert scene.warped_error(brighter) == 8
    monkeypatch.setattr(scene, "_motion", lambda: [(flow, nothing), (flow, nothing)])
    assert np.isnan(scene.warped_error(brighter))


# --- readout ---


class Namer:
    """Names every picture of a camera alike."""

    def estimate_priors(self, infrared: np.ndarray, visible: np.ndarray) -> Priors:
        tokens = np.zeros((16, 1), np.float32)
        named = [
            np.eye(len(kinds), dtype=np.float32)[kinds.index(kind)]
            for kinds, kind in ((INFRARED_DEGRADATIONS, "stripes"), (VISIBLE_DEGRADATIONS, "rain"))
        ]
        return Priors(tokens, tokens, tokens, *named, np.float32(0.5), np.float32(0.5))


def test_the_readout_is_judged_by_kind_and_by_strength(pictures):
    _, infrared, visible = pictures
    answers = readout.degraded_answers(Namer(), [cases.Pair("a", infrared, grey_to_colour(visible))])
    found = readout.figures(answers)["held-back"]
    assert found["visible"]["accuracy"] == pytest.approx(1 / len(VISIBLE_DEGRADATIONS))
    column = VISIBLE_DEGRADATIONS.index("rain")
    assert [sum(line) for line in found["visible"]["confusion"]] == [1] * len(VISIBLE_DEGRADATIONS)
    assert all(line[column] == 1 for line in found["visible"]["confusion"])
    assert found["infrared"]["strength"]["error"] == pytest.approx(
        np.mean([abs(a.strength - 0.5) for a in answers if a.camera == "infrared" and a.truth != "none"])
    )
    assert "right" in as_text(readout.tables({"held-back": found}))


# --- output ---


def test_tables_align_and_come_in_markdown():
    table = Table("Speed", ("who", "ms"), (("a long name", 1.5), ("b", None)), "two")
    assert as_text([table]).splitlines() == [
        "Speed",
        "who             ms",
        "a long name  1.500",
        "b                -",
        "two",
    ]
    assert "| a long name | 1.500 |" in as_markdown([table])


def test_a_sheet_shows_every_tile_at_full_size(tmp_path: Path, pictures):
    _, infrared, visible = pictures
    pair = cases.Pair("set/name", infrared, grey_to_colour(visible))
    with Sheets(tmp_path, "public") as sheets:
        for case in cases.degraded_cases([pair], ["clean", "ir_stripe"]):
            sheets.add(case, {"fused": case.visible})
    sheet = cv2.imread(str(tmp_path / "public_set_name.png"))
    assert sheet.shape[1] == 4 * WIDTH + 3 * 4
    assert sheet.shape[0] == 2 * (HEIGHT + 24 + 4)
    assert np.array_equal(sheet[24 : 24 + HEIGHT, :WIDTH, 0], infrared)


# --- the command ---


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: str, engine: type[MaximumEngine] = MaximumEngine):
        monkeypatch.setattr("pipeline.live.create_engine", lambda **_: engine())
        return CliRunner().invoke(app, ["evaluate", *arguments])

    return run


def test_the_command_judges_own_folders_and_writes_everything(tmp_path: Path, pictures, command):
    root = data_folder(tmp_path / "data", pictures) / "eval" / "tno"
    outputs = {name: tmp_path / name for name in ("scores.json", "scores.md", "sheets")}
    result = command(
        *("--infrared", str(root / "ir"), "--visible", str(root / "vi")),
        *("--json", str(outputs["scores.json"]), "--markdown", str(outputs["scores.md"])),
        *("--sheets", str(outputs["sheets"]), "--condition", "clean", "--condition", "vis_rain"),
    )
    assert result.exit_code == 0, result.output
    scores = json.loads(outputs["scores.json"].read_text())
    assert [(row["name"], row["degradation"]) for row in scores["rows"]] == [("one", "clean"), ("one", "vis_rain")]
    assert {*metrics.METRICS, "CbCr"} <= scores["mean"].keys()
    assert scores["mean"]["VIF"] == pytest.approx(np.mean([row["VIF"] for row in scores["rows"]]))
    assert "| vis_rain |" in outputs["scores.md"].read_text()
    assert [path.name for path in outputs["sheets"].iterdir()] == ["own_one.png"]


def test_ready_made_pictures_are_scored_without_an_engine(tmp_path: Path, pictures):
    root = data_folder(tmp_path / "data", pictures) / "eval" / "tno"
    folders = ("--infrared", str(root / "ir"), "--visible", str(root / "vi"), "--fused", str(root / "vi"))
    result = CliRunner().invoke(app, ["evaluate", *folders, "--json", "-"])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["engine"] is None
    assert scores["rows"][0]["CbCr"] == 0


def test_degraded_twins_are_fused_and_the_clean_ones_judge(tmp_path: Path, pictures, command):
    root = data_folder(tmp_path / "data", pictures) / "eval" / "tno"
    (tmp_path / "dark").mkdir()
    cv2.imwrite(str(tmp_path / "dark" / "one.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    folders = (
        "--infrared",
        str(root / "ir"),
        "--visible",
        str(root / "vi"),
        "--degraded-visible",
        str(tmp_path / "dark"),
    )
    result = command(*folders, "--json", "-")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["degradation"] == "degraded"
    assert row["CbCr"] == pytest.approx(0, abs=1e-9)


def test_sets_people_and_readout_are_parts_of_one_report(tmp_path: Path, pictures, command):
    root = data_folder(tmp_path / "data", pictures)
    parts = ("--by-set", "--people", "--readout", "--condition", "clean")
    result = command(str(root), *parts, "--json", str(tmp_path / "s.json"))
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "s.json").read_text())
    assert set(scores["parts"]) == {"by_set", "people", "readout"}
    assert set(scores["parts"]["by_set"]["sets"]) == {"msrs", "tno"}
    assert scores["parts"]["people"]["clean"]["people"] == 1
    assert {row["part"] for row in scores["rows"]} == {"by_set", "people"}
    assert set(scores["parts"]["readout"]["held-back"]) == {"infrared", "visible"}


def test_every_set_is_shown_with_its_scores_and_colours_clean_and_degraded(tmp_path: Path, pictures, command):
    root = data_folder(tmp_path, pictures)
    conditions = ("--condition", "clean", "--condition", "vis_haze", "--condition", "ir_stripe")
    result = command(str(root), "--by-set", *conditions, "--json", "-", "--markdown", str(tmp_path / "s.md"))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "s.md").read_text().splitlines() if "|" in line]
    shown = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(shown) == ["msrs", "tno"]
    for data_set, cells in shown.items():
        own = [row for row in rows if row["set"] == data_set]
        for score in ("VIF", "Qabf", "SSIM", "CbCr"):
            clean, *spoiled = (row[score] for row in own)
            assert cells[f"{score} clean"] == f"{clean:.3f}"
            assert cells[f"{score} degraded"] == f"{np.mean(spoiled):.3f}"


def real_folder(root: Path, pictures: tuple[np.ndarray, np.ndarray, np.ndarray], *scenes: str) -> Path:
    """Published degraded scenes with clean twins: each one's infrared with stripes."""
    _, infrared, visible = pictures
    lines = ["set,scene,modality,kind,file"]
    (root / "degraded").mkdir(parents=True)
    for number, scene in enumerate(scenes):
        clean = np.roll(infrared, 7 * number, 1)
        striped = np.clip(clean.astype(int) + 20 * (np.arange(WIDTH) % 4 == 0), 0, 255).astype(np.uint8)
        for modality, kind, picture in (("ir", "Clean", clean), ("vi", "Clean", visible), ("ir", "SN", striped)):
            name = f"{scene}_{modality}_{kind}.png"
            cv2.imwrite(str(root / "degraded" / name), picture)
            lines.append(f"dspfusion_val,{scene},{modality},{kind},{name}")
    (root / "degraded" / "index.csv").write_text("\n".join(lines))
    return root


def test_scenes_that_were_trained_on_are_scored_and_count_for_no_figure(tmp_path: Path, pictures, command):
    assert "00001D" in cases.TRAINED_ON
    root = real_folder(tmp_path, pictures, "00001D", "00025N")
    result = command(str(root), "--real", "--json", "-", "--markdown", str(tmp_path / "real.md"))
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    found = [(row["name"], row["degradation"], row["trained_on"]) for row in scores["rows"]]
    assert found == [
        (f"val/{name}", kind, name == "00001D") for name in ("00001D", "00025N") for kind in ("clean", "ir_SN")
    ]
    clean, striped = scores["rows"][2:]
    for score in (*metrics.METRICS, "CbCr"):
        assert scores["mean"][score] == pytest.approx((clean[score] + striped[score]) / 2)
        assert scores["parts"]["real"]["mean_degraded"][score] == striped[score]
    table = (tmp_path / "real.md").read_text()
    assert f"| ir_SN | {striped['EN']:.3f} |" in table
    assert f"| {clean['SSIM']:.3f} | {clean['CbCr']:.3f} |" in table


def test_there_is_nothing_to_judge_where_all_scenes_were_trained_on(tmp_path: Path, pictures, command):
    result = command(str(real_folder(tmp_path, pictures, "00001D")), "--real", engine=Unwanted)
    assert "all trained on" in str(result.exception)


def test_with_one_camera_black_the_other_ones_input_stands_beside_the_result(tmp_path: Path, pictures, command):
    _, infrared, visible = pictures
    save_public_pair(tmp_path, infrared, visible)
    conditions = ("--condition", "clean", "--condition", "vis_haze", "--condition", "ir_lowcon")
    result = command(str(tmp_path), "--missing", "--limit", "1", *conditions, "--json", "-")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    judged = [(row["missing"], row["degradation"]) for row in scores["rows"]]
    assert judged == [("infrared", "clean"), ("infrared", "vis_haze"), ("visible", "clean"), ("visible", "ir_lowcon")]
    hazy = np.rint(255 * (0.5 * visible / 255 + 0.45))
    error = np.mean((hazy - visible) ** 2)
    for row in scores["rows"]:  # the maximum with black is the other picture as it came
        assert [row[name] for name in ("VIF", "SSIM", "PSNR")] == [
            row[f"input {name}"] for name in ("VIF", "SSIM", "PSNR")
        ]
    assert scores["parts"]["missing"]["infrared"]["clean"]["SSIM"] == pytest.approx(1)
    assert scores["parts"]["missing"]["infrared"]["vis_haze"]["PSNR"] == pytest.approx(10 * np.log10(255**2 / error))
    assert scores["mean"]["PSNR"] == pytest.approx(np.mean([row["PSNR"] for row in scores["rows"]]))


class TokenEngine(MaximumEngine):
    """Its picture is the darker, the larger the semantic tokens are that it is given."""

    def fuse(self, infrared: np.ndarray, visible: np.ndarray, priors: Priors) -> np.ndarray:
        size = float(np.abs(priors.semantic).mean())
        return np.rint(super().fuse(infrared, visible, priors) / (1 + size)).astype(np.uint8)


def rms(difference: torch.Tensor) -> float:
    return float(difference.pow(2).mean().sqrt())


def read_tokens(infrared: np.ndarray, visible: np.ndarray, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The semantic tokens that the shipped nano reads from a pair with grey colours, and what its diffusion makes."""
    network, _ = load("nano")
    thermal = torch.from_numpy(infrared)[None, None] / 255
    optical = (torch.from_numpy(visible)[None, None] / 255).expand(1, 3, -1, -1)
    with torch.inference_mode():
        return network.encode_semantics(thermal, optical), network.estimate_priors(thermal, optical, steps).semantic


def test_the_ablation_shows_how_near_the_diffusion_comes_to_the_clean_pairs_tokens(tmp_path: Path, pictures, command):
    _, infrared, visible = pictures
    save_public_pair(tmp_path, infrared, visible)
    conditions = ("--condition", "vis_haze", "--condition", "ir_lowcon")
    outputs = ("--json", "-", "--markdown", str(tmp_path / "ablation.md"))
    result = command(str(tmp_path), "--ablation", "--limit", "1", *conditions, *outputs, engine=TokenEngine)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    modes = scores["parts"]["ablation"]["modes"]
    assert list(modes) == ["both priors", "unrestored", "clean", "no semantic", "no degradation", "no priors"]
    hazy = np.rint(255 * (0.5 * visible / 255 + 0.45)).astype(np.uint8)
    clean_tokens, _ = read_tokens(infrared, visible, 4)
    read, restored = read_tokens(infrared, hazy, 4)
    found = {mode: figure["mean_by_degradation"]["vis_haze"]["prior_error"] for mode, figure in modes.items()}
    assert found["both priors"] == pytest.approx(rms(restored - clean_tokens), rel=1e-4)
    assert found["unrestored"] == pytest.approx(rms(read - clean_tokens), rel=1e-4)
    assert found["clean"] == 0
    table = (tmp_path / "ablation.md").read_text().split("### Ablation of the priors, prior_error")[1]
    for mode in ("both priors", "unrestored", "clean"):
        assert f"| {mode} | {found[mode]:.3f} |" in table
    own = [row for row in scores["rows"] if row["mode"] == "both priors"]
    assert len(own) == 2
    for score in ("VIF", "prior_error", "intensity_error"):
        assert scores["mean"][score] == pytest.approx(np.mean([row[score] for row in own]))
    assert scores["mean"]["VIF"] != pytest.approx(np.mean([row["VIF"] for row in scores["rows"]]))


def test_numbers_of_diffusion_steps_are_compared_with_the_networks_own(tmp_path: Path, pictures, command):
    _, infrared, visible = pictures
    save_public_pair(tmp_path, infrared, visible)
    arguments = ("--diffusion-steps", "1", "--limit", "1", "--condition", "vis_haze", "--json", "-")
    result = command(str(tmp_path), *arguments, engine=TokenEngine)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    own = scores["engine"]["diffusion_steps"]
    assert [row["mode"] for row in scores["rows"]] == ["steps 1", f"steps {own}"]
    hazy = np.rint(255 * (0.5 * visible / 255 + 0.45)).astype(np.uint8)
    clean_tokens, _ = read_tokens(infrared, visible, 1)
    for row, steps in zip(scores["rows"], (1, own), strict=True):
        _, restored = read_tokens(infrared, hazy, steps)
        assert row["prior_error"] == pytest.approx(rms(restored - clean_tokens), rel=1e-4)
    assert scores["mean"]["prior_error"] == scores["rows"][1]["prior_error"] != scores["rows"][0]["prior_error"]


class Unwanted(MaximumEngine):
    """Made before everything was checked."""

    def __init__(self) -> None:
        raise AssertionError("work has begun")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("--video", "video/index.json"),
        ("--real", "degraded/index.csv"),
        ("--published", "expected one picture 01016N.*"),
        ("--public", "expected one picture 00095D.*"),
        ("--ablation", "expected one picture 00095D.*"),
        ("--all", "expected one picture"),
    ],
)
def test_missing_files_of_a_later_part_are_told_before_the_first_begins(part, told, tmp_path: Path, pictures, command):
    result = command(str(data_folder(tmp_path, pictures)), "--by-set", part, engine=Unwanted)
    assert told in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_missing_recording_or_label_or_twin_is_told_before_the_work_begins(tmp_path: Path, pictures, command):
    root = data_folder(tmp_path, pictures)
    (root / "video").mkdir()
    (root / "video" / "index.json").write_text('[{"name": "a", "group": "eval", "ir": "ir.mkv", "vi": "vi.mkv"}]')
    (root / "eval" / "msrs" / "boxes_infrared" / "00020N.txt").unlink()
    (root / "dark").mkdir()
    pair = root / "eval" / "tno"
    twins = ("--infrared", str(pair / "ir"), "--visible", str(pair / "vi"), "--degraded-visible", str(root / "dark"))
    for arguments, told in (
        ((str(root), "--by-set", "--video"), "ir.mkv"),
        ((str(root), "--by-set", "--people"), "boxes_infrared"),
        (twins, "expected one picture one.*"),
    ):
        assert told in str(command(*arguments, engine=Unwanted).exception)


@pytest.mark.parametrize("option", ["--engine", "--variant"])
def test_an_unknown_engine_or_variant_is_told_by_its_option(option, tmp_path: Path, pictures, command):
    result = command(str(data_folder(tmp_path, pictures)), "--by-set", option, "nothing", engine=Unwanted)
    assert str(result.exception).startswith(f"{option}: ")
    assert "should be" in str(result.exception)


@pytest.mark.parametrize("option", ["--json", "--markdown", "--sheets"])
def test_a_place_that_takes_no_report_is_told_before_the_work_begins(option, tmp_path: Path, pictures, command):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "report")
    result = command(str(data_folder(tmp_path, pictures)), "--by-set", option, place, engine=Unwanted)
    assert f"{tmp_path / 'file'} is no folder" in str(result.exception)


def write_frames(path: Path, frames: list[np.ndarray]) -> None:
    """A lossless video of these pictures, grey or in colour, at 25 frames a second."""
    height, width = frames[0].shape[:2]
    colour = frames[0].ndim == 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0" if colour else "gray"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24" if colour else "gray")))
        container.mux(stream.encode(None))


def test_a_degraded_clip_flickers_less_through_the_replay_than_frame_by_frame(tmp_path: Path, pictures, command):
    _, infrared, visible = (cv2.resize(picture, (160, 128)) for picture in pictures)
    random = np.random.default_rng(5)
    noisy = [np.clip(infrared + random.normal(0, 9, infrared.shape), 0, 255).astype(np.uint8) for _ in range(12)]
    folder = tmp_path / "video"
    folder.mkdir()
    write_frames(folder / "clean_ir.mkv", [infrared] * 12)
    write_frames(folder / "noisy_ir.mkv", noisy)
    write_frames(folder / "vi.mkv", [grey_to_colour(visible)] * 12)
    clips = [
        {"name": "wall", "group": group, "ir": file, "vi": "vi.mkv"}
        for group, file in (("eval", "clean_ir.mkv"), ("eval_degraded", "noisy_ir.mkv"), ("train", "nowhere.mkv"))
    ]
    (folder / "index.json").write_text(json.dumps(clips))
    result = command(str(tmp_path), "--video", "--json", "-")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    found = scores["parts"]["video"]
    both = [found[inputs]["replay"]["flicker"] for inputs in ("clean", "degraded")]
    assert scores["mean"]["flicker"] == pytest.approx(np.mean(both))
    assert found["clean"]["replay"]["flicker"] < 0.1
    noise = found["degraded"]["infrared input"]["flicker"]
    assert noise == pytest.approx(2 * 9 / np.sqrt(np.pi), rel=0.1)  # the mean of a difference of two normal draws
    assert found["degraded"]["frame by frame"]["flicker"] == found["degraded"]["maximum"]["flicker"]
    assert found["degraded"]["replay"]["flicker"] < 0.75 * found["degraded"]["frame by frame"]["flicker"]


FUSED = ["--infrared", "a", "--visible", "b", "--fused", "c"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "data folder"),
        (["nowhere"], "nowhere"),
        (["--infrared", "a"], "belong together"),
        ([".", "--condition", "fog"], "vis_rain"),
        ([".", "--diffusion-steps", "many"], "1 to 10"),
        ([".", "--infrared", "a", "--visible", "b"], "not both"),
        ([".", "--real", "--condition", "clean"], "--real"),
        ([".", "--published", "--condition", "clean"], "--published"),
        ([".", "--video", "--condition", "clean"], "--video"),
        ([".", "--ablation", "--condition", "clean"], "--ablation"),
        ([".", "--diffusion-steps", "1", "--condition", "vis_haze", "--condition", "clean"], "--diffusion-steps"),
        ([*FUSED, "--condition", "clean"], "leave it out"),
        ([*FUSED[:4], "--degraded-infrared", "c", "--condition", "clean"], "leave it out"),
        ([*FUSED, "--engine", "openvino"], "--engine"),
        ([*FUSED, "--variant", "base"], "--variant"),
        ([*FUSED, "--weights", "nano.safetensors"], "--weights"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, told, command):
    result = command(*arguments)
    assert result.exit_code != 0
    assert told in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("condition", "spared"), [("ir_SN", "visible"), ("vi_Rain", "infrared"), ("LL_SN", None), ("Rain_SN", None)]
)
def test_a_camera_that_is_not_degraded_can_be_given_its_clean_picture(condition: str, spared: str | None):
    grey, colour = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)
    case = cases.Case(cases.Pair("a", grey, colour), condition, grey + 9, colour + 9)
    given = cases.spared_clean(case)
    assert (given.infrared.max(), given.visible.max()) == (
        0 if spared == "infrared" else 9,
        0 if spared == "visible" else 9,
    )


def test_a_published_scene_is_fused_again_only_where_a_clean_picture_takes_an_inputs_place(
    tmp_path: Path, pictures, monkeypatch: pytest.MonkeyPatch
):
    fused, infrared, visible = pictures
    grey = np.full_like(infrared, 90)
    files = {"eval/msrs/ir/one": infrared, "eval/msrs/vi/one": visible}
    scenes = {"LL_SN": ("ir_SN", "vi_LL"), "vi_Rain": ("ir_Input", "vi_Rain"), "ir_SN": ("ir_SN", "vi_Input")}
    for condition, inputs in scenes.items():
        files |= {f"degraded/dspfusion_test/one/{name}": grey for name in inputs}
        files[f"official_dspfusion_outputs/{condition}/one"] = fused
    for name, picture in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    monkeypatch.setattr(cases, "PUBLISHED_SCENES", [(condition, "one") for condition in scenes])
    engine, method = MaximumEngine(), evaluate.fusing_with(MaximumEngine())
    steps, done = [], []
    found = parts.published(engine, parts.Scope(data_dir=tmp_path), (steps.append, lambda: done.append(1))).figures
    assert engine.calls == 3 + 2
    assert steps == [len(done)]
    as_published, spared = (
        evaluate.mean_scores(evaluate.score_cases(method, map(change, cases.published_cases(tmp_path))))
        for change in (lambda case: case, cases.spared_clean)
    )
    assert found["ours"] == as_published != spared
    assert found["ours, spared camera clean"] == spared


@pytest.mark.realdata
def test_the_published_pictures_score_as_published(data_dir: Path):
    rows = evaluate.score_cases(evaluate.ready_picture, cases.published_cases(data_dir))
    means = evaluate.mean_scores(rows)
    assert [means[name] for name in ("VIF", "Qabf", "SSIM")] == pytest.approx([0.890, 0.617, 1.227], abs=0.0006)


@pytest.mark.realdata
@pytest.mark.parametrize("degradation", ["vis_haze", "vis_blur", "ir_stripe"])
def test_with_one_camera_black_the_shipped_nano_restores_the_other(degradation: str, data_dir: Path):
    """The picture is nearer to what the other camera's clean one shows than its degraded one was."""
    camera, black = ("infrared", "visible") if degradation.startswith("ir_") else ("visible", "infrared")
    engine = PyTorchEngine("nano")
    for pair in cases.public_pairs(data_dir, ["msrs/00349D", "msrs/01016N"]):
        pictures = dict(zip(("infrared", "visible"), degrade(degradation, pair.infrared, pair.visible, 1), strict=True))
        pictures[black] = np.zeros_like(pictures[black])
        fused = engine.fuse(**pictures, priors=engine.estimate_priors(**pictures))
        sources = metrics.Sources(pair.infrared, pair.visible)
        before, after = (sources.likeness(picture, camera)["PSNR"] for picture in (pictures[camera], fused))
        assert after > before, pair.name
