"""Networks of a size: fresh, or with the weights of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engines.base import EngineError
from engines.dspfusion.network import DSPFusion
from engines.dspfusion.variants import VARIANTS, default_weights


def build(variant: str) -> DSPFusion:
    """A network of this size with fresh weights."""
    if variant not in VARIANTS:
        raise EngineError(f"there is no variant '{variant}': choose one of {', '.join(VARIANTS)}")
    return DSPFusion(VARIANTS[variant])


def load(variant: str, weights: Path | None = None) -> tuple[DSPFusion, str]:
    """Loads a network for inference.

    Args:
        variant: a name of `VARIANTS`.
        weights: a safetensors file; None takes the shipped weights of the variant.

    Returns:
        The module in eval mode, and the SHA-256 of the weights file.

    Raises:
        EngineError: the variant or the file does not exist, or the file belongs to another network.
    """
    network = build(variant)
    path = default_weights(variant) if weights is None else Path(weights)
    if not path.is_file():
        shipped = [name for name in VARIANTS if default_weights(name).is_file()]
        raise EngineError(
            f"there are no weights {path.name} for variant '{variant}': train it with `dspfusion train`, "
            f"or choose a variant with shipped weights ({', '.join(shipped) or 'none'})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("variant", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise EngineError(f"{path.name} is not a safetensors file ({error}): export the weights again") from error
    if owner != variant:
        raise EngineError(f"{path.name} holds weights of variant '{owner}', not '{variant}': choose the other variant")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise EngineError(
            f"{path.name} does not fit variant '{variant}' of this version: train or export it again"
        ) from error
    return network.eval(), hashlib.sha256(path.read_bytes()).hexdigest()
