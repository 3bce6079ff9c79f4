"""Model files, and how any file is touched: read with one kind of error, written whole or not at all.

A model is one safetensors file, which PyTorch, NumPy and Julia read without this package. A prunable layer ``0``
is

- ``0.weight``: float32 (out, in), of a convolution (out, in, height, width), exactly 0 where pruned; or, in sparse
  storage,
- ``0.values``: float32 (kept,), only the kept weights, in row-major order;
- ``0.mask``: uint8 (⌈weights / 8⌉,), the row-major mask, 1 keeps, eight to a byte, the first in the highest
  bit, the last byte filled up with 0; absent where nothing is pruned;
- ``0.bias``: float32 (out,); absent where there is none.

Batch normalisation ``1`` is ``1.weight``, ``1.bias``, ``1.running_mean``, ``1.running_var``: float32 (channels,).

The metadata are ``format``, ``version``, ``storage`` ("dense" or "sparse"), ``architecture`` and whatever the
writer adds. The architecture is a JSON list, first layer first. In version 1, of networks of dense layers only,
its entries are ``{"name", "in", "out", "bias", "activation"}``. In version 2, of all others, each says its type:

- ``"type": "input"``, only as the first: ``"shape"``, [channels, height, width];
- ``"type": "dense"``: as in version 1;
- ``"type": "conv"``: the same, and as [height, width] ``"kernel"``, ``"stride"``, ``"padding"``, ``"dilation"``;
- ``"type": "batchnorm"``: ``"name"``, ``"channels"``, ``"activation"``, ``"epsilon"``, ``"momentum"``;
- ``"type": "pool"``: ``"name"``, ``"kind"`` ("max" or "mean"), and as [height, width] ``"size"``, ``"stride"``,
  ``"padding"``;
- ``"type": "flatten"``: ``"name"``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .choices import shown
from .engines.parts import (
    ACTIVATIONS,
    LIMIT,
    BatchNorm,
    ConvLayer,
    Flatten,
    Float,
    Input,
    Layer,
    Part,
    Pool,
    arrays,
    shapes,
    with_arrays,
)
from .errors import InvalidInput

MAX_LAYERS = 1000
"""Networks of more layers are refused: a Flux ``Chain`` is a tuple, which Julia compiles layer by layer."""

_METADATA = {"format": ("pyflux_prune",), "version": ("1", "2"), "storage": ("dense", "sparse")}
"""What is allowed where."""

_RESERVED = (*_METADATA, "architecture")

_DENSE = ("name", "in", "out", "bias", "activation")
_ENTRIES = {
    "input": ("shape",),
    "dense": _DENSE,
    "conv": (*_DENSE, "kernel", "stride", "padding", "dilation"),
    "batchnorm": ("name", "channels", "activation", "epsilon", "momentum"),
    "pool": ("name", "kind", "size", "stride", "padding"),
    "flatten": ("name",),
}
"""The fields of each type of entry."""

_STORED = {"mean": "running_mean", "variance": "running_var"}
"""The tensors that are not called like the fields they hold."""


@dataclass(frozen=True)
class _Field:
    """What an entry may hold in one field."""

    kind: type
    words: str
    allows: Callable[[Any], bool]


def _one_of(*names: str) -> _Field:
    return _Field(str, f"one of {', '.join(names)}", lambda value: value in names)


def _whole(low: int) -> _Field:
    return _Field(int, f"from {low} to {LIMIT}", lambda value: low <= value <= LIMIT)


def _several(count: int, low: int) -> _Field:
    def allows(values: list[Any]) -> bool:
        return len(values) == count and all(type(n) is int and low <= n <= LIMIT for n in values)

    return _Field(list, f"{count} whole numbers from {low} to {LIMIT}", allows)


_FIELDS = {
    "name": _Field(str, "letters, digits, _, - and . only", lambda n: bool(re.fullmatch(r"[\w.-]+", n, re.ASCII))),
    "in": _whole(1),
    "out": _whole(1),
    "channels": _whole(1),
    "bias": _Field(bool, "true or false", lambda value: True),
    "activation": _one_of(*ACTIVATIONS),
    "kind": _one_of("max", "mean"),
    "shape": _several(3, 1),
    "kernel": _several(2, 1),
    "size": _several(2, 1),
    "stride": _several(2, 1),
    "dilation": _several(2, 1),
    "padding": _several(2, 0),
    "epsilon": _Field(float, "above 0", lambda value: 0 < value < math.inf),
    "momentum": _Field(float, "from 0 to 1", lambda value: 0 <= value <= 1),
}

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
        raise InvalidInput(f"{name} must be the name of a file or folder, not {shown(path)}")
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


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return a value of JSON as text; numbers that are not finite, which JSON does not have, as null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    match value:
        case dict():
            return {name: _finite(each) for name, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
    return value


def is_temporary(path: Path) -> bool:
    """Return whether this is what ``atomic_write`` leaves behind where it is killed."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name) is not None


