"""Criteria of what passes through the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ....choices import Activation, Wanda
from ...base import Samples
from ...parts import Layer
from ..double import patches, samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


@score.register(Wanda)
def _(criterion: Wanda, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, _) = model.double(), samples(data)
    squares = net.means(x, lambda layer, inputs, outputs: inputs.square().sum(0))
    scores = []
    for layer, weight, square in zip(net.layers, net.weights, squares, strict=True):
        norms = (len(x) * patches(layer, square[None])[0].mean(1)).sqrt()
        scores.append(weight.abs() * norms.view(weight.shape[1:]))
    return scores


@score.register(Activation)
def _(criterion: Activation, model: TorchModel, data: Samples | None) -> list[Tensor]:
    def total(layer: Layer, inputs: Tensor, outputs: Tensor) -> Tensor:
        measured = (outputs != 0).double() if criterion.zeros else outputs.abs()
        return measured.flatten(2).mean(2).sum(0) if outputs.ndim > 2 else measured.sum(0)

    return model.double().means(samples(data)[0], total)
