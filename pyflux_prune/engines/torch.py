"""The reference engine: the same operations made only of ``torch`` and ``torch.nn.utils.prune``.

It shares no numerical code with the Julia engine, so that agreement between the two means something.

Raises:
    EngineUnavailable: on import, where PyTorch is missing.

"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt

from ..choices import (
    Adam,
    AdamW,
    Descent,
    Layerwise,
    Magnitude,
    Momentum,
    Nesterov,
    Optimiser,
    RandomSaliency,
    RMSProp,
    Saliency,
    Sparsity,
    Structure,
)
from ..errors import Diverged, EngineUnavailable, InvalidInput
from .base import Bool, Engine, Float, Int, Layer, Model

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import prune
except ImportError as error:
    raise EngineUnavailable(
        f"PyTorch cannot be imported ({error}): install it with pip install 'torch<2.14'"
    ) from error

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
"""The module of each activation; "identity" has none."""

_TICK = 0.1
"""Seconds between two reports of progress."""


def sequential(layers: Sequence[Layer]) -> nn.Sequential:
    """Return a plain ``nn.Sequential`` with copies of the layers' weights and biases, without their masks.

    torch's random state is left alone.
    """
    modules: list[nn.Module] = []
    for layer in layers:
        outputs, inputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(torch.from_numpy(np.array(layer.weight, order="C")))
        if layer.bias is not None:
            linear.bias = nn.Parameter(torch.from_numpy(np.array(layer.bias)))
        modules.append(linear)
        if layer.activation in ACTIVATION_MODULES:
            modules.append(ACTIVATION_MODULES[layer.activation]())
    return nn.Sequential(*modules)


def linears(module: nn.Sequential) -> list[nn.Linear]:
    """Return the linear modules of what ``sequential`` made, in order."""
    return [part for part in module if isinstance(part, nn.Linear)]


def mask_weight(linear: nn.Linear, mask: Bool) -> None:
    """Put a copy of a mask, (out, in), on a linear module with ``torch.nn.utils.prune.custom_from_mask``.

    From then on ``weight`` is ``weight_orig``, a parameter, times ``weight_mask``, a float32 buffer.
    """
    prune.custom_from_mask(linear, "weight", torch.tensor(mask))  # type: ignore[no-untyped-call]


# --- axis 1: saliency ------------------------------------------------------------------------------------


@singledispatch
def score(criterion: Saliency, model: TorchModel) -> list[Tensor]:
    """Return the saliency of each layer's weights, (out, in); higher is more important.

    A new criterion is one more method of this function.

    Raises:
        InvalidInput: this engine does not have the criterion.

    """
    raise InvalidInput(f"saliency must be one that the torch engine has, not {criterion!r}")


@score.register(Magnitude)
def _(criterion: Magnitude, model: TorchModel) -> list[Tensor]:
    return [weight.detach().abs() for weight in model.weights]


@score.register(RandomSaliency)
def _(criterion: RandomSaliency, model: TorchModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(criterion.seed)
    return [torch.rand(weight.shape, generator=generator) for weight in model.weights]


# --- axis 2: structure -----------------------------------------------------------------------------------


def select(
    names: Sequence[str],
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    sparsity: Sparsity,
    structure: Structure,
) -> list[Tensor]:
    """Return the masks that leave exactly ``round(sparsity·n)`` of each n competing weights pruned.

    The lowest scores of kept weights go first; equal ones go by position: layer, then output, then input.

    Args:
        names: what to call the layers in messages.
        scores: one array per layer, (out, in).
        masks: one bool array per layer, (out, in); left as they are.
        sparsity: one number, or with ``Layerwise`` also one per layer.
        structure: which weights compete.

    Raises:
        InvalidInput: a kept weight scores NaN, the sparsities do not fit the structure, or competing weights
            are sparser already.

    """
    for name, values, mask in zip(names, scores, masks, strict=True):
        if values[mask].isnan().any():
            raise InvalidInput(f"layer {name} cannot be pruned: scores of its weights are NaN")
    if isinstance(structure, Layerwise):
        each = sparsity if isinstance(sparsity, tuple) else (sparsity,) * len(masks)
        if len(each) != len(masks):
            raise InvalidInput(
                f"sparsity must be one number or one per layer, {len(masks)} here, not {len(each)} numbers"
            )
        return [
            _compete(f"layer {name}", [values], [mask], target)[0]
            for name, values, mask, target in zip(names, scores, masks, each, strict=True)
        ]
    if isinstance(sparsity, tuple):
        raise InvalidInput(f"sparsity must be one number where all layers compete (Global), not {sparsity!r}")
    return _compete("the network", scores, masks, sparsity)


def _compete(group: str, scores: Sequence[Tensor], masks: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Return the masks of one group of competing weights."""
    keep = torch.cat([mask.flatten() for mask in masks])
    live = keep.nonzero().squeeze(1)
    pruned, target = len(keep) - len(live), round(sparsity * len(keep))
    if pruned > target:
        raise InvalidInput(
            f"sparsity {sparsity:g} of {group} means {target} of {len(keep)} weights pruned, "
            f"but {pruned} are already: pruned stays pruned"
        )
    order = torch.sort(torch.cat([values.flatten() for values in scores])[live], stable=True).indices
    keep[live[order[: target - pruned]]] = False
    parts = torch.split(keep, [mask.numel() for mask in masks])
    return [part.view_as(mask) for part, mask in zip(parts, masks, strict=True)]


