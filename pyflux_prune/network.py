"""Networks of prunable dense layers, whichever engine holds them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import files
from .choices import (
    Global,
    Magnitude,
    Saliency,
    Structure,
    check_choice,
    check_count,
    check_match,
    check_sparsity,
)
from .datasets import Dataset, check_inputs, check_labels
from .engines import ACTIVATIONS, Layer, Model, get_engine
from .engines.base import Samples
from .engines.parts import Bool, Float, Int, layer_names
from .errors import InvalidInput

if TYPE_CHECKING:
    import torch


class Network:
    """A multilayer perceptron whose weights carry masks: in Julia, a Flux ``Chain`` of ``PrunableDense``.

    Made by ``mlp``, ``Network.load`` and ``from_torch``. Calling it with ``x``, (samples, features), gives the
    outputs, (samples, outputs) float32, before any softmax.
    """

    def __init__(self, model: Model) -> None:
        """Wrap an engine's model."""
        self.model = model

    @property
    def engine(self) -> str:
        """The engine that holds the network, "julia" or "torch"."""
        return self.model.engine

    @property
    def layers(self) -> list[Layer]:
        """The layers; their weight (out, in), mask and bias are NumPy views of the engine's memory.

        Writing to a weight changes the network. A value written where the mask is False never counts, and is
        set back to 0.
        """
        return self.model.layers()

    @property
    def weights(self) -> list[Float]:
        """Each layer's weight, (out, in) float32, a view."""
        return [layer.weight for layer in self.layers]

    @property
    def masks(self) -> list[Bool]:
        """Each layer's mask, (out, in) bool, True keeps; a view."""
        return [layer.mask for layer in self.layers]

    @property
    def density(self) -> float:
        """Kept prunable weights ÷ all prunable weights; biases do not count."""
        masks = self.masks
        return sum(int(m.sum()) for m in masks) / sum(m.size for m in masks)

    @property
    def sparsity(self) -> float:
        """Pruned prunable weights ÷ all prunable weights."""
        return 1.0 - self.density

    @property
    def features(self) -> int:
        """The number of inputs."""
        return int(self.layers[0].weight.shape[1])

    @property
    def outputs(self) -> int:
        """The number of outputs: of classes."""
        return int(self.layers[-1].weight.shape[0])

    def __call__(self, x: object) -> Float:
        """Return the outputs (samples, outputs) for ``x`` (samples, features), or (outputs,) for one sample.

        Raises:
            InvalidInput: ``x`` has the wrong shape, is not numeric, or holds NaN or infinity.

        """
        array = np.asarray(x)
        if array.ndim == 1:
            one: Float = self.model.forward(check_inputs(array[None], self.features))[0]
            return one
        return self.model.forward(check_inputs(array, self.features))

    def predict(self, x: object) -> Int:
        """Return the class of each sample, (samples,) int64: the index of its largest output."""
        classes: Int = np.argmax(self(x), axis=-1)
        return classes

    def copy(self, engine: str | None = None) -> Network:
        """Return a network of its own with the same weights and masks, on this or another engine."""
        return _build(self.layers, engine or self.engine)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let ``copy.deepcopy`` and ``pickle`` (between processes) make networks of their own."""
        return _build, (self.layers, self.engine)

    def compact(self) -> Network:
        """Return a smaller network with the same outputs to rounding: without the neurons that do nothing.

        A neuron without incoming or without outgoing weights goes; what it adds, if it is constant, goes into the
        next biases. Takes fewer bytes and FLOPs than this network, which is left as it is.
        """
        return Network(self.model.compact())

    def save(self, path: str | PathLike[str], *, sparse: bool = False) -> None:
        """Write a safetensors model file; with ``sparse``, only the kept values and the masks' bits.

        Raises:
            InvalidInput: the file cannot be written; one that was there is as it was.

        """
        files.write_model(path, self.layers, sparse=sparse)

    @staticmethod
    def load(path: str | PathLike[str], engine: str = "auto") -> Network:
        """Read a model file that ``save`` wrote.

        Raises:
            InvalidInput: the file is missing, damaged, or not a model.

        """
        layers, _ = files.read_model(path)
        return _build(layers, engine)

    def __repr__(self) -> str:
        """Return widths, density and engine."""
        widths = "–".join(str(n) for n in (self.features, *(la.weight.shape[0] for la in self.layers)))
        return f"Network({widths}, density={self.density:.3g}, engine={self.engine!r})"


def _build(layers: Sequence[Layer], engine: str) -> Network:
    return Network(get_engine(engine).build(layers))


def mlp(sizes: Sequence[int], *, activation: str = "relu", seed: int = 0, engine: str = "auto") -> Network:
    """Return a multilayer perceptron with Glorot-uniform weights and zero biases.

    Args:
        sizes: the number of inputs, of units in each hidden layer, and of outputs.
        activation: of the hidden layers: identity, relu, tanh or sigmoid.
        seed: the same seed gives the same weights on both engines.
        engine: "auto", "julia" or "torch".

    Raises:
        InvalidInput: fewer than two sizes, a size below 1, or an unknown activation or engine.
        EngineUnavailable: the engine cannot be had here.

    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) < 2:
        raise InvalidInput(f"sizes must hold at least the numbers of inputs and outputs, not {sizes!r}")
    widths = [check_count("each of sizes", n, 1) for n in sizes]
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    rng = np.random.default_rng(check_count("seed", seed, 0))
    activations = [activation] * (len(widths) - 2) + ["identity"]
    layers = [
        Layer(
            name, glorot_uniform(rng, n_out, n_in), np.ones((n_out, n_in), bool), np.zeros(n_out, np.float32), act
        )
        for name, act, n_in, n_out in zip(layer_names(activations), activations, widths, widths[1:], strict=False)
    ]
    return _build(layers, engine)


