from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from any_networks import assert_same as assert_same_parts
from any_networks import layer as layer_of
from any_networks import networks as any_networks
from any_networks import norm, samples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pyflux_prune import files
from pyflux_prune.engines.parts import (
    ACTIVATIONS,
    ConvLayer,
    Flatten,
    Input,
    Layer,
    Part,
    Pool,
    arrays,
    numbered,
)
from pyflux_prune.errors import InvalidInput
from pyflux_prune.files import MAX_LAYERS, atomic_write, check_parts, read_model, write_model

torch = pytest.importorskip("torch")
load_torch = pytest.importorskip("safetensors.torch").load_file
sequential = pytest.importorskip("pyflux_prune.engines.torch").sequential


def network(sizes: Sequence[int], density: float = 1.0, bias: bool = True, seed: int = 0) -> list[Layer]:
    rng = np.random.default_rng(seed)
    layers = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        mask = rng.random((m, n)) < density
        weight = rng.normal(size=(m, n)).astype(np.float32) * mask
        offset = rng.normal(size=m).astype(np.float32) if bias else None
        last = i == len(sizes) - 2
        layers.append(Layer(str(2 * i), weight, mask, offset, "identity" if last else "relu"))
    return layers


def assert_same(found: Sequence[Layer], expected: Sequence[Layer]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.name, a.activation, a.bias is None) == (b.name, b.activation, b.bias is None)
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.mask, b.mask)
        if b.bias is not None:
            np.testing.assert_array_equal(a.bias, b.bias)


def parts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


