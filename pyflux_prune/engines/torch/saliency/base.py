"""What every criterion is a method of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import TYPE_CHECKING

from torch import Tensor

from ....choices import Saliency
from ....errors import InvalidInput
from ...base import Samples

if TYPE_CHECKING:
    from ..model import TorchModel


@singledispatch
def score(criterion: Saliency, model: TorchModel, data: Samples | None) -> list[Tensor]:
    """Return the saliency of each layer's weights, of their shape, or neurons, (out,); higher is more important.

    A new criterion is one more method of this function. Call ``check`` first.

    Raises:
        InvalidInput: the data will not do, a matrix is singular, the network is too large.

    """
    raise NotImplementedError(criterion)


@singledispatch
def compensate(criterion: Saliency, model: TorchModel, data: Samples | None, after: Sequence[Tensor]) -> None:
    """Change what stays under the masks ``after``, so that it makes up for what goes; nothing is masked yet.

    Most criteria have no method of this function, and change nothing.
    """


def check(criterion: Saliency, data: Samples | None) -> None:
    """Raise InvalidInput unless this engine has the criterion, and the criterion the data that it needs."""
    if score.dispatch(type(criterion)) is score.dispatch(object):
        raise InvalidInput(f"saliency must be one that the torch engine has, not {criterion!r}")
    if criterion.needs_data and data is None:
        raise InvalidInput(f"{type(criterion).__name__} needs data")
