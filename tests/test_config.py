"""A configuration is checked whole before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import EngineConfig, RigConfig, StreamSource, load_config
from pipeline.errors import ConfigError

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
SYNTHETIC = "infrared: {kind: synthetic}\nvisible: {kind: synthetic}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "rig.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["demo", "rtsp_rig", "replay", "perception"])
def test_every_example_is_valid(name: str, monkeypatch: pytest.MonkeyPatch):
    for variable in ("IR_CAMERA_USER", "IR_CAMERA_PASSWORD", "VIS_CAMERA_USER", "VIS_CAMERA_PASSWORD"):
        monkeypatch.setenv(variable, "x")
    path = next(path for path in EXAMPLES if path.stem == name)
    assert isinstance(load_config(path), RigConfig)


def test_an_unknown_key_is_refused_with_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"sync\.max_skew: unknown key"):
        load_config(written(tmp_path, SYNTHETIC + "sync: {max_skew: 3}\n"))


def test_an_impossible_value_is_refused_with_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"infrared\.rate_hz"):
        load_config(written(tmp_path, "infrared: {kind: synthetic, rate_hz: -1}\nvisible: {kind: synthetic}\n"))


def test_a_secret_comes_from_the_environment_and_its_absence_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(
        tmp_path, 'infrared: {kind: stream, url: "rtsp://u:${env:SECRET}@h/ir"}\nvisible: {kind: synthetic}\n'
    )
    monkeypatch.setenv("SECRET", "pass")
    source = load_config(path).infrared
    assert isinstance(source, StreamSource)
    assert source.url == "rtsp://u:pass@h/ir"
    monkeypatch.delenv("SECRET")
    with pytest.raises(ConfigError, match="environment variable SECRET"):
        load_config(path)


def test_an_error_never_repeats_a_value(tmp_path: Path):
    text = 'infrared: {kind: stream, url: "rtsp://u:canary@h/ir", transport: canary}\nvisible: {kind: synthetic}\n'
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, text))
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("- a\n- b\n", "expected keys"), ("a: [1,\n", "not valid YAML"), ("rig: 'No Capitals'\n" + SYNTHETIC, "rig:")],
)
def test_what_is_no_configuration_gets_one_line(tmp_path: Path, content: str, complaint: str):
    with pytest.raises(ConfigError, match=complaint) as raised:
        load_config(written(tmp_path, content))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")


def test_relative_paths_are_taken_from_the_files_own_folder(tmp_path: Path):
    config = load_config(written(tmp_path, "infrared: {kind: folder, path: ir}\nvisible: {kind: folder, path: vis}\n"))
    assert config.infrared.path == str(tmp_path / "ir")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x: 2024-13-45", "not valid YAML"),
        ("a: &a [*a]", "nested too deeply, or into itself|unknown key"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
        ("infrared: {kind: synthetic}\nvisible: {kind: synthetic}\nsync: {max_skew_ms: .inf}", "sync.max_skew_ms"),
    ],
    ids=["a date that is none", "a list in itself", "5000 brackets", "an infinite number"],
)
def test_strange_yaml_is_one_line(tmp_path: Path, text: str, complaint: str):
    path = tmp_path / "rig.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as raised:
        load_config(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "infrared: {kind: device}\nvisible: {kind: device, rate_hz: 30}\n",
            "same device: give each camera its own path",
        ),
        (
            "infrared: {kind: stream, url: 'rtsp://h/1'}\n"
            "visible: {kind: stream, url: 'rtsp://h/1', read_timeout_s: 5}\n",
            "same stream: give each camera its own url",
        ),
        ("infrared: {kind: folder, path: a}\nvisible: {kind: folder, path: ./b/../a, rate_hz: 5}\n", "same folder"),
        ("infrared: {kind: synthetic, realtime: false}\nvisible: {kind: synthetic}\n", "infrared.realtime is false"),
        (
            "infrared: {kind: folder, path: a}\nvisible: {kind: folder, path: b, realtime: false}\n",
            "visible.realtime is false, .* remove it; `dspfusion replay` fuses recordings at any rate",
        ),
        (SYNTHETIC + "viewer: {enabled: true}\npublish: {endpoint: ''}\n", "publish.endpoint is empty: give one"),
        (SYNTHETIC + "output: {video: a/b.mp4, report: a/../a/b.mp4}\n", "output: video and report are the same file"),
    ],
)
def test_what_cannot_work_together_is_refused_with_what_to_do(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(ConfigError, match=complaint) as raised:
        load_config(written(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_two_names_of_one_device_are_one_device(tmp_path: Path):
    (tmp_path / "by-id").symlink_to("/dev/video7")
    text = f"infrared: {{kind: device, path: {tmp_path}/by-id}}\nvisible: {{kind: device, path: /dev/video7}}\n"
    with pytest.raises(ConfigError, match="same device"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "rig.local", ""])
def test_a_viewer_for_other_machines_is_served_only_where_that_is_said(tmp_path: Path, host: str):
    """The rig may be encrypted: the viewer is given a key of its own, and its page asks for none."""
    text = SYNTHETIC + f"viewer: {{enabled: true, host: '{host}'}}\n"
    with pytest.raises(ConfigError, match=r"viewer: host can be reached from other machines.*set public: true"):
        load_config(written(tmp_path, text))
    for change in (("enabled: true", "enabled: true, public: true"), ("enabled: true", "enabled: false")):
        assert load_config(written(tmp_path, text.replace(*change))).viewer.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_a_viewer_for_this_machine_needs_no_permission(tmp_path: Path, host: str):
    assert load_config(written(tmp_path, SYNTHETIC + f"viewer: {{enabled: true, host: '{host}'}}\n")).viewer.enabled


def test_a_device_is_no_configuration():
    with pytest.raises(ConfigError, match="no file"):
        load_config("/dev/zero")


def test_files_that_are_read_lie_beside_the_configuration(tmp_path: Path):
    path = tmp_path / "rig.yaml"
    path.write_text(
        "infrared: {kind: folder, path: ir}\nvisible: {kind: stream, url: vis.mkv}\n"
        "registration: {calibration: rig_file.yaml}\nengine: {weights: mine.safetensors}\n"
        "publish: {curve_secret_key_file: secret.key, authorized_keys_dir: /etc/keys}\noutput: {video: fused.mp4}\n"
    )
    config = load_config(path)
    assert (config.infrared.path, config.visible.url) == (str(tmp_path / "ir"), str(tmp_path / "vis.mkv"))
    assert config.registration.calibration == str(tmp_path / "rig_file.yaml")
    assert config.engine.weights == str(tmp_path / "mine.safetensors")
    assert config.publish.curve_secret_key_file == str(tmp_path / "secret.key")
    assert config.publish.authorized_keys_dir == "/etc/keys"
    assert config.output.video == "fused.mp4"  # written where the user stands


def test_a_range_of_sizes_is_checked_with_the_rest():
    assert EngineConfig(sizes="320x240-640x480-1280x720").sizes == "320x240-640x480-1280x720"
    with pytest.raises(ValidationError, match="SMALLEST-USUAL-LARGEST"):
        EngineConfig(sizes="640x480")
    with pytest.raises(ValidationError, match="are no range"):
        EngineConfig(sizes="640x480-320x240-1280x720")