# --- model files -----------------------------------------------------------------------------------------


def write_model(
    path: StrPath, parts: Sequence[Part], *, sparse: bool = False, extra: Mapping[str, str] | None = None
) -> None:
    """Write a model file, atomically.

    Args:
        path: where to; a file that is there is replaced.
        parts: the network, from the inputs on; the arrays may lie in memory in any order.
        sparse: store the kept weights only: about 1/12 of the dense size at 5 % density.
        extra: metadata of the caller's own.

    Raises:
        InvalidInput: what ``check_parts`` raises; ``extra`` is not text, or uses a name of the format's own;
            or what ``atomic_write`` raises. Nothing is written then.

    """
    target = to_path(path)
    with naming(f"cannot write {target}"):
        check_parts(parts)
        data = _encode(parts, sparse, extra or {})
    atomic_write(target, data)


def read_model(path: StrPath) -> tuple[list[Part], dict[str, str]]:
    """Read a model file, dense or sparse.

    Returns:
        The parts, in arrays of their own, and as metadata ``storage`` ("dense" or "sparse") and the ``extra``
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


def check_parts(parts: Sequence[Part]) -> None:
    """Check that parts make one network, as a model file must hold.

    Raises:
        InvalidInput: no parts, or more than ``MAX_LAYERS``; a name that repeats or holds more than letters,
            digits, ``_``, ``-`` and ``.``; parts that do not fit each other; an unknown activation; an array of
            the wrong shape or dtype; NaN or Inf; a pruned weight that is not 0; or a negative variance.

    """
    for part in parts:
        _check_arrays(part)
    _check_architecture([_entry(part) for part in parts])
    shapes(parts)


def _entry(part: Part) -> dict[str, Any]:
    """Return what the architecture says of a part."""
    match part:
        case Input():
            return {"type": "input", "shape": list(part.shape)}
        case Layer():
            out, n_in, *kernel = part.weight.shape
            entry = {
                "type": "dense",
                "name": part.name,
                "in": n_in,
                "out": out,
                "bias": part.bias is not None,
                "activation": part.activation,
            }
            if isinstance(part, ConvLayer):
                entry |= {"type": "conv", "kernel": kernel} | _pairs(part, "stride", "padding", "dilation")
            return entry
        case BatchNorm():
            return {
                "type": "batchnorm",
                "name": part.name,
                "channels": len(part.weight),
                "activation": part.activation,
                "epsilon": part.epsilon,
                "momentum": part.momentum,
            }
        case Pool():
            place = {"type": "pool", "name": part.name, "kind": part.kind}
            return place | _pairs(part, "size", "stride", "padding")
        case Flatten():
            return {"type": "flatten", "name": part.name}


def _pairs(part: Part, *names: str) -> dict[str, Any]:
    return {name: list(getattr(part, name)) for name in names}


def _part(entry: Mapping[str, Any]) -> Part:
    """Return the part that an entry describes, with zeros in the place of its arrays that take no memory."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in entry.items()
        if name not in ("type", "in", "out", "bias", "channels", "kernel")
    }
    match entry["type"]:
        case "input":
            return Input(**given)
        case "dense" | "conv" as kind:
            shape = _weight_shape(entry)
            weight, mask = _zeros(*shape), np.broadcast_to(np.False_, shape)
            layer = Layer if kind == "dense" else ConvLayer
            return layer(weight=weight, mask=mask, bias=_zeros(shape[0]) if entry["bias"] else None, **given)
        case "batchnorm":
            each = _zeros(entry["channels"])
            return BatchNorm(weight=each, bias=each, mean=each, variance=each, **given)
        case "pool":
            return Pool(**given)
    return Flatten(**given)


