"""The engine of torch.compile, and the frame path that both GPU runtimes share, as far as a processor can run them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engines import arrays, gpu_probe
from engines.base import EngineError, PictureError, RegisteringEngine, fallbacks_of
from engines.cache import EngineCache
from engines.compile_engine import CompileEngine
from engines.dspfusion import variants
from engines.gpu_frames import FramePath, Warp, gpu_errors
from engines.pytorch_engine import PyTorchEngine
from tests.rigs.networks import MINI, save_random_weights

SIZE = (75, 101)  # height and width


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small network in the place of `nano`, and its weights."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "nano", MINI)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield save_random_weights(MINI, tmp_path_factory.mktemp("weights") / "nano.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "engines"


@pytest.fixture(scope="module")
def reference(mini: Path) -> PyTorchEngine:
    return PyTorchEngine(weights=mini, diffusion_steps=1)


@pytest.fixture(scope="module")
def plain(mini: Path, folder: Path) -> CompileEngine:
    """The shared path with the uncompiled network."""
    return engine(mini, folder, backend="none")


def engine(weights: Path, folder: Path, **changes) -> CompileEngine:
    settings = {"precision": "fp32", "diffusion_steps": 1, "device": "cpu", "backend": "eager"} | changes
    return CompileEngine(weights=weights, cache=EngineCache(folder), **settings)


def test_the_whole_path_is_one_graph_and_computes_what_pytorch_computes(mini, folder, reference):
    serving = engine(mini, folder)  # fullgraph: a break would be an error, and then a fallback
    pair = arrays.reference_pair()
    priors = reference.estimate_priors(*pair)
    fused = serving.fuse(*pair, priors)
    assert serving.description.fallbacks == ()
    assert fused.shape == (*arrays.REFERENCE_SIZE, 3)
    assert arrays.psnr_db(fused, reference.fuse(*pair, priors)) > 50
    np.testing.assert_allclose(serving.estimate_priors(*pair).semantic, priors.semantic, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_in_convolutions_and_stays_within_forty_decibels(mini, folder, reference, precision):
    serving = engine(mini, folder, backend="none", precision=precision)
    assert serving.description.precision == precision
    assert serving.psnr_db >= 40
    layers = [one for one in serving._frame.modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {serving._frame.dtype}
    norms = [one for one in serving._frame.modules() if isinstance(one, torch.nn.LayerNorm)]
    assert {norm.weight.dtype for norm in norms if norm.weight is not None} == {torch.float32}
    assert {parameter.dtype for parameter in serving._prior.parameters()} == {torch.float32}


def test_two_threads_get_their_own_pictures(plain, reference):
    pairs = [arrays.reference_pair(SIZE), tuple(255 - image for image in arrays.reference_pair(SIZE))]
    priors = reference.estimate_priors(*pairs[0])
    expected = [plain.fuse(*pair, priors) for pair in pairs]
    wrong = []

    def fuse(which: int) -> None:
        for _ in range(10):
            if not np.array_equal(plain.fuse(*pairs[which], priors), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=fuse, args=(which,), daemon=True) for which in (0, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_an_earlier_picture_is_not_written_over(plain, reference):
    pair = arrays.reference_pair(SIZE)
    priors = reference.estimate_priors(*pair)
    first = plain.fuse(*pair, priors)
    kept = first.copy()
    plain.fuse(255 - pair[0], pair[1], priors)
    assert np.array_equal(first, kept)


def test_the_block_that_goes_up_keeps_every_byte_in_its_place():
    """Tokens, infrared and visible travel in one block; each comes out as it went in."""
    seen = []

    def graph(infrared, visible, *tokens):
        seen.append([part.clone().numpy() for part in (infrared, visible, *tokens)])
        return visible + infrared[:3, :5, None]

    path = FramePath(graph, (3, 5), [(16, 2), (16, 3)], torch.device("cpu"))
    random = np.random.default_rng(0)
    infrared, visible = (random.integers(0, 100, shape, np.uint8) for shape in ((3, 5), (3, 5, 3)))
    tokens = [random.normal(size=shape).astype(np.float32) for shape in ((16, 2), (16, 3))]
    fused = path(infrared, visible, tokens)
    for found, sent in zip(seen[-1], (infrared, visible, *tokens), strict=True):
        assert np.array_equal(found, sent)
    assert np.array_equal(fused, visible + infrared[..., None])


@dataclass(frozen=True, eq=False)
class MapOf:
    """A map from visible pixels, (H, W), to infrared ones."""

    map_x: np.ndarray
    map_y: np.ndarray

    @classmethod
    def affine(cls, size: tuple[int, int], x: tuple[float, ...], y: tuple[float, ...], limit: tuple[int, int]) -> MapOf:
        """x and y of the infrared pixel as a * column + b * row + c, clamped to an infrared picture of a size."""
        rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
        places = (a * columns + b * rows + c for a, b, c in (x, y))
        return cls(*(np.clip(place, 0, side - 1) for place, side in zip(places, limit[::-1], strict=True)))

    def remap(self, image: np.ndarray) -> np.ndarray:
        return cv2.remap(image, self.map_x, self.map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def test_the_warp_on_the_device_is_the_one_on_the_processor():
    """A shift of (2, -1) pixels by hand, and a rotation with zoom against OpenCV's remap."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)

    def warped(image: np.ndarray, pixel_map: MapOf) -> np.ndarray:
        warp = Warp(pixel_map.map_x.shape, (40, 50))
        warp.follow(pixel_map)
        return warp(torch.from_numpy(image)).numpy()

    shifted = warped(image, MapOf.affine((40, 50), (1, 0, 2), (0, 1, -1), (40, 50)))
    assert np.array_equal(shifted[1:, :-2], image[:-1, 2:])
    assert np.array_equal(shifted[1:, -1], image[:-1, -1])  # outside, the border is repeated
    smooth = cv2.GaussianBlur(image, (0, 0), 2)
    turned = MapOf.affine((60, 80), (0.6, -0.1, 3.3), (0.1, 0.6, -2.7), (40, 50))  # to another size
    assert warped(smooth, turned).shape == (60, 80)
    # OpenCV interpolates in steps of 1/32 pixel.
    assert np.abs(warped(smooth, turned).astype(int) - turned.remap(smooth)).max() <= 2


