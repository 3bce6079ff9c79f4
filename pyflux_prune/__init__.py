"""Neural-network pruning in Julia's Flux, driven from Python and cross-checked against PyTorch.

Importing this package starts nothing; Julia starts when the first network is made.
"""

from . import datasets
from .choices import (
    Adam,
    AdamW,
    Constant,
    Continue,
    Descent,
    Exponential,
    Global,
    Layerwise,
    Magnitude,
    Momentum,
    Nesterov,
    OneShot,
    Polynomial,
    RandomSaliency,
    Reinitialize,
    Rewind,
    RMSProp,
    Training,
)
from .crosscheck import crosscheck
from .errors import Diverged, EngineUnavailable, InvalidInput, PruneError
from .experiment import Round, Run, iterative_prune, resume
from .network import Network, from_torch, mlp, prune, to_torch

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdamW",
    "Constant",
    "Continue",
    "Descent",
    "Diverged",
    "EngineUnavailable",
    "Exponential",
    "Global",
    "InvalidInput",
    "Layerwise",
    "Magnitude",
    "Momentum",
    "Nesterov",
    "Network",
    "OneShot",
    "Polynomial",
    "PruneError",
    "RMSProp",
    "RandomSaliency",
    "Reinitialize",
    "Rewind",
    "Round",
    "Run",
    "Training",
    "crosscheck",
    "datasets",
    "from_torch",
    "iterative_prune",
    "mlp",
    "prune",
    "resume",
    "to_torch",
]
