"""The viewer: what it serves, to whom, and what a real browser shows of it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from rigs.engines import MaximumEngine
from rigs.publishing import feeding, fused_frame, publishing, wait_until

from engines.base import EngineDescription
from pipeline.cli import viewer_of
from pipeline.config import PublishConfig, RigConfig, SyntheticSource, ViewerConfig
from pipeline.live import LivePipeline
from pipeline.publish import PublishContext, create_keys
from pipeline.viewer.server import Viewer, ViewerError, _host_allowed, run

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).resolve().parent.parent


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def connected(url: str, talk, **headers: str):
    """What `talk(socket)` returns, over a WebSocket of the viewer."""
    address = url.replace("http", "ws") + "ws"
    async with aiohttp.ClientSession() as session, session.ws_connect(address, headers=headers) as websocket:
        return await talk(websocket)


def over_websocket(url: str, talk, **headers: str):
    """Talks in a thread of its own: while a browser is open, its driver's event loop runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, asyncio.wait_for(connected(url, talk, **headers), timeout=60)).result()


def parse(packet: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<I", packet)
    return json.loads(packet[4 : 4 + length]), packet[4 + length :]


# -- the server ---------------------------------------------------------------------------------------------------


def test_the_page_and_its_parts_are_served_and_nothing_from_elsewhere_is_asked_for():
    with publishing() as publisher, Viewer(publisher.endpoint, port=0) as viewer:
        for path in ("", "viewer.js", "viewer.css", "icon.svg"):
            status, text = get(viewer.url + path)
            assert status == 200
            assert not re.search(r"(src|href|url)\W{1,2}(https?:)?//", text)
        assert get(viewer.url + "server.py")[0] == 404


def test_healthz_tells_whether_the_rig_is_heard():
    with publishing() as publisher, Viewer(publisher.endpoint, port=0) as viewer:
        wait_until(lambda: get(viewer.url + "healthz")[0] == 200)
        told = json.loads(get(viewer.url + "healthz")[1])
        assert (told["rig"], told["problem"]) == ("car", None)
    with Viewer("tcp://127.0.0.1:9", port=0) as viewer:
        status, text = get(viewer.url + "healthz")
        assert (status, json.loads(text)["status"]) == (503, "no_signal")


async def first_picture(websocket):
    while True:
        packet = await websocket.receive()
        if packet.type == aiohttp.WSMsgType.BINARY:
            return parse(packet.data)


def test_pictures_are_encoded_only_while_a_page_is_open():
    with publishing() as publisher, feeding(publisher), Viewer(publisher.endpoint, port=0, rig="car") as viewer:
        wait_until(lambda: get(viewer.url + "healthz")[0] == 200)
        assert "jpeg" not in publisher.statistics()["encoded"]
        facts, jpeg = over_websocket(viewer.url, first_picture)
        assert facts["mode"] == "fused"
        assert facts["degradation"]["visible"]["low_light"] == 0.75
        assert jpeg.startswith(b"\xff\xd8")
        wait_until(lambda: not any("jpeg" in prefix for prefix in publisher.statistics()["subscriptions"]))
        assert "pictures_sent_total" in get(viewer.url + "metrics")[1]


def test_the_viewer_of_an_encrypted_rig_shows_it_and_leaves_no_key_behind(tmp_path, monkeypatch):
    config = RigConfig(
        rig="car",
        infrared=SyntheticSource(width=160, height=128),
        visible=SyntheticSource(width=160, height=120),
        publish=PublishConfig(
            endpoint="tcp://0.0.0.0:*",
            curve_secret_key_file=str(create_keys(tmp_path / "server", "server")[1]),
            authorized_keys_dir=str(create_keys(tmp_path / "known", "friend")[0].parent),
        ),
        viewer=ViewerConfig(enabled=True, port=0),
    )
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    pipeline = LivePipeline(config, engine=MaximumEngine())
    running = threading.Thread(target=pipeline.run, args=(100,))
    running.start()
    try:
        with viewer_of(config, pipeline) as address:
            assert not list((tmp_path / "temporary").iterdir())
            facts, jpeg = over_websocket(address, first_picture)
        assert (facts["rig"], jpeg[:2]) == ("car", b"\xff\xd8")
    finally:
        pipeline.stop()
        running.join(10)


def encrypted(made: dict[str, tuple[Path, Path]]) -> PublishConfig:
    """A publisher that knows its friend alone, by the keys that were made."""
    return PublishConfig(
        endpoint="tcp://127.0.0.1:*",
        curve_secret_key_file=str(made["server"][1]),
        authorized_keys_dir=str(made["friend"][0].parent),
    )


@pytest.mark.parametrize(
    ("own_key", "why"),
    [(None, "do not agree on keys: check server_key"), ("stranger", "does not know this client's key")],
)
def test_keys_that_the_rig_refuses_are_explained_on_the_page_in_healthz_and_once_in_the_log(
    tmp_path, caplog, own_key, why
):
    made = {name: create_keys(tmp_path / name, name) for name in ("server", "friend", "stranger")}
    keys = {} if own_key is None else {"server_key": made["server"][0], "secret_key": made[own_key][1]}

    async def problem(websocket):
        while True:
            packet = await websocket.receive()
            if packet.type == aiohttp.WSMsgType.TEXT and json.loads(packet.data).get("problem"):
                return json.loads(packet.data)

    with publishing(encrypted(made)) as publisher, Viewer(publisher.endpoint, port=0, **keys) as viewer:
        state = over_websocket(viewer.url, problem)
        status, text = get(viewer.url + "healthz")
        time.sleep(2)  # it tries again, and is refused again
    assert state["type"] == "state"
    assert why in state["problem"]
    assert (status, json.loads(text)["problem"]) == (503, state["problem"])
    told = [record.getMessage() for record in caplog.records if record.name == "pipeline.viewer.server"]
    assert told == [f"nothing can be shown: {state['problem']}"]


def test_a_page_that_draws_slowly_gets_fewer_pictures_and_newer_ones():
    async def slow(websocket):
        seen: list[int] = []
        while len(seen) < 10:
            packet = await websocket.receive()
            if packet.type != aiohttp.WSMsgType.BINARY:
                continue
            facts, _ = parse(packet.data)
            if facts["stream"] != "fused":
                await websocket.send_json({"ack": facts["stream"]})
                continue
            seen.append(facts["sequence"])
            if len(seen) == 2:  # two are under way: without an answer no third comes
                await asyncio.sleep(0.5)
                await websocket.send_json({"ack": "fused"})
                await websocket.send_json({"ack": "fused"})
            elif len(seen) > 2:
                await websocket.send_json({"ack": "fused"})
        return seen

    with publishing() as publisher, feeding(publisher, rate_hz=40), Viewer(publisher.endpoint, port=0) as viewer:
        seen = over_websocket(viewer.url, slow)
    assert seen[2] - seen[1] >= 8  # about 20 pictures were replaced meanwhile
    assert seen == sorted(set(seen))


def test_only_our_own_page_may_connect():
    async def nothing(websocket):
        return True

    with publishing() as publisher, Viewer(publisher.endpoint, port=0) as viewer:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            over_websocket(viewer.url, nothing, Origin="http://evil.example")
        assert caught.value.status == 403
        assert over_websocket(viewer.url, nothing, Origin=viewer.url.rstrip("/"))
        assert get(viewer.url, Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8870", True),
        ("localhost", True),
        ("[::1]:8870", True),
        ("rig.local:8870", True),
        ("rig.local.evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_host_names_are_compared_as_a_whole(host, allowed):
    assert _host_allowed(host, "rig.local") is allowed


@pytest.mark.parametrize("nonsense", ["not json", "[]", "{}", '{"ack": "mask"}', '{"ping": "x"}', "[" * 4000, "7"])
def test_a_page_that_talks_nonsense_is_hung_up_on(nonsense):
    async def talk(websocket):
        await websocket.send_str(nonsense)
        while not websocket.closed:
            await websocket.receive()
        return True

    with publishing() as publisher, Viewer(publisher.endpoint, port=0) as viewer:
        assert over_websocket(viewer.url, talk)


def test_a_port_in_use_is_one_clear_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ViewerError, match=rf"127\.0\.0\.1:{port}.*choose another viewer\.port"):
            Viewer("tcp://127.0.0.1:5560", port=port).start()


@pytest.mark.parametrize("host", ["300.1.1.1", "192.0.2.7", "x" * 70 + ".local"])
def test_a_host_that_is_not_this_machine_is_one_line_that_does_not_blame_the_port(host: str):
    with pytest.raises(ViewerError, match=r"viewer\.host.*address") as raised:
        Viewer("tcp://127.0.0.1:5560", host=host, port=0).start()
    assert "viewer.port" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_stops_quickly_with_a_page_connected_and_can_be_run_for_a_while():
    there = threading.Event()

    async def until_closed(websocket):
        there.set()
        while not websocket.closed:
            await websocket.receive()
        return True

    with publishing() as publisher:
        viewer = Viewer(publisher.endpoint, port=0)
        viewer.start()
        threading.Thread(target=lambda: there.wait(60) and viewer.stop()).start()
        assert over_websocket(viewer.url, until_closed)
        started = time.monotonic()
        viewer.stop()
        assert time.monotonic() - started < 5
        urls: list[str] = []
        run(publisher.endpoint, port=0, duration_s=0.2, on_ready=urls.append)
        assert urls[0].startswith("http://127.0.0.1:")


# -- the page, in a real browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs the browser driver: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments, timeout=90_000)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(40_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    yield page
    page.close()
    assert problems == []


def pixel(page, canvas: str) -> np.ndarray:
    """The colour in the middle of a canvas."""
    script = """id => { const c = document.getElementById(id);
        return [...c.getContext("2d").getImageData(c.width >> 1, c.height >> 1, 1, 1).data].slice(0, 3); }"""
    return np.array(page.evaluate(script, canvas))


def text_of(page, selector: str) -> str:
    return page.locator(selector).inner_text()


def shows(page, look) -> None:
    """Waits until the page passes `look`: on a busy machine a picture may be late, and the page then says so."""
    for _ in range(100):
        try:
            return look()
        except AssertionError:
            page.wait_for_timeout(200)
    look()


@pytest.mark.needs_chromium
def test_the_page_shows_the_pictures_the_mode_the_figures_and_what_the_model_perceives(page):
    frame_color = (200, 40, 60)
    context = PublishContext(EngineDescription("openvino", "bf16", "nano", "", "ab" * 32))
    with (
        publishing() as publisher,
        feeding(publisher, lambda i: fused_frame(i, color=frame_color, age_ms=20), 25, context),
        Viewer(publisher.endpoint, port=0) as viewer,
    ):
        page.goto(viewer.url)
        page.wait_for_selector("#mode[data-mode=fused]")
        page.wait_for_selector('.tile[data-stream="ir"].live')
        page.wait_for_selector('.tile[data-stream="vis"].live')

        def all_is_told() -> None:
            assert np.abs(pixel(page, "fused") - frame_color).max() <= 6
            assert np.abs(pixel(page, "visible") - np.array(frame_color) // 2).max() <= 6
            assert np.abs(pixel(page, "infrared") - 120).max() <= 4
            assert text_of(page, "#mode") == "fused"
            assert text_of(page, "#rig") == "car"
            latency, fps = text_of(page, "#latency"), text_of(page, "#fps")
            assert latency.isdigit()
            assert 5 <= int(latency) < 1000  # 20, less the error of the clock comparison
            assert fps.replace(".", "").isdigit()
            assert 3 < float(fps) < 60
            assert text_of(page, "#degradation-visible [data-kind=low_light]").split() == ["low", "light", "75", "%"]
            assert "strong" in page.locator("#degradation-visible [data-kind=low_light]").get_attribute("class")
            assert text_of(page, "#degradation-infrared [data-kind=none]").split() == ["clear", "100", "%"]
            assert "nano, openvino, bf16" in text_of(page, "#facts")
            assert "rtcp_ntp ± 1.5 ms" in text_of(page, "#facts")
            assert "fuse17.5" in text_of(page, "#legend").replace(" ", "").replace("\n", "")
            assert text_of(page, "#connection") == "connected"

        shows(page, all_is_told)


@pytest.mark.needs_chromium
def test_a_lost_camera_a_silent_rig_and_a_gone_viewer_never_look_live(page):
    with publishing() as publisher, Viewer(publisher.endpoint, port=0) as viewer:
        page.goto(viewer.url)
        assert text_of(page, "#mode") == "no signal"
        with feeding(publisher):
            page.wait_for_selector('.tile[data-stream="ir"].live')
        with feeding(publisher, lambda i: fused_frame(100 + i, mode="vis_only")):

            def visible_alone() -> None:
                assert text_of(page, "#mode") == "visible only"
                assert page.locator('.tile[data-stream="ir"]:not(.live)').count() == 1
                assert "no signal" in text_of(page, '.tile[data-stream="ir"] .veil')
                assert "live" in page.locator('.tile[data-stream="fused"]').get_attribute("class")
                assert "absent" in text_of(page, "#facts")

            shows(page, visible_alone)
            page.wait_for_selector("#events :text('fused -> vis_only')")  # told beside the pictures, not with one
        page.wait_for_selector("#mode[data-mode=none]")  # no frames any more
        assert text_of(page, "#mode") == "no signal"
        assert text_of(page, "#latency") == "–"
        viewer.stop()
        page.wait_for_selector("#connection[data-state=closed]")
        assert text_of(page, "#connection") == "viewer is gone"


@pytest.mark.needs_chromium
def test_the_page_says_that_its_keys_are_refused(page, tmp_path):
    made = {name: create_keys(tmp_path / name, name) for name in ("server", "friend")}
    page.set_viewport_size({"width": 390, "height": 844})
    with publishing(encrypted(made)) as publisher, Viewer(publisher.endpoint, port=0) as viewer:
        page.goto(viewer.url)
        page.wait_for_selector("#connection:text('keys refused')")
        page.wait_for_selector('.tile[data-stream="fused"] .veil :text("do not agree on keys: check server_key")')
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.needs_chromium
def test_the_page_comes_back_by_itself_and_fits_a_small_screen(page):
    page.set_viewport_size({"width": 390, "height": 844})
    with publishing() as publisher, feeding(publisher):
        with Viewer(publisher.endpoint, port=0) as viewer:
            page.goto(viewer.url)
            page.wait_for_selector("#mode[data-mode=fused]")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.wait_for_selector("#connection[data-state=closed]")
        with Viewer(publisher.endpoint, port=viewer.port):
            page.wait_for_selector("#connection[data-state=live]")
            page.wait_for_selector("#mode[data-mode=fused]")


@pytest.mark.needs_chromium
def test_the_javascript_reader_in_the_documentation_reads_the_golden_file(page):
    code = re.findall(r"```javascript\n(.*?)```", (ROOT / "docs" / "messages.md").read_text(), re.DOTALL)[0]
    golden = (ROOT / "tests" / "golden" / "v1_fused_raw.bin").read_bytes()
    script = f"""bytes => {{ {code}
        const read = readMessage(Uint8Array.from(bytes), (packed) => [...packed]);
        return [read.topic, read.header, [...read.payload]]; }}"""
    topic, packed, payload = page.evaluate(script, list(golden))
    assert topic == "dspf1/golden/fused/raw"
    assert msgspec.msgpack.decode(bytes(packed))["mode"] == "held"
    assert payload == [i % 251 for i in range(144)]
