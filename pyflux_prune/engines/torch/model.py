"""Networks that live in PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...choices import Optimiser, Regrowth, Saliency, Sparsity, Structure
from ...errors import Diverged
from ..base import Kernels, Model, Samples, Scores
from ..parts import Float, Int, Part, arrays, input_shape, prunable
from .compact import compact
from .double import Double
from .modules import mask_weight, prunable_modules, sequential, tensor, views
from .pruning import prune
from .regrow import regrown
from .saliency import score
from .sparse import sparsify
from .training import Stepper

_TICK = 0.1
"""Seconds between two reports of progress."""

_IMAGES = 256
"""How many images are computed at a time, but in training."""


class TorchModel(Model):
    """An ``nn.Sequential`` whose prunable modules each carry a mask of ``torch.nn.utils.prune``.

    torch applies a mask by multiplication, and 0·NaN is NaN. Pruned weights are therefore set to 0 before
    anything is computed, as well as after every step: whatever was written there never counts.

    Attributes:
        module: the network, of images (samples, channels, height, width); in training mode only during ``train``.
        names: of the prunable layers.
        weights: each prunable module's ``weight_orig``, (out, in) or (out, in, height, width).
        masks: each prunable module's ``weight_mask``, a bool of the same shape.
        biases: each prunable module's bias, (out,), or None.

    """

    engine = "torch"

    def __init__(self, parts: Sequence[Part]) -> None:
        """Copy the parts' arrays."""
        self.module = sequential(parts).eval()
        layers, modules = prunable(parts), prunable_modules(self.module)
        self.names = [layer.name for layer in layers]
        for layer, module in zip(layers, modules, strict=True):
            mask_weight(module, layer.mask)
            module.weight_mask = module.get_buffer("weight_mask").bool()  # so that NumPy can view it
        self.weights = [module.get_parameter("weight_orig") for module in modules]
        self.masks = [module.get_buffer("weight_mask") for module in modules]
        self.biases = [module.bias for module in modules]
        self._shape = input_shape(parts)
        self._parts = views(parts, self.module)
        self._stepper: Stepper | None = None
        self._zero_pruned()

    def parts(self) -> list[Part]:
        """Return all parts, their arrays as NumPy views of torch's own memory, which stays where it is."""
        self._zero_pruned()
        return list(self._parts)

    def _load(self, parts: Sequence[Part]) -> None:
        for mine, given in zip(self._parts, parts, strict=True):
            for name, array in arrays(mine).items():
                array[:] = getattr(given, name)
        self._zero_pruned()

    def double(self) -> Double:
        """Return a float64 copy."""
        return Double.of(self.parts())

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
        self._zero_pruned()
        parameters = [p for p in (*self.weights, *self.biases) if p is not None]
        total, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
        for inputs, labels in zip(self._batches(x), self._split(tensor(y)), strict=True):
            loss = cross_entropy(self.module(inputs), labels) * (len(labels) / len(y))
            total += loss.item()
            for sum_, part in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                sum_ += part
        found = dict(zip(parameters, gradients, strict=True))
        return total, [
            (found[weight].numpy(), None if bias is None else found[bias].numpy())
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
        inputs, labels, indices = tensor(x).view(len(x), *self._shape), tensor(y), tensor(order)
        starts = range(0, len(order), batchsize)
        losses, parameters = np.empty(len(starts), np.float32), list(self.module.parameters())
        self._zero_pruned()
        told = time.monotonic()
        with _training(self.module):
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

    def _scores(self, saliency: Saliency, data: Samples | None) -> list[Scores]:
        """Return those of ``Magnitude``, ``Threshold`` and ``RandomSaliency`` in float32, others in float64."""
        self._zero_pruned()
        return [values.numpy() for values in score(saliency, self, data)]

    def _prune(
        self, saliency: Saliency, sparsity: Sparsity | None, structure: Structure, data: Samples | None
    ) -> None:
        """Prune a copy, and take what it holds once nothing can fail any more."""
        copy = TorchModel(self.parts())
        prune(copy, saliency, sparsity, structure, data)
        self.load(copy.parts())
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
        return TorchModel(compact(self.parts()))

    def sparsify(self, kernels: Kernels) -> Callable[[Float], tuple[Float, bool]]:
        """Return a function that multiplies with torch's sparse CSR matrices, or dense ones where asked to."""
        function = sparsify(self.parts(), kernels)
        return lambda x: (function(x), bool(np.isfinite(x).all()))

    @property
    def features(self) -> int:
        """The number of inputs."""
        return math.prod(self._shape)

    def _outputs(self, x: Float) -> Tensor:
        self._zero_pruned()
        return torch.cat([self.module(batch).flatten(1) for batch in self._batches(x)])

    def _batches(self, x: Float) -> Sequence[Tensor]:
        return self._split(tensor(x).view(len(x), *self._shape))

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        """Return the samples in batches, so that images take little memory."""
        return torch.split(values, _IMAGES) if len(self._shape) > 1 else (values,)

    def _zero_pruned(self) -> None:
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.detach().masked_fill_(~mask, 0)

    def _forget(self, places: Sequence[Tensor]) -> None:
        """Empty the optimiser's memory of some of the weights."""
        if self._stepper is not None:
            for weight, where in zip(self.weights, places, strict=True):
                self._stepper.forget(weight, where)


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Have batch normalisation use and store the statistics of batches for a while."""
    module.train()
    try:
        yield
    finally:
        module.eval()
