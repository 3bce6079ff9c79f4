"""That the benchmark works; it judges no times. For the numbers: ``pyflux-prune bench``."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import run_julia

from pyflux_prune import EngineUnavailable, Network, lenet5, mlp, vgg
from pyflux_prune.bench import Bench, Row, compare
from pyflux_prune.peers import Calls, DeepSparse, Processes, write_onnx

TINY = ("--hidden", "8", "--features", "4", "--classes", "3")


def bench(*arguments: str, network: Sequence[str] = TINY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyflux_prune", "bench", *network, "--repeats", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.julia
def test_bench_prints_ratios_measured_in_one_run() -> None:
    done = bench("--batch", "1,2", "--sparsity", "0.5", "--sparsity", "0.9", "--threads", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = result["rows"]
    peers = ["PyTorch, masks", "Flux, dense", "PyTorch, dense", "PyTorch, CSR"]
    assert [(r["sparsity"], r["batch"], r["peer"]) for r in rows] == [
        (sparsity, batch, peer) for sparsity in (0.5, 0.9) for batch in (1, 2) for peer in peers
    ]
    assert [r["what"] for r in rows[:4]] == ["training step"] * 2 + ["inference"] * 2
    assert all(r["ratio"] == r["peer_us"] / r["ours_us"] > 0 for r in rows)
    versions = result["versions"]
    assert result["threads"] == versions["julia"]["threads"] == versions["julia"]["blas_threads"] == 2
    assert versions["torch"]["threads"] == 2
    assert versions["julia"]["processor"]


@pytest.mark.julia
def test_bench_measures_networks_of_images() -> None:
    done = bench("--batch", "2", "--json", network=["--network", "lenet5"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["network"] == "1×28×28–6@5×5–max2×2–16@5×5–max2×2–120–84–10"
    assert all(r["ratio"] > 0 for r in result["rows"])


@pytest.mark.julia
def test_bench_measures_start_up() -> None:
    done = bench("--start-up", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["what"] in ("start-up", "start-up, system image")
    assert (row["batch"], row["peer"]) == (64, "PyTorch")
    assert row["ratio"] > 0


def test_a_process_that_trains_nothing_is_told() -> None:
    with pytest.raises(EngineUnavailable, match="could not train a batch"):
        Processes("raise SystemExit(1)", [4, 3], 1, 1).seconds(1)


@pytest.mark.julia
def test_bench_compares_with_the_runtimes_that_are_installed() -> None:
    pytest.importorskip("onnx")
    runtimes = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
    found = [name for name, package in runtimes.items() if importlib.util.find_spec(package)]
    done = bench("--peers")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("÷ ours", *found))


@pytest.mark.julia
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "--batch must be whole numbers"),
        (["--sparsity", "2"], "--sparsity must be"),
        (["--deepsparse", "no-such-python"], "no-such-python cannot be run"),
        (["--network", "lenet5"], "--hidden and --features are for --network mlp"),
    ],
)
def test_bench_says_what_is_wrong(arguments: Sequence[str], said: str) -> None:
    if "--deepsparse" in arguments:
        pytest.importorskip("onnx")
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.julia
def test_pruning_is_timed() -> None:
    done = run_julia(str(Path(__file__).with_name("pruning.jl")), "1", "0.01")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(.*), .*, .*: [\d.e-]+ s", done.stdout) == [
        "Magnitude, Global",
        "Magnitude, Layerwise",
        "Magnitude, PerOutput",
        "SynFlow, Global",
    ]


def test_the_best_time_of_each_counts() -> None:
    calls: list[str] = []
    works = {name: Calls(lambda name=name: calls.append(name)) for name in ("ours", "peer")}  # type: ignore[misc]
    (row,) = compare("inference", 1, 0.5, works["ours"], {"peer": works["peer"]}, 2, 0.0)
    assert (row.what, row.batch, row.sparsity, row.peer) == ("inference", 1, 0.5, "peer")
    assert 0 < row.ours_us < 1000
    assert set(calls) == {"ours", "peer"}


def test_a_ratio_above_one_says_that_ours_is_faster() -> None:
    row = Row("inference", 1, 0.5, "peer", ours_us=2.0, peer_us=3.0)
    assert row.ratio == 1.5
    assert Bench("4–3", 1, 1, (row,), {}).to_json()["rows"][0]["ratio"] == 1.5


def test_a_python_without_deepsparse_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"cannot run DeepSparse \(ModuleNotFoundError"):
        DeepSparse(sys.executable, tmp_path, np.ones((2, 4), np.float32), 1)


@pytest.mark.parametrize(
    "net",
    [
        mlp([4, 8, 3], engine="torch"),
        lenet5(engine="torch", activation="tanh"),
        vgg((4, "M", 6), input_shape=(2, 9, 8), activation="sigmoid", engine="torch"),
    ],
    ids=["mlp", "lenet5", "vgg"],
)
def test_the_onnx_file_computes_the_same(tmp_path: Path, net: Network) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).random((2, *net.input_shape), dtype=np.float32)
    write_onnx(tmp_path / "network.onnx", net.parts, len(x))
    (outputs,) = runtime.InferenceSession(tmp_path / "network.onnx").run(None, {"x": x})
    np.testing.assert_allclose(outputs, net(x), rtol=1e-5, atol=1e-5)