# --- round trips -----------------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> list[Layer]:
    """Return networks of every shape, density and memory order; some kept weights are 0, huge or denormal."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=2, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0)))
    layers = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        mask = rng.random((m, n)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
        scale = rng.choice(np.array([0, -0.0, 1, -1e-40, 3e38], np.float32), (m, n))
        values = scale * rng.random((m, n), np.float32)
        weight = np.where(mask, values, np.float32(0))
        arrays = [np.asarray(array, order=draw(st.sampled_from("CF"))) for array in (weight, mask)]
        bias = draw(st.none() | st.just(values[:, 0]))
        layers.append(Layer(f"block-{i}.fc_{i}", *arrays, bias, draw(st.sampled_from(ACTIVATIONS))))
    return layers


@settings(deadline=None)
@given(networks(), st.booleans(), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, layers: list[Layer], sparse: bool, extra: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    write_model(path, layers, sparse=sparse, extra=extra)
    found, read = read_model(path)
    assert_same(found, layers)
    assert read == extra | {"storage": "sparse" if sparse else "dense"}
    for layer in found:
        assert (layer.weight.dtype, layer.mask.dtype) == (np.float32, np.bool_)
        for array in (layer.weight, layer.mask, layer.bias):
            assert array is None or (array.flags.writeable and array.flags.c_contiguous)


@pytest.mark.parametrize("view", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: np.asfortranarray(a)])
def test_memory_order_does_not_matter(tmp_path: Path, view: Callable[[np.ndarray], np.ndarray]) -> None:
    layer = network([5, 3], 0.5)[0]
    layer = Layer("0", view(layer.weight), view(layer.mask), layer.bias[::-1], "tanh")
    for sparse in (False, True):
        write_model(tmp_path / "m", [layer], sparse=sparse)
        assert_same(read_model(tmp_path / "m")[0], [layer])


def test_the_format(tmp_path: Path) -> None:
    weight = np.array([[0, 1, 2], [3, 0, 0], [0, 4, 5]], np.float32)
    mask = np.array([[0, 1, 1], [1, 0, 1], [0, 1, 1]], bool)  # one kept weight is 0
    layers = [Layer("0", weight, mask, None, "relu"), Layer("2", weight, mask | True, weight[2], "identity")]
    write_model(tmp_path / "dense", layers, extra={"note": "é"})
    write_model(tmp_path / "sparse", layers, sparse=True)

    tensors, metadata = parts(tmp_path / "dense")
    assert {key: (str(a.dtype), a.tolist()) for key, a in tensors.items()} == {
        "0.weight": ("float32", weight.tolist()),
        "0.mask": ("uint8", [0b01110101, 0b10000000]),
        "2.weight": ("float32", weight.tolist()),
        "2.bias": ("float32", [0, 4, 5]),
    }
    assert json.loads(metadata.pop("architecture")) == [
        {"name": "0", "in": 3, "out": 3, "bias": False, "activation": "relu"},
        {"name": "2", "in": 3, "out": 3, "bias": True, "activation": "identity"},
    ]
    assert metadata == {"format": "pyflux_prune", "version": "1", "storage": "dense", "note": "é"}

    tensors, metadata = parts(tmp_path / "sparse")
    assert {key: (str(a.dtype), a.tolist()) for key, a in tensors.items()} == {
        "0.values": ("float32", [1, 2, 3, 0, 4, 5]),
        "0.mask": ("uint8", [0b01110101, 0b10000000]),
        "2.values": ("float32", weight.ravel().tolist()),
        "2.bias": ("float32", [0, 4, 5]),
    }
    assert metadata["storage"] == "sparse"
    assert_same(read_model(tmp_path / "sparse")[0], layers)


def test_a_sparse_file_at_5_percent_is_a_twelfth_of_the_dense_one(tmp_path: Path) -> None:
    layers = network([784, 300, 100, 10], 0.05)
    write_model(tmp_path / "dense", layers)
    write_model(tmp_path / "sparse", layers, sparse=True)
    plain = network([784, 300, 100, 10])
    write_model(tmp_path / "plain", plain)
    assert 11.5 < (tmp_path / "plain").stat().st_size / (tmp_path / "sparse").stat().st_size < 12.5
    assert_same(read_model(tmp_path / "sparse")[0], read_model(tmp_path / "dense")[0])


@pytest.mark.parametrize("bias", [False, True])
def test_pytorch_reads_the_dense_file(tmp_path: Path, bias: bool) -> None:
    layers = network([6, 5, 4, 3], 0.4, bias)
    write_model(tmp_path / "m.safetensors", layers)
    nn = torch.nn
    module = nn.Sequential(
        nn.Linear(6, 5, bias), nn.ReLU(), nn.Linear(5, 4, bias), nn.ReLU(), nn.Linear(4, 3, bias)
    )
    loaded = module.load_state_dict(load_torch(tmp_path / "m.safetensors"), strict=False)
    assert loaded.missing_keys == []
    assert sorted(loaded.unexpected_keys) == ["0.mask", "2.mask", "4.mask"]
    x = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
    y = x
    for layer in layers:
        y = y @ (layer.weight * layer.mask).T + (0 if layer.bias is None else layer.bias)
        y = np.maximum(y, 0) if layer.activation == "relu" else y
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), y, rtol=1e-5, atol=1e-6)


# --- writing ---------------------------------------------------------------------------------------------


def refuses_to_write(folder: Path, message: str, layers: Sequence[Layer], **options: Any) -> None:
    path = folder / "model"
    path.write_bytes(b"as it was")
    with pytest.raises(InvalidInput, match=message) as caught:
        write_model(path, layers, **options)
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert [p.name for p in folder.iterdir()] == ["model"]
    assert path.read_bytes() == b"as it was"


def layer(**change: Any) -> Layer:
    good = {"name": "0", "weight": np.ones((2, 3), np.float32), "mask": np.ones((2, 3), bool), "bias": None}
    return Layer(**{**good, "activation": "relu", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(3, np.float32)}, r"0\.weight must have the shape \(out, in\), not \(3,\)"),
        ({"weight": 1.0}, r"0\.weight must have the shape \(out, in\), not \(\)"),
        ({"weight": np.ones((2, 3))}, r"0\.weight must be a float32 array \(2, 3\), not float64 \(2, 3\)"),
        ({"weight": np.ones((2, 3), ">f4")}, r"0\.weight must be a float32 array \(2, 3\), not >f4 \(2, 3\)"),
        ({"weight": [[1.0]]}, r"0\.weight must be a float32 array \(1, 1\), not list"),
        ({"weight": np.full((2, 3), np.nan, np.float32)}, r"0\.weight holds NaN or Inf"),
        ({"mask": np.ones((3, 2), bool)}, r"0\.mask must be a bool array \(2, 3\), not bool \(3, 2\)"),
        ({"mask": np.ones((2, 3), np.uint8)}, r"0\.mask must be a bool array \(2, 3\), not uint8 \(2, 3\)"),
        ({"mask": np.eye(2, 3, dtype=bool)}, r"pruned weights must be 0, but 4 of 0\.weight are not"),
        ({"bias": np.ones(3, np.float32)}, r"0\.bias must be a float32 array \(2,\), not float32 \(3,\)"),
        ({"bias": np.array([1, np.inf], np.float32)}, r"0\.bias holds NaN or Inf"),
        ({"activation": "swish"}, "activation must be one of identity, relu, tanh, sigmoid, not 'swish'"),
        ({"activation": None}, "a layer of the architecture must have name"),
        ({"name": ""}, "layer names must be letters, digits, _, - and . only, not ''"),
        ({"name": "ä b"}, "layer names must be letters"),
        ({"name": 0}, "a layer of the architecture must have name"),
        ({"weight": np.ones((0, 3), np.float32), "mask": np.ones((0, 3), bool)}, "out must be from 1 to"),
    ],
)
def test_unusable_layers_are_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refuses_to_write(tmp_path, message, [layer(**change)])
    with pytest.raises(InvalidInput, match=message):
        check_parts([layer(**change)])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], f"the architecture must be a list of 1 to {MAX_LAYERS} layers, not 0 layers"),
        (network([1] * (MAX_LAYERS + 2)), f"not {MAX_LAYERS + 1} layers"),
        ([layer(), layer(name="2")], "layer 2 takes 3 inputs, but 0 before it has 2 outputs"),
        (network([2, 2, 2])[:1] * 2, "layer names must differ, but '0' occurs twice"),
    ],
)
def test_layers_that_make_no_network_are_not_written(tmp_path: Path, layers: list[Layer], message: str) -> None:
    refuses_to_write(tmp_path, message, layers)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"version": "2"}, "extra must not use the format's own version"),
        ({"storage": "s", "architecture": "[]"}, "extra must not use the format's own storage, architecture"),
        ({"rounds": 3}, "extra must map text to text"),
        ({3: "rounds"}, "extra must map text to text"),
        ({"path": "\udcff"}, "extra must map text to text"),
    ],
)
def test_unusable_extra_is_not_written(tmp_path: Path, extra: dict[str, str], message: str) -> None:
    refuses_to_write(tmp_path, message, [layer()], extra=extra)


def test_writing_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_model(path, network([3, 2]))
    write_model(str(path), network([4, 2]), sparse=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert read_model(path)[0][0].weight.shape == (2, 4)
    atomic_write(path, b"")
    assert path.read_bytes() == b""


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "atomic", b"")
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


@pytest.mark.parametrize("call", ["open", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), PermissionError(13, "Permission denied")])
def test_a_write_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: OSError
) -> None:
    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(files, "open", fail, raising=False)
        else:
            patch.setattr(call, fail)
        refuses_to_write(tmp_path, error.strerror, [layer()])


def test_a_write_that_is_interrupted_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt

    path = tmp_path / "m"
    path.write_bytes(b"as it was")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_model(path, [layer()])
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert path.read_bytes() == b"as it was"


def test_the_data_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for call in (os.fsync, os.replace):
        name, done = call.__name__, call
        monkeypatch.setattr(os, name, lambda *a, name=name, done=done: (calls.append(name), done(*a)))
    atomic_write(tmp_path / "a", b"data")
    assert calls == ["fsync", "replace"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"as it was")
    (tmp_path / "folder").mkdir()
    for path, message in {
        "nowhere/m": "No such file or directory",
        "file/m": "Not a directory",
        "folder": "it is there already and is not a file",
        "m" * 300: "File name too long",
    }.items():
        with pytest.raises(InvalidInput, match=f"cannot write {tmp_path / path}: {message}"):
            write_model(tmp_path / path, [layer()])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"as it was"


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match=f"cannot write {tmp_path}/m: Permission denied"):
        write_model(tmp_path / "m", [layer()])


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", None, 5])
def test_paths_that_are_none(path: Any) -> None:
    for act in (read_model, lambda path: write_model(path, [layer()]), lambda path: atomic_write(path, b"")):
        with pytest.raises(InvalidInput, match="path must be the name of a file or folder, not "):
            act(path)


# --- reading ---------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"cannot read {tmp_path}/none: No such file or directory"):
        read_model(tmp_path / "none")
    with pytest.raises(InvalidInput, match=f"cannot read {tmp_path}: it is not a file"):
        read_model(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InvalidInput, match=f"cannot read {tmp_path}/pipe: it is not a file"):
            read_model(tmp_path / "pipe")
        with pytest.raises(InvalidInput, match=f"cannot write {tmp_path}/pipe: it is there already"):
            atomic_write(tmp_path / "pipe", b"")


def refuses_to_read(path: Path, message: str) -> None:
    before, others = path.read_bytes(), sorted(path.parent.iterdir())
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=message) as caught:
            read_model(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path} is not a model file of pyflux_prune: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert (path.read_bytes(), sorted(path.parent.iterdir())) == (before, others)


@pytest.mark.parametrize("data", [b"", b"abc", bytes(8), b"\xff" * 64, b"PK\3\4" + bytes(60), b"\x80\2}q\0."])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    refuses_to_read(tmp_path / "m", "it is truncated, or no safetensors file")


def test_truncations(tmp_path: Path) -> None:
    write_model(tmp_path / "m", network([3, 2, 2], 0.5))
    whole = (tmp_path / "m").read_bytes()
    for size in range(0, len(whole), 3):
        (tmp_path / "m").write_bytes(whole[:size])
        with pytest.raises(InvalidInput, match="it is truncated, or no safetensors file"):
            read_model(tmp_path / "m")


def test_plain_pytorch_weights(tmp_path: Path) -> None:
    tensors = {"0.weight": np.ones((2, 3), np.float32), "0.bias": np.ones(2, np.float32)}
    for metadata, lacking in ((None, "format, version, storage"), ({"format": "pt"}, "version, storage")):
        (tmp_path / "m").write_bytes(safetensors.numpy.save(tensors, metadata))
        refuses_to_read(tmp_path / "m", f"its metadata lack {lacking}, architecture .*from_torch")


Change = Callable[[dict[str, np.ndarray], dict[str, str]], object]


def changed(path: Path, change: Change) -> None:
    tensors, metadata = parts(path)
    change(tensors, metadata)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


def architecture(change: Callable[[list[dict[str, Any]]], Any]) -> Change:
    """Return a change of the architecture: made in place, or to what ``change`` returns."""

    def apply(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        entries = json.loads(metadata["architecture"])
        result = change(entries)
        metadata["architecture"] = json.dumps(entries if result is None else result)

    return apply


def entry(i: int, **change: Any) -> Change:
    return architecture(lambda entries: entries[i].update({key.rstrip("_"): v for key, v in change.items()}))


def metadata(**change: str) -> Change:
    return lambda tensors, metadata: metadata.update(change)


def tensors(**change: Any) -> Change:
    """Return a change of tensors, by names with ``_`` for ``.`` behind a ``t``; None removes one."""

    def apply(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        for key, value in change.items():
            name = key[1:].replace("_", ".")
            tensors[name] = value(tensors.get(name)) if callable(value) else value
            if tensors[name] is None:
                del tensors[name]

    return apply


def in_place(at: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return apply


SHAPES = [(-1, "out must be from 1 to 2147483647, not -1"), (0, "out must be from 1 to 2147483647, not 0")]
SHAPES += [(2**31, "not 2147483648"), (10**30, "not 10000"), (10**4000, r"not 1000.*\.\.\..*000")]
SHAPES += [(2**31 - 1, "layer 2: the file is too small for 2147483647 × 4 weights")]
FIELDS = r"a layer of the architecture must have name \(str\), in \(int\), out \(int\), bias \(bool\), act"
WRONG: dict[str, tuple[Change, str]] = {
    "other format": (metadata(format="pt"), "its format must be pyflux_prune, not 'pt'"),
    "newer version": (metadata(version="2"), "its version must be 1, not '2'"),
    "other storage": (metadata(storage="zip"), "its storage must be dense or sparse, not 'zip'"),
    "long storage": (metadata(storage="s" * 10**5), "its storage must be dense or sparse, not 'sss"),
    "no architecture": (lambda tensors, metadata: metadata.pop("architecture"), "metadata lack arch"),
    "no JSON": (metadata(architecture="[{"), "its architecture is not JSON"),
    "deep JSON": (metadata(architecture="[" * 10**5), "its architecture is not JSON"),
    "long number": (metadata(architecture="[" + "1" * 10**4 + "]"), "its architecture is not JSON"),
    "dict": (architecture(lambda entries: {"layers": entries}), "a list of 1 to 1000 layers, not {'layers'"),
    "no layers": (architecture(lambda entries: []), "must be a list of 1 to 1000 layers, not 0 layers"),
    "5000 layers": (architecture(lambda entries: entries * 2500), "a list of 1 to 1000 layers, not 5000"),
    "layer no dict": (architecture(lambda entries: [*entries, 3]), FIELDS),
    "field missing": (architecture(lambda entries: entries[0].pop("bias") and None), FIELDS),
    "field too many": (entry(0, mask=True), FIELDS),
    "name no text": (entry(0, name=0), FIELDS),
    "size no int": (entry(0, out=4.0), FIELDS),
    "size bool": (entry(0, out=True), FIELDS),
    "size NaN": (entry(0, out=math.nan), FIELDS),
    "bias no bool": (entry(0, bias=1), FIELDS),
    "name hostile": (entry(0, name="../0\n"), "layer names must be letters, digits, _, - and . only"),
    "name twice": (entry(1, name="0"), "layer names must differ, but '0' occurs twice"),
    "unknown activation": (entry(0, activation="relu6"), "activation must be one of .*, not 'relu6'"),
    "widths apart": (entry(1, in_=5), "layer 2 takes 5 inputs, but 0 before it has 4 outputs"),
    "other width": (entry(1, out=3), r"its tensor 2\.weight must be F32 \(3, 4\), not F32 \(2, 4\)"),
    "name of nothing": (entry(1, name="3"), r"its tensor 3\.weight is missing"),
    "no weight": (tensors(t0_weight=None), r"its tensor 0\.weight is missing"),
    "no bias": (tensors(t0_bias=None), r"its tensor 0\.bias is missing"),
    "surplus bias": (entry(0, bias=False), r"its architecture does not mention \['0\.bias'\]"),
    "surplus tensor": (tensors(t4_weight=np.ones((1, 2))), r"does not mention \['4\.weight'\]"),
    "weight transposed": (
        tensors(t0_weight=lambda a: np.ascontiguousarray(a.T)),
        r"its tensor 0\.weight must be F32 \(4, 5\), not F32 \(5, 4\)",
    ),
    "weight double": (tensors(t0_weight=lambda a: a.astype(float)), r"0\.weight must be F32 .*, not F64"),
    "bias too long": (tensors(t0_bias=np.ones(5, np.float32)), r"0\.bias must be F32 \(4,\), not F32 \(5,\)"),
    "mask too short": (tensors(t0_mask=lambda a: a[:-1]), r"0\.mask must be U8 \(3,\), not U8 \(2,\)"),
    "mask too long": (tensors(t0_mask=lambda a: np.append(a, a)), r"must be U8 \(3,\), not U8 \(6,\)"),
    "mask bytes": (tensors(t0_mask=np.ones((4, 5), bool)), r"must be U8 \(3,\), not BOOL \(4, 5\)"),
    "padding": (tensors(t0_mask=in_place(2, 0b10100001)), r"the bits after the end of 0\.mask must be 0"),
    "revived": (tensors(t0_mask=np.zeros(3, np.uint8)), r"weights must be 0, but 10 of 0\.weight are not"),
    "NaN weight": (tensors(t2_weight=in_place((0, 0), math.nan)), r"2\.weight holds NaN or Inf"),
    "Inf bias": (tensors(t2_bias=in_place(0, -math.inf)), r"2\.bias holds NaN or Inf"),
    "sparse really": (metadata(storage="sparse"), r"its tensor 0\.values is missing"),
    **{f"size {i}": (entry(1, out=size), message) for i, (size, message) in enumerate(SHAPES)},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a model file, 5 to 4 to 2, half of the first layer pruned."""
    first, second = network([5, 4, 2])
    mask = np.arange(20).reshape(4, 5) % 2 == 0
    path = tmp_path / "model.safetensors"
    write_model(path, [Layer("0", first.weight * mask, mask, first.bias, "relu"), second])
    return path


