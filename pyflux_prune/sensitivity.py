"""How much each layer can lose: pruning one layer at a time, without training (Han et al. 2015, figure 6)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import report
from .choices import Layerwise, Magnitude, Saliency, check_choice, check_match, check_number, listed, shown
from .datasets import Dataset
from .errors import InvalidInput, LayerCollapse
from .network import Network, check_dataset

if TYPE_CHECKING:
    from rich.table import Table

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Test accuracy with one layer pruned.

    Attributes:
        data: the name of the data set.
        layers: the names of the prunable layers.
        rates: the sparsities that each of them was pruned to.
        accuracy: (layers, rates) the test accuracy with that layer alone pruned.
        baseline: the test accuracy of the network as it is.
        pruned: the sparsity of each layer as it is.

    """

    data: str
    layers: tuple[str, ...]
    rates: tuple[float, ...]
    accuracy: npt.NDArray[np.float64]
    baseline: float
    pruned: tuple[float, ...]

    def sparsities(self, loss: float = 0.01) -> tuple[float, ...]:
        """Return one sparsity per layer, for ``Layerwise``: how far each can go alone.

        It is the highest rate up to which accuracy stays within ``loss`` of the baseline; the layer's present
        sparsity where no rate does. All of them together cost more than ``loss``.
        """
        check_number("loss", loss, 0, 1)
        within = np.logical_and.accumulate(self.accuracy >= self.baseline - loss - 1e-12, axis=1).sum(axis=1)
        return tuple(self.rates[n - 1] if n else now for n, now in zip(within, self.pruned, strict=True))

    def table(self) -> Table:
        """Return the accuracies as a table to print."""
        from rich.table import Table

        shown = Table(title=f"{self.data}: accuracy {self.baseline:.2%} as it is", title_justify="left")
        for heading in ("layer", *(f"{rate:.0%}" for rate in self.rates)):
            shown.add_column(heading, justify="right")
        for name, row in zip(self.layers, self.accuracy, strict=True):
            shown.add_row(name, *(f"{accuracy:.1%}" for accuracy in row))
        return shown

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture of accuracy against sparsity, a curve per layer; the ending says its kind.

        Raises:
            InvalidInput: the file cannot be written, or its kind is unknown.

        """
        report.plot_sensitivity(self, path)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "data": self.data,
            "layers": list(self.layers),
            "rates": list(self.rates),
            "accuracy": self.accuracy.tolist(),
            "baseline": self.baseline,
            "pruned": list(self.pruned),
        }


def sensitivity(
    net: Network,
    data: Dataset,
    *,
    saliency: Saliency = Magnitude(),
    rates: Sequence[float] = RATES,
) -> Sensitivity:
    """Measure the test accuracy with each layer alone pruned to each rate; ``net`` stays as it is.

    Args:
        net: the network, trained.
        data: what to test on; criteria that need data get the training samples.
        saliency: how much a weight matters.
        rates: sparsities in [0, 1), going up, none below what is pruned of a layer already.

    Raises:
        InvalidInput: an argument cannot be used.

    """
    samples = check_dataset(net, data)
    check_choice("saliency", saliency, Saliency)
    check_match(saliency, Layerwise())
    chosen = tuple(check_number("each of rates", rate, 0, 1) for rate in listed(rates) or ())
    if not chosen or list(chosen) != sorted(set(chosen)):
        raise InvalidInput(f"rates must be one or more sparsities that go up, not {shown(rates)}")
    parts, layers, copy = net.parts, net.layers, net.copy().model
    accuracy = np.empty((len(layers), len(chosen)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapse)  # the accuracy says it
        for (i, k), _ in np.ndenumerate(accuracy):
            others = tuple(j for j in range(len(layers)) if j != i)
            copy.load(parts)
            copy.prune(saliency, chosen[k], Layerwise(exclude=others), samples)
            accuracy[i, k] = copy.evaluate(data.x_test, data.y_test)[1]
    names, pruned = zip(*((la.name, la.sparsity) for la in layers), strict=True)
    baseline = net.model.evaluate(data.x_test, data.y_test)[1]
    return Sensitivity(data.name, names, chosen, accuracy, baseline, pruned)
