"""That the benchmark works; it judges no times. For the numbers: ``pyflux-prune bench``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.julia
def test_bench_prints_ratios_measured_in_one_run() -> None:
    command = [
        sys.executable,
        "-m",
        "pyflux_prune",
        "bench",
        "--hidden",
        "8",
        "--features",
        "4",
        "--steps",
        "3",
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [r["what"] for r in result["rows"]] == ["training step", "forward pass"]
    assert all(r["ratio"] == r["julia"] / r["torch"] > 0 for r in result["rows"])
    assert result["versions"]["julia"]["threads"] >= 1
    assert "Julia ÷ PyTorch" in subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
