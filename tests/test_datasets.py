from __future__ import annotations

import contextlib
import gzip
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyflux_prune import datasets
from pyflux_prune.datasets import Dataset, check_inputs, check_labels
from pyflux_prune.errors import InvalidInput

MNIST10K = Path(__file__).parents[2] / "shared/data/mnist10k"
RNG = np.random.default_rng(0)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- check_inputs, check_labels --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.int8, np.uint64, np.bool_])
def test_inputs_of_any_real_dtype_become_float32(dtype: str) -> None:
    x = np.array([[0, 1], [1, 1], [1, 0]], dtype)
    checked = check_inputs(x)
    assert checked.dtype == np.float32
    assert checked.dtype.isnative
    assert checked.flags.c_contiguous
    assert not np.shares_memory(checked, x)
    np.testing.assert_array_equal(checked, x.astype(np.float32))


def test_float32_inputs_are_not_copied() -> None:
    x = RNG.random((5, 3), np.float32)
    assert check_inputs(x) is x
    assert np.shares_memory(check_inputs(x[1:4], 3), x)


@pytest.mark.parametrize("view", [lambda x: np.asfortranarray(x), lambda x: x[::-2], lambda x: x[:, ::2]])
def test_inputs_of_other_memory_orders_are_copied(view: Callable[[np.ndarray], np.ndarray]) -> None:
    x = view(RNG.random((6, 4), np.float32))
    checked = check_inputs(x)
    assert checked.flags.c_contiguous
    assert not np.shares_memory(checked, x)
    np.testing.assert_array_equal(checked, x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0, 2.0]], "pixels must be a NumPy array, not list"),
        (None, "pixels must be a NumPy array, not NoneType"),
        (np.zeros((2, 4), complex), "pixels must hold real numbers, not complex128"),
        (np.zeros((2, 4), object), "pixels must hold real numbers, not object"),
        (np.full((2, 4), "1"), "pixels must hold real numbers, not <U1"),
        (np.zeros((2, 4), "datetime64[s]"), "pixels must hold real numbers, not datetime64"),
        (np.zeros(4, np.float32), r"pixels must have the shape \(samples, 4\), not \(4,\)"),
        (np.zeros((2, 2, 4), np.float32), r"pixels must have the shape \(samples, 4\), not \(2, 2, 4\)"),
        (np.zeros((2, 5), np.float32), r"pixels must have the shape \(samples, 4\), not \(2, 5\)"),
        (np.array(1.0), r"pixels must have the shape \(samples, 4\), not \(\)"),
        (np.zeros((0, 4), np.float32), r"pixels must not be empty, but has the shape \(0, 4\)"),
    ],
)
def test_unusable_inputs(x: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_inputs(x, 4, name="pixels")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_inputs_that_are_not_finite_are_counted_and_located(bad: float) -> None:
    x = np.zeros((4, 3))
    x[2, 1] = x[3, 0] = bad
    message = rf"x must be finite, but 2 of its 12 values .*, the first at \(2, 1\): {re.escape(str(bad))}$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidInput, match=message):
            check_inputs(x)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint64, ">i8"])
def test_labels_of_any_integer_dtype_become_int64(dtype: str) -> None:
    y = check_labels(np.array([2, 0, 1], dtype), 3, 3)
    assert y.dtype == np.int64
    assert y.dtype.isnative
    assert y.tolist() == [2, 0, 1]