@pytest.mark.parametrize("case", WRONG)
def test_inconsistent_files(model: Path, case: str) -> None:
    change, message = WRONG[case]
    changed(model, change)
    refuses_to_read(model, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensors(t0_values=lambda a: a[:-1]), r"0\.values must be F32 \(10,\), not F32 \(9,\)"),
        (tensors(t0_values=lambda a: np.append(a, a)), r"0\.values must be F32 \(10,\), not F32 \(20,\)"),
        (tensors(t0_mask=np.zeros(3, np.uint8)), r"0\.values must be F32 \(0,\), not F32 \(10,\)"),
        (tensors(t0_mask=None), r"0\.values must be F32 \(20,\), not F32 \(10,\)"),
        (tensors(t0_values=in_place(3, math.nan)), r"0\.weight holds NaN or Inf"),
        (metadata(storage="dense"), r"its tensor 0\.weight is missing"),
        (entry(0, in_=2**31 - 1), "the file is too small for 4 × 2147483647 weights"),
    ],
)
def test_inconsistent_sparse_files(model: Path, change: Change, message: str) -> None:
    write_model(model, read_model(model)[0], sparse=True)
    changed(model, change)
    refuses_to_read(model, message)


def test_dtypes_numpy_has_not(model: Path) -> None:
    data = model.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["2.weight"].update(dtype="BF16", shape=[4, 4])
    changed = json.dumps(header).encode()
    model.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])
    refuses_to_read(model, r"its tensor 2\.weight must be F32 \(2, 4\), not BF16 \(4, 4\)")


