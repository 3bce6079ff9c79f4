"""The code passes its own linters."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_linters_pass(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_julia_engine_imports_juliacall() -> None:
    files = [p for p in (ROOT / "pyflux_prune").rglob("*.py") if "import juliacall" in p.read_text()]
    assert [p.name for p in files] == ["julia.py"]