def glorot_uniform(rng: np.random.Generator, n_out: int, n_in: int, *kernel: int) -> Float:
    """Return (out, in, kernel...) weights uniform in ±√(6 / ((in + out)·places)) (Glorot & Bengio 2010)."""
    limit = math.sqrt(6 / ((n_in + n_out) * math.prod(kernel)))
    return rng.uniform(-limit, limit, (n_out, n_in, *kernel)).astype(np.float32)


def prune(
    net: Network,
    saliency: Saliency = Magnitude(),
    *,
    sparsity: float | Sequence[float] | None = None,
    structure: Structure = Global(),
    data: Dataset | tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
) -> Network:
    """Prune ``net`` in place to ``sparsity``, and return it.

    Exactly ``round(sparsity * n)`` of each ``n`` competing weights are pruned, lowest score first; equal scores
    go by position: layer, output, input. Some criteria also adjust the survivors. Warns with ``LayerCollapse``
    where a layer loses its last weight.

    Args:
        net: the network.
        saliency: how much a weight matters.
        sparsity: in [0, 1), or one per competing layer where the structure allows it; None for ``NofM`` and for
            ``Threshold``, which say themselves what goes.
        structure: what competes with what.
        data: what some criteria score with: a data set, of which the training part counts, or inputs
            (samples, features) and labels (samples,).

    Raises:
        InvalidInput: an argument is none of these, the choices do not fit each other, the criterion needs data
            or cannot use these, or the network is sparser already. Nothing has changed then.

    """
    check_choice("net", net, Network)
    check_choice("saliency", saliency, Saliency)
    check_choice("structure", structure, Structure)
    check_match(saliency, structure)
    if saliency.needs_data and data is None:
        raise InvalidInput(f"data must be given, as the saliency {type(saliency).__name__} needs data")
    samples = None if data is None else check_samples(net, data)
    net.model.prune(saliency, None if sparsity is None else check_sparsity(sparsity), structure, samples)
    return net


def check_dataset(net: Network, data: Dataset) -> Samples:
    """Return the training samples of a data set; InvalidInput unless it is one and fits the network."""
    check_choice("net", net, Network)
    check_choice("data", data, Dataset)
    if data.features != net.features or data.classes > net.outputs:
        raise InvalidInput(
            f"data has {data.features} features and {data.classes} classes, but net takes {net.features} features "
            f"and has {net.outputs} outputs"
        )
    return data.x_train, data.y_train


def check_samples(net: Network, data: object) -> Samples:
    """Return the training samples of a data set, or the inputs and labels given.

    Raises:
        InvalidInput: they are neither, do not fit the network, or hold what no engine can use.

    """
    if isinstance(data, tuple) and len(data) == 2:
        x = check_inputs(data[0], net.features, name="data's x")
        return x, check_labels(data[1], len(x), net.outputs, name="data's y")
    if isinstance(data, Dataset):
        return check_dataset(net, data)
    raise InvalidInput(f"data must be a Dataset, or inputs and labels (x, y), not {reprlib.repr(data)}")


def to_torch(net: Network) -> torch.nn.Sequential:
    """Return a ``torch.nn.Sequential`` of ``Linear`` and activations with copies of the weights.

    Pruned layers come as ``torch.nn.utils.prune`` leaves them, with ``weight_orig`` and ``weight_mask``.

    Raises:
        EngineUnavailable: PyTorch is not installed.

    """
    from . import exchange

    return exchange.module_from_layers(net.layers)


def from_torch(
    module: torch.nn.Module | Mapping[str, Any], *, activation: str | None = None, engine: str = "auto"
) -> Network:
    """Return a network with copies of the weights of a ``Sequential``, or of its state dict.

    Args:
        module: ``Linear`` layers and ReLU, Tanh, Sigmoid or Identity, plain or pruned with
            ``torch.nn.utils.prune``; or a state dict of such a module.
        activation: for a state dict, which does not say: that of the hidden layers.
        engine: "auto", "julia" or "torch".

    Raises:
        InvalidInput: the module holds anything else, or weights that are not finite float32.
        EngineUnavailable: PyTorch, or the engine, cannot be had here.

    """
    from . import exchange

    if isinstance(module, Mapping):
        layers = exchange.layers_from_state_dict(module, activation=activation)
    else:
        layers = exchange.layers_from_module(module)
    return _build(layers, engine)
