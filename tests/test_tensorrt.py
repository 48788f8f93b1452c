"""The TensorRT engine: what is exported, what is asked of the compiler, what is kept, and how it fails.

TensorRT itself is not needed here: a stand-in records what it is asked and runs the exported program. What needs the
real one is marked `gpu`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from engines import arrays, gpu_probe, selection
from engines.base import EngineError, fallbacks_of
from engines.cache import EngineCache
from engines.dspfusion import variants
from engines.pytorch_engine import PyTorchEngine
from engines.sizes import SizeRange
from engines.tensorrt_engine import TensorRTEngine
from tests.rigs import fake_torch_tensorrt
from tests.rigs.networks import MINI, save_random_weights

SIZE = (72, 100)  # height and width; no multiple of the network's stride

# Of torch-tensorrt's registry of converters; these are in all of 2.11, 2.13 and 2.14 (read from their wheels), or are
# taken out by its own lowering.
CONVERTERS = {
    "aten._softmax.default", "aten._to_copy.default", "aten.add.Tensor", "aten.addmm.default", "aten.amax.default",
    "aten.avg_pool2d.default", "aten.bmm.default", "aten.cat.default", "aten.clamp.default", "aten.clone.default",
    "aten.convolution.default", "aten.expand.default", "aten.gelu.default", "aten.log.default", "aten.mean.dim",
    "aten.mm.default", "aten.mul.Tensor", "aten.native_layer_norm.default", "aten.permute.default",
    "aten.relu.default", "aten.rsqrt.default", "aten.select.int", "aten.sigmoid.default", "aten.slice.Tensor",
    "aten.split_with_sizes.default", "aten.sub.Tensor", "aten.sum.dim_IntList", "aten.tanh.default",
    "aten.unsqueeze.default", "aten.view.default", "aten.div.Tensor", "aten.squeeze.dims", "aten.exp.default",
    "aten.sym_size.int", "getitem", "aten.constant_pad_nd.default",
}  # fmt: skip
LOWERED = {"aten._assert_tensor_metadata.default", "aten.full_like.default", "aten.alias.default"}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small network in the place of `nano`, and its weights."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "nano", MINI)
        yield save_random_weights(MINI, tmp_path_factory.mktemp("weights") / "nano.safetensors")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> fake_torch_tensorrt.Calls:
    module, calls = fake_torch_tensorrt.make()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    return calls


class Built(NamedTuple):
    folder: Path
    calls: fake_torch_tensorrt.Calls
    operations: list[dict[str, set[torch.dtype]]]  # of the frame, of the priors


@pytest.fixture(scope="module")
def built(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A cache with the engines of the reference's size in fp32, and what was asked to build them."""
    return build(mini, tmp_path_factory.mktemp("fp32") / "engines", "fp32")


