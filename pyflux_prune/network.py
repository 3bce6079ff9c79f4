"""Networks of prunable layers, whichever engine holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from . import files
from .choices import (
    Global,
    Magnitude,
    Saliency,
    Structure,
    check_choice,
    check_sparsity,
    listed,
    shown,
)
from .datasets import Dataset, as_inputs, as_samples, check_inputs, check_labels
from .engines import ConvLayer, Layer, Model, Part, Pool, get_engine
from .engines.base import Kernels, Samples
from .engines.parts import Bool, Float, Int, input_shape
from .errors import InvalidInput

if TYPE_CHECKING:
    import torch


class Network:
    """A network whose weights carry masks: in Julia, a Flux ``Chain`` of ``PrunableDense`` and ``PrunableConv``.

    Made by ``mlp``, ``lenet5``, ``vgg``, ``Network.load`` and ``from_torch``. Calling it with ``x``, (samples,
    features) or, if it takes images, (samples, channels, height, width), gives the outputs, (samples, outputs)
    float32, before any softmax.
    """

    def __init__(self, model: Model) -> None:
        """Wrap an engine's model."""
        self.model = model

    @property
    def engine(self) -> str:
        """The engine that holds the network, "julia" or "torch"."""
        return self.model.engine

    @property
    def parts(self) -> list[Part]:
        """All parts, the prunable layers among them; their arrays are NumPy views of the engine's memory."""
        return self.model.parts()

    @property
    def layers(self) -> list[Layer]:
        """The prunable layers; their weight, mask and bias are NumPy views of the engine's memory.

        A weight is (out, in), that of a convolution (out, in, height, width). Writing to a weight changes the
        network. A value written where the mask is False never counts, and is set back to 0.
        """
        return self.model.layers()

    @property
    def weights(self) -> list[Float]:
        """Each prunable layer's weight, float32, a view."""
        return [layer.weight for layer in self.layers]

    @property
    def masks(self) -> list[Bool]:
        """Each prunable layer's mask, bool, True keeps; a view."""
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
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (features,) or (channels, height, width)."""
        return input_shape(self.parts)

    @property
    def features(self) -> int:
        """The number of inputs."""
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """The number of outputs: of classes."""
        return int(self.layers[-1].weight.shape[0])

    def __call__(self, x: object) -> Float:
        """Return the outputs (samples, outputs) for ``x``, or (outputs,) for one sample.

        Samples are (features,) or of ``input_shape``; engines take them flattened, which needs no copy.

        Raises:
            InvalidInput: ``x`` has the wrong shape, is not numeric, or holds NaN or infinity.

        """
        shape = self.input_shape
        samples, is_one = as_samples(x, shape)
        outputs = self.model.forward(check_inputs(samples, math.prod(shape), shape))
        return outputs.reshape(-1) if is_one else outputs

    def predict(self, x: object) -> Int:
        """Return the class of each sample, (samples,) int64: the index of its largest output."""
        classes: Int = np.argmax(self(x), axis=-1)
        return classes

    def copy(self, engine: str | None = None) -> Network:
        """Return a network of its own with the same weights and masks, on this or another engine."""
        return build(self.parts, engine or self.engine)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let ``copy.deepcopy`` and ``pickle`` make networks of their own.

        Processes of ``multiprocessing`` that use them must be started by "spawn": Julia does not survive a fork.
        """
        return build, (self.parts, self.engine)

    def compact(self) -> Network:
        """Return a smaller network with the same outputs to rounding: without the neurons that do nothing.

        A neuron, or filter, without incoming or without outgoing weights goes; what it adds, if it is constant,
        goes into the next biases. Takes fewer bytes and FLOPs than this network, which is left as it is.
        """
        return Network(self.model.compact())

    def sparsify(self, *, kernels: Kernels | Sequence[str] = "auto") -> SparseNetwork:
        """Return the network as a function for inference whose work is proportional to the weights that are kept.

        On Julia, batches are computed in panels of up to 64 samples by vectorised sparse kernels, on all of its
        threads, and neurons without consequence, which ``compact`` takes out, are not computed. A layer that is
        not sparse enough stays dense. The PyTorch engine uses torch's CSR matrices for dense layers, and leaves
        convolutions as they are.

        Args:
            kernels: "auto" takes, layer by layer, what is faster on this machine; "sparse" and "dense" force it,
                for all layers or one per layer.

        Raises:
            InvalidInput: ``kernels`` is none of these.

        """
        known, one_for_all = ("auto", "sparse", "dense"), isinstance(kernels, str)
        names = (kernels,) if one_for_all else listed(kernels) or ()
        fitting = [str(name) for name in names if isinstance(name, str) and name in known]
        if len(names) != (1 if one_for_all else len(self.layers)) or len(fitting) != len(names):
            raise InvalidInput(
                f"kernels must be one of {', '.join(known)}, or a list with one of these for each of the "
                f"{len(self.layers)} layers, not {shown(kernels)}"
            )
        chosen = fitting[0] if one_for_all else tuple(fitting)
        return SparseNetwork(self.model.sparsify(chosen), self.features, self.input_shape, self.density)

    def save(self, path: str | PathLike[str], *, sparse: bool = False) -> None:
        """Write a safetensors model file; with ``sparse``, only the kept values and the masks' bits.

        Raises:
            InvalidInput: the file cannot be written; one that was there is as it was.

        """
        files.write_model(path, self.parts, sparse=sparse)

    @staticmethod
    def load(path: str | PathLike[str], engine: str = "auto") -> Network:
        """Read a model file that ``save`` wrote.

        Raises:
            InvalidInput: the file is missing, damaged, or not a model.

        """
        parts, _ = files.read_model(path)
        return build(parts, engine)

    def __repr__(self) -> str:
        """Return the sketch, density and engine."""
        return f"Network({self.sketch}, density={self.density:.3g}, engine={self.engine!r})"

    @property
    def sketch(self) -> str:
        """The shape of the inputs and what the layers make of them, such as 784–300–100–10."""
        layers = "–".join(filter(None, map(_sketch, self.parts)))
        return f"{'×'.join(map(str, self.input_shape))}–{layers}"


