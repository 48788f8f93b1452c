"""`dspfusion evaluate`: scores against a second, slow implementation; people, flicker, readout; the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from engines.base import INFRARED_DEGRADATIONS, VISIBLE_DEGRADATIONS, Priors
from engines.evaluation import cases, evaluate, metrics, parts, people, readout
from engines.evaluation.sheets import Sheets
from engines.evaluation.tables import Table, as_markdown, as_text
from engines.evaluation.video import StaticScene
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
    assert again == metrics.evaluate_pair(fused, infrared, visible)
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


def test_a_trained_scene_is_told_from_the_others(tmp_path: Path, pictures):
    _, infrared, visible = pictures
    lines = ["set,scene,modality,kind,file"]
    for modality, kind, picture in (("ir", "Clean", infrared), ("vi", "Clean", visible), ("ir", "SN", 255 - infrared)):
        cv2.imwrite(str(tmp_path / f"{modality}_{kind}.png"), picture)
        lines.append(f"dspfusion_val,00001D,{modality},{kind},{modality}_{kind}.png")
    (tmp_path / "degraded").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "degraded" / path.name)
    (tmp_path / "degraded" / "index.csv").write_text("\n".join(lines))
    found = list(cases.real_cases(tmp_path))
    assert [case.condition for case in found] == ["clean", "ir_SN"]
    assert np.array_equal(found[1].infrared, 255 - infrared)
    assert np.array_equal(found[1].pair.infrared, infrared)
    assert "00001D" in cases.TRAINED_ON


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
    monkeypatch.setattr("pipeline.live.create_engine", lambda **_: MaximumEngine())

    def run(*arguments: str):
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
    found = json.loads(result.stdout)["parts"]["video"]
    assert found["clean"]["replay"]["flicker"] < 0.1
    noise = found["degraded"]["infrared input"]["flicker"]
    assert noise == pytest.approx(2 * 9 / np.sqrt(np.pi), rel=0.1)  # the mean of a difference of two normal draws
    assert found["degraded"]["frame by frame"]["flicker"] == found["degraded"]["maximum"]["flicker"]
    assert found["degraded"]["replay"]["flicker"] < 0.75 * found["degraded"]["frame by frame"]["flicker"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "data folder"),
        (["nowhere"], "nowhere"),
        (["--infrared", "a"], "belong together"),
        ([".", "--condition", "fog"], "vis_rain"),
        ([".", "--diffusion-steps", "many"], "1 to 10"),
        ([".", "--infrared", "a", "--visible", "b"], "not both"),
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
