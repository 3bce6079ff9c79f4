from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_julia

EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prune_digits(engine: str, tmp_path: Path) -> None:
    out = run_example("prune_digits.py", "--epochs", "1", "--engine", engine, cwd=tmp_path)
    assert "90.0% pruned" in out


def test_lottery_ticket_on_digits(engine: str, tmp_path: Path) -> None:
    arguments = ("digits", "--seeds", "1", "--rounds", "3", "--epochs", "1", "--engine", engine)
    out = run_example("lottery_ticket_mnist.py", *arguments, cwd=tmp_path)
    assert "| weights | rewound | reinitialised |" in out


@pytest.mark.julia
@pytest.mark.slow
def test_lottery_ticket_on_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    arguments = (f"mnist:{mnist_dir}", "--seeds", "1", "--rounds", "3", "--epochs", "1")
    assert "| 51.3% |" in run_example("lottery_ticket_mnist.py", *arguments, cwd=tmp_path)


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


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(path.name in tested for path in EXAMPLES.iterdir())
