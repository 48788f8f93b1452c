"""Recordings, image folders, devices, and what happens where there is none."""

from __future__ import annotations

import itertools
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from pipeline.config import DeviceSource, FolderSource, StreamSource, SyntheticSource
from pipeline.errors import SourceEnded, SourceError
from pipeline.frame import Frame
from pipeline.redaction import RedactingFilter, redact, secrets_of
from pipeline.sources.device import DeviceCamera, device_frame, device_options, driver_time
from pipeline.sources.folder import ImageFolder, image_files
from pipeline.sources.opening import open_source
from pipeline.sources.pictures import infrared_image, visible_image
from pipeline.sources.stream import StreamCamera

MS = 1_000_000


def thermal(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """14-bit counts, all different."""
    base = np.arange(width * height, dtype=np.uint16).reshape(height, width)
    return [base * 3 + 6000 + 17 * k for k in range(count)]


def write_video(
    path: Path,
    images: list[np.ndarray],
    codec: str,
    pixel_format: str,
    array_format: str,
    rate: Fraction | int = 25,
    pts: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """`pts` in units of 1/rate s, or one per frame."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixel_format
        for k, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format=array_format)
            frame.pts = k if pts is None else pts[k]
            frame.time_base = 1 / Fraction(rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def colours(count: int) -> list[np.ndarray]:
    return [np.full((48, 64, 3), (10 + 5 * k, 120, 200), np.uint8) for k in range(count)]


def recording(path: Path, camera: str = "infrared", **settings) -> StreamCamera:
    return StreamCamera(StreamSource(url=str(path), **({"realtime": False} | settings)), camera)


def read_all(source) -> list[Frame]:
    frames = []
    source.open()
    try:
        while True:
            frames.append(source.grab())
    except SourceEnded:
        return frames
    finally:
        source.close()


# Video files


def test_sixteen_bit_infrared_comes_out_of_a_file_bit_by_bit(tmp_path):
    images = thermal(12)
    frames = read_all(recording(write_video(tmp_path / "ir.mkv", images, "ffv1", "gray16le", "gray16le")))
    assert len(frames) == 12
    assert all(frame.image.dtype == np.uint16 and frame.bits == 16 for frame in frames)
    assert all(np.array_equal(frame.image, image) for frame, image in zip(frames, images, strict=True))


@pytest.mark.parametrize(("pixel_format", "bits"), [("gray10le", 10), ("gray12le", 12), ("gray14le", 14)])
def test_ten_to_fourteen_bits_say_how_many_they_are(pixel_format, bits):
    counts = thermal(1)[0] % (1 << bits)
    frame = av.VideoFrame(64, 48, pixel_format)
    plane = np.zeros((48, frame.planes[0].line_size // 2), np.uint16)
    plane[:, :64] = counts
    frame.planes[0].update(plane.tobytes())
    image, told = infrared_image(frame)
    assert told == bits
    assert np.array_equal(image, counts)


def test_big_endian_counts_are_turned_round():
    frame = av.VideoFrame.from_ndarray(thermal(1)[0], format="gray16le").reformat(format="gray16be")
    image, bits = infrared_image(frame)
    assert bits == 16
    assert image.dtype == np.dtype(np.uint16)
    assert np.array_equal(image, thermal(1)[0])


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "nv12", "yuv422p"])
def test_infrared_in_a_colour_stream_is_its_luminance_unchanged(pixel_format):
    frame = av.VideoFrame.from_ndarray(colours(1)[0], format="rgb24").reformat(format=pixel_format)
    image, bits = infrared_image(frame)
    plane = np.frombuffer(bytes(frame.planes[0]), np.uint8).reshape(48, -1)[:, :64]
    assert bits == 8
    assert np.array_equal(image, plane)


@pytest.mark.parametrize("pixel_format", ["yuyv422", "rgb24", "bgr24"])
def test_infrared_in_an_interleaved_format_becomes_grey(pixel_format):
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24").reformat(format=pixel_format)
    image, _ = infrared_image(frame)
    assert image.shape == (48, 64)
    assert np.ptp(image) <= 1


@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
@pytest.mark.parametrize("colour_range", ["MPEG", "JPEG"])
def test_colours_come_back_whatever_matrix_and_range_the_stream_names(matrix, colour_range):
    image = np.full((48, 64, 3), (200, 60, 120), np.uint8)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format="yuv444p", dst_colorspace=matrix, dst_color_range=colour_range
    )
    assert np.abs(visible_image(frame).astype(int) - image).max() <= 3


def test_every_frame_of_a_compressed_file_is_counted_once_and_in_order(tmp_path):
    """With B frames, which are stored in another order than they are shown in."""
    path = write_video(tmp_path / "v.mp4", colours(40), "libx264", "yuv420p", "rgb24", options={"bf": "3", "crf": "4"})
    frames = read_all(recording(path, "visible"))
    assert [frame.index for frame in frames] == list(range(40))
    reds = [frame.image[:, :, 0].mean() for frame in frames]
    assert reds == sorted(reds)
    assert not any(frame.suspect for frame in frames)


def test_two_runs_through_a_file_are_bit_identical(tmp_path):
    path = write_video(tmp_path / "v.mp4", colours(20), "libx264", "yuv420p", "rgb24")
    first, second = read_all(recording(path, "visible")), read_all(recording(path, "visible"))
    assert len(first) == len(second) == 20
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image)
        assert one.captured_ns == other.captured_ns


def test_file_times_are_exact_also_for_29_97_hz(tmp_path):
    path = write_video(tmp_path / "v.mp4", colours(31), "libx264", "yuv420p", "rgb24", rate=Fraction(30000, 1001))
    frames = read_all(recording(path, "visible"))
    assert [frame.captured_ns for frame in frames] == [round(Fraction(k * 1001 * 10**9, 30000)) for k in range(31)]
    assert {frame.clock for frame in frames} == {"file"}


def test_a_pause_in_a_recording_stays_a_pause(tmp_path):
    path = write_video(
        tmp_path / "ir.mkv", thermal(4), "ffv1", "gray16le", "gray16le", pts=[5, 6, 30, 31]
    )  # the first frame is the origin, whatever its own stamp
    assert [frame.captured_ns // MS for frame in read_all(recording(path))] == [0, 40, 1000, 1040]


def test_a_recording_that_loops_goes_on_in_number_and_time(tmp_path):
    source = recording(write_video(tmp_path / "ir.mkv", thermal(3), "ffv1", "gray16le", "gray16le"), loop=True)
    source.open()
    frames = [source.grab() for _ in range(8)]
    source.close()
    assert [frame.index for frame in frames] == list(range(8))
    assert [frame.captured_ns // MS for frame in frames] == [40 * k for k in range(8)]
    assert np.array_equal(frames[0].image, frames[6].image)


def test_in_real_time_a_frame_is_not_handed_out_before_it_is_due(tmp_path):
    source = recording(write_video(tmp_path / "ir.mkv", thermal(6), "ffv1", "gray16le", "gray16le"), realtime=True)
    frames = read_all(source)
    assert all(frame.arrived_ns >= frame.captured_ns for frame in frames)
    assert list(np.diff([frame.captured_ns for frame in frames])) == [40 * MS] * 5
    assert abs(frames[0].captured_ns - time.monotonic_ns()) < 20_000 * MS  # the live scale


def test_two_recordings_that_are_started_together_share_their_first_moment(tmp_path):
    infrared = recording(write_video(tmp_path / "ir.mkv", thermal(3), "ffv1", "gray16le", "gray16le"), realtime=True)
    visible = recording(
        write_video(tmp_path / "v.mkv", colours(3), "ffv1", "yuv420p", "rgb24"), "visible", realtime=True
    )
    infrared.open(), visible.open()
    pairs = [(infrared.grab(), visible.grab()) for _ in range(3)]
    infrared.close(), visible.close()
    assert all(thermal_frame.captured_ns == colour.captured_ns for thermal_frame, colour in pairs)


def test_a_recording_that_takes_a_second_to_open_still_shares_the_first_moment(tmp_path, caplog):
    infrared, visible = folders(tmp_path, 3, 3)
    thermal_frame = infrared.grab()
    time.sleep(1)
    assert visible.grab().captured_ns == thermal_frame.captured_ns
    assert infrared.fault is visible.fault is None
    assert caplog.text == ""
    infrared.close(), visible.close()


def test_a_recording_that_starts_far_too_late_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.sources.base.START_TOGETHER_NS", 50 * MS)
    infrared, visible = folders(tmp_path, 3, 3)
    infrared.grab()
    time.sleep(0.3)
    visible.grab(), visible.grab()
    assert re.fullmatch(
        r"the visible recording starts \d\.\d s after the other one, and stays so much behind", visible.fault
    )
    assert caplog.text.count(visible.fault) == 1
    infrared.close(), visible.close()


def folders(path: Path, *images: int, **settings) -> list[ImageFolder]:
    """An infrared and a visible recording of so many images, open, in real time at 100 Hz."""
    sources = []
    for camera, count in zip(("infrared", "visible"), images, strict=True):
        (path / camera).mkdir()
        for k in range(count):
            cv2.imwrite(str(path / camera / f"{k}.png"), np.full((48, 64), k, np.uint8))
        sources.append(ImageFolder(FolderSource(path=str(path / camera), rate_hz=100, **settings), camera))
        sources[-1].open()
    return sources


def test_recordings_of_unequal_length_that_loop_are_told_of_once(tmp_path, caplog):
    """Three images against four: after the third one their pictures are of different moments."""
    infrared, visible = folders(tmp_path, 3, 4, loop=True)
    for number in range(20):
        infrared.grab(), visible.grab()
        assert (visible.fault is not None) == (number >= 4)
    assert visible.fault == (
        "the visible recording begins anew after 0.040 s, the other one after 0.030 s: "
        "from now on their pictures are of different moments; loop recordings of one length"
    )
    assert infrared.fault is None
    assert caplog.text.count("begins anew") == 1
    infrared.close(), visible.close()


def test_a_video_that_loops_beside_one_that_goes_on_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.base.START_TOGETHER_NS", 100 * MS)
    path = write_video(tmp_path / "ir.mkv", thermal(2), "ffv1", "gray16le", "gray16le")
    infrared = recording(path, realtime=True, loop=True)
    _, visible = folders(tmp_path, 1, 99)
    infrared.open()
    infrared.grab(), visible.grab()
    for _ in range(10):
        infrared.grab()
    assert infrared.fault.startswith("the infrared recording begins anew after 0.080 s, the other one later: ")
    infrared.close(), visible.close()


def test_recordings_of_equal_length_that_loop_stay_together(tmp_path, caplog):
    infrared, visible = folders(tmp_path, 3, 3, loop=True)
    for _ in range(20):
        assert infrared.grab().captured_ns == visible.grab().captured_ns
    assert infrared.fault is visible.fault is None
    assert caplog.text == ""
    infrared.close(), visible.close()


def test_a_damaged_middle_does_not_end_a_recording(tmp_path):
    path = write_video(tmp_path / "v.ts", colours(60), "libx264", "yuv420p", "rgb24", options={"g": "10", "bf": "0"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 188 * 188
    for offset in range(middle, middle + 188 * 6):
        if offset % 188 >= 4:
            data[offset] = (offset * 7919) & 0xFF
    path.write_bytes(data)
    frames = read_all(recording(path, "visible"))
    assert 40 <= len(frames) <= 60
    stamps = [frame.captured_ns for frame in frames]
    assert stamps == sorted(set(stamps))


def moving_noise(count: int) -> list[np.ndarray]:
    """Pictures of 160x128 of which each differs from the one before in place and in noise."""
    random = np.random.default_rng(0)
    wide = cv2.GaussianBlur(random.integers(0, 255, (128, 160 + 5 * count, 3), np.uint8), (0, 0), 2)
    return [
        np.uint8(np.clip(wide[:, 5 * k : 5 * k + 160] + random.normal(0, 12, (128, 160, 1)), 0, 255))
        for k in range(count)
    ]


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def one_slice_a_picture(path: Path) -> Path:
    """30 pictures, of which every tenth is a keyframe, and the others build on the one before."""
    options = {"g": "10", "bf": "0", "sc_threshold": "0", "x264-params": "slices=1:sliced-threads=0"}
    return write_video(path, moving_noise(30), "libx264", "yuv420p", "rgb24", options=options)


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4"])
def test_pictures_from_a_damaged_one_to_the_next_keyframe_are_flagged_counted_and_told_once(tmp_path, caplog, name):
    path = one_slice_a_picture(tmp_path / name)
    whole = read_all(recording(path, "visible"))
    packet, data = packets_of(path)[13], bytearray(path.read_bytes())
    begin, half = data.index(packet) + len(packet) // 4, len(packet) // 2
    data[begin : begin + half] = np.random.default_rng(0).bytes(half)
    path.write_bytes(data)
    source = recording(path, "visible")
    frames = read_all(source)
    differ = [k for k, (one, other) in enumerate(zip(whole, frames, strict=True)) if (one.image != other.image).any()]
    assert [frame.index for frame in frames if frame.suspect] == differ == list(range(13, 20))
    assert source.unreadable == 0
    assert source.fault == (
        f"the visible recording {path} is damaged: "
        "7 of its frames are damaged or build on damaged ones, and are used as decoded"
    )
    assert [record.getMessage() for record in caplog.records] == [source.fault]


def test_one_recording_may_have_lost_and_damaged_pictures(tmp_path):
    path = one_slice_a_picture(tmp_path / "v.mp4")
    packet = packets_of(path)[14]
    path.write_bytes(path.read_bytes().replace(packet, b"\xff" * len(packet)))
    source = recording(path, "visible")
    assert [frame.index for frame in read_all(source) if frame.suspect] == [15, 16, 17, 18, 19]
    assert source.fault.endswith(
        "is damaged: 1 of its frames could not be read, the others are used; "
        "5 of its frames are damaged or build on damaged ones, and are used as decoded"
    )


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.ts"])
@pytest.mark.parametrize("params", ["bframes=3", "bframes=3:open-gop=1", "intra-refresh=1"])
def test_a_whole_recording_has_no_damaged_picture_whatever_its_order_and_keyframes(tmp_path, caplog, name, params):
    options = {"g": "10", "x264-params": params}
    path = write_video(tmp_path / name, moving_noise(30), "libx264", "yuv420p", "rgb24", options=options)
    source = recording(path, "visible")
    assert not any(frame.suspect for frame in read_all(source))
    assert source.fault is None
    assert not caplog.records


# What a user may get wrong


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "notes.txt").write_text("neither is this\n" * 100)
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n")
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    with av.open(str(folder / "sound.wav"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        output.mux(stream.encode(sound))
    video = write_video(folder / "whole.mkv", thermal(2), "ffv1", "gray16le", "gray16le").read_bytes()
    (folder / "cut.mkv").write_bytes(video[: video.find(b"\x1f\x43\xb6\x75")])  # ends where the first cluster begins
    return {
        "empty.mp4": ("empty.mp4", "is empty"),
        "text.mp4": ("text.mp4", "damaged, or no video"),
        "notes.txt": ("notes.txt", "no video"),
        "list.m3u8": ("list.m3u8", "list of other files|no video"),
        "noise.mp4": ("noise.mp4", "damaged, or no video"),
        "sound.wav": ("sound.wav", "has no video in it"),
        "cut.mkv": ("cut.mkv", "not one whole frame|damaged, or no video"),
        "missing.mp4": ("missing.mp4", "there is no file"),
        ".": (".", "is a folder"),
    }


@pytest.mark.parametrize(
    "name",
    ["empty.mp4", "text.mp4", "notes.txt", "list.m3u8", "noise.mp4", "sound.wav", "cut.mkv", "missing.mp4", "."],
)
def test_a_file_that_is_no_recording_is_one_clear_line(tmp_path, name):
    part, reason = bad_files(tmp_path)[name]
    with pytest.raises(SourceError, match=reason) as caught:
        read_all(recording(tmp_path / part))
    assert type(caught.value) is SourceError
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("url", ["http://camera/video.mp4", "concat://a", "gopher://x", "ftp://a/b", "tcp://h:1"])
def test_other_schemes_are_refused_before_anything_is_opened(url):
    with pytest.raises(SourceError, match="use rtsp, rtsps, udp, rtp, or a file's path"):
        open_source(StreamSource(url=url), "visible")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = write_video(tmp_path / "ir.mkv", thermal(2), "ffv1", "gray16le", "gray16le")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, who may read everything
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        recording(path).open()


def test_a_closed_recording_is_not_read(tmp_path):
    source = recording(write_video(tmp_path / "ir.mkv", thermal(2), "ffv1", "gray16le", "gray16le"))
    with pytest.raises(SourceError, match="closed"):
        source.grab()
    source.open()
    source.close(), source.close()
    with pytest.raises(SourceError, match="closed"):
        source.grab()


# Folders of images


def test_images_come_in_natural_name_order(tmp_path):
    for name in ["frame10.png", "frame2.png", "Frame1.PNG", ".hidden.png", "frame2.txt", "frame010.png"]:
        (tmp_path / name).write_bytes(b"x")
    names = [file.name for file in image_files(tmp_path)]
    assert names == ["Frame1.PNG", "frame2.png", "frame010.png", "frame10.png"]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_images_stay_sixteen_bit(tmp_path, suffix):
    images = thermal(3)
    for k, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{k}.{suffix}"), image)
    frames = read_all(ImageFolder(FolderSource(path=str(tmp_path), rate_hz=30, realtime=False), "infrared"))
    assert all(np.array_equal(frame.image, image) for frame, image in zip(frames, images, strict=True))
    assert {frame.bits for frame in frames} == {16}
    assert [frame.captured_ns for frame in frames] == [0, 33_333_333, 66_666_667]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_colour_images_are_rgb_for_the_visible_camera_and_grey_for_the_infrared(tmp_path, suffix):
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), np.full((48, 64, 3), (200, 120, 10), np.uint8))  # OpenCV: blue first
    config = FolderSource(path=str(tmp_path), realtime=False)
    (visible,) = read_all(open_source(config, "visible"))
    assert np.abs(visible.image[24, 32].astype(int) - (10, 120, 200)).max() <= 4
    (infrared,) = read_all(open_source(config, "infrared"))
    assert infrared.image.shape == (48, 64)
    assert infrared.bits == 8


def test_a_folder_that_loops_goes_on_in_number_and_time(tmp_path):
    for k in range(2):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((48, 64), k, np.uint8))
    source = ImageFolder(FolderSource(path=str(tmp_path), loop=True, realtime=False), "infrared")
    source.open()
    frames = [source.grab() for _ in range(5)]
    assert [int(frame.image[0, 0]) for frame in frames] == [0, 1, 0, 1, 0]
    assert [frame.captured_ns // MS for frame in frames] == [0, 40, 80, 120, 160]


def test_folder_mistakes_are_one_clear_line_each(tmp_path):
    def failure(path: Path) -> str:
        with pytest.raises(SourceError) as caught:
            read_all(ImageFolder(FolderSource(path=str(path), realtime=False), "infrared"))
        assert type(caught.value) is SourceError
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no images" in failure(tmp_path)
    assert "there is no folder" in failure(tmp_path / "nowhere")
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert "0.png cannot be decoded" in failure(tmp_path)
    assert "is a file" in failure(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes(b"")
    assert "0.png cannot be decoded" in failure(tmp_path)
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((48, 64), np.uint8))
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((48, 65), np.uint8))
    assert "65x48 pixels, but the images before it 64x48" in failure(tmp_path)
    (tmp_path / "0.png").unlink(), (tmp_path / "1.png").unlink()
    cv2.imwrite(str(tmp_path / "0.tiff"), np.zeros((48, 64), np.float32))
    assert "8 or 16 bits" in failure(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path):
    """A small file that would become 36 megapixels."""
    cv2.imwrite(str(tmp_path / "bomb.png"), np.zeros((6000, 6000), np.uint8))
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    # In a fresh interpreter: OpenCV reads its limit when it is imported, and this test has imported it already.
    program = (
        "import sys, pathlib, pipeline.sources.folder as folder\n"
        "try: folder.read_image(pathlib.Path(sys.argv[1]), 'infrared')\n"
        "except folder.SourceError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "bomb.png")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert "larger than 33554432 pixels" in said.stdout, said.stderr


# Devices: there is none on a test machine, so what surrounds it is tested


def test_a_missing_device_is_one_clear_line():
    with pytest.raises(SourceError, match="there is no device /dev/video99: is the camera plugged in"):
        open_source(DeviceSource(path="/dev/video99"), "infrared").open()


def test_a_file_that_is_no_device_is_one_clear_line(tmp_path):
    (tmp_path / "video0").write_bytes(b"no device")
    source = DeviceCamera(DeviceSource(path=str(tmp_path / "video0"), pixel_format="gray16le", width=640), "infrared")
    with pytest.raises(SourceError, match="cannot be read as a camera with gray16le, 640") as caught:
        source.open()
    assert "\n" not in str(caught.value)
    source.close()


def test_a_device_that_may_not_be_used_names_the_group(tmp_path, monkeypatch):
    (tmp_path / "video0").touch()
    monkeypatch.setattr("os.access", lambda *_args: False)
    with pytest.raises(SourceError, match="add this user to the group 'video'"):
        DeviceCamera(DeviceSource(path=str(tmp_path / "video0")), "visible").open()


def test_device_settings_become_driver_options():
    config = DeviceSource(pixel_format="gray16le", width=640, height=512, rate_hz=29.97)
    options = device_options(config)
    assert options["input_format"] == "gray16le"
    assert options["video_size"] == "640x512"
    assert Fraction(options["framerate"]) == Fraction(2997, 100)
    assert set(device_options(DeviceSource())) == {"timestamps"}


def test_a_sixteen_bit_device_picture_keeps_its_counts_and_the_drivers_time(tmp_path):
    """A thermal core's gray16le, through the lossless codec and the device's own conversion."""
    path = write_video(tmp_path / "ir.mkv", thermal(1), "ffv1", "gray16le", "gray16le")
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0))
    wall_offset = 1_700_000_000 * 10**9
    now = 5_000_000 * MS
    picture.pts, picture.time_base = (wall_offset + now - 12 * MS) // 1000, Fraction(1, 10**6)
    frame = device_frame(picture, "infrared", 3, now, wall_offset)
    assert np.array_equal(frame.image, thermal(1)[0])
    assert (frame.captured_ns, frame.clock, frame.index) == (now - 12 * MS, "driver", 3)


@pytest.mark.parametrize("wall_us", [None, 0, 10**18])
def test_a_device_without_a_plausible_time_is_stamped_with_its_arrival(wall_us):
    captured_ns, clock, _ = driver_time(wall_us, 10**12, 1_700_000_000 * 10**9)
    assert (captured_ns, clock) == (10**12, "arrival")


class UsbCamera:
    """What FFmpeg gives of a V4L2 device: JPEGs, of which `damaged` says how each one arrives."""

    def __init__(self, path: Path, damaged: Callable[[int], str], pause_s: float = 0.0) -> None:
        write_video(path, colours(4), "mjpeg", "yuvj420p", "rgb24")
        self._file, self._damaged, self._pause_s = av.open(str(path)), damaged, pause_s
        self.streams = self._file.streams
        self.closed = threading.Event()

    def demux(self, stream):
        good = [packet for packet in self._file.demux(stream) if packet.size]
        for number in itertools.count():
            time.sleep(self._pause_s)
            packet = good[number % len(good)]
            how = self._damaged(number)
            if how == "cut off":
                packet = av.Packet(b"\xff\xd8\xff\xe0 no picture")
            elif how == "empty":  # as FFmpeg hands out a buffer that the driver has flagged
                packet = av.Packet()
            if how == "unplugged":
                yield av.Packet()
                return
            packet.stream, packet.pts = stream, number
            yield packet

    def close(self) -> None:
        self.closed.set()


def usb_camera(tmp_path: Path, monkeypatch, damaged: Callable[[int], str], pause_s: float = 0.0) -> DeviceCamera:
    container = UsbCamera(tmp_path / "usb.avi", damaged, pause_s)
    (tmp_path / "video0").touch()
    monkeypatch.setattr("pipeline.sources.device.av.open", lambda *_args, **_options: container)
    source = DeviceCamera(DeviceSource(path=str(tmp_path / "video0")), "visible")
    source.open()
    return source


@pytest.mark.parametrize("damage", ["cut off", "empty"])
def test_a_device_picture_that_cannot_be_decoded_leaves_a_gap_in_the_numbers(tmp_path, monkeypatch, damage):
    source = usb_camera(tmp_path, monkeypatch, lambda number: damage if number in (2, 3, 5) else "")
    assert [source.grab().index for _ in range(5)] == [0, 1, 4, 6, 7]
    source.close()


def test_a_device_whose_pictures_all_are_damaged_is_an_error_after_the_read_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.device.READ_TIMEOUT_S", 0.3)
    source = usb_camera(tmp_path, monkeypatch, lambda _: "cut off", pause_s=0.01)
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"sent no whole picture for 0\.3 s: is its cable good"):
        source.grab()
    assert time.monotonic() - started < 5  # 0.3 s, and some for a busy machine
    source.close()


def test_a_device_whose_pictures_all_are_damaged_can_be_closed_from_another_thread(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.device.READ_TIMEOUT_S", 30.0)
    source = usb_camera(tmp_path, monkeypatch, lambda _: "cut off", pause_s=0.01)
    closer = threading.Timer(0.2, source.close)
    closer.start()
    with pytest.raises(SourceError, match="was closed while it was read"):
        source.grab()
    closer.join()
    assert source._container is None


def test_a_device_that_is_unplugged_says_so(tmp_path, monkeypatch):
    source = usb_camera(tmp_path, monkeypatch, lambda number: "unplugged" if number == 2 else "")
    source.grab(), source.grab()
    with pytest.raises(SourceError, match="is gone: was the camera unplugged"):
        source.grab()
    source.close()


# Which source


def test_a_configuration_opens_its_kind_of_source(tmp_path):
    assert isinstance(open_source(StreamSource(url="rtsp://camera/ir"), "infrared"), StreamCamera)
    assert isinstance(open_source(DeviceSource(), "visible"), DeviceCamera)
    assert isinstance(open_source(FolderSource(path=str(tmp_path)), "visible"), ImageFolder)
    assert open_source(StreamSource(url="rtsp://camera/ir"), "infrared").live
    assert not open_source(StreamSource(url=str(tmp_path / "a.mp4")), "infrared").live
    source = open_source(SyntheticSource(width=64, height=64, frames=2, realtime=False), "infrared")
    assert len(read_all(source)) == 2


# Passwords


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://admin:s3cret@10.0.0.5/main",
        "Did you mean file:rtsp://admin:s3c@ret:s3cret@10.0.0.5/main ?",
        "open 'rtsps://admin:s3cret@h:322/x' failed; retry rtsp://s3cret@h/",
        "http://h/snap?user=admin&password=s3cret&channel=1",
        "rtsp:/admin:s3cret@10.0.0.5/main does not exist",  # as a path that was made of it shows it
        "rtsp://h:554/user=admin_password=s3cret_channel=1_stream=0.sdp?real_stream",
        "rtsp://h:554/user=admin&password=s3cret&channel=1",
    ],
)
def test_credentials_are_cut_out_of_any_url(text):
    assert "s3cret" not in redact(text)
    assert "admin" not in redact(text)
    assert "***" in redact(text)


def test_text_without_credentials_is_left_alone():
    for text in ("rtsp://10.0.0.5:8554/ir?channel=1", "40 frames @ 25 Hz", "mail a@b.c", ""):
        assert redact(text) == text


def test_a_known_secret_is_cut_out_in_all_its_spellings():
    secrets = secrets_of("rtsp://user:p%40ss%2Fword@h/x")
    for spelling in ("p%40ss%2Fword", "p@ss/word", "p%40ss/word"):
        assert spelling not in redact(f"method DESCRIBE failed for {spelling}: 401", secrets)


def test_log_records_lose_their_credentials_with_arguments_and_tracebacks(caplog):
    handler = logging.Handler()
    lines: list[str] = []
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    handler.addFilter(RedactingFilter())
    logger = logging.getLogger("test.redaction")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        raise OSError("rtsp://admin:s3cret@h/x")
    except OSError:
        logger.exception("cannot open %s", "rtsp://admin:s3cret@h/x")
    finally:
        logger.removeHandler(handler)
    assert "cannot open rtsp://***@h/x" in lines[0]
    assert "Traceback" in lines[0]
    assert "s3cret" not in lines[0]


@pytest.mark.parametrize("source", [StreamSource(url="~/ir.mkv"), FolderSource(path="~/ir")])
def test_a_tilde_of_a_user_without_a_home_is_one_clear_line(monkeypatch, source):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    with pytest.raises(SourceError, match=r"there is no (file|folder) ~/ir"):
        open_source(source, "infrared").open()


# Recordings that were cut off


def recordings_to_cut(folder: Path) -> dict[str, Path]:
    """Whole recordings of 40 frames in all containers, each frame different from the one before."""
    settings: dict[str, dict] = {
        "ffv1.mkv": {"codec": "ffv1"},
        "h264.mkv": {"codec": "libx264", "options": {"g": "8"}},
        "reordered.mkv": {"codec": "libx264", "options": {"g": "8", "bf": "3"}},
        "front.mp4": {"codec": "libx264", "options": {"g": "8"}, "container": {"movflags": "faststart"}},
        "fragments.mp4": {
            "codec": "libx264", "options": {"g": "8"}, "container": {"movflags": "frag_keyframe+empty_moov"},
        },
        "ffv1.avi": {"codec": "ffv1"},
    }  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 255, (96, 300, 3), np.uint8)
    for name, given in settings.items():
        with av.open(str(folder / name), "w", options=given.get("container", {})) as container:
            stream = container.add_stream(given["codec"], rate=25, options=given.get("options", {}))
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for index in range(40):
                moved = np.ascontiguousarray(noise[:, 4 * index : 4 * index + 128])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
            container.mux(stream.encode(None))
    return {name: folder / name for name in settings}


def test_a_recording_that_was_cut_off_is_read_as_far_as_it_goes_and_what_is_lost_is_told(tmp_path, caplog):
    for name, path in recordings_to_cut(tmp_path).items():
        source = recording(path, "visible")
        assert (len(read_all(source)), source.unreadable, source.fault) == (40, 0, None), name
        for share in (0.5, 0.8, 0.97):
            cut = path.with_name(f"cut_{name}")
            cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
            source = recording(cut, "visible")
            caplog.clear()
            frames = len(read_all(source))
            assert 40 * share - 10 <= frames < 40, (name, share)
            if "fragments" in name:  # each tells of itself only
                assert 0 < source.unreadable <= 40 - frames
            else:
                assert frames + source.unreadable == 40, (name, share)
            assert f"{source.unreadable} of its frames could not be read" in source.fault
            assert f"cut_{name} is cut off" in source.fault
            assert "damaged" not in source.fault
            assert [record.getMessage() for record in caplog.records] == [source.fault]


def test_a_recording_that_loops_tells_once_that_it_was_cut_off(tmp_path, caplog):
    path = recordings_to_cut(tmp_path)["ffv1.mkv"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    source = recording(path, loop=True)
    source.open()
    frames = [source.grab() for _ in range(25)]
    source.close()
    assert [frame.index for frame in frames] == list(range(25))
    assert len(caplog.records) == 1
    assert source.fault == caplog.records[0].getMessage()