def test_int64_labels_are_not_copied() -> None:
    y = np.array([0, 1])
    assert check_labels(y, 2) is y


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1, 2], "y must be a NumPy array, not list"),
        (np.array([0.0, 1.0, 2.0]), "y must have an integer dtype, not float64"),
        (np.array([True, False, True]), "y must have an integer dtype, not bool"),
        (np.array(["0", "1", "2"]), "y must have an integer dtype, not <U1"),
        (np.array([0, 1]), r"one label for each of 3 samples, but has the shape \(2,\)"),
        (np.array([[0, 1, 2]]), r"one label for each of 3 samples, but has the shape \(1, 3\)"),
        (np.array([0, 3, 9]), r"y must hold labels from 0 to 2, not 3 \(at position 1\)"),
        (np.array([0, 1, -1]), r"y must hold labels from 0 to 2, not -1 \(at position 2\)"),
        (np.array([2**64 - 1, 0, 0], np.uint64), "y must hold labels from 0 to 2, not 18446744073709551615"),
    ],
)
def test_unusable_labels(y: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_labels(y, 3, 3)


def test_labels_without_a_number_of_classes_have_one_limit() -> None:
    assert check_labels(np.array([2**31 - 1]), 1).tolist() == [2**31 - 1]
    with pytest.raises(InvalidInput, match="from 0 to 2147483647, not 9223372036854775808"):
        check_labels(np.array([2**63], np.uint64), 1)


# --- Dataset, arrays -------------------------------------------------------------------------------------


def some(n: int = 20, features: int = 3, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return RNG.random((n, features), np.float32), RNG.permutation(np.arange(n) % classes)


def test_a_dataset_keeps_good_arrays_and_converts_others() -> None:
    x, y = some()
    data = Dataset("toy", x, y, x.astype(np.float64), y.astype(np.int8), classes=np.int32(4))
    assert data.x_train is x
    assert data.y_train is y
    assert (data.x_test.dtype, data.y_test.dtype) == (np.float32, np.int64)
    assert data.features == 3
    assert repr(data) == "Dataset(name='toy', classes=4)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.full((20, 3), np.nan)}, "x_train must be finite, but 60 of its 60"),
        ({"x_test": np.zeros((20, 2))}, r"x_test must have the shape \(samples, 3\), not \(20, 2\)"),
        ({"y_train": np.zeros(19, int)}, "y_train must hold one label for each of 20 samples"),
        ({"y_test": np.full(20, 4)}, "y_test must hold labels from 0 to 3, not 4"),
        ({"name": 5}, "name must be text, not 5"),
        ({"classes": 0}, "classes must be a whole number of at least 1, not 0"),
        ({"classes": 4.0}, "classes must be a whole number of at least 1, not 4.0"),
    ],
)
def test_a_dataset_is_checked(change: dict[str, object], message: str) -> None:
    x, y = some()
    fields = {"name": "toy", "x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": 4}
    with pytest.raises(InvalidInput, match=message):
        Dataset(**{**fields, **change})


def test_arrays_with_a_test_set_are_not_copied() -> None:
    x = RNG.random((6, 2, 5), np.float32)
    y = np.array([0, 1, 2, 0, 1, 2])
    data = datasets.arrays(x, y, x[:2], np.array([0, 3]), name="mine")
    assert np.shares_memory(data.x_train, x)
    assert data.x_train.shape == (6, 10)
    assert (data.name, data.classes) == ("mine", 4)
    np.testing.assert_array_equal(data.x_test, x[:2].reshape(2, 10))


def test_arrays_of_one_axis_are_one_feature() -> None:
    assert datasets.arrays(np.arange(4.0), np.array([0, 1, 0, 1]), test_size=2).features == 1


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda counts: sum(counts) >= 2),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_the_split_is_exact_stratified_and_loses_nothing(counts: list[int], share: float, seed: int) -> None:
    n = sum(counts)
    size = min(max(round(share * n), 1), n - 1)
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    data = datasets.arrays(np.arange(n), y, test_size=size, seed=seed)
    assert len(data.y_test) == size
    samples = np.concatenate([data.x_train, data.x_test])[:, 0].astype(int)
    assert sorted(samples) == list(range(n))
    np.testing.assert_array_equal(np.concatenate([data.y_train, data.y_test]), y[samples])
    for label, count in enumerate(counts):
        assert abs(np.count_nonzero(data.y_test == label) - size * count / n) < 1