def _sketch(part: Part) -> str:
    """Return a layer or pooling in a word: 10 units, 6@5×5 filters of a kernel, max2×2."""
    match part:
        case ConvLayer():
            out, _, height, width = part.weight.shape
            return f"{out}@{height}×{width}"
        case Layer():
            return str(len(part.weight))
        case Pool():
            return f"{part.kind}{part.size[0]}×{part.size[1]}"
    return ""


def build(parts: Sequence[Part], engine: str) -> Network:
    """Return a network of these parts, which ``engines.parts.shapes`` has checked."""
    return Network(get_engine(engine).build(parts))


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
            (samples, features), or of the network's input shape, and labels (samples,).

    Raises:
        InvalidInput: an argument is none of these, the choices do not fit each other, the criterion needs data
            or cannot use these, or the network is sparser already. Nothing has changed then.

    """
    check_choice("net", net, Network)
    check_choice("saliency", saliency, Saliency)
    check_choice("structure", structure, Structure)
    samples = None if data is None else check_samples(net, data)
    net.model.prune(saliency, None if sparsity is None else check_sparsity(sparsity), structure, samples)
    return net


class SparseNetwork:
    """What ``Network.sparsify`` returns: called with ``x``, it gives the network's outputs to rounding.

    It is the network as it was then; masks and weights that change later do not reach it.
    """

    def __init__(
        self,
        function: Callable[[Float], tuple[Float, bool]],
        features: int,
        input_shape: tuple[int, ...],
        density: float,
    ) -> None:
        """Wrap an engine's function, which also tells whether all inputs were finite."""
        self._function, self._density = function, density
        self._features, self._input_shape = features, input_shape

    def __call__(self, x: object) -> Float:
        """Return the outputs (samples, outputs) for ``x``, or (outputs,) for one sample, as the network does.

        Raises:
            InvalidInput: ``x`` has the wrong shape, is not numeric, or holds NaN or infinity.

        """
        samples, is_one = as_samples(x, self._input_shape)
        outputs, finite = self._function(as_inputs(samples, self._features, self._input_shape))
        if not finite:
            check_inputs(samples, self._features, self._input_shape)
        return outputs.reshape(-1) if is_one else outputs

    def __deepcopy__(self, memo: object) -> SparseNetwork:
        """Return the same: it never changes."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: what it calls is in the engine's memory."""
        raise TypeError("a sparse network cannot be pickled; pickle the network, and call its sparsify again")

    def __repr__(self) -> str:
        """Return the density."""
        return f"SparseNetwork(density={self._density:.3g})"


