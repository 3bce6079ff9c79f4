"""PyTorch as an engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..base import Engine
from ..parts import Part
from .model import TorchModel


class TorchEngine(Engine):
    """PyTorch on the CPU."""

    name = "torch"

    def build(self, parts: Sequence[Part]) -> TorchModel:
        """Return a new model with copies of these parts' arrays."""
        return TorchModel(parts)

    def versions(self) -> dict[str, Any]:
        """Return the versions of torch and NumPy, and torch's BLAS and number of threads."""
        blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "blas": blas[1] if blas else "unknown",
            "threads": torch.get_num_threads(),
        }