def test_the_split_is_shuffled_by_its_seed() -> None:
    x, y = np.arange(200), np.repeat([0, 1], 100)
    first, again, other = (datasets.arrays(x, y, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.x_train, again.x_train)
    np.testing.assert_array_equal(first.x_test, again.x_test)
    assert set(first.x_test[:, 0]) != set(other.x_test[:, 0])
    for labels in (first.y_train, first.y_test):
        assert np.count_nonzero(np.diff(labels)) > 10
    assert len(first.y_test) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [[1.0]]}, "x must be a NumPy array, not list"),
        ({"x": np.float32(1)}, "x must be a NumPy array, not float32"),
        ({"x": np.array(1.0)}, r"x must have the shape \(samples, features\), not \(\)"),
        ({"x": np.zeros((0, 2, 2))}, "x must not be empty"),
        ({"y": np.zeros(20)}, "y must have an integer dtype"),
        ({"x_test": np.zeros((2, 3))}, "x_test and y_test go together, but y_test is missing"),
        ({"y_test": np.zeros(2, int)}, "x_test and y_test go together, but x_test is missing"),
        ({"x_test": np.zeros((2, 4)), "y_test": np.zeros(2, int)}, "x_test must have the shape"),
        ({"x_test": np.zeros((2, 3)), "y_test": np.zeros(3, int)}, "y_test must hold one label for each"),
        ({"test_size": 0.0}, r"test_size must be a number in \(0, 1\), not 0.0"),
        ({"test_size": 1.0}, r"test_size must be a number in \(0, 1\), not 1.0"),
        ({"test_size": np.nan}, r"test_size must be a number in \(0, 1\), not nan"),
        ({"test_size": 0.01}, "test_size must leave some of 20 samples on either side, not 0.01"),
        ({"test_size": 20}, "test_size must leave some of 20 samples on either side, not 20"),
        ({"test_size": 0}, "test_size must be a whole number of at least 1, not 0"),
        ({"test_size": "half"}, "test_size must be a whole number of at least 1, not 'half'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": None}, "seed must be a whole number of at least 0, not None"),
    ],
)
def test_unusable_arrays(arguments: dict[str, object], message: str) -> None:
    x, y = some()
    with pytest.raises(InvalidInput, match=message):
        datasets.arrays(**{"x": x, "y": y, **arguments})


def test_images_are_flattened_and_their_shape_remembered() -> None:
    x, y = np.arange(96.0).reshape(4, 2, 3, 4), np.array([0, 1, 0, 1])
    data = datasets.arrays(x, y, x[:2], y[:2])
    assert data.shape == (2, 3, 4)
    np.testing.assert_array_equal(data.x_train, x.reshape(4, 24))
    assert datasets.arrays(x, y, x.reshape(4, 24), y).shape == (2, 3, 4)
    assert datasets.arrays(x, y, test_size=2).shape == (2, 3, 4)
    assert datasets.arrays(x[:, 0], y, test_size=2).shape == (1, 3, 4)
    for other in (x.reshape(4, 24), x[:, 0, 0, 0], x[..., None]):
        assert datasets.arrays(other, y, test_size=2).shape is None
    assert datasets.arrays(x.reshape(4, 24), y, x, y).shape is None
    with pytest.raises(InvalidInput, match=r"x_test must hold images .* x, \(2, 3, 4\), not \(3, 4, 2\)"):
        datasets.arrays(x, y, x.reshape(4, 3, 4, 2), y)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 4), r"shape must be of samples with 3 features, not \(1, 1, 4\)"),
        ((3,), r"shape must be \(channels, height, width\), not \(3,\)"),
        ((1, -1, -3), "each of shape must be a whole number of at least 1"),
        ("133", "shape must be"),
    ],
)
def test_a_shape_must_be_that_of_the_samples(shape: Any, message: str) -> None:
    x, y = some()
    assert Dataset("toy", x, y, x, y, classes=4, shape=(1, 1, 3)).shape == (1, 1, 3)
    with pytest.raises(InvalidInput, match=message):
        Dataset("toy", x, y, x, y, classes=4, shape=shape)


def test_inputs_may_be_images() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    checked = check_inputs(x, 12, (3, 2, 2))
    assert np.shares_memory(checked, x)
    np.testing.assert_array_equal(checked, x.reshape(2, 12))
    np.testing.assert_array_equal(check_inputs(x[:, :, ::-1], 12, (3, 2, 2)), x[:, :, ::-1].reshape(2, 12))
    assert check_inputs(checked, 12, (3, 2, 2)) is checked
    x[1, 2, 0, 1] = np.nan
    with pytest.raises(InvalidInput, match=r"1 of its 24 values are NaN .*, the first at \(1, 9\): nan"):
        check_inputs(x, 12, (3, 2, 2))
    with pytest.raises(InvalidInput, match=r"\(samples, 12\) or \(samples, 3, 2, 2\), not \(2, 2, 2, 3\)"):
        check_inputs(x.reshape(2, 2, 2, 3), 12, (3, 2, 2))


