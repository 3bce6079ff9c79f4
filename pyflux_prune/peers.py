"""What a pruned network would otherwise be trained and run with, each set up to be as fast as it can."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .choices import Adam
from .engines import BatchNorm, ConvLayer, Flatten, Input, Layer, Part, Pool
from .engines.julia import JuliaModel
from .engines.parts import Float, Int, input_shape, prunable
from .engines.torch import sequential
from .engines.torch.sparse import sparsify
from .errors import EngineUnavailable
from .network import Network, to_torch

import torch  # isort: skip  # after the engine, which says so where it is missing


class Work(ABC):
    """Something to do many times over."""

    @abstractmethod
    def seconds(self, times: int) -> float:
        """Do it so many times, and return how long that took."""


class Calls(Work):
    """Calls of a function in this process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        """Take the function."""
        self.function = function

    def seconds(self, times: int) -> float:
        """Call the function."""
        began = time.perf_counter()
        for _ in range(times):
            self.function()
        return time.perf_counter() - began

    def outputs(self) -> Float:
        """Return what the function returns."""
        return np.asarray(self.function())


class Processes(Work):
    """Fresh Python processes, each from its start until it says that it has trained a batch."""

    def __init__(self, script: str, sizes: Sequence[int], batch: int, threads: int) -> None:
        """Take a script, and the perceptron, samples and threads that it should train."""
        self.command = [sys.executable, "-c", script, *map(str, (batch, threads, *sizes))]

    def seconds(self, times: int) -> float:
        """Start processes one after the other; their end does not count."""
        total = 0.0
        for _ in range(times):
            began = time.perf_counter()
            with subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                said = process.stdout.readline()
                total += time.perf_counter() - began
            if said != "trained\n":
                raise EngineUnavailable("a fresh Python process could not train a batch; what it says is above")
        return total


JULIA_START = """
import sys
import numpy as np
import pyflux_prune as fp

batch, threads, *sizes = map(int, sys.argv[1:])
net = fp.mlp(sizes, engine="julia")
rng = np.random.default_rng(0)
x, y = rng.random((batch, sizes[0]), dtype=np.float32), rng.integers(0, sizes[-1], batch)
net.model.start(fp.Adam())
net.model.train(x, y, np.arange(batch), batch)
print("trained", flush=True)
"""
"""For ``Processes``; Julia takes its threads from the environment."""

TORCH_START = """
import sys
import torch
from torch import nn

batch, threads, *sizes = map(int, sys.argv[1:])
torch.set_num_threads(threads)
layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
module = nn.Sequential(*layers[:-1])
optimiser = torch.optim.Adam(module.parameters())
x, y = torch.rand(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
nn.functional.cross_entropy(module(x), y).backward()
optimiser.step()
print("trained", flush=True)
"""


class JuliaTraining(Work):
    """Steps on the Julia engine, batches following one another."""

    def __init__(self, train: Callable[[Float, Int, Int, int], Any], x: Float, y: Int, batch: int) -> None:
        """Take what trains over given batches."""
        self.train, self.data, self.batch = train, (x, y), batch

    def seconds(self, times: int) -> float:
        """Train."""
        order = np.resize(np.arange(len(self.data[0])), times * self.batch)
        return Calls(lambda: self.train(*self.data, order, self.batch)).seconds(1)


def masked_training(net: Network, x: Float, y: Int, batch: int) -> JuliaTraining:
    """Steps of Adam on a copy of the network."""
    model = net.copy().model
    model.start(Adam())
    return JuliaTraining(model.train, x, y, batch)


def flux_training(net: Network, x: Float, y: Int, batch: int) -> JuliaTraining:
    """Steps of Adam on the same network in plain Flux, without masks."""
    assert isinstance(net.model, JuliaModel)
    return JuliaTraining(net.model.plain_training(Adam()), x, y, batch)


def torch_training(net: Network, x: Float, y: Int, batch: int) -> Calls:
    """Steps of fused Adam on an ``nn.Sequential`` with the masks of ``torch.nn.utils.prune``."""
    module, x = to_torch(net).train(), x.reshape(len(x), *net.input_shape)
    optimiser = torch.optim.Adam(module.parameters(), lr=Adam().eta, fused=True)
    given = itertools.cycle(
        [(torch.tensor(x[at : at + batch]), torch.tensor(y[at : at + batch])) for at in range(0, len(x), batch)]
    )

    def step() -> None:
        inputs, labels = next(given)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return Calls(step)


def torch_dense(parts: Sequence[Part], x: Float) -> Calls:
    """PyTorch with zeros where weights are pruned."""
    module, inputs = sequential(parts).eval(), torch.from_numpy(x)
    return Calls(torch.inference_mode()(lambda: module(inputs)))


def torch_csr(parts: Sequence[Part], x: Float) -> Calls:
    """PyTorch with sparse matrices; it has no sparse convolutions."""
    function = sparsify(parts, "sparse")
    return Calls(lambda: function(x))


def onnx_runtime(folder: Path, x: Float, threads: int) -> Calls:
    """ONNX Runtime with zeros where weights are pruned."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
    return Calls(lambda: session.run(None, {"x": x})[0])


def openvino(folder: Path, x: Float, threads: int) -> Calls:
    """OpenVINO with zeros where weights are pruned, in single precision like the others."""
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = importlib.import_module("openvino").Core()
    request = core.compile_model(folder / "network.onnx", "CPU", options).create_infer_request()
    return Calls(lambda: request.infer([x], share_inputs=True, share_outputs=True)[0])


class DeepSparse(Work):
    """DeepSparse, in a process of its own, as it needs older packages than this one."""

    SCRIPT = """
