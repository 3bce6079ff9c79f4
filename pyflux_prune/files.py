"""Model files, and how any file is touched: read with one kind of error, written whole or not at all.

A model is one safetensors file, which PyTorch, NumPy and Julia read without this package. A layer ``0`` is

- ``0.weight``: float32 (out, in), exactly 0 where pruned; or, in sparse storage,
- ``0.values``: float32 (kept,), only the kept weights, in row-major order;
- ``0.mask``: uint8 (⌈out·in / 8⌉,), the row-major mask, 1 keeps, eight to a byte, the first in the highest
  bit, the last byte filled up with 0; absent where nothing is pruned;
- ``0.bias``: float32 (out,); absent where there is none.

The metadata are ``format``, ``version``, ``storage`` ("dense" or "sparse"), ``architecture`` (a JSON list of
``{"name", "in", "out", "bias", "activation"}``, first layer first) and whatever the writer adds.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import reprlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .engines.parts import ACTIVATIONS, Layer
from .errors import InvalidInput

MAX_LAYERS = 1000
"""Networks of more layers are refused: a Flux ``Chain`` is a tuple, which Julia compiles layer by layer."""

_METADATA = {"format": ("pyflux_prune",), "version": ("1",), "storage": ("dense", "sparse")}
"""What is allowed where: in a dense file the first, in a sparse one the last."""

_RESERVED = (*_METADATA, "architecture")
_FIELDS = {"name": str, "in": int, "out": int, "bias": bool, "activation": str}

StrPath = str | os.PathLike[str]

# --- any file --------------------------------------------------------------------------------------------


def to_path(path: StrPath, name: str = "path") -> Path:
    """Return ``path`` as a Path, a leading ``~`` expanded.

    Raises:
        InvalidInput: it is no string or Path, is empty, or holds what no file name can.

    """
    try:
        encoded = os.fsencode(os.path.expanduser(path))
    except (TypeError, ValueError):
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise InvalidInput(f"{name} must be the name of a file or folder, not {reprlib.repr(path)}")
    return Path(os.fsdecode(encoded))


@contextmanager
def naming(subject: object) -> Iterator[None]:
    """Put ``subject`` in front of the message of an InvalidInput that is raised inside."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"{subject}: {error}") from error


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading, and turn what the system objects to, now or inside, into InvalidInput.

    Raises:
        InvalidInput: there is no such file, it is a folder or a device, or it cannot be read.

    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise InvalidInput(f"cannot read {path}: it is not a file")
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error


def read_bytes(path: Path) -> bytes:
    """Return what a file holds; raises what ``reading`` raises."""
    with reading(path) as stream:
        return stream.read()


def atomic_write(path: StrPath, data: bytes) -> None:
    """Write a file which, whatever happens, holds all of ``data`` afterwards or what it held before.

    Raises:
        InvalidInput: the folder is missing or not writable, the disk is full, or ``path`` is no regular file.

    """
    target = to_path(path)
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        if target.exists() and not target.is_file():  # renaming onto a device would destroy it
            raise InvalidInput(f"cannot write {target}: it is there already and is not a file")
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- model files -----------------------------------------------------------------------------------------


def write_model(
    path: StrPath, layers: Sequence[Layer], *, sparse: bool = False, extra: Mapping[str, str] | None = None
) -> None:
    """Write a model file, atomically.

    Args:
        path: where to; a file that is there is replaced.
        layers: the network, first layer first; the arrays may lie in memory in any order.
        sparse: store the kept weights only: about 1/12 of the dense size at 5 % density.
        extra: metadata of the caller's own.

    Raises:
        InvalidInput: what ``check_layers`` raises; ``extra`` is not text, or uses a name of the format's own;
            or what ``atomic_write`` raises. Nothing is written then.

    """
    target = to_path(path)
    with naming(f"cannot write {target}"):
        check_layers(layers)
        data = _encode(layers, sparse, extra or {})
    atomic_write(target, data)


