"""The exceptions of this package."""

from __future__ import annotations


class PruneError(Exception):
    """Base of everything that pyflux_prune raises on purpose."""


class InvalidInput(PruneError, ValueError):
    """An argument, array, file or directory that cannot be used; the message says which, and what is allowed."""


class EngineUnavailable(PruneError, RuntimeError):
    """The engine that was asked for cannot be started here; the message says what is missing and what mends it."""


class Diverged(PruneError, ArithmeticError):
    """A training loss, or a weight in the last step, became infinite or NaN.

    The network is as it was before the step with that loss; or as the last step left it.
    """


class LayerCollapse(UserWarning):
    """Pruning left no weight in a layer."""