def test_an_engine_that_registers_takes_the_infrared_picture_as_its_camera_sent_it(mini, folder, reference):
    serving = engine(mini, folder, backend="none")
    assert isinstance(serving, RegisteringEngine)
    infrared, visible = arrays.reference_pair(SIZE)
    small = cv2.resize(infrared, (60, 48))
    fitting = MapOf.affine(SIZE, (59 / (SIZE[1] - 1), 0, 0), (0, 47 / (SIZE[0] - 1), 0), (48, 60))
    priors = reference.estimate_priors(fitting.remap(small), visible)
    corrected = MapOf(np.clip(fitting.map_x + 3, 0, 59), fitting.map_y)
    for pixel_map in (fitting, corrected, fitting):  # a correction comes as a new map, from one frame to the next
        fused = serving.fuse_unregistered(small, visible, priors, pixel_map)
        expected = reference.fuse(pixel_map.remap(small), visible, priors)
        assert arrays.psnr_db(fused, expected) > 45
    assert arrays.psnr_db(serving.fuse(infrared, visible, priors), reference.fuse(infrared, visible, priors)) > 50
    with pytest.raises(PictureError, match="infrared must be uint8"):
        serving.fuse_unregistered(small.astype(np.uint16), visible, priors, fitting)
    with pytest.raises(PictureError, match="need"):
        serving.fuse_unregistered(small, visible[:-8], priors, fitting)