def check_dataset(net: Network, data: Dataset) -> Samples:
    """Return the training samples of a data set; InvalidInput unless it is one and fits the network."""
    check_choice("net", net, Network)
    check_choice("data", data, Dataset)
    shape = net.input_shape
    if len(shape) == 3 and data.shape not in (None, shape):
        raise InvalidInput(f"data has samples of the shape {data.shape}, but net takes {shape}")
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
        x = check_inputs(data[0], net.features, net.input_shape, name="data's x")
        return x, check_labels(data[1], len(x), net.outputs, name="data's y")
    if isinstance(data, Dataset):
        return check_dataset(net, data)
    raise InvalidInput(f"data must be a Dataset, or inputs and labels (x, y), not {shown(data)}")


def to_torch(net: Network) -> torch.nn.Sequential:
    """Return a ``torch.nn.Sequential`` that computes the same, with copies of the weights.

    Pruned layers come as ``torch.nn.utils.prune`` leaves them, with ``weight_orig`` and ``weight_mask``. Where the
    network has convolutions the module takes (samples, channels, height, width).

    Raises:
        InvalidInput: ``net`` is no network.
        EngineUnavailable: PyTorch is not installed.

    """
    from . import exchange

    check_choice("net", net, Network)
    return exchange.module_from_parts(net.parts)


def from_torch(
    module: torch.nn.Module | Mapping[str, Any],
    *,
    input_shape: Sequence[int] | None = None,
    activation: str | None = None,
    engine: str = "auto",
) -> Network:
    """Return a network with copies of the weights of a ``Sequential``, or of its state dict.

    Args:
        module: ``Linear``, ``Conv2d``, ``BatchNorm1d`` and ``BatchNorm2d``, each with or without ReLU, Tanh or
            Sigmoid after it, ``MaxPool2d``, ``AvgPool2d``, ``AdaptiveAvgPool2d``, ``Flatten`` and ``Identity``,
            plain or pruned with ``torch.nn.utils.prune``; or, of ``Linear`` layers only, a state dict of such a
            module.
        input_shape: (channels, height, width) of a sample, for a module that takes images.
        activation: for a state dict, which does not say: that of the hidden layers.
        engine: "auto", "julia" or "torch".

    Raises:
        InvalidInput: the module holds anything else, does not fit ``input_shape``, or has weights that are not
            finite float32; or ``input_shape`` or ``activation`` is given where it does not count.
        EngineUnavailable: PyTorch, or the engine, cannot be had here.

    """
    from . import exchange

    if isinstance(module, Mapping):
        if input_shape is not None:
            raise InvalidInput("input_shape is for a module: a state dict must be of dense layers")
        return build(exchange.layers_from_state_dict(module, activation=activation), engine)
    if activation is not None:
        raise InvalidInput("activation is for a state dict: a module says itself which it has")
    return build(exchange.parts_from_module(module, input_shape), engine)
