"""Networks in float64, as functions of their weights: what scores are computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ..base import Samples
from ..parts import Layer
from .modules import ACTIVATION_MODULES, tensor


@dataclass(frozen=True)
class Double:
    """A float64 copy of a network.

    Attributes:
        names: what to call the layers in messages.
        weights: of each layer, (out, in); 0 where pruned.
        masks: of each layer, (out, in) bool.
        biases: of each layer, (out,), or None.
        activations: of each layer, a function.

    """

    names: list[str]
    weights: list[Tensor]
    masks: list[Tensor]
    biases: list[Tensor | None]
    activations: list[Callable[[Tensor], Tensor]]

    @staticmethod
    def of(layers: Sequence[Layer]) -> Double:
        """Copy the layers' arrays."""
        return Double(
            [layer.name for layer in layers],
            [tensor(layer.weight).double() * tensor(layer.mask) for layer in layers],
            [tensor(layer.mask).clone() for layer in layers],
            [None if layer.bias is None else tensor(layer.bias).double() for layer in layers],
            [ACTIVATION_MODULES.get(layer.activation, nn.Identity)() for layer in layers],
        )

    @property
    def classes(self) -> int:
        """The number of outputs."""
        return len(self.weights[-1])

    def above(self, place: int) -> Double:
        """Return the network of the layers after one of them."""
        return Double(*(values[place + 1 :] for values in vars(self).values()))

    def unmasked(self) -> Double:
        """Return the same network with nothing pruned: what is 0 is free to grow."""
        return replace(self, masks=[torch.ones_like(mask) for mask in self.masks])

    def forward(
        self, x: Tensor, weights: Sequence[Tensor] | None = None, biases: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """Return ``x``, (samples, features), and what each layer makes of it; weights are masked here.

        Args:
            x: the inputs.
            weights: to use in the place of its own.
            biases: to use in the place of its own.

        """
        passed = [x]
        weights, biases = weights or self.weights, biases or self.biases
        for weight, mask, bias, act in zip(weights, self.masks, biases, self.activations, strict=True):
            passed.append(act(linear(passed[-1], weight * mask, bias)))
        return passed

    def loss(self, x: Tensor, y: Tensor, weights: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Return the mean cross-entropy with these weights, the outputs divided by ``temperature``."""
        return cross_entropy(self.forward(x, weights)[-1] / temperature, y)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return the masked gradient of the mean cross-entropy in the weights."""
        weights = [weight.requires_grad_() for weight in map(Tensor.clone, self.weights)]
        return torch.autograd.grad(self.loss(x, y, weights), weights)


def samples(data: Samples | None) -> tuple[Tensor, Tensor]:
    """Return inputs, in float64, and labels."""
    assert data is not None, "scores checks that there are data"
    return tensor(data[0]).double(), tensor(data[1])
