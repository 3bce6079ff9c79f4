"""Classification data sets: checked arrays, and where they come from."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from .choices import check_count, check_number, listed, shown
from .engines.parts import Float, Int
from .errors import InvalidInput
from .files import StrPath, naming, read_bytes, reading, to_path

_Number = TypeVar("_Number", np.float32, np.int64)
_Bytes = npt.NDArray[np.uint8]

# --- checks ----------------------------------------------------------------------------------------------


def check_inputs(x: object, features: int | None = None, shape: tuple[int, ...] = (), name: str = "x") -> Float:
    """Return ``x`` as (samples, features) float32, C-contiguous.

    An array that is so already comes back as it is, without a copy. Other memory orders and other float,
    integer and bool dtypes are converted, which makes a copy.

    Args:
        x: a NumPy array of finite real numbers, at least one sample.
        features: how many columns it must have; None for any number.
        shape: of the samples that may be given instead of columns, (channels, height, width); they are flattened.
        name: what messages call it.

    Raises:
        InvalidInput: ``x`` is anything else, or not finite once it is float32.

    """
    array = as_inputs(x, features, shape, name)
    finite = np.isfinite(array)
    if not finite.all():
        first = tuple(map(int, np.unravel_index(finite.argmin(), finite.shape)))
        raise InvalidInput(
            f"{name} must be finite, but {np.count_nonzero(~finite)} of its {array.size} values are NaN or Inf "
            f"as float32, the first at {first}: {np.asarray(x).reshape(array.shape)[first]}"
        )
    return array


def as_inputs(x: object, features: int | None = None, shape: tuple[int, ...] = (), name: str = "x") -> Float:
    """Return ``x`` as ``check_inputs`` does, without a look at its values."""
    if not isinstance(x, np.ndarray):
        raise InvalidInput(f"{name} must be a NumPy array, not {type(x).__name__}")
    if x.dtype.kind not in "fiub":
        raise InvalidInput(f"{name} must hold real numbers, not {x.dtype}")
    images = len(shape) == 3 and x.shape[1:] == shape
    if not images and (x.ndim != 2 or (features is not None and x.shape[1] != features)):
        other = f" or (samples, {', '.join(map(str, shape))})" if len(shape) == 3 else ""
        raise InvalidInput(f"{name} must have the shape (samples, {features or 'features'}){other}, not {x.shape}")
    if x.size == 0:
        raise InvalidInput(f"{name} must not be empty, but has the shape {x.shape}")
    columns: npt.NDArray[Any] = _flat(x) if images else x
    if columns.dtype == np.float32:
        return _addressable(columns, np.float32)
    with np.errstate(over="ignore"):
        return _addressable(columns, np.float32)


def as_samples(x: object, shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], bool]:
    """Return ``x`` as an array of samples, and whether it is one sample alone, (features,) or of this shape.

    Raises:
        InvalidInput: NumPy cannot make an array of it, or it is one-dimensional but no sample.

    """
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:  # what lists and tensors of other libraries raise
        raise InvalidInput(f"x must be an array of numbers, not {shown(x)}: {error}") from error
    if array.ndim == 1 and array.size != math.prod(shape):
        n = math.prod(shape)
        raise InvalidInput(f"x must have the shape (samples, {n}), or ({n},) of one sample, not {array.shape}")
    is_one = array.ndim == 1 or array.shape == shape
    return (array[None] if is_one else array), is_one


def check_labels(y: object, n: int, classes: int | None = None, name: str = "y") -> Int:
    """Return ``y`` as (n,) int64, C-contiguous; without a copy where it is so already.

    Args:
        y: a NumPy array of integers, the class of each sample, counted from 0.
        n: the number of samples.
        classes: labels must be below this; None for any number of classes.
        name: what messages call it.

    Raises:
        InvalidInput: ``y`` is anything else; floats are refused even where they are whole numbers.

    """
    if not isinstance(y, np.ndarray):
        raise InvalidInput(f"{name} must be a NumPy array, not {type(y).__name__}")
    if y.dtype.kind not in "iu":
        raise InvalidInput(f"{name} must have an integer dtype, not {y.dtype}")
    if y.shape != (n,):
        raise InvalidInput(f"{name} must hold one label for each of {n} samples, but has the shape {y.shape}")
    top = (classes or 2**31) - 1
    outside = (y < 0) | (y > top)
    if outside.any():
        first = int(outside.argmax())
        raise InvalidInput(f"{name} must hold labels from 0 to {top}, not {y[first]} (at position {first})")
    return _addressable(y, np.int64)


def _addressable(array: npt.NDArray[Any], dtype: type[_Number]) -> npt.NDArray[_Number]:
    """Return an array as engines can take it by its address; without a copy where it is so already."""
    contiguous = np.ascontiguousarray(array, dtype)
    return contiguous if contiguous.flags.aligned else contiguous.copy()


def check_shape(name: str, value: object) -> tuple[int, int, int]:
    """Return (channels, height, width); InvalidInput unless these are three whole numbers from 1."""
    if (sizes := listed(value)) and len(sizes) == 3:
        channels, height, width = (check_count(f"each of {name}", n, 1) for n in sizes)
        return channels, height, width
    raise InvalidInput(f"{name} must be (channels, height, width), not {shown(value)}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples of a classification problem, checked when it is made.

    Attributes:
        name: what reports call it.
        x_train: (n, features) float32, C-contiguous; ``check_inputs`` says what is converted.
        y_train: (n,) int64, labels from 0 to classes − 1.
        x_test: (m, features) float32, C-contiguous.
        y_test: (m,) int64.
        classes: the number of classes.
        shape: of an image before it was flattened, (channels, height, width); None where samples are none, or of
            unknown shape.

    Raises:
        InvalidInput: what ``check_inputs`` and ``check_labels`` raise, ``name`` is no text, ``classes`` is below
            1, or samples cannot have the ``shape``.

    """

    name: str
    x_train: Float = field(repr=False)
    y_train: Int = field(repr=False)
    x_test: Float = field(repr=False)
    y_test: Int = field(repr=False)
    classes: int
    shape: tuple[int, int, int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the fields, and convert the arrays."""
        if not isinstance(self.name, str):
            raise InvalidInput(f"name must be text, not {shown(self.name)}")
        classes = check_count("classes", self.classes, 1)
        x_train = check_inputs(self.x_train, name="x_train")
        x_test = check_inputs(self.x_test, x_train.shape[1], name="x_test")
        shape = None if self.shape is None else check_shape("shape", self.shape)
        if shape is not None and math.prod(shape) != x_train.shape[1]:
            raise InvalidInput(f"shape must be of samples with {x_train.shape[1]} features, not {shape}")
        checked = {
            "x_train": x_train,
            "y_train": check_labels(self.y_train, len(x_train), classes, name="y_train"),
            "x_test": x_test,
            "y_test": check_labels(self.y_test, len(x_test), classes, name="y_test"),
            "classes": classes,
            "shape": shape,
        }
        for key, value in checked.items():
            object.__setattr__(self, key, value)

    @property
    def features(self) -> int:
        """The number of inputs per sample."""
        return int(self.x_train.shape[1])

    @property
    def fingerprint(self) -> str:
        """A hash of everything but the name: equal where a run finds the same samples in the same order."""
        found = hashlib.blake2b(repr((self.x_train.shape, self.classes, self.shape)).encode(), digest_size=16)
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            found.update(array.data)
        return found.hexdigest()


# --- arrays ----------------------------------------------------------------------------------------------


def arrays(
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    x_test: npt.NDArray[Any] | None = None,
    y_test: npt.NDArray[Any] | None = None,
    test_size: float = 0.2,
    seed: int = 0,
    name: str = "arrays",
) -> Dataset:
    """Make a data set of arrays; without a test set, split one off.

    Args:
        x: (n, ...) real numbers; all axes but the first are flattened. Images, (n, channels, height, width) or (n,
            height, width), give the data set its ``shape``. Together with a test set, it is copied only where
            ``check_inputs`` must.
        y: (n,) integers, labels from 0; the largest of ``y`` and ``y_test`` tells the number of classes.
        x_test: (m, ...) likewise, or None.
        y_test: (m,) likewise, or None.
        test_size: the share of the samples to split off, in (0, 1), or their number. The split is shuffled
            and stratified: each class has its share of the test set to within one sample.
        seed: of the shuffling.
        name: what reports call the data set.

    Raises:
        InvalidInput: arrays that cannot be used, only one of ``x_test`` and ``y_test``, or a ``test_size``
            that leaves no samples on one side.

    """
    shape = _image_shape(x)
    x = check_inputs(_flat(x))
    y = check_labels(y, len(x))
    if x_test is None and y_test is None:
        train, test = _split(y, test_size, seed)
        return Dataset(name, x[train], y[train], x[test], y[test], classes=int(y.max()) + 1, shape=shape)
    if x_test is None or y_test is None:
        missing = "x_test" if x_test is None else "y_test"
        raise InvalidInput(f"x_test and y_test go together, but {missing} is missing")
    if None not in (shape, test_shape := _image_shape(x_test)) and test_shape != shape:
        raise InvalidInput(f"x_test must hold images of the shape of those in x, {shape}, not {test_shape}")
    x_test = check_inputs(_flat(x_test), x.shape[1], name="x_test")
    y_test = check_labels(y_test, len(x_test), name="y_test")
    return Dataset(name, x, y, x_test, y_test, classes=int(max(y.max(), y_test.max())) + 1, shape=shape)


def _image_shape(x: Any) -> tuple[int, int, int] | None:
    match np.shape(x)[1:] if isinstance(x, np.ndarray) else ():
        case (height, width):
            return 1, height, width
        case (channels, height, width):
            return channels, height, width
    return None


def _flat(x: Any) -> Any:
    return x.reshape(len(x), math.prod(x.shape[1:])) if isinstance(x, np.ndarray) and x.ndim else x


def _split(y: Int, test_size: float, seed: int) -> tuple[Int, Int]:
    n = len(y)
    if isinstance(test_size, (float, np.floating)):
        check_number("test_size", test_size, 0, 1, open_low=True)
        count = round(test_size * n)
    else:
        count = check_count("test_size", test_size, 1)
    if not 0 < count < n:
        raise InvalidInput(f"test_size must leave some of {n} samples on either side, not {shown(test_size)}")
    rng = np.random.default_rng(check_count("seed", seed, 0))
    order = rng.permutation(n)
    order = order[np.argsort(y[order], kind="stable")]
    test = (2 * np.arange(count) + 1) * n // (2 * count)  # at even distances, through class after class
    return rng.permutation(np.delete(order, test)), rng.permutation(order[test])


def npz(path: StrPath) -> Dataset:
    """Read a NumPy ``.npz`` file of arrays ``x``, ``y`` and, if it has them, ``x_test`` and ``y_test``.

    The data set is named after the file; ``arrays`` says which shapes and dtypes are allowed, and how a test
    set is split off.

    Raises:
        InvalidInput: no such file, a corrupt one, one with pickled objects, or what ``arrays`` raises.

    """
    target = to_path(path)
    with reading(target) as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                held = sorted(file)
                found = {key: file[key] for key in ("x", "y", "x_test", "y_test") if key in held}
        except Exception as error:  # zipfile, zlib and the .npy reader meet corrupt bytes with a dozen kinds
            raise InvalidInput(f"cannot read {target} as an .npz file of plain arrays: {error}") from error
    with naming(target):
        if missing := [key for key in ("x", "y") if key not in found]:
            raise InvalidInput(f"has no array {' and no '.join(missing)}, only {shown(held)}")
        return arrays(**found, name=target.stem)


def digits(seed: int = 0, test_size: float = 450) -> Dataset:
    """Return scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels in [0, 1], 10 classes.

    Args:
        seed: of the shuffled, stratified split.
        test_size: as in ``arrays``; by default, 1,347 samples to train on and 450 to test on.

    Raises:
        InvalidInput: a ``seed`` or ``test_size`` that cannot be used.

    """
    from sklearn.datasets import load_digits  # a second to import, which no other data set should cost

    images, labels = load_digits(return_X_y=True)
    return arrays(images.reshape(-1, 1, 8, 8) / 16, labels, test_size=test_size, seed=seed, name="digits")


# --- files of images -------------------------------------------------------------------------------------


def mnist(dir: StrPath) -> Dataset:
    """Read MNIST, or a data set in its format, from a folder of IDX files.

    Args:
        dir: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte``, also as ``train-images.idx3-ubyte`` etc., gzipped with ``.gz`` or not.

    Returns:
        Images flattened row by row, pixels in [0, 1]; 10 classes.

    Raises:
        InvalidInput: a missing, truncated, overlong or corrupt file, images and labels that differ in number,
            or a label above 9.

    """
    folder = to_path(dir, "dir")
    (x_train, y_train, shape), (x_test, y_test, _) = (_mnist_part(folder, part) for part in ("train", "t10k"))
    with naming(folder):
        return Dataset("mnist", x_train, y_train, x_test, y_test, classes=10, shape=shape)


def cifar10(dir: StrPath) -> Dataset:
    """Read CIFAR-10 in its Python or its binary version.

    Args:
        dir: holds ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, or these with ``.bin``; or holds
            the folder of these as it is unpacked, ``cifar-10-batches-py`` or ``cifar-10-batches-bin``.

    Returns:
        Images flattened channel by channel (red, green, blue), each row by row, pixels in [0, 1]; 10 classes.

    Raises:
        InvalidInput: a missing, truncated or corrupt file, a pickle of anything else, or a label above 9.

    """
    expected = "data_batch_1 … data_batch_5 and test_batch, or these with .bin"
    python, binary = "test_batch", "test_batch.bin"
    names = [python, f"cifar-10-batches-py/{python}", binary, f"cifar-10-batches-bin/{binary}"]
    test = _find(to_path(dir, "dir"), names, expected)
    train = [_find(test.parent, [f"data_batch_{i}{test.suffix}"], expected) for i in range(1, 6)]
    read = _cifar_records if test.suffix else _cifar_pickle
    images, labels = zip(*map(read, train), strict=True)
    x_train, y_train, (x_test, y_test) = np.concatenate(images), np.concatenate(labels), read(test)
    return Dataset("cifar10", _pixels(x_train), y_train, _pixels(x_test), y_test, classes=10, shape=(3, 32, 32))


def load(spec: str) -> Dataset:
    """Return the data set that the command line calls ``spec``.

    Args:
        spec: ``digits``, ``mnist:DIR``, ``cifar10:DIR`` or ``FILE.npz``.

    Raises:
        InvalidInput: any other form, or what the reader of that form raises.

    """
    kind, _, folder = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if spec == "digits":
        return digits()
    if kind == "mnist" and folder:
        return mnist(folder)
    if kind == "cifar10" and folder:
        return cifar10(folder)
    if kind and spec.endswith(".npz"):
        return npz(spec)
    raise InvalidInput(f"data must be digits, mnist:DIR, cifar10:DIR or FILE.npz, not {shown(spec)}")


def _find(folder: Path, names: Sequence[str], expected: str) -> Path:
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    problem = f"has no {names[0]}" if os.path.isdir(folder) else "is not a folder"
    raise InvalidInput(f"{folder} {problem}; expected there: {expected}")


def _pixels(images: _Bytes) -> Float:
    return np.divide(images.reshape(len(images), -1), 255, dtype=np.float32)


def _mnist_part(folder: Path, part: str) -> tuple[Float, Int, tuple[int, int, int]]:
    images, labels = _idx(folder, f"{part}-images", 3), _idx(folder, f"{part}-labels", 1)
    with naming(folder):
        checked = check_labels(labels, len(images), 10, name=f"{part}-labels")
    return _pixels(images), checked, (1, *images.shape[1:])


def _idx(folder: Path, stem: str, ndim: int) -> _Bytes:
    """Read an IDX file: two zeros, the type (8: bytes), the number of axes, the length of each, the bytes."""
    names = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
    parts = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    path = _find(folder, names, f"{', '.join(parts)}, each plain or .gz")
    magic = bytes((0, 0, 8, ndim))
    shape: tuple[int, ...] = ()
    size = start = 4 + 4 * ndim
    data, cut = bytearray(), ""
    with reading(path) as file:
        stream = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
        try:  # one byte more than the header promises, and memory for no more than there is
            while len(data) <= size and (part := stream.read1(min(size + 1 - len(data), 1 << 20))):
                data += part
                if not shape and len(data) >= start:
                    shape = struct.unpack_from(f">{ndim}I", data, 4)
                    size = start + math.prod(shape)
        except EOFError:
            cut = " and no end of the gzip stream"
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InvalidInput(f"{path} is corrupt: {error}") from error
    if not magic.startswith(data[:4]):
        raise InvalidInput(f"{path} must start with the bytes {magic.hex(' ')}, not {data[:4].hex(' ')}")
    if len(data) != size or cut:
        problem = "too long" if len(data) > size else "truncated"
        raise InvalidInput(f"{path} is {problem}: expected {size} bytes, found {len(data)}{cut}")
    if 0 in shape:
        raise InvalidInput(f"{path} must not be empty, but has the shape {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _cifar_records(path: Path) -> tuple[_Bytes, Int]:
    data = read_bytes(path)
    if not data or len(data) % 3073:
        raise InvalidInput(f"{path} must be a whole number of records of 3073 bytes, not {len(data)} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return records[:, 1:], check_labels(records[:, 0], len(records), 10, name=f"{path}: labels")


def _cifar_pickle(path: Path) -> tuple[_Bytes, Int]:
    data = read_bytes(path)
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # corrupt opcodes can raise anything
        raise InvalidInput(f"{path} is not a CIFAR-10 batch: {error!r}") from error
    match batch:
        case {
            b"data": _Pickled(state=[_, [int(n), 3072], _Pickled(args=[b"u1", *_]), False, bytes(pixels)]),
            b"labels": list(labels),
        } if 0 < len(pixels) == n * 3072 and all(type(label) is int for label in labels):
            images = np.frombuffer(pixels, np.uint8).reshape(n, 3072)
            return images, check_labels(np.array(labels), n, 10, name=f"{path}: labels")
    raise InvalidInput(f"{path} is not a CIFAR-10 batch of data, (images, 3072) bytes, and labels, a list")


class _Pickled:
    """Stands in for NumPy's names in a pickle: keeps what it is told, and acts on none of it."""

    args: tuple[object, ...] = ()
    state: object = None

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.state = state


class _BatchUnpickler(pickle._Unpickler):
    """Reads the bytes, integers, lists and one array of a CIFAR-10 batch, and calls nothing it names.

    It is the unpickler written in Python: the one in C allocates whatever corrupt bytes ask for. So does an
    opcode of protocol 5; these files are of protocol 2, and the opcodes from protocol 4 on are left out.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        opcode: action
        for opcode, action in pickle._Unpickler.dispatch.items()
        if opcode < pickle.SHORT_BINUNICODE[0]
    }

    def find_class(self, module: str, name: str) -> type[_Pickled]:
        if f"{module}.{name}" in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            return _Pickled
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