# --- training --------------------------------------------------------------------------------------------


def _optimiser(rule: Optimiser, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's optimiser with the update of the Optimisers.jl rule."""
    match rule:
        case Descent(eta):
            return torch.optim.SGD(parameters, lr=eta)
        case Momentum(eta, rho):
            return torch.optim.SGD(parameters, lr=eta, momentum=rho)
        case Nesterov(eta, rho):  # without momentum it is plain descent, but torch refuses the flag
            return torch.optim.SGD(parameters, lr=eta, momentum=rho, nesterov=rho > 0)
        case RMSProp(eta, rho, epsilon):
            return torch.optim.RMSprop(parameters, lr=eta, alpha=rho, eps=epsilon)
        case Adam(eta, beta, epsilon):
            return torch.optim.Adam(parameters, lr=eta, betas=beta, eps=epsilon)
        case AdamW(eta, beta, lambda_, epsilon):
            return torch.optim.AdamW(parameters, lr=eta, betas=beta, eps=epsilon, weight_decay=lambda_)
    raise InvalidInput(f"optimiser must be one that the torch engine has, not {rule!r}")


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor on the array's memory, which nothing here writes to: torch's warning does not apply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


# --- the engine ------------------------------------------------------------------------------------------


class TorchModel(Model):
    """An ``nn.Sequential`` whose linear modules each carry a mask of ``torch.nn.utils.prune``.

    torch applies a mask by multiplication, and 0·NaN is NaN. Pruned weights are therefore set to 0 before
    anything is computed, as well as after every step: whatever was written there never counts.

    Attributes:
        module: the network.
        weights: each linear module's ``weight_orig``, (out, in).
        masks: each linear module's ``weight_mask``, (out, in) bool.
        biases: each linear module's bias, (out,), or None.

    """

    engine = "torch"

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Copy the layers' arrays."""
        self.module = sequential(layers)
        self.weights: list[nn.Parameter] = []
        self.masks: list[Tensor] = []
        self.biases: list[nn.Parameter | None] = []
        self._layers: list[Layer] = []
        self._optimiser: torch.optim.Optimizer | None = None
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

    def layers(self) -> list[Layer]:
        """Return the layers as NumPy views of torch's own memory, which stays where it is."""
        self._zero_pruned()
        return list(self._layers)

    def load(self, layers: Sequence[Layer]) -> None:
        """Copy weights, biases and masks in; shapes and activations are those of the model."""
        for mine, given in zip(self._layers, layers, strict=True):
            mine.weight[:] = given.weight
            mine.mask[:] = given.mask
            if mine.bias is not None:
                mine.bias[:] = given.bias
        self._zero_pruned()

    @torch.no_grad()
    def forward(self, x: Float) -> Float:
        """Return the outputs (samples, outputs)."""
        outputs: Float = self._outputs(x).numpy()
        return outputs

    @torch.no_grad()
    def evaluate(self, x: Float, y: Int) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy."""
        outputs, labels = self._outputs(x), _tensor(y)
        right = int((outputs.argmax(1) == labels).sum())
        return cross_entropy(outputs, labels).item(), right / len(labels)

    def loss_and_gradients(self, x: Float, y: Int) -> tuple[float, list[tuple[Float, Float | None]]]:
        """Return the mean cross-entropy and, layer by layer, its masked gradient in weight and bias."""
        loss = cross_entropy(self._outputs(x), _tensor(y))
        parameters = list(self.module.parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        return loss.item(), [
            (gradients[weight].numpy(), None if bias is None else gradients[bias].numpy())
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]

    def start(self, optimiser: Optimiser) -> None:
        """Begin a training run: optimiser memory is empty."""
        self._optimiser = _optimiser(optimiser, list(self.module.parameters()))

    def train(
        self, x: Float, y: Int, order: Int, batchsize: int, tick: Callable[[int], None] | None = None
    ) -> Float:
        """Take one step per ``batchsize`` samples of ``x[order]``, and return each step's loss before it.

        ``tick`` is told how many steps are done about ten times a second, and after the last.
        """
        assert self._optimiser is not None, "start comes before train"
        inputs, labels, indices = _tensor(x), _tensor(y), _tensor(order)
        starts = range(0, len(order), batchsize)
        losses = np.empty(len(starts), np.float32)
        self._zero_pruned()
        told = time.monotonic()
        for step, start in enumerate(starts):
            batch = indices[start : start + batchsize]
            loss = cross_entropy(self.module(inputs[batch]), labels[batch])
            if not loss.isfinite():
                raise Diverged("the training loss is not finite; try a lower learning rate")
            self._optimiser.zero_grad()
            torch.autograd.backward(loss)
            self._optimiser.step()
            self._zero_pruned()
            losses[step] = loss.item()
            if tick is not None and (step + 1 == len(starts) or time.monotonic() - told >= _TICK):
                tick(step + 1)
                told = time.monotonic()
        return losses

    def scores(self, saliency: Saliency) -> list[Float]:
        """Return the saliency of each layer's weights, (out, in)."""
        self._zero_pruned()
        return [values.numpy() for values in score(saliency, self)]

    def prune(self, saliency: Saliency, sparsity: Sparsity, structure: Structure) -> None:
        """Prune to ``sparsity``: masks lose entries, weights and optimiser memory there become 0.

        Raises:
            InvalidInput: with nothing changed; see ``select``.

        """
        names = [layer.name for layer in self._layers]
        chosen = select(names, score(saliency, self), self.masks, sparsity, structure)
        for mask, keep in zip(self.masks, chosen, strict=True):
            mask.copy_(keep)
        self._zero_pruned()
        self._forget_pruned()

    def _outputs(self, x: Float) -> Tensor:
        self._zero_pruned()
        outputs: Tensor = self.module(_tensor(x))
        return outputs

    def _zero_pruned(self) -> None:
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.detach().masked_fill_(~mask, 0)

    def _forget_pruned(self) -> None:
        """Empty the optimiser's memory of pruned weights, which would move them again."""
        if self._optimiser is None:
            return
        for weight, mask in zip(self.weights, self.masks, strict=True):
            for memory in self._optimiser.state[weight].values():
                if isinstance(memory, Tensor) and memory.shape == mask.shape:  # not Adam's step count
                    memory.masked_fill_(~mask, 0)


class TorchEngine(Engine):
    """PyTorch on the CPU."""

    name = "torch"

    def build(self, layers: Sequence[Layer]) -> TorchModel:
        """Return a new model with copies of these layers' arrays."""
        return TorchModel(layers)

    def versions(self) -> dict[str, Any]:
        """Return the versions of torch and NumPy, and torch's BLAS and number of threads."""
        blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "blas": blas[1] if blas else "unknown",
            "threads": torch.get_num_threads(),
        }