def _weight_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return (entry["out"], entry["in"], *entry.get("kernel", ()))


def _zeros(*shape: int) -> Float:
    return np.broadcast_to(np.float32(0), shape)


def _encode(parts: Sequence[Part], sparse: bool, extra: Mapping[str, str]) -> bytes:
    if taken := [key for key in _RESERVED if key in extra]:
        raise InvalidInput(f"extra must not use the format's own {', '.join(taken)}")
    tensors: dict[str, npt.NDArray[Any]] = {}
    for part in parts:
        for field, array in arrays(part).items():  # safetensors copies memory as it lies, Julia's column by column
            tensors[f"{getattr(part, 'name', '')}.{_STORED.get(field, field)}"] = np.ascontiguousarray(array)
        if isinstance(part, Layer):
            name = part.name
            if sparse:
                tensors[f"{name}.values"] = tensors.pop(f"{name}.weight")[part.mask]
            mask = tensors.pop(f"{name}.mask")
            if not mask.all():
                tensors[f"{name}.mask"] = np.packbits(mask)
    entries = [_entry(part) for part in parts]
    only_dense = all(entry["type"] == "dense" for entry in entries)
    metadata = {
        "format": "pyflux_prune",
        "version": "1" if only_dense else "2",
        "storage": "sparse" if sparse else "dense",
        "architecture": json.dumps([_untyped(entry) for entry in entries] if only_dense else entries),
    }
    try:
        return save(tensors, {**metadata, **extra})
    except (TypeError, UnicodeEncodeError) as error:  # everything but extra has been checked
        raise InvalidInput(f"extra must map text to text ({error})") from error


def _untyped(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "type"}


def _decode(file: Any, capacity: int) -> tuple[list[Part], dict[str, str]]:
    metadata = dict(file.metadata() or {})
    if missing := [key for key in _RESERVED if key not in metadata]:
        raise InvalidInput(f"its metadata lack {', '.join(missing)} (for plain PyTorch weights: from_torch)")
    for key, allowed in _METADATA.items():
        if metadata[key] not in allowed:
            raise InvalidInput(f"its {key} must be {' or '.join(allowed)}, not {shown(metadata[key])}")
    try:
        architecture = json.loads(metadata["architecture"])
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"its architecture is not JSON ({error})") from error
    entries = _check_architecture(architecture, metadata["version"])
    for entry in entries:
        if "in" in entry and math.prod(size := _weight_shape(entry)) > capacity:  # a weight takes a bit at least
            wanted = " × ".join(map(str, size))
            raise InvalidInput(f"layer {entry['name']}: the file is too small for {wanted} weights")
    tensors, parts = _Tensors(file), [_part(entry) for entry in entries]
    shapes(parts)
    parts = [tensors.filled(part, sparse=metadata["storage"] == "sparse") for part in parts]
    if tensors.left:
        raise InvalidInput(f"its architecture does not mention {shown(sorted(tensors.left))}")
    for part in parts:
        _check_arrays(part)
    return parts, {key: value for key, value in metadata.items() if key == "storage" or key not in _RESERVED}