def test_digits() -> None:
    data = datasets.digits()
    assert (data.x_train.shape, data.x_test.shape, data.classes) == ((1347, 64), (450, 64), 10)
    assert data.shape == (1, 8, 8)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert set(np.bincount(data.y_test)) <= {43, 44, 45, 46}
    np.testing.assert_array_equal(data.x_train, datasets.digits(0).x_train)
    assert not np.array_equal(data.y_train, datasets.digits(seed=1).y_train)
    assert len(datasets.digits(test_size=0.5).y_test) == round(1797 / 2)


def test_only_digits_imports_scikit_learn() -> None:
    code = "import sys, pyflux_prune.datasets; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --- npz -------------------------------------------------------------------------------------------------


def test_npz(tmp_path: Path) -> None:
    x, y = some()
    np.savez(tmp_path / "two.npz", x=x, y=y, note=np.array("other arrays do not matter"))
    np.savez_compressed(tmp_path / "four.npz", x=x, y=y, x_test=x[:5], y_test=y[:5])
    two, four = datasets.npz(tmp_path / "two.npz"), datasets.load(str(tmp_path / "four.npz"))
    assert (two.name, len(two.x_test)) == ("two", 4)
    np.testing.assert_array_equal(two.x_test, datasets.arrays(x, y).x_test)
    np.testing.assert_array_equal(four.x_train, x)
    np.testing.assert_array_equal(four.y_test, y[:5])


class Touch:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    x = np.array([Touch(tmp_path / "executed")], object)
    np.savez(tmp_path / "evil.npz", x=x, y=np.array([0]))
    before = listing(tmp_path)
    with pytest.raises(InvalidInput, match=r"evil\.npz as an \.npz file of plain arrays: Object arrays"):
        datasets.npz(tmp_path / "evil.npz")
    assert listing(tmp_path) == before
    assert not (tmp_path / "executed").exists()


def test_unusable_npz(tmp_path: Path) -> None:
    def fails(name: str, message: str) -> None:
        before = listing(tmp_path)
        with pytest.raises(InvalidInput, match=message) as caught:
            datasets.npz(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert listing(tmp_path) == before

    x, y = some()
    fails("none.npz", "No such file")
    (tmp_path / "folder.npz").mkdir()
    fails("folder.npz", "it is not a file")
    for name, data in {"empty": b"", "text": b"x,y\n1,2\n", "zip": b"PK\3\4" + bytes(30)}.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
        fails(f"{name}.npz", "cannot read")
    np.save(tmp_path / "array.npy", x)
    fails("array.npy", "cannot read")
    np.savez(tmp_path / "lacks.npz", x=x, labels=y)
    fails("lacks.npz", r"has no array y, only \['labels', 'x'\]")
    np.savez(tmp_path / "nan.npz", x=x * np.nan, y=y)
    fails("nan.npz", "x must be finite, but 60 of its 60")
    np.savez(tmp_path / "cut.npz", x=x, y=y)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-30])
    fails("cut.npz", "not a zip file")
    (tmp_path / "cut.npz").write_bytes(whole.replace(x.tobytes(), bytes(x.nbytes)))
    fails("cut.npz", "Bad CRC-32")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d)}\n" % (2**40, 2**40)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("x.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    fails("huge.npz", "cannot read")


# --- MNIST -----------------------------------------------------------------------------------------------


def idx(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    shape = array.shape if shape is None else shape
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


IMAGES = {part: RNG.integers(0, 256, (n, 4, 3), np.uint8) for part, n in (("train", 6), ("t10k", 3))}
LABELS = {part: np.arange(len(images), dtype=np.uint8) for part, images in IMAGES.items()}


def write_mnist(folder: Path, dot: str = "-", zipped: bool = False) -> Path:
    for part in IMAGES:
        for stem, arrays in ((f"images{dot}idx3", IMAGES), (f"labels{dot}idx1", LABELS)):
            data = idx(arrays[part])
            path = folder / f"{part}-{stem}-ubyte{'.gz' * zipped}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return folder


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path: Path, dot: str, zipped: bool) -> None:
    data = datasets.load(f"mnist:{write_mnist(tmp_path, dot, zipped)}")
    assert (data.name, data.classes, data.features) == ("mnist", 10, 12)
    assert data.x_train.dtype == np.float32
    np.testing.assert_array_equal(data.x_train, IMAGES["train"].reshape(6, 12) / np.float32(255))
    np.testing.assert_array_equal(data.x_test, IMAGES["t10k"].reshape(3, 12) / np.float32(255))
    assert data.shape == (1, *IMAGES["train"].shape[1:])
    np.testing.assert_array_equal(data.y_train, LABELS["train"])
    np.testing.assert_array_equal(data.y_test, LABELS["t10k"])


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        if "labels" in path.name:
            path.rename(f"{path}.gz")
        else:
            path.write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(datasets.mnist(tmp_path).y_train, LABELS["train"])


