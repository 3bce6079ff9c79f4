"""What every criterion is a method of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import TYPE_CHECKING

from torch import Tensor

from ....choices import Saliency
from ...base import Samples

if TYPE_CHECKING:
    from ..model import TorchModel


@singledispatch
def score(criterion: Saliency, model: TorchModel, data: Samples | None) -> list[Tensor]:
    """Return the saliency of each layer's weights, of their shape, or neurons, (out,); higher is more important.

    A new criterion is one more method of this function. What ``Model.scores`` checks has been checked.

    Raises:
        InvalidInput: the data will not do, a matrix is singular, the network is too large.

    """
    raise NotImplementedError(criterion)


@singledispatch
def compensate(criterion: Saliency, model: TorchModel, data: Samples | None, after: Sequence[Tensor]) -> None:
    """Change what stays under the masks ``after``, so that it makes up for what goes; nothing is masked yet.

    Most criteria have no method of this function, and change nothing.
    """
