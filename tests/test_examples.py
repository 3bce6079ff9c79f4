from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_julia

EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    """Run an example, with one thread: networks this small gain nothing by more, which contend for the cores."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(out: str) -> dict[str, list[str]]:
    """The cells of the rows of a Markdown table, by the first."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line[:2] == "| "]
    return {first: others for first, *others in cells if not first.startswith("-")}


def numbers(row: list[str]) -> list[float]:
    """The first number of each cell."""
    return [float(re.sub(r"[,%]", "", cell.split()[0])) for cell in row]


def test_prune_digits(engine: str, tmp_path: Path) -> None:
    out = run_example("prune_digits.py", "--epochs", "1", "--engine", engine, cwd=tmp_path)
    assert "90.0% pruned" in out


def test_lottery_ticket_on_digits(engine: str, tmp_path: Path) -> None:
    arguments = ("digits", "--seeds", "1", "--rounds", "2", "--epochs", "1", "--engine", engine)
    out = run_example("lottery_ticket_mnist.py", *arguments, cwd=tmp_path)
    assert list(rows(out)) == ["weights kept", "100.0%", "80.2%", "64.3%"]
    assert all(cell > 30 for row in list(rows(out).values())[2:] for cell in numbers(row))
    assert "(one seed)" in out


@pytest.mark.julia
@pytest.mark.slow
def test_lottery_ticket_on_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    arguments = (f"mnist:{mnist_dir}", "--seeds", "1", "--rounds", "3", "--epochs", "1")
    ticket, reinitialised, _ = numbers(
        rows(run_example("lottery_ticket_mnist.py", *arguments, cwd=tmp_path))["51.3%"]
    )
    assert ticket > 85
    assert ticket > reinitialised


def test_layer_collapse(tmp_path: Path) -> None:
    arguments = ("--seeds", "1", "--depth", "8", "--width", "20", "--engine", "torch")
    found = rows(run_example("layer_collapse.py", *arguments, cwd=tmp_path))
    best = numbers(found["SynFlow"])
    assert best[0] == best[1] >= 178
    for name in ("Magnitude", "SNIP", "GraSP"):
        assert all(other < synflow for other, synflow in zip(numbers(found[name]), best, strict=True))


def test_curvature(tmp_path: Path) -> None:
    arguments = ("--seeds", "1", "--hidden", "6", "--epochs", "20", "--engine", "torch")
    found = rows(run_example("curvature.py", *arguments, cwd=tmp_path))
    magnitude, obd, obs, full = (
        numbers(found[name]) for name in ("magnitude", "OBD", "OBS by layer", "OBS of all weights together")
    )
    assert obd[0] > magnitude[0] + 0.1  # rank correlation
    assert min(obs[1], full[1]) > magnitude[1]  # sparsity that costs one point
    assert full[3] > obd[3] > magnitude[3]  # accuracy at 70 %


def test_edge_popup(tmp_path: Path) -> None:
    arguments = ("--seeds", "1", "--width", "64", "--epochs", "5", "--engine", "torch")
    found = rows(run_example("edge_popup.py", *arguments, cwd=tmp_path))
    share, chosen = numbers(found["chosen by edge-popup"])
    assert share == 50
    assert chosen > 80
    assert all(numbers(found[name])[1] < 30 for name in ("all weights", "random ones", "the largest"))


def test_smaller_network(engine: str, tmp_path: Path) -> None:
    arguments = ("--seeds", "1", "--epochs", "1", "--repetitions", "5", "--engine", engine)
    found = rows(run_example("smaller_network.py", *arguments, cwd=tmp_path))
    dense, masked, small = (numbers(found[name]) for name in ("dense", "neurons masked", "neurons taken out"))
    assert dense[0] == 50_610
    assert all(10 * of_small < of_dense for of_small, of_dense in zip(small[:3], dense[:3], strict=True))
    assert small[4] == masked[4] > 70  # the accuracy


def test_sparse_training(tmp_path: Path) -> None:
    arguments = (
        "digits",
        "--seeds",
        "1",
        "--epochs",
        "3",
        "--every",
        "10",
        "--sparsity",
        "0.9",
        "--engine",
        "torch",
    )
    found = rows(run_example("sparse_training.py", *arguments, cwd=tmp_path))
    kept = {name: numbers(row) for name, row in found.items() if name != "network"}
    assert [share for share, _ in kept.values()] == [100, 10, 10, 10, 10, 10]
    assert all(accuracy > 30 for _, accuracy in kept.values())
    assert kept["pruned by magnitude, bit by bit"][1] > kept["random masks that stay"][1]


@pytest.mark.julia
def test_crosscheck_torch(tmp_path: Path) -> None:
    out = run_example("crosscheck_torch.py", "--epochs", "1", "--rounds", "1", cwd=tmp_path)
    assert "largest difference" in out


@pytest.mark.julia
def test_prune_in_julia() -> None:
    done = run_julia(str(EXAMPLES / "prune_in_julia.jl"), "1")
    assert done.returncode == 0, done.stderr
    assert "round 1:" in done.stdout
    assert "PrunableDense(64 => 64, relu; density=" in done.stdout


@pytest.mark.julia
def test_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_julia("-e", "using MPI; isnothing(Sys.which(first(MPI.mpiexec().exec))) && error(MPI.mpiexec())")
    if found.returncode:
        pytest.skip(f"needs MPI.jl and mpiexec: {found.stderr.strip().splitlines()[0]}")
    for name in ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe"):
        monkeypatch.setenv(f"OMPI_{name}", "1")
    example = f"--project=$(Base.active_project()) {EXAMPLES / 'data_parallel.jl'} 2"
    done = run_julia("-e", f"using MPI; run(`$(MPI.mpiexec()) -n 2 $(Base.julia_cmd()) {example}`)")
    assert done.returncode == 0, done.stderr
    assert "round 2, 2 processes: 51 % pruned" in done.stdout


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(path.name in tested for path in EXAMPLES.iterdir())