@pytest.mark.skipif(not MNIST10K.is_dir(), reason=f"needs the MNIST digits in {MNIST10K}")
def test_real_mnist() -> None:
    data = datasets.mnist(MNIST10K)
    assert (data.x_train.shape, data.x_test.shape) == ((8000, 784), (2000, 784))
    sizes = np.bincount(np.concatenate([data.y_train, data.y_test]))
    assert (sizes.min(), sizes.max()) == (863, 1127)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert 0.12 < data.x_train.mean() < 0.14


@pytest.mark.skipif(not MNIST10K.is_dir(), reason=f"needs the MNIST digits in {MNIST10K}")
def test_real_mnist_truncated(tmp_path: Path) -> None:
    for path in MNIST10K.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:600_000])
    with pytest.raises(InvalidInput, match=f"{cut} is truncated: expected 6272016 bytes, found [0-9]{{7}}"):
        datasets.mnist(tmp_path)


WHOLE = idx(IMAGES["train"])
ZIPPED = gzip.compress(WHOLE)
BAD_IDX = {
    "no bytes": (b"", "truncated: expected 16 bytes, found 0"),
    "header cut": (WHOLE[:9], "truncated: expected 16 bytes, found 9"),
    "pixels cut": (WHOLE[:-5], "truncated: expected 88 bytes, found 83"),
    "too long": (WHOLE + b"\0\0\0", "too long: expected 88 bytes, found 89"),
    "labels' magic": (idx(LABELS["train"]), "must start with the bytes 00 00 08 03, not 00 00 08 01"),
    "floats": (b"\0\0\x0d\3" + WHOLE[4:], "must start with the bytes 00 00 08 03, not 00 00 0d 03"),
    "text": (b"<!DOCTYPE html>", "must start with the bytes 00 00 08 03, not 3c 21 44 4f"),
    "no images": (idx(np.zeros((0, 4, 3), np.uint8)), r"must not be empty, but has the shape \(0, 4, 3\)"),
    "no pixels": (idx(np.zeros((6, 0, 3), np.uint8)), r"must not be empty, but has the shape \(6, 0, 3\)"),
    "gzip cut": (ZIPPED[:40], "truncated: expected 88 bytes, found .* and no end of the gzip stream"),
    "gzip header only": (ZIPPED[:10], "truncated: expected 16 bytes, found 0 and no end of the gzip stream"),
    "gzip end cut": (ZIPPED[:-3], "truncated: expected 88 bytes, found 88 and no end of the gzip stream"),
    "gzip sum": (ZIPPED[:-8] + bytes(4) + ZIPPED[-4:], "corrupt: CRC check failed"),
    "gzip body": (ZIPPED[:10] + b"\xff" * 30 + ZIPPED[40:], "corrupt: Error -3"),
    "gzip tail": (ZIPPED + b"tail", "corrupt: Not a gzipped file"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx(tmp_path: Path, case: str) -> None:
    data, message = BAD_IDX[case]
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(data)
    before = listing(tmp_path)
    with pytest.raises(InvalidInput, match=f"{path} (is )?{message}"):
        datasets.mnist(tmp_path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**16, 28, 28), (6, 2**31, 3)])