def read_model(path: StrPath) -> tuple[list[Layer], dict[str, str]]:
    """Read a model file, dense or sparse.

    Returns:
        The layers, in arrays of their own, and as metadata ``storage`` ("dense" or "sparse") and the ``extra``
        they were written with.

    Raises:
        InvalidInput: the file cannot be read, or is not a whole and consistent model file. Sizes it declares
            are held against its contents before anything is allocated.

    """
    target = to_path(path)
    with reading(target) as stream, naming(f"{target} is not a model file of pyflux_prune"):
        try:
            with safe_open(target, framework="numpy") as file:
                return _decode(file, capacity=8 * os.fstat(stream.fileno()).st_size)
        except SafetensorError as error:
            raise InvalidInput(f"it is truncated, or no safetensors file ({error})") from error


def check_layers(layers: Sequence[Layer]) -> None:
    """Check that layers make one network, as a model file must hold.

    Raises:
        InvalidInput: no layers, or more than ``MAX_LAYERS``; a name that repeats or holds more than letters,
            digits, ``_``, ``-`` and ``.``; widths that do not meet; an unknown activation; an array of the
            wrong shape or dtype; NaN or Inf; or a pruned weight that is not 0.

    """
    for layer in layers:
        _check_arrays(layer)
    _check_architecture(_architecture(layers))


def _architecture(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    return [
        {
            "name": layer.name,
            "in": layer.weight.shape[1],
            "out": layer.weight.shape[0],
            "bias": layer.bias is not None,
            "activation": layer.activation,
        }
        for layer in layers
    ]


def _encode(layers: Sequence[Layer], sparse: bool, extra: Mapping[str, str]) -> bytes:
    if taken := [key for key in _RESERVED if key in extra]:
        raise InvalidInput(f"extra must not use the format's own {', '.join(taken)}")
    tensors: dict[str, npt.NDArray[Any]] = {}
    for layer in layers:
        if sparse:
            tensors[f"{layer.name}.values"] = layer.weight[layer.mask]
        else:  # safetensors copies memory as it lies, and Julia's lies column by column
            tensors[f"{layer.name}.weight"] = np.ascontiguousarray(layer.weight)
        if not layer.mask.all():
            tensors[f"{layer.name}.mask"] = np.packbits(layer.mask)
        if layer.bias is not None:
            tensors[f"{layer.name}.bias"] = np.ascontiguousarray(layer.bias)
    metadata = {key: allowed[-1 if sparse else 0] for key, allowed in _METADATA.items()}
    try:
        return save(tensors, {**metadata, "architecture": json.dumps(_architecture(layers)), **extra})
    except (TypeError, UnicodeEncodeError) as error:  # everything but extra has been checked
        raise InvalidInput(f"extra must map text to text ({error})") from error


def _decode(file: Any, capacity: int) -> tuple[list[Layer], dict[str, str]]:
    metadata = dict(file.metadata() or {})
    if missing := [key for key in _RESERVED if key not in metadata]:
        raise InvalidInput(f"its metadata lack {', '.join(missing)} (for plain PyTorch weights: from_torch)")
    for key, allowed in _METADATA.items():
        if metadata[key] not in allowed:
            raise InvalidInput(f"its {key} must be {' or '.join(allowed)}, not {reprlib.repr(metadata[key])}")
    try:
        architecture = json.loads(metadata["architecture"])
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"its architecture is not JSON ({error})") from error
    entries = _check_architecture(architecture)
    tensors = _Tensors(file, capacity)
    layers = [tensors.layer(entry, sparse=metadata["storage"] == "sparse") for entry in entries]
    if tensors.left:
        raise InvalidInput(f"its architecture does not mention {reprlib.repr(sorted(tensors.left))}")
    for layer in layers:
        _check_arrays(layer)
    return layers, {key: value for key, value in metadata.items() if key == "storage" or key not in _RESERVED}


