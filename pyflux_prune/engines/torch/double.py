"""Networks in float64, as functions of their weights: what scores are computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear, unfold

from ..base import Samples
from ..parts import ConvLayer, Input, Layer, Part, prunable
from .modules import ACTIVATION_MODULES, by_part, tensor

_IMAGES = 128
"""How many images are computed at a time."""


class Passed(NamedTuple):
    """What goes into and comes out of each layer: (samples, features) or (samples, channels, height, width)."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Double:
    """A float64 copy of a network, with the stored statistics of batch normalisation.

    Attributes:
        layers: the prunable parts; their arrays are not used.
        before: what comes between the layer before and each layer, a module; in training mode, batch normalisation
            uses the statistics of batches.
        weights: of each layer, (out, in) or (out, in, height, width); 0 where pruned.
        masks: of each layer, a bool of the same shape.
        biases: of each layer, (out,), or None.
        activations: of each layer, a function.

    """

    layers: list[Layer]
    before: list[nn.Module]
    weights: list[Tensor]
    masks: list[Tensor]
    biases: list[Tensor | None]
    activations: list[Callable[[Tensor], Tensor]]

    @staticmethod
    def of(parts: Sequence[Part]) -> Double:
        """Copy the parts' arrays."""
        layers, between = prunable(parts), [nn.Sequential()]
        for part, modules in by_part(parts):
            if isinstance(part, Layer):
                between.append(nn.Sequential())
            else:
                between[-1].extend([nn.Unflatten(1, part.shape)] if isinstance(part, Input) else modules)
        return Double(
            layers,
            [module.double().eval().requires_grad_(False) for module in between[:-1]],
            [tensor(layer.weight).double() * tensor(layer.mask) for layer in layers],
            [tensor(layer.mask).clone() for layer in layers],
            [None if layer.bias is None else tensor(layer.bias).double() for layer in layers],
            [ACTIVATION_MODULES.get(layer.activation, nn.Identity)() for layer in layers],
        )

    @property
    def names(self) -> list[str]:
        """What to call the layers in messages."""
        return [layer.name for layer in self.layers]

    @property
    def classes(self) -> int:
        """The number of outputs."""
        return len(self.weights[-1])

    @property
    def norms(self) -> list[nn.Parameter]:
        """The weights and biases of batch normalisation."""
        return [parameter for module in self.before for parameter in module.parameters()]

    def above(self, place: int) -> Double:
        """Return the network of what comes after one of the layers."""
        return Double(*(values[place + 1 :] for values in vars(self).values()))

    def unmasked(self) -> Double:
        """Return the same network with nothing pruned: what is 0 is free to grow."""
        return replace(self, masks=[torch.ones_like(mask) for mask in self.masks])

    def perceptron(self) -> Double:
        """Return the same network, which is of dense layers only, to take features alone."""
        return replace(self, before=[nn.Sequential() for _ in self.before])

    def passed(
        self, x: Tensor, weights: Sequence[Tensor] | None = None, biases: Sequence[Tensor | None] | None = None
    ) -> Passed:
        """Return what passes through the network; weights are masked here.

        Args:
            x: the inputs, (samples, features); after ``above``, what the layer gives.
            weights: to use in the place of its own.
            biases: to use in the place of its own.

        """
        inputs, outputs = [], []
        own = zip(self.layers, self.before, self.masks, self.activations, strict=True)
        given = zip(weights or self.weights, biases or self.biases, strict=True)
        for (layer, before, mask, act), (weight, bias) in zip(own, given, strict=True):
            inputs.append(before(x))
            x = act(product(layer, inputs[-1], weight * mask, bias))
            outputs.append(x)
        return Passed(inputs, outputs)

    def forward(
        self, x: Tensor, weights: Sequence[Tensor] | None = None, biases: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Return the outputs; the arguments are those of ``passed``."""
        return self.passed(x, weights, biases).outputs[-1] if self.layers else x

    def loss(self, x: Tensor, y: Tensor, weights: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Return the mean cross-entropy with these weights, the outputs divided by ``temperature``."""
        return cross_entropy(self.forward(x, weights) / temperature, y)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return the masked gradient of the mean cross-entropy in the weights."""
        weights = [weight.requires_grad_() for weight in map(Tensor.clone, self.weights)]
        return torch.autograd.grad(self.loss(x, y, weights), weights)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Return samples in portions, so that images take little memory."""
        return (values,) if all(weight.ndim == 2 for weight in self.weights) else torch.split(values, _IMAGES)

    def means(self, x: Tensor, total: Callable[[Layer, Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Return, for each layer, the mean over samples of what ``total`` of its inputs and outputs adds up."""
        sums: list[Tensor] = []
        for portion in self.split(x):
            with torch.no_grad():
                inputs, outputs = self.passed(portion)
                found = [total(*each) for each in zip(self.layers, inputs, outputs, strict=True)]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        return [sum_ / len(x) for sum_ in sums]


def product(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a layer makes of its inputs before its activation."""
    if isinstance(layer, ConvLayer):
        return conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return linear(x, weight, bias)


def patches(layer: Layer, x: Tensor) -> Tensor:
    """Return what the rows of ``weight.flatten(1)`` are multiplied with, (samples, in·height·width, places)."""
    if isinstance(layer, ConvLayer):
        height, width = layer.weight.shape[2:]
        return unfold(x, (height, width), layer.dilation, layer.padding, layer.stride)
    return x[:, :, None]


def samples(data: Samples | None) -> tuple[Tensor, Tensor]:
    """Return inputs, in float64, and labels."""
    assert data is not None, "scores checks that there are data"
    return tensor(data[0]).double(), tensor(data[1])