def test_a_hostile_idx_header_allocates_nothing(tmp_path: Path, shape: tuple[int, ...], zipped: bool) -> None:
    data = idx(IMAGES["train"], shape)
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(data) if zipped else data)
    expected = 16 + math.prod(shape)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=f"{path} is truncated: expected {expected} bytes, found 88"):
            datasets.mnist(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_mnist_labels_are_checked(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx(np.array([0, 10, 11], np.uint8)))
    with pytest.raises(InvalidInput, match=f"{tmp_path}: t10k-labels must hold labels from 0 to 9, not 10"):
        datasets.mnist(tmp_path)
    path.write_bytes(idx(np.array([0, 1], np.uint8)))
    with pytest.raises(InvalidInput, match=f"{tmp_path}: t10k-labels must hold one label for each of 3"):
        datasets.mnist(tmp_path)


def test_mnist_images_of_different_sizes(tmp_path: Path) -> None:
    (write_mnist(tmp_path) / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 4), np.uint8)))
    with pytest.raises(InvalidInput, match=rf"{tmp_path}: x_test must .* \(samples, 12\), not \(3, 16\)"):
        datasets.mnist(tmp_path)


def test_mnist_says_what_it_expects(tmp_path: Path) -> None:
    expected = "expected there: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte"
    with pytest.raises(InvalidInput, match=f"{tmp_path}/nowhere is not a folder; {expected}"):
        datasets.mnist(tmp_path / "nowhere")
    (write_mnist(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InvalidInput, match=f"{tmp_path} has no t10k-labels-idx1-ubyte; {expected}"):
        datasets.mnist(tmp_path)


@pytest.mark.parametrize("dir", ["", "a\0b", 5, None, b"\0"])
@pytest.mark.parametrize("read", [datasets.mnist, datasets.cifar10])
def test_dir_is_a_name(read: Callable[[object], Dataset], dir: object) -> None:
    with pytest.raises(InvalidInput, match="dir must be the name of a file or folder, not "):
        read(dir)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path)
    assert datasets.load("mnist:~").features == 12


# --- CIFAR-10 --------------------------------------------------------------------------------------------


def python2_pickle(value: object) -> bytes:
    """Pickle as Python 2 does with protocol 2: bytes are strings, and NumPy's modules have old names."""

    def save(value: object) -> bytes:
        match value:
            case None | bool():
                return {None: b"N", False: b"\x89", True: b"\x88"}[value]
            case int():
                return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
            case bytes() if len(value) < 256:
                return b"U" + bytes([len(value)]) + value + b"q\0"
            case bytes():
                return b"T" + struct.pack("<i", len(value)) + value + b"r\0\1\0\0"
            case tuple():
                return b"(" + b"".join(map(save, value)) + b"t"
            case list():
                return b"]q\1(" + b"".join(map(save, value)) + b"e"
            case dict():
                return b"}q\2(" + b"".join(save(part) for item in value.items() for part in item) + b"u"
            case np.ndarray():
                code = value.dtype.str[1:].encode()
                dtype = b"cnumpy\ndtype\n" + save((code, 0, 1)) + b"R"
                dtype += save((3, b"|", None, None, None, -1, -1, 0)) + b"b"
                made = b"cnumpy.core.multiarray\n_reconstruct\n"
                made += b"(cnumpy\nndarray\n" + save((0,)) + save(b"b") + b"tR"
                order = value.flags.f_contiguous and not value.flags.c_contiguous
                parts = [save(1), save(value.shape), dtype, save(order), save(value.tobytes("A"))]
                return made + b"(" + b"".join(parts) + b"tb"
        raise TypeError(value)

    return b"\x80\2" + save(value) + b"."


CIFAR = {f"data_batch_{i}": 2 for i in range(1, 6)} | {"test_batch": 3}
PIXELS = {name: RNG.integers(0, 256, (n, 3072), np.uint8) for name, n in CIFAR.items()}
CLASSES = {name: [9, 0, i][:n] for i, (name, n) in enumerate(CIFAR.items())}


def batch(name: str, **change: object) -> bytes:
    entries: dict[str, object] = {
        "batch_label": name.encode(),
        "labels": CLASSES[name],
        "data": PIXELS[name],
        "filenames": [b"leptodactylus_pentadactylus_s_%06d.png" % i for i in range(CIFAR[name])],
    }
    return python2_pickle({key.encode(): value for key, value in {**entries, **change}.items()})


def records(name: str) -> bytes:
    return np.column_stack([np.array(CLASSES[name], np.uint8), PIXELS[name]]).tobytes()


