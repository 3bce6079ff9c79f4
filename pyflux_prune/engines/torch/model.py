"""Networks that live in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...choices import Optimiser, Regrowth, Saliency, Sparsity, Structure
from ...errors import Diverged
from ..base import Model, Samples, Scores
from ..parts import Float, Int, Layer, Part
from .compact import compact
from .double import Double
from .modules import linears, mask_weight, sequential, tensor
from .pruning import prune
from .regrow import regrown
from .saliency import check, score
from .training import Stepper

_TICK = 0.1
"""Seconds between two reports of progress."""


class TorchModel(Model):
    """An ``nn.Sequential`` whose linear modules each carry a mask of ``torch.nn.utils.prune``.

    torch applies a mask by multiplication, and 0·NaN is NaN. Pruned weights are therefore set to 0 before
    anything is computed, as well as after every step: whatever was written there never counts.

    Attributes:
        module: the network.
        names: of the layers.
        weights: each linear module's ``weight_orig``, (out, in).
        masks: each linear module's ``weight_mask``, (out, in) bool.
        biases: each linear module's bias, (out,), or None.

    """

    engine = "torch"

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Copy the layers' arrays."""
        self.module = sequential(layers)
        self.names = [layer.name for layer in layers]
        self.weights: list[nn.Parameter] = []
        self.masks: list[Tensor] = []
        self.biases: list[nn.Parameter | None] = []
        self._layers: list[Layer] = []
        self._stepper: Stepper | None = None
        for layer, linear in zip(layers, linears(self.module), strict=True):
            mask_weight(linear, layer.mask)
            linear.weight_mask = mask = linear.get_buffer("weight_mask").bool()  # so that NumPy can view it
            weight, bias = linear.get_parameter("weight_orig"), linear.bias
            self.weights.append(weight)
            self.masks.append(mask)
            self.biases.append(bias)
            self._layers.append(
                replace(
                    layer,
                    weight=weight.detach().numpy(),
                    mask=mask.numpy(),
                    bias=None if bias is None else bias.detach().numpy(),
                )
            )
        self._zero_pruned()

    def parts(self) -> list[Part]:
        """Return all parts, their arrays as NumPy views of torch's own memory, which stays where it is."""
        self._zero_pruned()
        return list(self._layers)

    def load(self, layers: Sequence[Part]) -> None:
        """Copy all arrays of these parts in; all else is that of the model."""
        for mine, given in zip(self._layers, layers, strict=True):
            mine.weight[:] = given.weight
            mine.mask[:] = given.mask
            if mine.bias is not None:
                mine.bias[:] = given.bias
        self._zero_pruned()

    def double(self) -> Double:
        """Return a float64 copy."""
        return Double.of(self.layers())

    @torch.no_grad()
    def write(self, net: Double) -> None:
        """Copy the weights and biases of a float64 copy in, rounded, also where masks prune."""
        mine, theirs = (*self.weights, *self.biases), (*net.weights, *net.biases)
        for parameter, values in zip(mine, theirs, strict=True):
            if parameter is not None and values is not None:
                parameter.copy_(values)

    def mask(self, masks: Sequence[Tensor]) -> None:
        """Copy masks in."""
        for mask, given in zip(self.masks, masks, strict=True):
            mask.copy_(given)
        self._zero_pruned()

    @torch.no_grad()
    def forward(self, x: Float) -> Float:
        """Return the outputs (samples, outputs)."""
        outputs: Float = self._outputs(x).numpy()
        return outputs

    @torch.no_grad()
    def evaluate(self, x: Float, y: Int) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy."""
        outputs, labels = self._outputs(x), tensor(y)
        right = int((outputs.argmax(1) == labels).sum())
        return cross_entropy(outputs, labels).item(), right / len(labels)

    def loss_and_gradients(self, x: Float, y: Int) -> tuple[float, list[tuple[Float, Float | None]]]:
        """Return the mean cross-entropy and, layer by layer, its masked gradient in weight and bias."""
        loss = cross_entropy(self._outputs(x), tensor(y))
        parameters = list(self.module.parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        return loss.item(), [
            (gradients[weight].numpy(), None if bias is None else gradients[bias].numpy())
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]

    def start(self, optimiser: Optimiser) -> None:
        """Begin a training run: optimiser memory is empty."""
        self._stepper = Stepper(optimiser, list(self.module.parameters()))

    def adjust(self, eta: float) -> None:
        """Set the learning rate of the training run that ``start`` began; its memory stays."""
        assert self._stepper is not None, "start comes before adjust"
        self._stepper.adjust(eta)

    def train(
        self, x: Float, y: Int, order: Int, batchsize: int, tick: Callable[[int], None] | None = None
    ) -> Float:
        """Take one step per ``batchsize`` samples of ``x[order]``, and return each step's loss before it.

        ``tick`` is told how many steps are done about ten times a second, and after the last.
        """
        assert self._stepper is not None, "start comes before train"
        inputs, labels, indices = tensor(x), tensor(y), tensor(order)
        starts = range(0, len(order), batchsize)
        losses, parameters = np.empty(len(starts), np.float32), list(self.module.parameters())
        self._zero_pruned()
        told = time.monotonic()
        for step, start in enumerate(starts):
            batch = indices[start : start + batchsize]
            loss = cross_entropy(self.module(inputs[batch]), labels[batch])
            if not loss.isfinite():
                raise Diverged("the training loss is not finite; try a lower learning rate")
            self._stepper.step(torch.autograd.grad(loss, parameters))
            self._zero_pruned()
            losses[step] = loss.item()
            if tick is not None and (step + 1 == len(starts) or time.monotonic() - told >= _TICK):
                tick(step + 1)
                told = time.monotonic()
        return losses

    def scores(self, saliency: Saliency, data: Samples | None = None) -> list[Scores]:
        """Return the saliency of each layer's weights, (out, in), or of its neurons, (out,).

        Those of ``Magnitude``, ``Threshold`` and ``RandomSaliency`` are float32, all others float64.
        """
        self._zero_pruned()
        check(saliency, data)
        return [values.numpy() for values in score(saliency, self, data)]

    def _prune(
        self, saliency: Saliency, sparsity: Sparsity | None, structure: Structure, data: Samples | None
    ) -> None:
        """Prune a copy, and take what it holds once nothing can fail any more."""
        copy = TorchModel(self.layers())
        prune(copy, saliency, sparsity, structure, data)
        self.load(copy.layers())
        self._forget([~mask for mask in self.masks])

    def regrow(self, method: Regrowth, fraction: float, data: Samples) -> None:
        """Give the place of the smallest weights of each layer to others, which begin at 0."""
        self._zero_pruned()
        gone, grown = regrown(method, fraction, self, data)
        for mask, out, new in zip(self.masks, gone, grown, strict=True):
            mask.copy_(mask & ~out | new)
        self._zero_pruned()
        self._forget([out | new for out, new in zip(gone, grown, strict=True)])

    def compact(self) -> TorchModel:
        """Return a model of its own without the neurons that do nothing; its outputs are the same to rounding."""
        return TorchModel(compact(self.layers()))

    def _outputs(self, x: Float) -> Tensor:
        self._zero_pruned()
        outputs: Tensor = self.module(tensor(x))
        return outputs

    def _zero_pruned(self) -> None:
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.detach().masked_fill_(~mask, 0)

    def _forget(self, places: Sequence[Tensor]) -> None:
        """Empty the optimiser's memory of some of the weights."""
        if self._stepper is not None:
            for weight, where in zip(self.weights, places, strict=True):
                self._stepper.forget(weight, where)
