"""The engine that computes in Julia, and the only module that imports juliacall."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import io
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .. import sysimage
from ..choices import Choice, Optimiser, Regrowth, Saliency, Sparsity, Structure
from ..errors import Diverged, EngineUnavailable, InvalidInput
from .base import Engine, Kernels, Model, Samples, Scores
from .parts import (
    BatchNorm,
    ConvLayer,
    Flatten,
    Float,
    Input,
    Int,
    Layer,
    Part,
    Pool,
    arrays,
    input_shape,
    with_arrays,
)

_T = TypeVar("_T")

SECONDS_PER_CALL = 0.2
"""How long one call into Julia trains before Python may look at Ctrl-C and redraw progress."""

LOAD = """
GC.enable(false)  # nothing becomes garbage here, and looking for it takes a tenth of the time
try
    @eval begin
        using Flux, PrunableFlux
        import LinearAlgebra
    end
finally
    GC.enable(true)
end
"""

NANOSECONDS_AWAKE = 1_000_000
"""How long a Julia thread waits for more work before it sleeps: waking it takes longer than a small network."""

PACKAGE = Path(__file__).parent.parent / "julia"
"""The Julia package: a link to the repository's ``julia/``, or the wheel's own copy."""


_STARTING = threading.RLock()


def _once(make: Callable[[], _T]) -> Callable[[], _T]:
    """Return a function that makes something once, though several threads call it at the same time."""
    made = functools.cache(make)

    @functools.wraps(make)
    def wait() -> _T:
        with _STARTING:
            return made()

    return wait


@_once
def start() -> Any:
    """Start Julia in this process, once, and return its ``Main`` with PrunableFlux loaded.

    Raises:
        EngineUnavailable: Julia or its packages cannot be had here.

    """
    with _explained(), warnings.catch_warnings():
        # juliacall warns if torch came first; the crash it fears is tested for, and no user can act on it.
        warnings.filterwarnings("ignore", message="torch was imported before juliacall")
        runs = "juliacall" in sys.modules
        settings = {} if runs else _defaults() | _image(*_prepared())
        with _environment(settings):
            import juliacall

            main = juliacall.Main
            # Not by `seval`, which takes long to compile: in what is loaded here it is compiled already. But only
            # `seval` will do in a thread that Julia does not know, as may be where it runs already.
            library = None if runs else juliacall.CONFIG.get("lib")  # none where Julia runs Python
            if library is None or library.jl_eval_string(LOAD.encode()) is None:
                main.seval(LOAD)  # raises what went wrong
    _take_back_interrupts()
    if not {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        main.seval("LinearAlgebra.BLAS.set_num_threads(1)")  # Julia's share products
    return main


def place() -> tuple[str, Path]:
    """Return Julia's executable and the project that juliacall uses here, having seen to both.

    Raises:
        EngineUnavailable: Julia or its packages cannot be had here.

    """
    with _explained():
        return _prepared()


def said(name: str) -> str | None:
    """Return what the user has told juliacall about an option, such as "THREADS"."""
    option = sys._xoptions.get(f"juliacall-{name.lower().replace('_', '-')}")
    return str(option) if option is not None else os.environ.get(f"PYTHON_JULIACALL_{name}")


def has_image() -> bool:
    """Whether juliacall starts Julia with a system image other than Julia's own."""
    return bool(_image(*place()))


def _defaults() -> dict[str, str]:
    """What juliacall should be told, where the user has not said it.

    With Julia's signal handling off, more than one Julia thread can crash in the garbage collector: handling
    is on, unless the user turned it off, and then there is one thread. Threads stay awake for a while.
    """
    defaults = {}
    if "JULIA_THREAD_SLEEP_THRESHOLD" not in os.environ:
        defaults["JULIA_THREAD_SLEEP_THRESHOLD"] = str(NANOSECONDS_AWAKE)
    if said("HANDLE_SIGNALS") is None:
        defaults["PYTHON_JULIACALL_HANDLE_SIGNALS"] = "yes"
    if said("THREADS") is None and "JULIA_NUM_THREADS" not in os.environ:
        defaults["PYTHON_JULIACALL_THREADS"] = "1" if said("HANDLE_SIGNALS") == "no" else "auto"
    return defaults