def test_a_compiler_that_cannot_work_is_reported_and_the_network_is_replayed_without(mini, folder, caplog):
    def broken(graph, example):
        raise RuntimeError("no compiler\nfound on this machine")

    serving = engine(mini, folder, backend=broken)
    (line,) = fallbacks_of(serving)
    assert "found on this machine" in line
    assert "the uncompiled network is replayed" in line
    assert serving.psnr_db >= 50
    assert len([record for record in caplog.records if "torch.compile" in record.message]) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore"), "memory does not"),
        (RuntimeError("CUDA error: an illegal memory access\nwas encountered"), "GPU runtime failed"),
    ],
)
def test_what_a_gpu_raises_becomes_one_line(error, says):
    with pytest.raises(EngineError, match=says) as refusal, gpu_errors("base"):
        raise error
    assert "\n" not in str(refusal.value)
    if isinstance(error, torch.OutOfMemoryError):
        assert "Tried to allocate 2.00 GiB" not in str(refusal.value).split("(")[0]


def test_out_of_memory_in_flight_is_an_error_of_the_engine_and_it_can_go_on(plain, reference, monkeypatch):
    pair = arrays.reference_pair(SIZE)
    priors = reference.estimate_priors(*pair)
    expected = plain.fuse(*pair, priors)
    with monkeypatch.context() as patch:

        def out_of_memory(*inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        patch.setattr(plain._programs[SIZE].frames[None], "_replay", out_of_memory)
        for _ in range(3):  # more often than there are slots: a failure gives its slot back
            with pytest.raises(EngineError, match="memory"):
                plain.fuse(*pair, priors)
    assert np.array_equal(plain.fuse(*pair, priors), expected)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_precision_that_is_not_served_is_refused(mini, folder, precision):
    with pytest.raises(EngineError, match="does not serve"):
        engine(mini, folder, precision=precision)


def test_inductor_keeps_its_kernels_in_a_folder_of_ours(mini, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("DSPFUSION_CACHE", str(tmp_path))
    serving = CompileEngine.__new__(CompileEngine)
    serving._backend, serving.cache = "inductor", EngineCache()
    serving._keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert (tmp_path / "inductor").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "inductor").chmod(0o777)
    serving._keep_kernels()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "cannot be used" in serving.cache.faults[0]


# On the real thing


@pytest.fixture
def gpu() -> None:
    if (reason := gpu_probe.refusal("compile")) is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", ["inductor", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_is_pytorch_within_its_tolerance_on_a_gpu(mini, folder, reference, backend, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute in bf16")
    serving = engine(mini, folder, device="cuda", backend=backend, precision=precision)
    assert serving.description.fallbacks == ()
    for size in (SIZE, (480, 640)):
        pair = arrays.reference_pair(size)
        assert arrays.agreement(serving, reference, *pair) >= arrays.PSNR_LIMIT_DB[precision]
        priors = serving.estimate_priors(*pair)
        fused = [serving.fuse(*pair, priors) for _ in range(4)]
        assert all(np.array_equal(one, fused[0]) for one in fused)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_frames_and_priors_run_at_once_on_a_gpu(mini, folder):
    serving = engine(mini, folder, device="cuda", backend="none", precision="fp16")
    pair = arrays.reference_pair((480, 640))
    priors = serving.estimate_priors(*pair)
    expected, wrong = serving.fuse(*pair, priors), []

    def fuse() -> None:
        wrong.extend(1 for _ in range(50) if not np.array_equal(serving.fuse(*pair, priors), expected))

    threads = [threading.Thread(target=fuse) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert np.array_equal(serving.estimate_priors(*pair).semantic, priors.semantic)
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_memory_left_says_so_in_one_line(mini, folder):
    serving = engine(mini, folder, device="cuda", backend="none", precision="fp16")
    limit = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(limit, 1e-3))
    try:
        with pytest.raises(EngineError, match="memory does not suffice"):
            serving.prepare(4096, 4096)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
