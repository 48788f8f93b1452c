"""Every runtime computes what PyTorch computes, or refuses to serve and says why."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engines import arrays, gpu_probe, selection
from engines.base import EngineError, FusionEngine, Priors
from engines.cache import EngineCache
from engines.dspfusion.loading import build
from engines.openvino_engine import OpenVINOEngine, import_openvino
from engines.pytorch_engine import PyTorchEngine

ODD = (137, 155)  # height and width


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of `nano` that were never trained, but are all different from zero."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in build("nano").state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_file(state, path, metadata={"variant": "nano"})
    return path


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "engines"


@pytest.fixture(scope="module")
def reference(weights: Path) -> PyTorchEngine:
    return PyTorchEngine(weights=weights, diffusion_steps=2)


@pytest.fixture(scope="module")
def fp32(weights: Path, cache_folder: Path) -> OpenVINOEngine:
    return openvino_engine(weights, cache_folder)


def openvino_engine(weights: Path, cache_folder: Path, precision: str = "fp32") -> OpenVINOEngine:
    return OpenVINOEngine(
        weights=weights, precision=precision, threads=1, diffusion_steps=2, cache=EngineCache(cache_folder)
    )


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    return arrays.reference_pair(ODD)


def serves_bf16() -> bool:
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_openvino_fuses_an_odd_size_as_pytorch_does(fp32, reference, pair):
    priors = reference.estimate_priors(*pair)
    fused = fp32.fuse(*pair, priors)
    assert fused.shape == (*ODD, 3)
    assert fused.dtype == np.uint8
    assert arrays.psnr_db(fused, reference.fuse(*pair, priors)) > 50


def test_openvino_estimates_the_priors_that_pytorch_does(fp32, reference, pair):
    found, expected = fp32.estimate_priors(*pair), reference.estimate_priors(*pair)
    for field in dataclasses.fields(Priors):
        np.testing.assert_allclose(getattr(found, field.name), getattr(expected, field.name), atol=2e-3)
    assert found.infrared_probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert found.visible_probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_half_precision_stays_within_forty_decibels(weights, cache_folder, reference, pair):
    if not serves_bf16():
        with pytest.raises(EngineError, match="bf16"):
            openvino_engine(weights, cache_folder, "bf16")
        return
    engine = openvino_engine(weights, cache_folder, "bf16")
    priors = reference.estimate_priors(*pair)
    assert engine.description.precision == "bf16"
    assert arrays.psnr_db(engine.fuse(*pair, priors), reference.fuse(*pair, priors)) > 40


@pytest.mark.parametrize("runtime", ["reference", "fp32"])
def test_the_same_pair_gives_the_same_bits(runtime, pair, request):
    engine: FusionEngine = request.getfixturevalue(runtime)
    runs = [(engine.estimate_priors(*pair), engine.fuse(*pair, engine.estimate_priors(*pair))) for _ in range(3)]
    assert all(np.array_equal(fused, runs[0][1]) for _, fused in runs)
    assert all(np.array_equal(priors.semantic, runs[0][0].semantic) for priors, _ in runs)


def test_inputs_are_left_as_they_were_and_may_be_read_only_or_strided(fp32, reference, pair):
    infrared, visible = pair
    priors = reference.estimate_priors(infrared, visible)
    before = infrared.copy(), visible.copy()
    fused = fp32.fuse(infrared, visible, priors)
    for image in (infrared, visible):
        image.flags.writeable = False
    flipped = np.ascontiguousarray(visible[..., ::-1])[..., ::-1]
    try:
        for engine in (fp32, reference):
            assert np.array_equal(engine.fuse(infrared, flipped, priors), engine.fuse(infrared, visible, priors))
    finally:
        for image in (infrared, visible):
            image.flags.writeable = True
    assert np.array_equal(before[0], infrared)
    assert np.array_equal(before[1], visible)
    again = fused.copy()
    fp32.fuse(infrared[::-1], visible, priors)
    assert np.array_equal(fused, again), "a later frame must not write into an earlier picture"


def test_two_frames_at_once_are_those_of_one_after_the_other(fp32, weights, cache_folder, pair):
    engine = OpenVINOEngine(
        weights=weights, precision="fp32", threads=1, diffusion_steps=2, cache=EngineCache(cache_folder), at_once=2
    )
    assert engine.description.at_once == 2
    priors = engine.estimate_priors(*pair)
    other = pair[0][::-1].copy(), pair[1][::-1].copy()
    expected = [fp32.fuse(*one, priors) for one in (pair, other)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: engine.fuse(*one, priors), [pair, other] * 4))
    assert all(np.array_equal(picture, expected[k % 2]) for k, picture in enumerate(found))


@pytest.mark.parametrize("runtime", ["reference", "fp32"])
def test_priors_and_frames_may_be_computed_at_once(runtime, pair, request):
    engine: FusionEngine = request.getfixturevalue(runtime)
    priors = engine.estimate_priors(*pair)
    expected = engine.fuse(*pair, priors)
    wrong: list[str] = []
    start = threading.Barrier(3)

    def estimate() -> None:
        start.wait(10)
        for _ in range(6):
            if not np.array_equal(engine.estimate_priors(*pair).semantic, priors.semantic):
                wrong.append("priors")

    def fuse() -> None:
        start.wait(10)
        for _ in range(6):
            if not np.array_equal(engine.fuse(*pair, priors), expected):
                wrong.append("picture")

    threads = [threading.Thread(target=work, daemon=True) for work in (estimate, fuse, fuse)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []


@pytest.mark.parametrize(
    ("infrared", "visible", "complaint"),
    [
        (np.zeros((64, 64), np.uint16), np.zeros((64, 64, 3), np.uint8), "uint8"),
        (np.zeros((64, 64), np.uint8), np.zeros((64, 65, 3), np.uint8), "shape"),
        (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), "shape"),
        (np.zeros((16, 64), np.uint8), np.zeros((16, 64, 3), np.uint8), "too small"),
    ],
)
def test_what_is_no_pair_is_refused(reference, fp32, infrared, visible, complaint):
    for engine in (reference, fp32):
        with pytest.raises(ValueError, match=complaint):
            engine.estimate_priors(infrared, visible)


def test_priors_of_another_variant_are_refused(reference, fp32, pair):
    foreign = dataclasses.replace(reference.estimate_priors(*pair), semantic=np.zeros((16, 7), np.float32))
    for engine in (reference, fp32):
        with pytest.raises(EngineError, match="estimate them with it"):
            engine.fuse(*pair, foreign)


def test_a_closed_engine_says_so(weights, cache_folder, pair):
    for engine in (PyTorchEngine(weights=weights), openvino_engine(weights, cache_folder)):
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.estimate_priors(*pair)


class Broken:
    """An engine that is off by some grey levels, or whose priors are not numbers."""

    def __init__(self, inner: FusionEngine, levels: int = 0, token_error: float = 0.0) -> None:
        self.inner, self.levels, self.token_error = inner, levels, token_error
        self.description = inner.description

    def estimate_priors(self, infrared, visible):
        priors = self.inner.estimate_priors(infrared, visible)
        return dataclasses.replace(priors, semantic=priors.semantic + np.float32(self.token_error))

    def fuse(self, infrared, visible, priors):
        fused = self.inner.fuse(infrared, visible, priors).astype(int)
        return np.where(fused > 127, fused - self.levels, fused + self.levels).astype(np.uint8)

    def close(self) -> None: ...


def test_an_engine_outside_of_its_tolerance_is_refused(reference):
    expected = arrays.Reference.of(reference)
    assert arrays.refuse_unless_close(Broken(reference), expected) == float("inf")
    with pytest.raises(EngineError, match="dB"):
        arrays.refuse_unless_close(Broken(reference, levels=2), expected)  # 42 dB
    for error in (0.5, float("nan")):
        with pytest.raises(EngineError, match="priors"):
            arrays.refuse_unless_close(Broken(reference, token_error=error), expected)


def test_openvino_is_refused_at_load_when_it_computes_something_else(weights, tmp_path, monkeypatch):
    run = OpenVINOEngine.fuse
    monkeypatch.setattr(OpenVINOEngine, "fuse", lambda self, *pair: 255 - run(self, *pair))
    with pytest.raises(EngineError, match="does not compute what PyTorch computes"):
        openvino_engine(weights, tmp_path)


def test_a_build_is_proven_once_on_a_real_pair(fp32, weights, cache_folder, pair, monkeypatch):
    priors = fp32.estimate_priors(*pair)
    fused = fp32.fuse(*pair, priors)
    proof = fp32.prove(*pair, priors, fused)
    assert 60 < proof <= arrays.PSNR_MOST_DB
    monkeypatch.setattr(OpenVINOEngine, "_reference", lambda self: pytest.fail("PyTorch was asked again"))
    assert openvino_engine(weights, cache_folder).prove(*pair, priors, fused) == pytest.approx(proof, abs=0.01)


def test_an_engine_that_fails_the_proof_is_refused_every_time(fp32):
    other, colours = arrays.reference_pair((141, 155))  # a size that was not proven yet
    priors = fp32.estimate_priors(other, colours)
    wrong = fp32.fuse(other, colours, priors)[::-1].copy()
    for _ in range(2):
        with pytest.raises(EngineError, match="does not compute what PyTorch computes"):
            fp32.prove(other, colours, priors, wrong)


def test_pytorch_in_fp32_is_the_reference_and_proves_nothing(reference, pair):
    priors = reference.estimate_priors(*pair)
    assert reference.prove(*pair, priors, reference.fuse(*pair, priors)) is None


def test_a_warm_start_needs_no_torch_and_gives_the_same_bits(fp32, weights, cache_folder, pair):
    script = (
        "import sys, hashlib\nfrom pathlib import Path\n"
        "from engines import arrays\nfrom engines.cache import EngineCache\n"
        "from engines.openvino_engine import OpenVINOEngine\n"
        f"engine = OpenVINOEngine(weights=Path({str(weights)!r}), precision='fp32', threads=1, diffusion_steps=2,"
        f" cache=EngineCache(Path({str(cache_folder)!r})))\n"
        f"pair = arrays.reference_pair({ODD!r})\n"
        "fused = engine.fuse(*pair, engine.estimate_priors(*pair))\n"
        "print(hashlib.sha256(fused.tobytes()).hexdigest(), 'torch' in sys.modules, engine.cache.faults)"
    )
    import hashlib

    fused = fp32.fuse(*pair, fp32.estimate_priors(*pair))
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert answer.stdout.split(" ", 1) == [hashlib.sha256(fused.tobytes()).hexdigest(), "False []\n"], answer.stderr


def test_the_import_of_openvino_neither_reports_nor_writes_into_the_home_folder(tmp_path):
    script = "from engines.openvino_engine import import_openvino; import_openvino().Core()"
    environment = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_entry_is_counted_and_made_again(fp32, weights, cache_folder, pair, tmp_path):
    import shutil

    folder = tmp_path / "engines"
    shutil.copytree(cache_folder, folder)
    for model in folder.glob("*/frame.xml"):
        model.write_text(model.read_text()[:500])
    engine = openvino_engine(weights, folder)
    assert len(engine.cache.faults) == 1
    assert "made again" in engine.cache.faults[0]
    assert engine.psnr_db >= 50
    assert openvino_engine(weights, folder).cache.faults == []


def test_a_cache_that_cannot_be_written_is_warned_of_once_and_done_without(weights, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "dspfusion.engines"):
        engine = openvino_engine(weights, tmp_path / "file" / "engines")
    assert engine.psnr_db >= 50
    assert len(engine.cache.faults) >= 2
    assert [record.levelname for record in caplog.records if "engine cache" in record.message] == ["WARNING"]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    foreign = tmp_path / "base.safetensors"
    save_file({"a": torch.zeros(1)}, foreign, metadata={"variant": "base"})
    for path in (tmp_path / "missing.safetensors", text, foreign):
        for runtime in ("pytorch", "openvino", "auto"):
            with pytest.raises(EngineError):
                selection.create_engine(runtime, weights=path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"runtime": "abacus"}, "no runtime 'abacus'"),
        ({"variant": "giga"}, "no variant 'giga'"),
        ({"precision": "fp16"}, "fp16"),
        ({"diffusion_steps": 0}, "1 to 10"),
    ],
)
def test_what_is_not_on_offer_is_refused_in_one_line(weights, arguments, complaint):
    with pytest.raises(EngineError, match=complaint) as refusal:
        selection.create_engine(**{"weights": weights, **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("runtime", ["tensorrt", "compile"])
def test_a_gpu_runtime_asked_for_by_name_says_that_it_needs_a_gpu(runtime, weights, monkeypatch):
    monkeypatch.setattr(gpu_probe, "nvidia_driver_present", lambda: False)
    with pytest.raises(EngineError, match="NVIDIA GPU"):
        selection.create_engine(runtime, weights=weights)


def test_auto_takes_openvino_without_a_fallback_where_there_is_no_gpu(weights, cache_folder, monkeypatch):
    monkeypatch.setenv("DSPFUSION_CACHE", str(cache_folder.parent))
    monkeypatch.setattr(gpu_probe, "nvidia_driver_present", lambda: False)
    engine = selection.create_engine(weights=weights, precision="fp32", threads=1, diffusion_steps=2)
    assert (engine.description.runtime, engine.description.fallbacks) == ("openvino", ())
    assert engine.description.threads == 1
    assert len(engine.description.weights_sha256) == 64


def test_auto_falls_back_to_pytorch_and_records_why(weights, monkeypatch, caplog):
    monkeypatch.setattr(gpu_probe, "nvidia_driver_present", lambda: True)
    monkeypatch.setattr(gpu_probe, "refusal", lambda runtime: "the GPU is on holiday")

    def refuse(*arguments):
        raise EngineError("OpenVINO cannot be imported")

    monkeypatch.setitem(selection._FACTORIES, "openvino", refuse)
    with caplog.at_level(logging.WARNING, "dspfusion.engines"):
        engine = selection.create_engine(weights=weights)
    assert engine.description.runtime == "pytorch"
    assert engine.description.fallbacks == (
        "tensorrt: the GPU is on holiday",
        "compile: the GPU is on holiday",
        "openvino: OpenVINO cannot be imported",
    )
    assert len(caplog.records) == 3


@pytest.mark.parametrize("content", ["raise Exception('half installed')", "__version__ = '2020.1'"])
def test_an_openvino_that_is_broken_or_too_old_is_one_line(content, tmp_path, monkeypatch):
    (tmp_path / "openvino.py").write_text(content)
    import_openvino()  # the real one, which is put back afterwards
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "openvino")
    with pytest.raises(EngineError, match=r"OpenVINO cannot be imported \((half installed|version 2020.1)"):
        import_openvino()


def test_whatever_a_runtime_raises_at_its_start_is_a_reason_to_take_the_next_one(weights, monkeypatch):
    def half_installed(*arguments):
        raise AttributeError("module has no attribute 'Core'")

    monkeypatch.setitem(selection._FACTORIES, "openvino", half_installed)
    engine = selection.create_engine(weights=weights)
    assert engine.description.runtime == "pytorch"
    assert "AttributeError: module has no attribute 'Core'" in engine.description.fallbacks[-1]
    with pytest.raises(EngineError, match="runtime 'openvino' cannot start here"):
        selection.create_engine("openvino", weights=weights)


def test_a_runtime_that_runs_out_of_memory_is_one_line_and_serves_the_next_frame(fp32, reference, pair, monkeypatch):
    priors = reference.estimate_priors(*pair)
    fused = fp32.fuse(*pair, priors)

    def out_of_memory(*inputs, **options):
        raise RuntimeError("Exception from src/inference:\ncould not allocate 40960 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(fp32._compiled[ODD]["frame"], "_request", lambda: SimpleNamespace(infer=out_of_memory))
        with pytest.raises(EngineError, match=r"OpenVINO failed \(could not allocate 40960 bytes\)"):
            fp32.fuse(*pair, priors)
        patch.setattr(reference, "_frame", out_of_memory)
        with pytest.raises(EngineError, match=r"PyTorch failed \(could not allocate 40960 bytes\)"):
            reference.fuse(*pair, priors)
    assert np.array_equal(fp32.fuse(*pair, priors), fused)


REAL_PAIRS = 20


@pytest.mark.realdata
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_agrees_with_pytorch_on_real_pairs(data_dir, precision):
    """Shipped weights, every 50th pair in turn: >= 50 dB in fp32, >= 40 dB in bf16. DSPFUSION_ALL_PAIRS=1 takes 20."""
    if precision == "bf16" and not serves_bf16():
        pytest.skip("this processor does not compute in bf16")
    count = REAL_PAIRS if os.environ.get("DSPFUSION_ALL_PAIRS") else 2
    serving = OpenVINOEngine(precision=precision, threads=1)
    exact = PyTorchEngine()
    found = {}
    for name, infrared, visible in real_pairs(data_dir, count):
        found[name] = arrays.agreement(serving, exact, infrared, visible)
    print(precision, {name: round(value, 1) for name, value in found.items()})
    assert len(found) == count
    assert min(found.values()) >= arrays.PSNR_LIMIT_DB[precision], found


def real_pairs(data_dir: Path, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Pairs from all over the index, at 320x240 so that few sizes are compiled."""
    import csv

    import cv2

    with (data_dir / "eval" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = []
    for row in rows[:: len(rows) // count][:count]:
        infrared = cv2.imread(str(data_dir / "eval" / row["ir"]), cv2.IMREAD_GRAYSCALE)
        visible = cv2.imread(str(data_dir / "eval" / row["vi"]), cv2.IMREAD_COLOR_RGB)
        pairs.append((row["name"], cv2.resize(infrared, (320, 240)), cv2.resize(visible, (320, 240))))
    return pairs