def test_a_mask_that_keeps_all_may_be_there(model: Path) -> None:
    changed(model, tensors(t2_mask=np.array([255], np.uint8)))
    assert read_model(model)[0][1].mask.all()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sparse=st.booleans())
def test_damaged_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sparse: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_model(path, network([5, 4, 2], 0.5), sparse=sparse, extra={"k": "v"})
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])
    with contextlib.suppress(InvalidInput):
        layers, _ = read_model(path)
        check_parts(layers)
        write_model(path, layers, sparse=sparse)
        assert_same(read_model(path)[0], layers)


# --- networks of other parts than dense layers -----------------------------------------------------------


def small_vgg() -> list[Part]:
    """Return input, convolution, normalisation, pooling, flattening and a dense layer, half of each pruned."""
    rng = np.random.default_rng(0)
    conv = ConvLayer(**vars(layer_of(rng, (3, 2, 3, 3), "identity", False, 0.5)), padding=(1, 1), dilation=(1, 1))
    parts = [Input((2, 4, 4)), conv, norm(rng, 3, "relu"), Pool("", "max", (2, 2), (2, 2)), Flatten("")]
    return numbered([*parts, layer_of(rng, (2, 12), "identity", True, 0.5)])


@settings(deadline=None)
@given(any_networks(), st.booleans())
def test_round_trip_of_any_parts(
    tmp_path_factory: pytest.TempPathFactory, network: list[Part], sparse: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_model(path, network, sparse=sparse)
    found, _ = read_model(path)
    assert_same_parts(found, network)
    for part in found:
        assert all(array.flags.writeable and array.flags.c_contiguous for array in arrays(part).values())
    data = path.read_bytes()
    write_model(path, found, sparse=sparse)
    assert sorted(path.read_bytes()) == sorted(data)  # the order of metadata is safetensors' own


def test_the_format_of_other_parts(tmp_path: Path) -> None:
    network = small_vgg()
    write_model(tmp_path / "dense", network)
    tensors, metadata = parts(tmp_path / "dense")
    assert {key: (str(a.dtype), a.shape) for key, a in tensors.items()} == {
        "0.weight": ("float32", (3, 2, 3, 3)),
        "0.mask": ("uint8", (7,)),
        "1.weight": ("float32", (3,)),
        "1.bias": ("float32", (3,)),
        "1.running_mean": ("float32", (3,)),
        "1.running_var": ("float32", (3,)),
        "5.weight": ("float32", (2, 12)),
        "5.mask": ("uint8", (3,)),
        "5.bias": ("float32", (2,)),
    }
    assert metadata["version"] == "2"
    conv = {"type": "conv", "name": "0", "in": 2, "out": 3, "bias": False, "activation": "identity"}
    assert json.loads(metadata["architecture"]) == [
        {"type": "input", "shape": [2, 4, 4]},
        conv | {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]},
        {"type": "batchnorm", "name": "1", "channels": 3, "activation": "relu", "epsilon": 1e-3, "momentum": 0.25},
        {"type": "pool", "name": "3", "kind": "max", "size": [2, 2], "stride": [2, 2], "padding": [0, 0]},
        {"type": "flatten", "name": "4"},
        {"type": "dense", "name": "5", "in": 12, "out": 2, "bias": True, "activation": "identity"},
    ]
    write_model(tmp_path / "sparse", network, sparse=True)
    tensors, metadata = parts(tmp_path / "sparse")
    assert isinstance(network[1], Layer)
    np.testing.assert_array_equal(tensors["0.values"], network[1].weight[network[1].mask])
    assert "0.weight" not in tensors
    assert (metadata["version"], metadata["storage"]) == ("2", "sparse")