def write_cifar(folder: Path, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in CIFAR:
        (folder / f"{name}{suffix}").write_bytes(records(name) if suffix else batch(name))
    return folder


@pytest.mark.filterwarnings("ignore:.*align should be passed")
def test_the_pickles_here_are_as_python_2_writes_them() -> None:
    loaded = pickle.loads(batch("test_batch"), encoding="bytes")
    assert loaded[b"labels"] == CLASSES["test_batch"]
    assert loaded[b"data"].dtype == np.uint8
    np.testing.assert_array_equal(loaded[b"data"], PIXELS["test_batch"])


@pytest.mark.parametrize(("inner", "suffix"), [("cifar-10-batches-py", ""), ("cifar-10-batches-bin", ".bin")])
@pytest.mark.parametrize("parent", [False, True])
def test_cifar10(tmp_path: Path, inner: str, suffix: str, parent: bool) -> None:
    folder = write_cifar(tmp_path / inner, suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = datasets.load(f"cifar10:{tmp_path if parent else folder}")
    assert (data.name, data.classes, data.features, data.shape) == ("cifar10", 10, 3072, (3, 32, 32))
    train = [name for name in CIFAR if name != "test_batch"]
    pixels = np.concatenate([PIXELS[name] for name in train])
    np.testing.assert_array_equal(data.x_train, pixels / np.float32(255))
    np.testing.assert_array_equal(data.x_test, PIXELS["test_batch"] / np.float32(255))
    assert data.y_train.tolist() == [label for name in train for label in CLASSES[name]]
    assert data.y_test.tolist() == CLASSES["test_batch"]


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_cifar10_says_what_it_expects(tmp_path: Path, suffix: str) -> None:
    expected = "expected there: data_batch_1 … data_batch_5 and test_batch, or these with .bin"
    with pytest.raises(InvalidInput, match=f"{tmp_path}/nowhere is not a folder; {expected}"):
        datasets.cifar10(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=f"{tmp_path} has no test_batch; {expected}"):
        datasets.cifar10(tmp_path)
    (write_cifar(tmp_path, suffix) / f"data_batch_4{suffix}").unlink()
    with pytest.raises(InvalidInput, match=f"{tmp_path} has no data_batch_4{suffix}; {expected}"):
        datasets.cifar10(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be a whole number of records of 3073 bytes, not 0 bytes"),
        (records("test_batch")[:-1], "must be a whole number of records of 3073 bytes, not 9218 bytes"),
        (b"\x0a" + bytes(3072), "labels must hold labels from 0 to 9, not 10"),
    ],
)
def test_bad_cifar10_records(tmp_path: Path, data: bytes, message: str) -> None:
    path = write_cifar(tmp_path, ".bin") / "data_batch_2.bin"
    path.write_bytes(data)
    before = listing(tmp_path)
    with pytest.raises(InvalidInput, match=f"{path}:? {message}"):
        datasets.cifar10(tmp_path)
    assert listing(tmp_path) == before


def _global(module: str, name: str, argument: bytes) -> bytes:
    return b"\x80\2c%s\n%s\nU%c%s\x85R." % (module.encode(), name.encode(), len(argument), argument)


GOOD = batch("test_batch")
OTHER = "of data"
BAD_PICKLES = {
    "empty": (b"", "EOFError"),
    "cut": (GOOD[:-200], "EOFError"),
    "text": (b"<!DOCTYPE html>", r"KeyError\(60\)"),
    "no dict": (python2_pickle([1, 2]), OTHER),
    "no data": (python2_pickle({b"labels": [1]}), OTHER),
    "data no array": (batch("test_batch", data=b"abc"), OTHER),
    "wrong width": (batch("test_batch", data=np.zeros((3, 3071), np.uint8)), OTHER),
    "wrong dtype": (batch("test_batch", data=np.zeros((3, 3072), np.int8)), OTHER),
    "column-major": (batch("test_batch", data=np.asfortranarray(PIXELS["test_batch"])), OTHER),
    "no images": (batch("test_batch", data=np.zeros((0, 3072), np.uint8), labels=[]), OTHER),
    "other shape": (GOOD.replace(b"J\0\x0c\0\0t", b"J\xff\xff\xff\x7ft"), OTHER),
    "labels no list": (batch("test_batch", labels=b"\1\2\3"), OTHER),
    "labels no ints": (batch("test_batch", labels=[1, b"2", None]), OTHER),
    "hoarding": (b"\x80\5\x96" + struct.pack("<Q", 2**34) + b".", r"KeyError\(150\)"),
    "remembering": (b"\x80\2Nr\xff\xff\xff\x7f.", OTHER),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_cifar10_pickles(tmp_path: Path, case: str) -> None:
    data, message = BAD_PICKLES[case]
    path = write_cifar(tmp_path) / "test_batch"
    path.write_bytes(data)
    before = listing(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=f"{path} is not a CIFAR-10 batch:? {message}"):
            datasets.cifar10(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, 10], r"hold labels from 0 to 9, not 10 \(at position 2\)"),
        ([1, -2, 0], r"hold labels from 0 to 9, not -2 \(at position 1\)"),
        ([1, 2], "hold one label for each of 3 samples"),
    ],
)
def test_bad_cifar10_labels(tmp_path: Path, labels: list[int], message: str) -> None:
    path = write_cifar(tmp_path) / "test_batch"
    path.write_bytes(batch("test_batch", labels=labels))
    with pytest.raises(InvalidInput, match=f"{path}: labels must {message}"):
        datasets.cifar10(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_runs_no_pickle(tmp_path: Path, protocol: int) -> None:
    path = write_cifar(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Touch(tmp_path / "executed"), b"labels": [0]}, protocol))
    with pytest.raises(InvalidInput, match="data_batch_1 is not a CIFAR-10 batch: "):
        datasets.cifar10(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "numpy.core.multiarray.fromfile"])