@pytest.fixture(scope="module")
def built_fp16(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(mini, tmp_path_factory.mktemp("fp16") / "engines", "fp16")


def build(weights: Path, folder: Path, precision: str) -> Built:
    module, calls = fake_torch_tensorrt.make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_tensorrt", module)
        serving = engine(weights, folder, precision=precision)
        assert serving.psnr_db >= arrays.PSNR_LIMIT_DB[precision]
        assert (serving.built, serving.cache.faults) == (2, [])
    return Built(folder, calls, [operations(program) for program in calls.programs])


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> Path:
    """A copy of the cache, to do harm to."""
    shutil.copytree(built.folder, tmp_path / "engines")
    return tmp_path / "engines"


def engine(weights: Path, folder: Path, **changes) -> TensorRTEngine:
    settings = {"precision": "fp32", "diffusion_steps": 1, "device": "cpu"} | changes
    return TensorRTEngine(weights=weights, cache=EngineCache(folder), **settings)


def test_it_computes_what_pytorch_computes_and_finds_its_engines_again(mini, built, calls):
    serving = engine(mini, built.folder)
    assert (serving.built, serving.cache.faults, calls.compiled) == (0, [], [])
    pair = arrays.reference_pair()
    reference = PyTorchEngine(weights=mini, diffusion_steps=1)
    priors = reference.estimate_priors(*pair)
    fused = serving.fuse(*pair, priors)
    assert fused.shape == (*arrays.REFERENCE_SIZE, 3)
    assert arrays.psnr_db(fused, reference.fuse(*pair, priors)) > 50
    np.testing.assert_allclose(serving.estimate_priors(*pair).semantic, priors.semantic, atol=1e-4)


def test_the_types_are_in_the_graph_and_no_precision_is_handed_over(built_fp16):
    folder, calls, (frame, priors) = built_fp16
    for settings in calls.compiled:
        assert not {"enabled_precisions", "use_explicit_typing", "use_python_runtime"} & set(settings)
        assert settings["require_full_compilation"]
        assert (settings["cache_built_engines"], settings["reuse_cached_engines"]) == (False, False)
        assert Path(settings["timing_cache_path"]).parent == folder
    assert frame["aten.convolution.default"] == {torch.float16}
    assert priors["aten.convolution.default"] == {torch.float32}  # never in halves
    assert [settings["disable_tf32"] for settings in calls.compiled] == [False, True]


def test_every_operation_has_a_converter(built, built_fp16):
    for found in (*built.operations, *built_fp16.operations):
        assert not set(found) - CONVERTERS - LOWERED


def operations(program: torch.export.ExportedProgram) -> dict[str, set[torch.dtype]]:
    """What a program does after its decomposition to core operations, and the types of the results."""
    found: dict[str, set[torch.dtype]] = {}
    for node in program.run_decompositions().graph.nodes:
        if node.op == "call_function":
            value = node.meta.get("val")
            name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
            found.setdefault(name, set()).add(getattr(value, "dtype", None))
    return found


def test_cuda_graphs_are_on_while_the_engine_lives(mini, folder, calls):
    serving = engine(mini, folder)
    assert (calls.graphs_opened, calls.graphs_open) == (2, 2)
    serving.close()
    assert calls.graphs_open == 0
    with pytest.raises(EngineError, match="closed"):
        serving.estimate_priors(*arrays.reference_pair())


def test_one_engine_serves_a_range_of_sizes(mini, folder, calls):
    sizes = SizeRange((64, 80), (72, 100), (136, 168))
    serving = engine(mini, folder, sizes=sizes)
    reference = PyTorchEngine(weights=mini, diffusion_steps=1)
    priors = reference.estimate_priors(*arrays.reference_pair())
    frame = serving._frame_graph
    for height, width in ((64, 80), (136, 168), (99, 101)):
        pair = arrays.reference_pair((height, width))
        tokens = (priors.degradation_infrared, priors.degradation_visible, priors.semantic)
        fused = frame((height, width))(*(torch.from_numpy(array) for array in (*pair, *tokens))).numpy()
        assert arrays.psnr_db(fused, reference.fuse(*pair, priors)) > 50
    (settings,) = calls.compiled  # the priors came from the cache
    infrared = settings["arg_inputs"][0]
    assert (infrared.min_shape, infrared.opt_shape, infrared.max_shape) == (
        (1, 1, 64, 80), (1, 1, 72, 104), (1, 1, 136, 168),
    )  # fmt: skip
    assert engine(mini, folder, sizes=sizes).built == 0


def test_a_range_that_is_none_is_refused():
    with pytest.raises(EngineError, match="are no range"):
        SizeRange((64, 80), (60, 100), (136, 168))


def priors_file(folder: Path) -> Path:
    """The smaller one of the two engine files: the cheaper one to build again."""
    return min(folder.glob("*/engine.pt2"), key=lambda path: path.stat().st_size)


def test_an_engine_file_that_does_not_load_is_counted_and_built_again(mini, folder, calls):
    key = priors_file(folder).parent.name
    EngineCache(folder).store(key, lambda entry: (entry / "engine.pt2").write_bytes(b"no engine") and None)
    serving = engine(mini, folder)
    assert serving.built == 1
    (line,) = fallbacks_of(serving)
    assert line.startswith("engine cache:")
    assert "built again" in line
    assert engine(mini, folder).built == 0


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no file owners")
def test_an_engine_file_that_others_may_write_is_never_loaded(mini, folder, calls, monkeypatch):
    file = priors_file(folder)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    load, loaded = torch.export.load, []
    monkeypatch.setattr(torch.export, "load", lambda path: loaded.append(path) or load(path))
    serving = engine(mini, folder)
    assert serving.built == 1
    assert file not in loaded
    assert "others may write" in serving.cache.faults[0]


def test_an_engine_of_another_library_precision_or_network_is_not_taken(mini, folder, calls, monkeypatch):
    serving = engine(mini, folder)
    keys = {serving._key("frame", SIZE), serving._key("frame", SIZE[::-1]), serving._key("priors", SIZE)}
    serving._trt.__version__ = "2.14.0"
    keys.add(serving._key("frame", SIZE))
    monkeypatch.setattr("engines.tensorrt_engine.partner_versions", lambda: {"tensorrt": "11.1.0"})
    keys.add(serving._key("frame", SIZE))
    monkeypatch.setattr("engines.gpu_frames.source_sha256", lambda *_: "another network")
    keys.add(serving._key("frame", SIZE))
    for change in ({"precision": "bf16"}, {"weights_sha256": "0" * 64}):
        serving.description = dataclasses.replace(serving.description, **change)
        keys.add(serving._key("frame", SIZE))
    assert len(keys) == 8


def test_a_cache_that_cannot_be_written_costs_only_time(mini, calls, tmp_path):
    (tmp_path / "file").write_text("in the way")
    serving = engine(mini, tmp_path / "file" / "engines")
    assert serving.psnr_db >= 50
    assert serving.cache.faults
    assert tmp_path not in Path(calls.compiled[0]["timing_cache_path"]).parents


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."), "memory"),
        (RuntimeError("first line\nno converter for aten.magic"), "no converter for aten.magic"),
        (Exception("bare"), "bare"),
    ],
)
def test_a_build_that_fails_is_one_line_and_leaves_nothing(mini, tmp_path, monkeypatch, error, says):
    module, _ = fake_torch_tensorrt.make(build_error=error)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    with pytest.raises(EngineError, match=says) as refusal:
        engine(mini, tmp_path / "engines")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in (tmp_path / "engines").glob("*/*.pt2")] == []