@settings(max_examples=25, deadline=None)
@given(any_networks())
def test_pytorch_reads_the_dense_file_of_any_parts(
    tmp_path_factory: pytest.TempPathFactory, network: list[Part]
) -> None:
    path = tmp_path_factory.getbasetemp() / "torch.safetensors"
    write_model(path, network)
    module = sequential(network).eval()
    expected = module(torch.from_numpy(samples(network)))
    for tensor in module.state_dict().values():
        tensor.fill_(1)
    loaded = module.load_state_dict(load_torch(path), strict=False)
    assert loaded.missing_keys == []
    assert all(key.endswith(".mask") for key in loaded.unexpected_keys)
    assert torch.equal(module(torch.from_numpy(samples(network))), expected)


CONV = r"a layer of the architecture must have name \(str\), .*, kernel \(list\), stride \(list\), .*, not "
WRONG_PARTS: dict[str, tuple[Change, str]] = {
    "old version": (metadata(version="1"), "its version must be 2, not '1'"),
    "newer version": (metadata(version="3"), "its version must be 1 or 2, not '3'"),
    "no type": (
        architecture(lambda entries: entries[5].pop("type") and None),
        "the type of a layer must be one of",
    ),
    "other type": (entry(1, type="conv3d"), "must be one of input, dense, conv, .*, not 'conv3d'"),
    "type no text": (entry(1, type=["conv"]), r"must be one of input, .*, not \['conv'\]"),
    "no dict": (
        architecture(lambda entries: [*entries, 3]),
        "a layer of the architecture must have name .*, not 3",
    ),
    "field missing": (architecture(lambda entries: entries[1].pop("stride") and None), CONV),
    "field too many": (entry(1, groups=1), CONV),
    "kernel no list": (entry(1, kernel=3), CONV),
    "kernel 1-D": (entry(1, kernel=[3]), r"'0': kernel must be 2 whole numbers from 1 to \d+, not \[3\]"),
    "kernel 0": (entry(1, kernel=[3, 0]), "'0': kernel must be 2 whole numbers from 1 "),
    "kernel bool": (entry(1, kernel=[3, True]), "'0': kernel must be 2 whole numbers from 1 "),
    "kernel nested": (entry(1, kernel=[3, [3]]), "'0': kernel must be 2 whole numbers from 1 "),
    "kernel float": (entry(1, kernel=[3, 3.0]), "'0': kernel must be 2 whole numbers from 1 "),
    "kernel huge": (entry(1, kernel=[3, 10**4000]), "'0': kernel must be 2 whole numbers from 1 "),
    "kernel many": (entry(1, kernel=[3] * 10**5), "'0': kernel must be 2 whole numbers from 1 "),
    "kernel of nothing": (entry(1, kernel=[2**31 - 1] * 2), "layer 0: the file is too small for 3 × 2 × 2147"),
    "kernel too large": (
        entry(1, kernel=[7, 3]),
        r"layer 0 has windows of \(7, 3\), which do not fit",
    ),
    "other kernel": (entry(1, kernel=[3, 1]), r"layer 5 takes 12 inputs, but 4 before it has 18 outputs"),
    "as large a kernel": (entry(1, kernel=[1, 3], padding=[0, 1]), r"0\.mask must be U8 \(3,\), not U8 \(7,\)"),
    "stride 0": (entry(1, stride=[0, 1]), "'0': stride must be 2 whole numbers from 1 "),
    "padding below 0": (entry(1, padding=[0, -1]), "'0': padding must be 2 whole numbers from 0 "),
    "padding huge": (entry(1, padding=[2**31 - 1] * 2), r"at most 2147483647 values anywhere .*, not \(3, 42949"),
    "dilation huge": (entry(1, dilation=[2**31 - 1] * 2), "layer 0 has windows of"),
    "channels apart": (entry(1, in_=3), "layer 0 takes 3 channels, but the input before it has 2 channels"),
    "normalised apart": (entry(2, channels=4), "layer 1 takes 4 channels, but 0 before it has 3 channels"),
    "channels huge": (entry(2, channels=2**31 - 1), "layer 1 takes 2147483647 channels, but"),
    "epsilon 0": (entry(2, epsilon=0.0), "'1': epsilon must be above 0, not 0.0"),
    "epsilon NaN": (entry(2, epsilon=math.nan), "'1': epsilon must be above 0, not nan"),
    "epsilon infinite": (entry(2, epsilon=math.inf), "'1': epsilon must be above 0, not inf"),
    "epsilon no float": (entry(2, epsilon=1), r"must have name \(str\), channels \(int\), .*epsilon \(float\)"),
    "momentum": (entry(2, momentum=1.5), "'1': momentum must be from 0 to 1, not 1.5"),
    "activation": (entry(2, activation="gelu"), "'1': activation must be one of .*, not 'gelu'"),
    "kind": (entry(3, kind="sum"), "'3': kind must be one of max, mean, not 'sum'"),
    "pool padding": (entry(3, padding=[2, 0]), r"layer 3: padding \(2, 0\) must be at most half of \(2, 2\)"),
    "pool too large": (entry(3, size=[5, 2]), r"layer 3 has windows of \(5, 2\), which do not fit"),
    "input 2-D": (
        entry(0, shape=[2, 4]),
        r"the input's shape must be 3 whole numbers from 1 to \d+, not \[2, 4\]",
    ),
    "input huge": (entry(0, shape=[2, 2**31 - 1, 2**31 - 1]), "at most 2147483647 values anywhere"),
    "input named": (entry(0, name="0"), r"must have shape \(list\), not"),
    "no input": (architecture(lambda entries: entries[1:]), "must begin with the shape of its inputs"),
    "two inputs": (architecture(lambda entries: [*entries[:1], *entries]), "the inputs must come first"),
    "no flatten": (
        architecture(lambda entries: [*entries[:4], entries[5]]),
        r"layer 5 takes vectors, \(features,\)",
    ),
    "only input": (architecture(lambda entries: entries[:1]), "at least one dense layer or convolution"),
    "no dense layer": (architecture(lambda entries: entries[:5]), "a network must end with a dense layer"),
    "name twice": (entry(4, name="3"), "layer names must differ, but '3' occurs twice"),
    "no mean": (lambda tensors, metadata: tensors.pop("1.running_mean"), r"its tensor 1\.running_mean is missing"),
    "variance": (tensors(t1_weight=None), r"its tensor 1\.weight is missing"),
    "negative variance": (
        lambda tensors, metadata: tensors.update({"1.running_var": -np.ones(3, np.float32)}),
        r"1\.variance must not be negative",
    ),
    "NaN mean": (
        lambda tensors, metadata: tensors.update({"1.running_mean": np.full(3, np.nan, np.float32)}),
        r"1\.mean holds NaN or Inf",
    ),
    "normalisation too long": (
        lambda tensors, metadata: tensors.update({"1.running_var": np.ones(4, np.float32)}),
        r"its tensor 1\.running_var must be F32 \(3,\), not F32 \(4,\)",
    ),
    "flat weight": (
        tensors(t0_weight=lambda a: a.reshape(3, 18)),
        r"0\.weight must be F32 \(3, 2, 3, 3\), not F32",
    ),
    "revived": (tensors(t0_weight=lambda a: a + 1), r"pruned weights must be 0, but \d+ of 0\.weight are not"),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_inconsistent_files_of_other_parts(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, small_vgg())
    change, message = WRONG_PARTS[case]
    changed(path, change)
    refuses_to_read(path, message)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, {"weight": np.ones((3, 18), np.float32)}, r"0\.weight must have the shape \(out, in, height, width\)"),
        (2, {"mean": np.ones(4, np.float32)}, r"1\.mean must be a float32 array \(3,\), not float32 \(4,\)"),
        (2, {"weight": np.ones((3, 1), np.float32)}, r"1\.weight must have the shape \(channels,\), not \(3, 1\)"),
        (2, {"epsilon": 1}, r"must have name \(str\), channels"),
        (3, {"size": (5, 5)}, "layer 3 has windows of"),
        (4, {"name": "3"}, "layer names must differ"),
    ],
)
def test_unusable_parts_are_not_written(tmp_path: Path, place: int, change: dict[str, Any], message: str) -> None:
    network = small_vgg()
    network[place] = replace(network[place], **change)
    refuses_to_write(tmp_path, message, network)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sparse=st.booleans())
def test_damaged_files_of_other_parts_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sparse: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_model(path, small_vgg(), sparse=sparse)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(InvalidInput):
        network, _ = read_model(path)
        check_parts(network)
        write_model(path, network, sparse=sparse)
        assert_same_parts(read_model(path)[0], network)