def test_cifar10_admits_no_other_name(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(_global(module, function, b"true"))
    with pytest.raises(InvalidInput, match=f"is not a CIFAR-10 batch: .*it asks for {name}"):
        datasets.cifar10(tmp_path)


# --- load, and random corruption -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "digit", "digits:", "mnist", "mnist:", "cifar10:", "a:b", "x.npy", 5])
def test_other_specs_are_refused_with_the_allowed_forms(spec: object) -> None:
    with pytest.raises(InvalidInput, match=rf"digits, mnist:DIR, cifar10:DIR or FILE\.npz, not {spec!r}"):
        datasets.load(spec)  # type: ignore[arg-type]


def test_load_digits() -> None:
    np.testing.assert_array_equal(datasets.load("digits").x_train, datasets.digits().x_train)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a function that cuts bytes off, or overwrites some, mostly near the start."""
    if draw(st.booleans()):
        share = draw(st.floats(0, 1))
        return lambda data: data[: int(share * len(data))]
    places = draw(st.lists(st.tuples(st.integers(0, 200) | st.integers(0), st.integers(0, 255)), max_size=4))

    def overwrite(data: bytes) -> bytes:
        changed = bytearray(data)
        for place, value in places:
            changed[place % len(changed)] = value
        return bytes(changed)

    return overwrite


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """Return for each format a file of a good data set, with its bytes."""
    root = tmp_path_factory.mktemp("damaged")
    for name in ("idx", "gz"):
        (root / name).mkdir()
    np.savez_compressed(root / "a.npz", **dict(zip("xy", some(), strict=True)))
    paths = {
        "idx": write_mnist(root / "idx") / "train-images-idx3-ubyte",
        "gz": write_mnist(root / "gz", zipped=True) / "train-images-idx3-ubyte.gz",
        "pickle": write_cifar(root / "pickle") / "test_batch",
        "bin": write_cifar(root / "bin", ".bin") / "test_batch.bin",
        "npz": root / "a.npz",
    }
    return {name: (path, path.read_bytes()) for name, path in paths.items()}


@pytest.mark.parametrize("kind", ["idx", "gz", "pickle", "bin", "npz"])
@settings(max_examples=60, deadline=None)
@given(damage=damage())
def test_damaged_files_are_refused_or_read(
    folders: dict[str, tuple[Path, bytes]], kind: str, damage: Callable[[bytes], bytes]
) -> None:
    path, whole = folders[kind]
    path.write_bytes(damage(whole))
    spec = {"npz": str(path), "pickle": f"cifar10:{path.parent}", "bin": f"cifar10:{path.parent}"}
    with contextlib.suppress(InvalidInput):
        assert np.isfinite(datasets.load(spec.get(kind, f"mnist:{path.parent}")).x_train).all()