def test_an_engine_that_computes_something_else_is_refused(mini, folder, calls, monkeypatch):
    run = TensorRTEngine.fuse
    monkeypatch.setattr(TensorRTEngine, "fuse", lambda self, *pair: 255 - run(self, *pair))
    with pytest.raises(EngineError, match="does not compute what PyTorch computes"):
        engine(mini, folder)


# Probing


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a driver; what was probed before is forgotten."""
    monkeypatch.setattr(gpu_probe, "nvidia_driver_present", lambda: True)
    gpu_probe.probe.cache_clear()
    yield
    gpu_probe.probe.cache_clear()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, tuple[str, str]]) -> None:
    """Puts packages where this process and its children look first: name -> (version, code)."""
    for name, (version, code) in packages.items():
        (folder / name.replace("-", "_")).mkdir(parents=True)
        (folder / name.replace("-", "_") / "__init__.py").write_text(code)
        about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


TORCH = """
import types
__version__ = "2.13.0+cu130"
version = types.SimpleNamespace(cuda="13.0")
class ones:
    def __init__(self, *args, **kwargs): pass
    def __mul__(self, other): return self
    def sum(self): return self
    def item(self): return 16.0
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda index: "Imaginary 9000")
    get_device_capability = staticmethod(lambda index: (9, 0))
    mem_get_info = staticmethod(lambda: (7 << 30, 8 << 30))
