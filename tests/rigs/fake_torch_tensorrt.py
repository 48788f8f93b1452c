"""A stand-in for torch_tensorrt 2.11 to 2.14: it records what it is asked, and runs the exported program as it is.

What is given to `compile`, saved and loaded is the real exported program, so the shapes, the types and the files are
real; only TensorRT is not. Arguments that one of the versions does not know are refused, as that version would.
"""

from __future__ import annotations

import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# What every version from 2.11 to 2.14 takes, as far as this product could want it.
KNOWN = {
    "arg_inputs", "min_block_size", "require_full_compilation", "optimization_level", "num_avg_timing_iters",
    "disable_tf32", "immutable_weights", "hardware_compatible", "version_compatible", "cache_built_engines",
    "reuse_cached_engines", "timing_cache_path", "use_fp32_acc", "workspace_size", "dryrun",
}  # fmt: skip


@dataclass
class Input:
    min_shape: tuple[int, ...]
    opt_shape: tuple[int, ...]
    max_shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Calls:
    compiled: list[dict[str, Any]] = field(default_factory=list)
    programs: list[torch.export.ExportedProgram] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    graphs_open: int = 0
    graphs_opened: int = 0


def make(version: str = "2.13.0", build_error: BaseException | None = None) -> tuple[types.ModuleType, Calls]:
    """The module to put into sys.modules, and what will have been asked of it."""
    calls = Calls()
    module = types.ModuleType("torch_tensorrt")

    def compile(program: torch.export.ExportedProgram, **settings: Any) -> torch.nn.Module:
        if unknown := set(settings) - KNOWN:
            raise TypeError(f"compile() got unexpected settings {unknown}")
        if build_error is not None:
            raise build_error
        for given, wanted in zip(settings["arg_inputs"], _inputs_of(program), strict=True):
            found = (given.opt_shape, given.dtype) if isinstance(given, Input) else (tuple(given.shape), given.dtype)
            assert len(found[0]) == wanted[0]
            assert found[1] == wanted[1]
        calls.compiled.append(settings)
        calls.programs.append(program)
        compiled = program.module()
        compiled.program = program
        return compiled

    def save(
        compiled: Any, path: str, *, output_format: str, arg_inputs: list[Any], dynamic_shapes: Any = None
    ) -> None:
        assert output_format == "exported_program"
        assert all(isinstance(one, torch.Tensor) for one in arg_inputs)
        torch.export.save(compiled.program, path)
        calls.saved.append(path)

    @contextmanager
    def enable_cudagraphs(compiled: Any) -> Any:
        calls.graphs_open += 1
        calls.graphs_opened += 1
        yield compiled
        calls.graphs_open -= 1

    module.__version__ = version  # type: ignore[attr-defined]
    module.Input = Input  # type: ignore[attr-defined]
    module.dynamo = types.SimpleNamespace(compile=compile)  # type: ignore[attr-defined]
    module.runtime = types.SimpleNamespace(enable_cudagraphs=enable_cudagraphs)  # type: ignore[attr-defined]
    module.save = save  # type: ignore[attr-defined]
    return module, calls


def _inputs_of(program: torch.export.ExportedProgram) -> list[tuple[int, torch.dtype]]:
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [(value.dim(), value.dtype) for value in values]
