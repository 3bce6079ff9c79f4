"""The exceptions of this package."""

from __future__ import annotations


class PruneError(Exception):
    """Base of everything that pyflux_prune raises on purpose."""


class InvalidInput(PruneError, ValueError):
    """An argument, array, file or directory that cannot be used; the message says which, and what is allowed."""


class EngineUnavailable(PruneError, RuntimeError):
    """The engine that was asked for cannot be started here; the message says what is missing and what mends it."""


class Diverged(PruneError, ArithmeticError):
    """A training loss became infinite or NaN; the network is as it was before that step."""


class LayerCollapse(UserWarning):
    """Pruning left no weight in a layer."""