import os, sys, time
replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
import numpy as np
from deepsparse import Engine, __version__
folder, threads = sys.argv[1:]
x = np.load(folder + "/x.npy")
engine = Engine(folder + "/network.onnx", len(x), int(threads))
np.save(folder + "/y.npy", engine.run([x])[0])
print(__version__, file=replies)
for line in sys.stdin:
    began = time.perf_counter()
    for _ in range(int(line)):
        engine.run([x], val_inp=False)
    print(time.perf_counter() - began, file=replies)
"""

    def __init__(self, python: str, folder: Path, x: Float, threads: int) -> None:
        """Start the process; EngineUnavailable if it cannot do that."""
        np.save(folder / "x.npy", x)
        quiet = os.environ | {"NM_DISABLE_ANALYTICS": "True"}
        try:
            self.process = subprocess.Popen(
                [python, "-c", self.SCRIPT, folder, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=quiet,
                text=True,
            )
        except OSError as error:
            raise EngineUnavailable(f"{python} cannot be run ({error.strerror})") from error
        assert self.process.stdout is not None
        self.version = self.process.stdout.readline().strip()
        if not self.version:
            _, said = self.process.communicate()
            raise EngineUnavailable(f"{python} cannot run DeepSparse ({(said.splitlines() or ['it ended'])[-1]})")
        self.folder = folder

    def seconds(self, times: int) -> float:
        """Have the process call its engine."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(times, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def outputs(self) -> Float:
        """Return what the engine gave."""
        outputs: Float = np.load(self.folder / "y.npy")
        return outputs

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


RUNTIMES = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}


def installed() -> dict[str, str]:
    """Return the versions of the runtimes that this Python has."""
    packages = {name: runtime.__name__.replace("_", "") for name, runtime in RUNTIMES.items()}
    return {name: importlib.metadata.version(p) for name, p in packages.items() if importlib.util.find_spec(p)}


@contextlib.contextmanager
def inference(
    parts: Sequence[Part], x: Float, threads: int, runtimes: Sequence[str], deepsparse: str | None
) -> Iterator[dict[str, Calls | DeepSparse]]:
    """Yield all that is to run a network on one batch: PyTorch, the runtimes named, and DeepSparse."""
    x = x.reshape(len(x), *input_shape(parts))
    works: dict[str, Calls | DeepSparse] = {
        "PyTorch, dense": torch_dense(parts, x),
        "PyTorch, CSR": torch_csr(parts, x),
    }
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        if runtimes or deepsparse:
            write_onnx(Path(name, "network.onnx"), parts, len(x))
        works |= {runtime: RUNTIMES[runtime](Path(name), x, threads) for runtime in runtimes}
        if deepsparse:
            works["DeepSparse"] = engine = DeepSparse(deepsparse, Path(name), x, threads)
            stack.callback(engine.close)
        yield works


def write_onnx(path: Path, parts: Sequence[Part], batch: int) -> None:
    """Write a network as an ONNX file; EngineUnavailable without the package onnx."""
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise EngineUnavailable(f"onnx cannot be imported ({error}): pip install onnx") from error
    made, nodes, constants, values = onnx.helper, [], [], "x"
    for i, part in enumerate(parts):
        if isinstance(part, Input):
            continue
        operator, held, attributes = _onnx_operator(part)
        names = [f"{i}.{k}" for k in range(len(held))]
        constants += [
            onnx.numpy_helper.from_array(np.array(a, order="C"), n) for n, a in zip(names, held, strict=True)
        ]
        nodes.append(made.make_node(operator, [values, *names], [f"{i}"], **attributes))
        values = f"{i}"
        activation = getattr(part, "activation", "identity")
        if activation != "identity":
            nodes.append(made.make_node(activation.capitalize(), [values], [f"{i}.{activation}"]))
            values = f"{i}.{activation}"
    shapes = [("x", input_shape(parts)), (values, prunable(parts)[-1].weight.shape[:1])]
    inputs, outputs = (
        made.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, *shape]) for name, shape in shapes
    )
    graph = made.make_graph(nodes, "network", [inputs], [outputs], constants)
    # The newest versions that DeepSparse 1.8 reads.
    model = made.make_model(graph, opset_imports=[made.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))


def _onnx_operator(part: Part) -> tuple[str, list[Float], dict[str, Any]]:
    """Return the name of what computes a part, before its activation, with its arrays and attributes."""
    match part:
        case ConvLayer():
            geometry = {"strides": part.stride, "pads": part.padding * 2, "dilations": part.dilation}
            return "Conv", [part.weight, _bias(part)], geometry
        case Layer():
            return "Gemm", [part.weight, _bias(part)], {"transB": 1}
        case BatchNorm():
            arrays = [part.weight, part.bias, part.mean, part.variance]
            return "BatchNormalization", arrays, {"epsilon": part.epsilon}
        case Pool():
            geometry = {"kernel_shape": part.size, "strides": part.stride, "pads": part.padding * 2}
            if part.kind == "max":
                return "MaxPool", [], geometry
            return "AveragePool", [], geometry | {"count_include_pad": 1}
        case Flatten():
            return "Flatten", [], {}
    raise AssertionError(part)


def _bias(layer: Layer) -> Float:
    return np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias
