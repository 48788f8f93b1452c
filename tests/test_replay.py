"""Replay drops nothing, keeps the order, and repeats itself bit by bit."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from engines.base import NOISE_SEED
from pipeline.client import Client
from pipeline.config import PublishConfig
from pipeline.errors import ConfigError, SourceError
from pipeline.live import engine_for
from pipeline.publish import Publisher
from pipeline.replay import ReplayConfig, replay
from tests.rigs.engines import MaximumEngine
from tests.rigs.recordings import write_video


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    return {
        "infrared": str(write_video(tmp_path / "ir.mkv", colour=False)),
        "visible": str(write_video(tmp_path / "vis.mkv")),
    }


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_as_many_frames_come_out_as_pairs_went_in_and_three_runs_are_equal(tmp_path: Path, pair, suffix: str):
    digests = set()
    for run in range(3):
        output = tmp_path / f"fused{run}.{suffix}"
        report = replay(ReplayConfig(**pair, output=str(output)), engine=MaximumEngine())
        assert report["pairs"] == report["fused"] == frames_in(output) == 12
        digests.add(digest(output))
    assert len(digests) == 1


def test_two_folders_replay_in_name_order(tmp_path: Path):
    import cv2
    import numpy as np

    for name, channels in (("ir", 1), ("vis", 3)):
        (tmp_path / name).mkdir()
        for index in (1, 2, 10):
            image = np.full((32, 48, channels), 10 * index, np.uint8)
            cv2.imwrite(str(tmp_path / name / f"{index}.png"), image)
    levels = []
    config = ReplayConfig(infrared=str(tmp_path / "ir"), visible=str(tmp_path / "vis"))
    report = replay(config, engine=MaximumEngine(), on_fused=lambda fused: levels.append(int(fused.image[0, 0, 0])))
    assert levels == [10, 20, 100]
    assert report["modes"]["fused"] == 3


def test_a_picture_that_a_closed_shutter_repeats_is_fused_once_and_then_held(tmp_path: Path):
    import cv2
    import numpy as np

    for name, content in (("ir", (0, 1, 2, 2, 2, 3)), ("vis", range(6))):
        (tmp_path / name).mkdir()
        for index, number in enumerate(content):
            image = np.random.default_rng(number).integers(0, 4000, (32, 48)).astype(np.uint16)
            colour = cv2.merge([np.uint8(image // 16)] * 3)
            cv2.imwrite(str(tmp_path / name / f"{index}.png"), image if name == "ir" else colour)
    modes = []
    config = ReplayConfig(infrared=str(tmp_path / "ir"), visible=str(tmp_path / "vis"))
    replay(config, engine=MaximumEngine(), on_fused=lambda fused: modes.append(fused.mode))
    assert modes == ["fused", "fused", "fused", "held", "held", "fused"]


def test_a_longer_recording_goes_on_alone(tmp_path: Path):
    infrared = write_video(tmp_path / "ir.mkv", frames=10, colour=False)
    visible = write_video(tmp_path / "vis.mkv", frames=25)
    report = replay(ReplayConfig(infrared=str(infrared), visible=str(visible)), engine=MaximumEngine())
    assert report["fused"] == 25
    assert report["modes"]["vis_only"] >= 10
    for account in report["accounting"].values():
        assert account["captured"] == account["used"] + sum(account["dropped"].values())


def wait_for_the_subscription(endpoint: str) -> None:
    with Client(endpoint, rig="replay", stream="health") as client:
        while not any("fused/raw" in prefix for prefix in client.latest(30).data()["subscriptions"]):
            pass


def test_every_fused_frame_of_a_replay_reaches_a_subscriber(tmp_path: Path, pair):
    endpoint = f"ipc://{tmp_path / 'replay'}"
    received = []

    def consume() -> None:
        with Client(endpoint, rig="replay", codec="raw") as client:
            for _, message in zip(range(12), client.all(timeout_s=30), strict=False):
                received.append(message.header.sequence)

    consumer = threading.Thread(target=consume)
    consumer.start()
    config = ReplayConfig(**pair, publish=PublishConfig(endpoint=endpoint))
    report = replay(config, engine=MaximumEngine(), on_start=lambda _: wait_for_the_subscription(endpoint))
    consumer.join(timeout=40)
    assert report["published"] == 12
    assert received == list(range(12))


def test_the_headers_of_a_replay_say_what_those_of_a_live_rig_say(tmp_path: Path, pair):
    from calibration.rig import CameraModel, Rig
    from calibration.rig_file import save_rig

    with av.open(pair["visible"]) as container:
        size = container.streams.video[0].width, container.streams.video[0].height
    camera = CameraModel(*size, np.array([[size[0], 0, size[0] / 2], [0, size[0], size[1] / 2], [0, 0, 1.0]]))
    save_rig(Rig(camera, camera, np.eye(4), homography=np.eye(3), time_offset_ms=5.0), tmp_path / "rig.yaml")
    headers = []
    endpoint = f"ipc://{tmp_path / 'replay'}"

    def consume() -> None:
        with Client(endpoint, rig="replay", codec="raw") as client:
            headers.append(client.latest(timeout_s=30).header)

    consumer = threading.Thread(target=consume)
    consumer.start()
    config = ReplayConfig(**pair, calibration=str(tmp_path / "rig.yaml"), publish=PublishConfig(endpoint=endpoint))
    replay(config, engine=MaximumEngine(), on_start=lambda _: wait_for_the_subscription(endpoint))
    consumer.join(timeout=40)
    (header,) = headers
    assert (header.seed, header.steps) == (NOISE_SEED, 4)
    assert len(header.engine_sha) == 64
    assert header.calibration_sha == digest(tmp_path / "rig.yaml")
    assert header.infrared_clock.offset_ns == 5_000_000
    assert header.drops == {"sync": 0, "publish": 0}


def test_what_a_replay_could_not_publish_is_in_its_report(pair, monkeypatch: pytest.MonkeyPatch):
    def fails_once(publisher, work):
        if work.fused.index == 3:
            raise RuntimeError("the picture cannot be encoded")
        publish(publisher, work)

    publish = Publisher._publish
    monkeypatch.setattr(Publisher, "_publish", fails_once)
    report = replay(ReplayConfig(**pair), engine=MaximumEngine())
    assert (report["fused"], report["published"]) == (12, 11)
    assert report["dropped"]["publish"] == {"error": 1}
    assert report["fallbacks"] == ["a frame could not be published: RuntimeError: the picture cannot be encoded"]


def test_a_replay_whose_publisher_dies_goes_on_and_says_so(tmp_path: Path, pair, monkeypatch: pytest.MonkeyPatch):
    def dies(publisher) -> None:
        if publisher.statistics()["published"]:
            raise OSError("too many open files")

    monkeypatch.setattr(Publisher, "_read_subscriptions", dies)
    report = replay(ReplayConfig(**pair, output=str(tmp_path / "fused.mp4")), engine=MaximumEngine())
    assert report["fused"] == frames_in(tmp_path / "fused.mp4") == 12
    assert any("nothing is published any more" in line for line in report["fallbacks"])
    assert report["published"] + report["dropped"]["publish"]["closed"] == 12


def test_stopping_early_leaves_a_whole_video_of_what_was_fused(tmp_path: Path, pair):
    count = []
    config = ReplayConfig(**pair, output=str(tmp_path / "fused.mp4"))
    replay(config, engine=MaximumEngine(), on_fused=count.append, stopped=lambda: len(count) >= 5)
    assert frames_in(tmp_path / "fused.mp4") == 5


@pytest.mark.parametrize("frames", [(50, 20), (20, 50), (25, 25)])
@pytest.mark.parametrize("end", [1, 4, 15])
def test_stopping_early_accounts_for_the_frames_that_were_read_ahead(tmp_path: Path, frames: tuple[int, int], end: int):
    infrared = write_video(tmp_path / "ir.mkv", frames=frames[0], colour=False)
    visible = write_video(tmp_path / "vis.mkv", frames=frames[1])
    count = []
    config = ReplayConfig(infrared=str(infrared), visible=str(visible))
    report = replay(config, engine=MaximumEngine(), on_fused=count.append, stopped=lambda: len(count) >= end)
    assert report["fused"] == end
    for camera, account in report["accounting"].items():
        assert account["captured"] == account["used"] + sum(account["dropped"].values()), (camera, account)


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda folder, pair: pair | {"infrared": str(folder / "absent.mkv")}, "does not exist"),
        (lambda folder, pair: pair | {"visible": str(text_file(folder))}, "cannot be read as a video"),
        (lambda folder, pair: {"infrared": pair["visible"], "visible": pair["infrared"]}, "look swapped"),
        (lambda folder, pair: pair | {"infrared": str(other_rate(folder))}, "one of the rates is wrong"),
        (lambda folder, pair: pair | {"visible": str(empty_folder(folder))}, "has no frames"),
    ],
    ids=["missing file", "text instead of video", "swapped", "equal length at another rate", "zero frames"],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(tmp_path: Path, pair, prepare, complaint: str):
    output = tmp_path / "out" / "fused.mp4"
    output.parent.mkdir()
    config = ReplayConfig(**prepare(tmp_path, pair), output=str(output))
    with pytest.raises(SourceError, match=complaint) as raised:
        replay(config, engine=MaximumEngine())
    assert "\n" not in str(raised.value)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("alias", ["same", "relative", "symbolic link", "hard link", "calibration"])
def test_an_output_that_is_an_input_under_any_name_is_refused(tmp_path: Path, pair, alias: str, monkeypatch):
    recording, output = Path(pair["visible"]), tmp_path / "fused.mkv"
    names = dict(pair)
    if alias == "same":
        output = recording
    elif alias == "relative":
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path / "folder")
        output = Path("../folder/../vis.mkv")
    elif alias == "symbolic link":
        output.symlink_to(recording)
    elif alias == "hard link":
        output.hardlink_to(recording)
    else:
        names["calibration"] = str(output)
    before = recording.read_bytes()
    with pytest.raises(ConfigError, match="choose another place"):
        replay(ReplayConfig(**names, output=str(output)), engine=MaximumEngine())
    assert recording.read_bytes() == before


def test_a_live_rig_does_not_write_its_video_over_a_recording_it_reads(tmp_path: Path, pair):
    from pipeline.config import OutputConfig, RigConfig, StreamSource
    from pipeline.live import LivePipeline

    config = RigConfig(
        infrared=StreamSource(url=pair["infrared"]),
        visible=StreamSource(url=pair["visible"]),
        publish=PublishConfig(endpoint=""),
        output=OutputConfig(video=pair["visible"]),
    )
    with pytest.raises(ConfigError, match="choose another place"):
        LivePipeline(config, engine=MaximumEngine())


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("camera", ["infrared", "visible"])
def test_a_recording_that_was_cut_off_is_fused_as_far_as_it_goes_and_the_report_says_so(tmp_path: Path, pair, camera):
    cut(Path(pair[camera]), 0.6)
    output = tmp_path / "fused.mp4"
    report = replay(ReplayConfig(**pair, output=str(output)), engine=MaximumEngine())
    lost = report["cameras"][camera]["unreadable"]
    short = {"infrared": "ir", "visible": "vis"}[camera]
    assert report["frames_in"][short] == 12 - lost < 12
    assert report["fused"] == frames_in(output) == (12 if camera == "infrared" else report["pairs"])
    (line,) = report["fallbacks"]
    assert f"the {camera} recording" in line
    assert f"is cut off: {lost} of its frames could not be read" in line
    for account in report["accounting"].values():
        assert account["captured"] == account["used"] + sum(account["dropped"].values())


def test_a_live_rig_that_reads_a_cut_off_recording_reports_it(pair):
    from pipeline.config import RigConfig, StreamSource
    from pipeline.live import LivePipeline

    cut(Path(pair["visible"]), 0.6)
    config = RigConfig(
        infrared=StreamSource(url=pair["infrared"]),
        visible=StreamSource(url=pair["visible"]),
        publish=PublishConfig(endpoint=""),
    )
    report = LivePipeline(config, engine=MaximumEngine()).run(10)
    assert report["cameras"]["visible"]["unreadable"] == 12 - report["cameras"]["visible"]["captured"] > 0
    assert any("the visible recording" in line and "is cut off" in line for line in report["fallbacks"])


def painted(folder: Path, palette: bool, shift: int = 0) -> Path:
    """A recording in colour: of a scene, or of one quantity in false colours. Its first picture is black."""
    import cv2
    import numpy as np

    (folder / f"{palette}{shift}").mkdir(parents=True)
    random = np.random.default_rng(shift)
    for index in range(6):
        grey = cv2.GaussianBlur(random.integers(0, 255, (48, 64), np.uint8), (0, 0), 3)
        grey = cv2.normalize(grey, None, 0, 255, cv2.NORM_MINMAX)
        scene = np.dstack([cv2.GaussianBlur(random.integers(0, 255, (48, 64), np.uint8), (0, 0), 1)] * 3)
        scene[..., 0] = cv2.GaussianBlur(random.integers(0, 255, (48, 64), np.uint8), (0, 0), 2)
        image = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO) if palette else scene
        cv2.imwrite(str(folder / f"{palette}{shift}" / f"{index}.png"), image * (index > 0))
    return folder / f"{palette}{shift}"


def grey_in_three_channels(folder: Path) -> Path:
    import cv2
    import numpy as np

    (folder / "grey").mkdir(parents=True)
    for index in range(6):
        cv2.imwrite(str(folder / "grey" / f"{index}.png"), np.full((48, 64, 3), 30 * index, np.uint8))
    return folder / "grey"


def test_swapped_recordings_are_told_apart_by_several_pictures_not_by_the_first(tmp_path: Path):
    scene, grey, palette = painted(tmp_path, False), grey_in_three_channels(tmp_path), painted(tmp_path, True)
    for infrared, visible in ((scene, grey), (scene, palette)):
        with pytest.raises(SourceError, match="infrared and visible look swapped"):
            replay(ReplayConfig(infrared=str(infrared), visible=str(visible)), engine=MaximumEngine())
        report = replay(ReplayConfig(infrared=str(visible), visible=str(infrared)), engine=MaximumEngine())
        assert report["fused"] == 6
        warned = [line for line in report["fallbacks"] if "is in colour, of which only the brightness is used" in line]
        assert len(warned) == (visible is palette)


def test_two_grey_recordings_are_taken_as_they_are_given(tmp_path: Path):
    infrared, visible = (str(grey_in_three_channels(tmp_path / name)) for name in ("ir", "vis"))
    assert replay(ReplayConfig(infrared=infrared, visible=visible), engine=MaximumEngine())["fallbacks"] == []


@pytest.mark.realdata
def test_every_real_clip_is_recognised_when_it_is_swapped_and_taken_when_it_is_not(data_dir: Path):
    from pipeline.recording import doubts, look_swapped, probe

    for clip in json.loads((data_dir / "video" / "index.json").read_text()):
        infrared, visible = (probe(data_dir / "video" / clip[name]) for name in ("ir", "vi"))
        assert not look_swapped(infrared.colour, visible.colour), clip["name"]
        assert doubts(infrared, visible, calibrated=True) == []
        grey = "tno" in clip["name"]  # where both cameras are grey, nothing tells them apart
        assert look_swapped(visible.colour, infrared.colour) != grey, clip["name"]


def text_file(folder: Path) -> Path:
    path = folder / "notes.mkv"
    path.write_text("this is no video\n" * 50)
    return path


def other_rate(folder: Path) -> Path:
    return write_video(folder / "slow.mkv", rate=10, colour=False)


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_an_output_that_is_no_video_name_is_refused_before_anything_runs(pair):
    engine = MaximumEngine()
    with pytest.raises(ConfigError, match=r"\.mp4 or \.mkv"):
        replay(ReplayConfig(**pair, output="fused.txt"), engine=engine)
    assert engine.calls == 0


@pytest.mark.timeout(900)  # a minute on idle cores
@pytest.mark.realdata
def test_every_registered_clip_gives_a_video_of_as_many_frames_and_repeats_itself(data_dir: Path, tmp_path: Path):
    from pipeline.config import EngineConfig

    clips = [clip for clip in json.loads((data_dir / "video" / "index.json").read_text()) if clip["aligned"] != "no"]
    clips = [clip for clip in clips if "raw" not in clip["group"]]
    assert len(clips) >= 10
    for number, clip in enumerate(clips):
        names = {"infrared": str(data_dir / "video" / clip["ir"]), "visible": str(data_dir / "video" / clip["vi"])}
        digests = set()
        for run in range(3 if number == 0 else 1):
            output = tmp_path / f"{number}_{run}.mp4"
            report = replay(ReplayConfig(**names, output=str(output)), engine=engine_for(EngineConfig()))
            assert report["fused"] == frames_in(output) == clip["frames"], clip["name"]
            digests.add(digest(output))
        assert len(digests) == 1
