"""A configuration is checked whole before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from calibration.strict_yaml import load_yaml
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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SYNTHETIC + "sync: {max_skew_ms: 5}\nsteady: {}\nsync: {hold_ms: 1}\n", "line 5: the key sync is there twice"),
        (SYNTHETIC + "sync:\n  hold_ms: 1\n  hold_ms: 2\n", "line 5: the key hold_ms is there twice"),
        (SYNTHETIC + "sync: {hold_ms: 1, 'hold_ms': 2}\n", "line 3: the key hold_ms is there twice"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(ConfigError, match=f"rig.yaml {complaint}: keep one"):
        load_config(written(tmp_path, text))


def test_sections_may_be_merged_and_what_they_say_themselves_counts(tmp_path: Path):
    text = (
        "infrared: &night {kind: synthetic, scene: night, seed: 3, width: 64}\n"
        "visible: {<<: *night, width: 128}\n"
        "steady: &half {share: 0.5}\n"
    )
    config = load_config(written(tmp_path, text))
    assert (config.infrared.seed, config.infrared.width) == (3, 64)  # type: ignore[union-attr]
    assert (config.visible.seed, config.visible.width) == (3, 128)  # type: ignore[union-attr]


def test_a_mapping_may_be_merged_that_merges_another_one_itself():
    text = "a:\n  b: {c: &small {<<: &tiny {x: 1, y: 1}, x: 2}}\nd: {<<: [*small, *tiny], x: 3}\n"
    assert load_yaml(text) == {"a": {"b": {"c": {"x": 2, "y": 1}}}, "d": {"x": 3, "y": 1}}


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 3), ("utf-16", 1), ("utf-16-le", 1)])
def test_a_file_in_another_encoding_is_told_so(tmp_path: Path, encoding: str, line: int):
    path = tmp_path / "rig.yaml"
    path.write_bytes((SYNTHETIC + "# für die Kamera\n").encode(encoding))
    with pytest.raises(ConfigError, match=f"rig.yaml line {line}: not UTF-8 text: save it as UTF-8"):
        load_config(path)


def test_the_mark_that_some_editors_begin_utf_8_with_is_no_fault(tmp_path: Path):
    path = tmp_path / "rig.yaml"
    path.write_bytes((SYNTHETIC + "# für die Kamera\n").encode("utf-8-sig"))
    assert load_config(path).infrared.kind == "synthetic"


CUT = "the user or password has a / ? or #: write it as %2F %3F %23"


@pytest.mark.parametrize("password", ["can/ary", "1/canary", "canary?", "#canary"])
@pytest.mark.parametrize("user", ["admin", "${env:IR_PW}"])
def test_a_password_that_would_end_the_host_is_refused_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str, user: str
):
    monkeypatch.setenv("IR_PW", password)
    text = f"infrared: {{kind: stream, url: 'rtsp://{user}:${{env:IR_PW}}@host:554/x'}}\nvisible: {{kind: synthetic}}\n"
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, text))
    assert str(raised.value) == f"infrared.url: the environment variable IR_PW: {CUT}"


@pytest.mark.parametrize(
    "url", ["rtsp://admin:can/ary@host/x", "rtsps://admin:can?ary@host", "rtsp://a:canary#1@[::1]/x"]
)
def test_a_password_in_the_file_that_would_end_the_host_is_refused_and_never_shown(tmp_path: Path, url: str):
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, f"infrared: {{kind: stream, url: '{url}'}}\nvisible: {{kind: synthetic}}\n"))
    assert str(raised.value) == f"rig.yaml: infrared.url: {CUT}"


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://admin:a%2Fb@host/x",
        "rtsp://admin:p@ss@host/x",
        "rtsp://${env:IR_PW}:x@host/x",
        "rtsp://host:554/user=admin&password=${env:PATH_PW}@1",
        "rtsp://[::1]:554/camera@1",
        "rtsp://[::1]/camera@1",
        "udp://@239.0.0.1:5000?fifo=1",
        "recordings/camera:1/a@b.mkv",
    ],
)
def test_addresses_with_an_at_sign_elsewhere_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("IR_PW", "a${b}")
    monkeypatch.setenv("PATH_PW", "a/b")
    text = f"infrared: {{kind: stream, url: '{url}'}}\nvisible: {{kind: synthetic}}\n"
    assert isinstance(load_config(written(tmp_path, text)).infrared, StreamSource)


@pytest.mark.parametrize("value", ["${env:IR-PW}", "${NOPE}", "${env:}", "rtsp://u:${env:OK}${env:1}@h/x", "${env:OK"])
def test_what_looks_like_a_variable_and_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("OK", "canary")
    text = f"infrared: {{kind: stream, url: '{value}'}}\nvisible: {{kind: synthetic}}\n"
    with pytest.raises(ConfigError, match=r"infrared\.url: .* write \$\{env:NAME\}") as raised:
        load_config(written(tmp_path, text))
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize("source", ["{url: ir.mkv}", "{kind: rtsp, url: x}"])
def test_a_source_without_its_kind_is_told_which_there_are(tmp_path: Path, source: str):
    with pytest.raises(ConfigError, match="infrared: write kind: stream, device, folder or synthetic"):
        load_config(written(tmp_path, f"infrared: {source}\nvisible: {{kind: synthetic}}\n"))


@pytest.mark.parametrize("source", ["{kind: stream, url: ''}", "{kind: folder, path: ''}", "{kind: device, path: ''}"])
def test_an_empty_address_does_not_become_the_folder_of_the_configuration(tmp_path: Path, source: str):
    with pytest.raises(ConfigError, match=r"infrared\.(url|path): nothing is written there: give one"):
        load_config(written(tmp_path, f"infrared: {source}\nvisible: {{kind: synthetic}}\n"))


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