def _image(julia: str, project: Path) -> dict[str, str]:
    """What juliacall and a system image should be told, where there is one that fits or the user has said one."""
    found = said("SYSIMAGE") or sysimage.find(julia, project)
    if found is None:
        return {}
    embedding = {
        sysimage.LIBPYTHON: f"{os.getpid()} {ctypes.pythonapi._handle}",
        "JULIA_PYTHONCALL_EXE": sys.executable,
    }
    return embedding | {"PYTHON_JULIACALL_SYSIMAGE": str(found)}


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever keeps Julia from starting into one sentence, and keep stdout clean meanwhile."""
    try:
        with _stdout_to_stderr():
            yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, subprocess.CalledProcessError):
            reason = "its package manager failed; what it says is above"
        raise EngineUnavailable(
            f"Julia could not be started ({reason}); `pyflux-prune doctor` says what is missing"
        ) from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep the package manager's messages off stdout, which belongs to results, and drop juliapkg's chatter."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _prepared() -> tuple[str, Path]:
    """See to the Julia project that juliacall will ask juliapkg for; return Julia's executable and the project."""
    exe, given = said("EXE"), said("PROJECT")
    if exe and given:
        return exe, Path(given)
    if exe or given:
        raise ValueError("PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT must both be set, or neither")
    import juliapkg

    if not juliapkg.offline(None):
        if not juliapkg.resolve(dry_run=True):
            print("pyflux_prune: preparing Julia and its packages; some minutes, once", file=sys.stderr)
        return juliapkg.executable(), Path(juliapkg.project())
    # Offline, juliapkg finds Julia and leaves the project empty: fill it from the packages in the depot.
    project = Path(juliapkg.project())
    if not (project / "Manifest.toml").exists():
        script = (
            f'import Pkg; Pkg.offline(true); Pkg.develop(path=raw"{PACKAGE}"); Pkg.add([Pkg.PackageSpec("Flux"), '
            f'Pkg.PackageSpec(name="PythonCall", version="{importlib.metadata.version("juliacall")}")])'
        )
        subprocess.run(
            [juliapkg.executable(), f"--project={project}", "--startup-file=no", "-e", script],
            check=True,
            env={**os.environ, "JULIA_PYTHONCALL_EXE": sys.executable},
        )
    return juliapkg.executable(), project


def _take_back_interrupts() -> None:
    """Give Ctrl-C back to Python: Julia's handling would wait for the call to end, or end the process."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@_once
def _bridge() -> Any:
    return start().seval("Base.get_extension(PrunableFlux, :PrunableFluxPythonCallExt)")


@_once
def _infer_function() -> Callable[[int, int, int, int], int]:
    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return kind(int(_bridge().infer_function()))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what Julia throws at bad input into this package's exceptions."""
    import juliacall

    try:
        yield
    except juliacall.JuliaError as error:
        main, cause = start(), error.exception
        if main.isa(cause, main.ArgumentError) or main.isa(cause, main.DimensionMismatch):
            raise InvalidInput(str(cause.msg)) from None
        if main.isa(cause, main.DomainError):
            raise Diverged(str(cause.msg)) from None
        raise


def _choice(value: Choice) -> Any:
    """Return the Julia struct with the name and the fields of a choice."""
    given = {f.name.rstrip("_"): _field(f.name, getattr(value, f.name)) for f in fields(value)}
    return _bridge().choice(type(value).__name__, **given)


def _field(name: str, value: Any) -> Any:
    if isinstance(value, Choice):
        return _choice(value)
    if name == "exclude":  # layers count from 0 here and from 1 there
        return tuple(i if i < 0 else i + 1 for i in value)
    return value


def _at(array: npt.NDArray[Any] | None) -> int:
    """Return the address of a C-contiguous array, or 0 for none."""
    if array is None:
        return 0
    assert array.flags.c_contiguous
    if array.size and array.flags.writeable:  # in a fifth of the time that the dictionary takes
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    address: int = array.__array_interface__["data"][0]
    return address


