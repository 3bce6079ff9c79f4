"""The two engines and how one is chosen."""

from __future__ import annotations

import functools
import warnings

from ..choices import shown
from ..errors import EngineUnavailable, InvalidInput
from .base import Engine, Model
from .parts import ACTIVATIONS, BatchNorm, ConvLayer, Flatten, Input, Layer, Part, Pool

__all__ = [
    "ACTIVATIONS",
    "ENGINES",
    "BatchNorm",
    "ConvLayer",
    "Engine",
    "Flatten",
    "Input",
    "Layer",
    "Model",
    "Part",
    "Pool",
    "check_engine",
    "get_engine",
]

ENGINES = ("auto", "julia", "torch")


def check_engine(name: object) -> None:
    """Raise InvalidInput unless an engine has this name."""
    if not isinstance(name, str) or name not in ENGINES:
        raise InvalidInput(f"engine must be one of {', '.join(ENGINES)}, not {shown(name)}")


def get_engine(name: str = "auto") -> Engine:
    """Return an engine: "julia", "torch", or "auto": Julia, and PyTorch with a warning where Julia cannot be had.

    Raises:
        InvalidInput: no engine has this name.
        EngineUnavailable: the engine, or with "auto" both, cannot be had here.

    """
    check_engine(name)
    return _engine(name)


@functools.cache
def _engine(name: str) -> Engine:
    if name == "julia":
        from .julia import JuliaEngine

        return JuliaEngine()
    if name == "torch":
        from .torch import TorchEngine

        return TorchEngine()
    try:
        return get_engine("julia")
    except EngineUnavailable as no_julia:
        try:
            engine = get_engine("torch")
        except EngineUnavailable as no_torch:
            raise EngineUnavailable(f"{no_julia}; and {no_torch}") from no_torch
        warnings.warn(f"{no_julia}. Using the slower PyTorch reference engine instead.", stacklevel=3)
        return engine