class _Tensors:
    """The tensors of an open file. Each is taken once; what is ``left`` in the end is surplus."""

    def __init__(self, file: Any, capacity: int) -> None:
        self.left = set(file.keys())
        self._file = file
        self._capacity = capacity  # a weight takes one bit of the file at the least

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if name not in self.left:
            raise InvalidInput(f"its tensor {name} is missing")
        self.left.remove(name)
        declared = self._file.get_slice(name)
        if (declared.get_dtype(), tuple(declared.get_shape())) != (dtype, shape):
            found = f"{declared.get_dtype()} {tuple(declared.get_shape())}"
            raise InvalidInput(f"its tensor {name} must be {dtype} {shape}, not {found}")
        tensor: npt.NDArray[Any] = self._file.get_tensor(name)
        return tensor

    def layer(self, entry: Mapping[str, Any], *, sparse: bool) -> Layer:
        name, shape = entry["name"], (entry["out"], entry["in"])
        size = shape[0] * shape[1]
        if size > self._capacity:
            raise InvalidInput(f"layer {name}: the file is too small for {shape[0]} × {shape[1]} weights")
        mask = np.ones(shape, np.bool_)
        if f"{name}.mask" in self.left:
            bits = np.unpackbits(self.take(f"{name}.mask", "U8", (-(-size // 8),)))
            if bits[size:].any():
                raise InvalidInput(f"the bits after the end of {name}.mask must be 0")
            mask = bits[:size].astype(np.bool_).reshape(shape)
        if sparse:
            weight = np.zeros(shape, np.float32)
            weight[mask] = self.take(f"{name}.values", "F32", (int(np.count_nonzero(mask)),))
        else:
            weight = self.take(f"{name}.weight", "F32", shape)
        bias = self.take(f"{name}.bias", "F32", shape[:1]) if entry["bias"] else None
        return Layer(name, weight, mask, bias, entry["activation"])


def _check_architecture(entries: object) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_LAYERS:
        found = f"{len(entries)} layers" if isinstance(entries, list) else reprlib.repr(entries)
        raise InvalidInput(f"the architecture must be a list of 1 to {MAX_LAYERS} layers, not {found}")
    for entry in entries:
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != _FIELDS:
            fields = ", ".join(f"{key} ({kind.__name__})" for key, kind in _FIELDS.items())
            raise InvalidInput(f"a layer of the architecture must have {fields}, not {reprlib.repr(entry)}")
        name = reprlib.repr(entry["name"])
        if not re.fullmatch(r"[\w.-]+", entry["name"], re.ASCII):
            raise InvalidInput(f"layer names must be letters, digits, _, - and . only, not {name}")
        for side in ("in", "out"):
            if not 1 <= entry[side] < 2**31:
                given = reprlib.repr(entry[side])
                raise InvalidInput(f"layer {name}: {side} must be from 1 to {2**31 - 1}, not {given}")
        if entry["activation"] not in ACTIVATIONS:
            given, known = reprlib.repr(entry["activation"]), ", ".join(ACTIVATIONS)
            raise InvalidInput(f"layer {name}: activation must be one of {known}, not {given}")
    names = sorted(entry["name"] for entry in entries)
    if twice := next((a for a, b in itertools.pairwise(names) if a == b), None):
        raise InvalidInput(f"layer names must differ, but {reprlib.repr(twice)} occurs twice")
    for before, after in itertools.pairwise(entries):
        if before["out"] != after["in"]:
            raise InvalidInput(
                f"layer {after['name']} takes {after['in']} inputs, but {before['name']} before it has "
                f"{before['out']} outputs"
            )
    return entries


def _check_arrays(layer: Layer) -> None:
    shape = np.shape(layer.weight)
    if len(shape) != 2:
        raise InvalidInput(f"{layer.name}.weight must have the shape (out, in), not {shape}")
    parts: list[tuple[str, object, type[np.generic], tuple[int, ...]]] = [
        ("weight", layer.weight, np.float32, shape),
        ("mask", layer.mask, np.bool_, shape),
    ]
    if layer.bias is not None:
        parts.append(("bias", layer.bias, np.float32, shape[:1]))
    for part, array, dtype, wanted in parts:
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, wanted):
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InvalidInput(f"{layer.name}.{part} must be a {np.dtype(dtype)} array {wanted}, not {found}")
        if not np.isfinite(array).all():
            raise InvalidInput(f"{layer.name}.{part} holds NaN or Inf")
    if revived := np.count_nonzero(layer.weight[~layer.mask]):
        raise InvalidInput(f"pruned weights must be 0, but {revived} of {layer.name}.weight are not")
