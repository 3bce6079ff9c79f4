"""The interface that both engines have, and the values that cross it.

Arrays are NumPy. Inputs are (samples, features) float32, C-contiguous, images flattened channel by channel and row
by row; labels are (samples,) int64 from 0; weights and masks are (out, in), of convolutions (out, in, height,
width). Everything that reaches an engine has been checked (see ``network`` and ``datasets``); an engine may assume
it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..choices import Neurons, Optimiser, Regrowth, Saliency, Sparsity, Structure, check_choice, check_match
from ..errors import InvalidInput, LayerCollapse
from .parts import Flatten, Float, Input, Int, Layer, Part, alike, check_batches, prunable

Scores = npt.NDArray[np.floating[Any]]
"""Most criteria are computed in float64."""

Kernels = str | tuple[str, ...]
"""How layers are multiplied: "auto", "sparse" or "dense", for all or one per layer."""

Samples = tuple[Float, Int]
"""Inputs (samples, features) and labels (samples,)."""


class Model(ABC):
    """A network that lives on one engine."""

    engine: str
    """"julia" or "torch"."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """Return all parts, their arrays as NumPy views of the engine's own memory."""

    def layers(self) -> list[Layer]:
        """Return the parts that can be pruned."""
        return prunable(self.parts())

    def load(self, parts: Sequence[Part]) -> None:
        """Copy all arrays of these parts in; InvalidInput unless all else is as in the model."""
        if not alike(self.parts(), parts):
            raise InvalidInput("parts must be those of the network, but for the values in their arrays")
        self._load(parts)

    @abstractmethod
    def _load(self, parts: Sequence[Part]) -> None:
        """Do what ``load`` promises, for parts that fit."""

    @abstractmethod
    def forward(self, x: Float) -> Float:
        """Return the outputs (samples, outputs)."""

    @abstractmethod
    def evaluate(self, x: Float, y: Int) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy."""

    @abstractmethod
    def loss_and_gradients(self, x: Float, y: Int) -> tuple[float, list[tuple[Float, Float | None]]]:
        """Return the mean cross-entropy and, layer by layer, its masked gradient in weight and bias."""

    @abstractmethod
    def start(self, optimiser: Optimiser) -> None:
        """Begin a training run: optimiser memory is empty."""

    @abstractmethod
    def train(
        self, x: Float, y: Int, order: Int, batchsize: int, tick: Callable[[int], None] | None = None
    ) -> Float:
        """Take one step per ``batchsize`` samples of ``x[order]``, and return each step's loss before the step.

        ``order`` holds indices from 0; the last batch may be smaller. Pruned weights stay exactly 0. ``tick``
        is told now and then how many of these steps are done. ``start`` comes first.
        """

    @abstractmethod
    def adjust(self, eta: float) -> None:
        """Set the learning rate of the training run that ``start`` began; its memory stays."""

    def scores(self, saliency: Saliency, data: Samples | None = None) -> list[Scores]:
        """Return the saliency of each layer's weights, in their shape, or of its neurons, (out,).

        Neurons of a convolution are its filters. Raises InvalidInput for a choice that engines do not have, and
        where network or data will not do: other layers than dense ones, none or too few samples, a batch without
        some class, a singular Hessian, a network that is too large.
        """
        check_saliency(saliency, self.parts(), data)
        return self._scores(saliency, data)

    @abstractmethod
    def _scores(self, saliency: Saliency, data: Samples | None) -> list[Scores]:
        """Do what ``scores`` promises, for what has been checked."""

    def prune(
        self,
        saliency: Saliency,
        sparsity: Sparsity | None,
        structure: Structure,
        data: Samples | None = None,
    ) -> None:
        """Prune to ``sparsity``: masks lose entries, weights and optimiser memory there become 0.

        Warns with ``LayerCollapse`` where that empties a layer. Raises InvalidInput, with nothing changed, where
        a competing group is sparser already, where ``saliency`` and ``structure`` do not fit each other, and
        what ``scores`` raises.
        """
        parts = self.parts()
        check_saliency(saliency, parts, data)
        _check_structure(structure, len(prunable(parts)), sparsity)
        check_match(saliency, structure)
        alive = [bool(layer.mask.any()) for layer in prunable(parts)]
        self._prune(saliency, sparsity, structure, data)
        for layer, before in zip(self.layers(), alive, strict=True):
            if before and not layer.mask.any():
                warnings.warn(
                    f"pruning left no weight in layer {layer.name}, so that the network's outputs no longer "
                    "depend on its inputs; min_kept=1 in the structure keeps one",
                    LayerCollapse,
                    stacklevel=3,
                )

    @abstractmethod
    def _prune(
        self, saliency: Saliency, sparsity: Sparsity | None, structure: Structure, data: Samples | None
    ) -> None:
        """Do what ``prune`` promises, for what has been checked, but for the warning."""

    @abstractmethod
    def regrow(self, method: Regrowth, fraction: float, data: Samples) -> None:
        """Give the place of the smallest weights of each layer to others, which begin at 0.

        In each layer with k kept and p pruned weights, ``min(round(fraction·k), p)`` kept weights of the least
        magnitude are pruned, and as many of those pruned before are kept from now on: for ``RigL`` those with
        the largest absolute gradient of the mean cross-entropy over ``data``. Ties go by position, the first
        being dropped, and the first growing. Optimiser memory of both becomes 0.
        """

    @abstractmethod
    def compact(self) -> Model:
        """Return a model of its own without the neurons that do nothing; its outputs are the same to rounding.

        A hidden neuron, or filter, goes if none of its outgoing weights is kept, or if none of its incoming ones
        is: then it is the constant σ(b), which the biases of the next layer take over (and get a bias for, if they
        have none and the constant is not 0). A filter whose constant a padded convolution or mean would mix with
        zeros stays. One neuron of each layer stays. Among the others all masks are kept.
        """

    @abstractmethod
    def sparsify(self, kernels: Kernels) -> Callable[[Float], tuple[Float, bool]]:
        """Return the network as a function from (samples, features) to (samples, outputs) that uses sparsity.

        With the outputs it returns whether all inputs are finite. It is of the network as it is now.
        """


def check_saliency(saliency: Saliency, parts: Sequence[Part], data: Samples | None) -> None:
    """Raise InvalidInput unless a criterion can score a network of these parts with these samples."""
    check_choice("saliency", saliency, Saliency)
    name = type(saliency).__name__
    if saliency.needs_data and data is None:
        raise InvalidInput(f"data must be given, as the saliency {name} needs data")
    if saliency.of_dense_layers and any(type(part) not in (Layer, Input, Flatten) for part in parts):
        raise InvalidInput(f"saliency {saliency} is for networks of dense layers only, but net has other parts")
    training: Any = getattr(saliency, "training", None)
    if saliency.normalises and training.epochs and data is not None:
        check_batches(parts, len(data[1]), training.batchsize, f"{name}'s")


def _check_structure(structure: Structure, layers: int, sparsity: Sparsity | None) -> None:
    """Raise InvalidInput unless a structure leaves some of the layers, and allows sparsities of this kind."""
    check_choice("structure", structure, Structure)
    if isinstance(sparsity, tuple) and not structure.per_layer:
        raise InvalidInput(f"sparsity must be one number with {structure}, not one per layer")
    if wrong := [i for i in structure.exclude if not -layers <= i < layers]:
        raise InvalidInput(
            f"exclude must hold numbers of the {layers} prunable layers, from 0 or from the end (-1), "
            f"not {wrong[0]}"
        )
    competing = set(range(layers - isinstance(structure, Neurons))) - {i % layers for i in structure.exclude}
    if structure.exclude and not competing:
        raise InvalidInput(f"exclude must leave layers that can be pruned, not {structure.exclude}")


class Engine(ABC):
    """Something that can hold and compute networks."""

    name: str

    @abstractmethod
    def build(self, parts: Sequence[Part]) -> Model:
        """Return a new model with copies of these parts' arrays."""

    @abstractmethod
    def versions(self) -> dict[str, Any]:
        """Return the versions, threads and BLAS that results depend on."""