"""
WORKS = '__version__ = "{}"'


def test_without_a_driver_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(gpu_probe, "nvidia_driver_present", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    for runtime in ("tensorrt", "compile"):
        assert "needs an NVIDIA GPU" in str(gpu_probe.refusal(runtime))


@pytest.mark.usefixtures("driver")
def test_a_library_that_is_absent_or_does_not_fit_is_named_without_loading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert "not installed" in str(gpu_probe.refusal("tensorrt"))
    monkeypatch.setattr(gpu_probe.importlib.util, "find_spec", lambda name: object())
    cases = [
        (("2.12.0", "2.13.0", "11.0.0"), "needs torch 2.13, but torch 2.12.0"),
        (("2.13.0", "2.13.0", None), "TensorRT is not installed"),
        (("2.13.0", "2.13.0", "10.15.1"), "needs tensorrt >=11.0,<11.1, but 10.15.1"),
        (("2.15.0", "2.15.0", "12.0"), "not one of the versions"),
    ]
    for (torch_version, ours, tensorrt), says in cases:
        versions = {"torch": torch_version, "torch-tensorrt": ours, "tensorrt": tensorrt}
        monkeypatch.setattr(gpu_probe, "partner_versions", lambda versions=versions: versions)
        assert says in str(gpu_probe.partners_refusal())
    for versions in (("2.11.0", "10.15.1.29"), ("2.12.1", "10.16.9"), ("2.13.0", "11.0.0.114"), ("2.14.0", "11.1")):
        found = {"torch": f"{versions[0]}+cu130", "torch-tensorrt": versions[0], "tensorrt": versions[1]}
        monkeypatch.setattr(gpu_probe, "partner_versions", lambda found=found: found)
        assert gpu_probe.partners_refusal() is None


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise Exception('Could not find libnvinfer.so.11')", "importing torch_tensorrt failed (Exception: Could not"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "importing torch_tensorrt crashed (SIGSEGV)"),
        ("import os; os._exit(7)", "importing torch_tensorrt failed with status 7"),
        (WORKS.format("2.13.0"), None),
    ],
)
def test_an_import_that_raises_or_crashes_is_a_reason_and_not_an_end(tmp_path, monkeypatch, code, says):
    packages = {
        "torch": ("2.13.0", TORCH),
        "torch-tensorrt": ("2.13.0", code),
        "tensorrt": ("11.0.0", WORKS.format("11.0.0")),
    }
    install(tmp_path / "site", monkeypatch, packages)
    reason = gpu_probe.refusal("tensorrt")
    assert reason is None if says is None else says in str(reason)
    found = gpu_probe.probe(True)
    assert (found.gpu, found.capability, found.memory_mb, found.no_gpu) == ("Imaginary 9000", (9, 0), 8192, None)
    assert gpu_probe.refusal("compile") is None  # TensorRT's trouble is not the GPU's


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("code", "says"),
    [
        (TORCH.replace('cuda="13.0"', "cuda=None"), "has no CUDA: install its CUDA build"),
        (TORCH.replace("lambda: True", "lambda: False"), "finds no GPU"),
        (TORCH.replace("return 16.0", "raise RuntimeError('no kernel image')"), "starting CUDA failed (RuntimeError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "importing torch crashed (SIGABRT)"),
    ],
)
def test_a_gpu_that_torch_cannot_use_says_why(tmp_path, monkeypatch, code, says):
    install(tmp_path / "site", monkeypatch, {"torch": ("2.13.0", code)})
    assert says in str(gpu_probe.refusal("compile"))


@pytest.mark.usefixtures("driver")
def test_auto_tells_of_every_runtime_that_it_passed_over(mini, tmp_path, monkeypatch, caplog):
    reasons = {"tensorrt": "torch_tensorrt is not installed", "compile": None}
    monkeypatch.setattr(gpu_probe, "refusal", reasons.get)

    def out_of_memory(order, why):
        raise EngineError("the GPU's memory does not suffice")

    monkeypatch.setitem(selection._FACTORIES, "compile", out_of_memory)
    monkeypatch.setitem(selection._FACTORIES, "openvino", out_of_memory)
    serving = selection.create_engine(weights=mini, diffusion_steps=1)
    assert serving.description.runtime == "pytorch"
    assert [line.split(":")[0] for line in serving.description.fallbacks] == ["tensorrt", "compile", "openvino"]
    assert "memory" in serving.description.fallbacks[1]
    assert len(caplog.records) == 3


# On the real thing


@pytest.fixture
def real() -> None:
    if (reason := gpu_probe.refusal("tensorrt")) is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_tensorrt_is_pytorch_within_its_tolerance_on_a_gpu(mini, tmp_path, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute in bf16")
    serving = engine(mini, tmp_path / "engines", precision=precision, device="cuda")
    assert serving.psnr_db >= arrays.PSNR_LIMIT_DB[precision]
    pair = arrays.reference_pair((480, 640))
    priors = serving.estimate_priors(*pair)
    fused = [serving.fuse(*pair, priors) for _ in range(3)]
    assert all(np.array_equal(one, fused[0]) for one in fused)
    again = engine(mini, tmp_path / "engines", precision=precision, device="cuda")
    assert np.array_equal(again.fuse(*pair, priors), fused[0])
    assert again.built == 0