class JuliaModel(Model):
    """A Flux ``Chain`` in Julia's memory."""

    engine = "julia"

    def __init__(self, parts: Sequence[Part], model: Any) -> None:
        """Wrap a Julia network whose parts are like these but for their arrays, which are not kept."""
        self._like, self._model = [_without_values(part) for part in parts], model
        self._shape = input_shape(parts)
        self._opt: Any = None
        self._trainer: Any = None

    @staticmethod
    def build(parts: Sequence[Part]) -> JuliaModel:
        """Copy the parts' arrays into Julia."""
        parts = [_row_major(part) for part in parts]
        made = [_made(part) for part in parts if not isinstance(part, Input)]
        return JuliaModel(parts, _bridge().network(*made))

    def parts(self) -> list[Part]:
        """Return all parts, their arrays as NumPy views of Julia's memory."""
        bridge, model, found, place = _bridge(), self._model, list[Part](), 0
        for part in self._like:
            place += not isinstance(part, Input)
            match part:
                case Layer():
                    bias = bridge.bias(model, place)
                    part = replace(
                        part,
                        weight=_view(bridge.weight(model, place)),
                        mask=_view(bridge.mask(model, place)),
                        bias=None if bias is False else np.asarray(bias),
                    )
                case BatchNorm():
                    views: dict[str, Any] = {n: np.asarray(bridge.norm(model, place, n)) for n in arrays(part)}
                    part = replace(part, **views)
            found.append(part)
        return found

    def _load(self, parts: Sequence[Part]) -> None:
        load = getattr(_bridge(), "load!")
        given = [_row_major(part) for part in parts if not isinstance(part, Input)]  # alive until they are copied
        for place, part in enumerate(given, start=1):
            load(self._model, place, *map(_at, _arrays(part)))

    def forward(self, x: Float) -> Float:
        """Return the outputs, a view of Julia's memory; those of a convolution flattened."""
        outputs = np.asarray(_bridge().forward(self._model, _at(x), self._sizes(), len(x))).T
        return outputs.reshape(len(x), -1)

    def evaluate(self, x: Float, y: Int) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy."""
        loss, accuracy = _bridge().score(self._model, *self._samples(x, y))
        return float(loss), float(accuracy)

    def loss_and_gradients(self, x: Float, y: Int) -> tuple[float, list[tuple[Float, Float | None]]]:
        """Return the mean cross-entropy and each layer's gradient."""
        loss, gradients = _bridge().loss_and_gradients(self._model, *self._samples(x, y))
        return float(loss), [(np.asarray(w), None if b is None else np.asarray(b)) for w, b in gradients]

    def start(self, optimiser: Optimiser) -> None:
        """Begin a training run: optimiser memory is empty."""
        self._opt, self._trainer = _bridge().setup(self._model, _choice(optimiser)), None

    def train(
        self, x: Float, y: Int, order: Int, batchsize: int, tick: Callable[[int], None] | None = None
    ) -> Float:
        """Train over the given batches, in Julia, coming back a few times a second for Ctrl-C and ``tick``."""
        order = np.ascontiguousarray(order, np.int64)
        self._trainer = _bridge().trainer(self._model, self._opt, self._trainer)
        data = *self._samples(x, y), _at(order), len(order), batchsize
        steps = _bridge().Steps(self._trainer, self._model, self._opt, *data)
        total, done = len(steps.losses), 0
        while done < total:
            with _translated():
                done = getattr(_bridge(), "advance!")(steps, SECONDS_PER_CALL)
            if tick is not None:
                tick(done)
        return np.array(steps.losses)

    def plain_training(self, optimiser: Optimiser) -> Callable[[Float, Int, Int, int], None]:
        """Return a function that trains a copy without masks, as plain Flux does, over given batches."""
        bridge = _bridge()
        plain = bridge.plain(self._model)
        opt, train = bridge.setup(plain, _choice(optimiser)), getattr(bridge, "train_plain!")

        def go_on(x: Float, y: Int, order: Int, batchsize: int) -> None:
            order = np.ascontiguousarray(order, np.int64)
            train(plain, opt, self._model, *self._samples(x, y), _at(order), len(order), batchsize)

        return go_on

    def adjust(self, eta: float) -> None:
        """Set the learning rate of the training run that is under way."""
        _bridge().adjust(self._opt, eta)

    def _scores(self, saliency: Saliency, data: Samples | None) -> list[Scores]:
        with _translated():
            return [np.asarray(s) for s in _bridge().scores(self._model, _choice(saliency), *self._given(data))]

    def _prune(
        self, saliency: Saliency, sparsity: Sparsity | None, structure: Structure, data: Samples | None
    ) -> None:
        with _translated():
            chosen = _choice(saliency), sparsity, _choice(structure)
            _bridge().prune(self._model, *chosen, self._opt, *self._given(data))

    def regrow(self, method: Regrowth, fraction: float, data: Samples) -> None:
        """Give the place of the smallest weights to others."""
        with _translated():
            _bridge().regrow(self._model, _choice(method), fraction, self._opt, *self._samples(*data))

    def compact(self) -> JuliaModel:
        """Return a model of its own without the neurons that do nothing."""
        with _translated():
            return JuliaModel(self.parts(), _bridge().compact(self._model))

    def sparsify(self, kernels: Kernels) -> Callable[[Float], tuple[Float, bool]]:
        """Return a function that multiplies with what is kept only, or with all where that is faster."""
        bridge = _bridge()
        with _translated():
            network = bridge.sparsify(self._model, kernels, self._sizes())
        call, place, outputs = _infer_function(), int(bridge.address(network)), len(self.layers()[-1].weight)
        infer = getattr(bridge, "infer!")

        def fast(x: Float) -> tuple[Float, bool]:
            y = np.empty((len(x), outputs), np.float32)
            finite = call(place, _at(y), _at(x), len(x))
            if finite < 0:
                finite = infer(network, _at(y), _at(x), len(x))  # throws what was thrown, with its message
            return y, bool(finite)

        return fast

    def _sizes(self) -> Any:
        """Return the number of features, or the sizes of an image in Julia, where the first varies fastest."""
        return self._shape[0] if len(self._shape) == 1 else self._shape[::-1]

    def _samples(self, x: Float, y: Int) -> tuple[int, Any, int, int]:
        """Return what the bridge takes for samples: where they are, their sizes, where labels are, how many."""
        return _at(x), self._sizes(), _at(y), len(x)

    def _given(self, data: Samples | None) -> tuple[int, Any, int, int]:
        """Return the samples of a criterion, which may be none."""
        return (0, self._sizes(), 0, 0) if data is None else self._samples(*data)