class _Tensors:
    """The tensors of an open file. Each is taken once; what is ``left`` in the end is surplus."""

    def __init__(self, file: Any) -> None:
        self.left = set(file.keys())
        self._file = file

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

    def filled(self, part: Part, *, sparse: bool) -> Part:
        """Return a part with the file's arrays in the place of its own, which have their shapes."""
        given: dict[str, npt.NDArray[Any]] = {}
        if isinstance(part, Layer):
            name, shape = part.name, part.weight.shape
            given["mask"] = mask = self.mask(name, shape)
            if sparse:
                given["weight"] = weight = np.zeros(shape, np.float32)
                weight[mask] = self.take(f"{name}.values", "F32", (int(np.count_nonzero(mask)),))
        for field, array in arrays(part).items():
            if field not in given:
                stored = f"{getattr(part, 'name', '')}.{_STORED.get(field, field)}"
                given[field] = self.take(stored, "F32", array.shape)
        return with_arrays(part, given)

    def mask(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        if f"{name}.mask" not in self.left:
            return np.ones(shape, np.bool_)
        size = math.prod(shape)
        bits = np.unpackbits(self.take(f"{name}.mask", "U8", (-(-size // 8),)))
        if bits[size:].any():
            raise InvalidInput(f"the bits after the end of {name}.mask must be 0")
        return bits[:size].astype(np.bool_).reshape(shape)


def _check_architecture(entries: object, version: str = "2") -> list[dict[str, Any]]:
    """Return the entries, each with its type, once each is well-formed and names differ."""
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_LAYERS:
        found = f"{len(entries)} layers" if isinstance(entries, list) else shown(entries)
        raise InvalidInput(f"the architecture must be a list of 1 to {MAX_LAYERS} layers, not {found}")
    typed = any(isinstance(entry, dict) and "type" in entry for entry in entries)
    if version != ("2" if typed else "1"):
        raise InvalidInput(f"its version must be {'2' if typed else '1'}, not {version!r}")
    for entry in entries:
        _check_entry(entry, typed)
    names = sorted(entry["name"] for entry in entries if "name" in entry)
    if twice := next((a for a, b in itertools.pairwise(names) if a == b), None):
        raise InvalidInput(f"layer names must differ, but {shown(twice)} occurs twice")
    return [{"type": "dense"} | entry for entry in entries]


def _check_entry(entry: object, typed: bool) -> None:
    kind = entry.get("type") if typed and isinstance(entry, dict) else "dense"
    if not isinstance(kind, str) or kind not in _ENTRIES:
        raise InvalidInput(f"the type of a layer must be one of {', '.join(_ENTRIES)}, not {shown(kind)}")
    fields = {name: _FIELDS[name] for name in _ENTRIES[kind]}
    kinds = {name: field.kind for name, field in fields.items()}
    if not isinstance(entry, dict) or {name: type(entry[name]) for name in entry if name != "type"} != kinds:
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise InvalidInput(f"a layer of the architecture must have {wanted}, not {shown(entry)}")
    for name, field in fields.items():
        if not field.allows(entry[name]):
            whose = f"layer {shown(entry['name'])}: {name}" if "name" in entry else f"the input's {name}"
            what = "layer names" if name == "name" else whose
            raise InvalidInput(f"{what} must be {field.words}, not {shown(entry[name])}")


def _check_arrays(part: Part) -> None:
    match part:
        case Layer():
            kernel = ("height", "width") if isinstance(part, ConvLayer) else ()
            shape = _shape(part.name, part.weight, "out", "in", *kernel)
            wanted: dict[str, tuple[type[np.generic], tuple[int, ...]]]
            wanted = {"weight": (np.float32, shape), "mask": (np.bool_, shape)}
            if part.bias is not None:
                wanted["bias"] = (np.float32, shape[:1])
        case BatchNorm():
            shape = _shape(part.name, part.weight, "channels")
            wanted = dict.fromkeys(("weight", "bias", "mean", "variance"), (np.float32, shape))
        case _:
            return
    for field, (dtype, size) in wanted.items():
        name, array = f"{part.name}.{field}", getattr(part, field)
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, size):
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InvalidInput(f"{name} must be a {np.dtype(dtype)} array {size}, not {found}")
        if not np.isfinite(array).all():
            raise InvalidInput(f"{name} holds NaN or Inf")
    if isinstance(part, BatchNorm):
        if (part.variance < 0).any():
            raise InvalidInput(f"{part.name}.variance must not be negative")
    elif revived := np.count_nonzero(part.weight[~part.mask]):
        raise InvalidInput(f"pruned weights must be 0, but {revived} of {part.name}.weight are not")


def _shape(name: str, weight: Any, *axes: str) -> tuple[int, ...]:
    """Return the shape of a weight, which must have these axes."""
    shape: tuple[int, ...] = np.shape(weight)
    if len(shape) != len(axes):
        wanted = ", ".join(axes) + ("," if len(axes) == 1 else "")
        raise InvalidInput(f"{name}.weight must have the shape ({wanted}), not {shape}")
    return shape