def _made(part: Part) -> Any:
    """Return the Flux layer with copies of a part's arrays."""
    bridge = _bridge()
    match part:
        case ConvLayer():
            arguments = *part.weight.shape, *map(_at, _arrays(part)), part.activation
            return bridge.conv(*arguments, part.stride[::-1], part.padding[::-1], part.dilation[::-1])
        case Layer():
            return bridge.dense(*part.weight.shape, *map(_at, _arrays(part)), part.activation)
        case BatchNorm():
            arguments = len(part.weight), *map(_at, _arrays(part)), part.activation
            return bridge.batchnorm(*arguments, part.epsilon, part.momentum)
        case Pool():
            return bridge.pool(part.kind, part.size[::-1], part.stride[::-1], part.padding[::-1])
        case Flatten():
            return bridge.flatten()
    raise AssertionError(part)


def _arrays(part: Part) -> list[npt.NDArray[Any] | None]:
    """Return the arrays of a part in the order in which the bridge takes them."""
    match part:
        case Layer():
            return [part.weight, part.mask, part.bias]
        case BatchNorm():
            return [part.weight, part.bias, part.mean, part.variance]
    return []


def _view(array: Any) -> npt.NDArray[Any]:
    """Return Julia's array of a weight's size as (out, in, height, width): there, kernels are flipped."""
    view: npt.NDArray[Any] = np.asarray(array)
    return view if view.ndim == 2 else view.T[:, :, ::-1, ::-1]


def _without_values(part: Part) -> Part:
    """Return the part with empty arrays."""
    return with_arrays(part, {name: np.empty(0, array.dtype) for name, array in arrays(part).items()})


def _row_major(part: Part) -> Part:
    """Return the part with row-major arrays; a network of this engine has others."""
    return with_arrays(part, {name: np.ascontiguousarray(array) for name, array in arrays(part).items()})


class JuliaEngine(Engine):
    """Flux and PrunableFlux, through juliacall."""

    name = "julia"

    def __init__(self) -> None:
        """Start Julia if this process has not yet; EngineUnavailable where that cannot be done."""
        start()

    def build(self, parts: Sequence[Part]) -> JuliaModel:
        """Return a new model with copies of these parts' arrays."""
        return JuliaModel.build(parts)

    def versions(self) -> dict[str, Any]:
        """Return the versions, threads and BLAS that results depend on."""
        main = start()
        return {
            "julia": str(main.VERSION),
            "juliacall": importlib.metadata.version("juliacall"),
            "Flux": str(main.pkgversion(main.Flux)),
            "PrunableFlux": str(main.pkgversion(main.PrunableFlux)),
            "threads": int(main.Threads.nthreads()),
            "blas": str(
                main.seval(
                    'join((basename(l.libname) for l in LinearAlgebra.BLAS.get_config().loaded_libs), ", ")'
                )
            ),
            "blas_threads": int(main.LinearAlgebra.BLAS.get_num_threads()),
            "processor": str(main.seval('"$(first(Sys.cpu_info()).model) ($(Sys.CPU_NAME))"')),
            "numpy": np.__version__,
        }
