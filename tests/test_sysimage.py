"""Which system image is used, and that nothing half-built ever is. Building one takes minutes: fakes stand in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyflux_prune import EngineUnavailable, cli, doctor, sysimage
from pyflux_prune.engines import julia as engine


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one package of a release and one from a directory."""
    folder, package = tmp_path / "project", tmp_path / "package"
    for name, text in {
        "Project.toml": 'name = "P"',
        "src/P.jl": "module P end",
        "ext/E.jl": "module E end",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    folder.mkdir()
    (folder / "Project.toml").write_text("[deps]\n")
    (folder / "Manifest.toml").write_text(
        'julia_version = "1.10.8"\nmanifest_format = "2.0"\n'
        '[[deps.Flux]]\ngit-tree-sha1 = "0123"\nversion = "0.16.9"\n[[deps.P]]\npath = "../package"\n'
    )
    return folder


@pytest.fixture
def julia(tmp_path: Path) -> str:
    """What only tells its version."""
    path = tmp_path / "julia"
    path.write_text("#!/bin/sh\necho julia version 1.10.8\n")
    path.chmod(0o755)
    return str(path)


Made = Callable[..., Path]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building takes no time."""

    def make(julia: str, project: Path, scratch: Path) -> Path:
        (scratch / "image").write_text("image")
        return scratch / "image"

    monkeypatch.setattr(sysimage, "_make", make)


def left(project: Path) -> list[Path]:
    return sorted((project / "pyflux_prune").iterdir())


@pytest.mark.usefixtures("made")
def test_an_image_is_built_once_and_found(julia: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sysimage.find(julia, project) is None
    image = sysimage.build(julia, project)
    assert sysimage.find(julia, project) == image
    assert left(project) == [image]
    monkeypatch.setattr(sysimage, "_make", None)
    assert sysimage.build(julia, project) == image


def changed_release(project: Path, julia: str) -> None:
    manifest = project / "Manifest.toml"
    manifest.write_text(manifest.read_text().replace("0.16.9", "0.16.10"))


def changed_preference(project: Path, julia: str) -> None:
    (project / "LocalPreferences.toml").write_text("[PythonCall]\n")


def changed_source(project: Path, julia: str) -> None:
    (project.parent / "package" / "src" / "P.jl").write_text("module P f() = 1 end")


def changed_extension(project: Path, julia: str) -> None:
    (project.parent / "package" / "ext" / "E.jl").write_text("module E f() = 1 end")


def new_source(project: Path, julia: str) -> None:
    (project.parent / "package" / "src" / "deep").mkdir()
    (project.parent / "package" / "src" / "deep" / "Q.jl").write_text("module Q end")


def changed_julia(project: Path, julia: str) -> None:
    Path(julia).write_text("#!/bin/sh\necho julia version 1.10.9\n")


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    "change",
    [changed_release, changed_preference, changed_source, changed_extension, new_source, changed_julia],
)
def test_an_image_of_anything_else_is_not_used_and_goes_with_the_next(
    change: Callable[[Path, str], None], julia: str, project: Path
) -> None:
    old = sysimage.build(julia, project)
    change(project, julia)
    assert sysimage.find(julia, project) is None
    assert sysimage.built(project) == [old]
    new = sysimage.build(julia, project)
    assert new != old
    assert left(project) == [new]


@pytest.mark.usefixtures("made")
def test_an_image_is_not_used_on_another_processor(
    julia: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysimage.build(julia, project)
    monkeypatch.setattr(sysimage, "_processor", lambda: ["another"])
    assert sysimage.find(julia, project) is None


def test_a_build_that_fails_leaves_nothing(julia: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(julia: str, project: Path, scratch: Path) -> Path:
        (scratch / "image").write_text("half an im")
        raise KeyboardInterrupt

    monkeypatch.setattr(sysimage, "_make", fail)
    with pytest.raises(KeyboardInterrupt):
        sysimage.build(julia, project)
    assert left(project) == []


def test_an_image_of_sources_that_change_meanwhile_is_not_kept(
    julia: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(julia: str, project: Path, scratch: Path) -> Path:
        changed_source(project, julia)
        (scratch / "image").write_text("image")
        return scratch / "image"

    monkeypatch.setattr(sysimage, "_make", make)
    with pytest.raises(EngineUnavailable, match="changed meanwhile"):
        sysimage.build(julia, project)
    assert left(project) == []


def test_no_compiler_is_one_sentence(julia: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JULIA_CC", raising=False)
    with pytest.raises(EngineUnavailable, match=r"needs a C compiler: install gcc or clang"):
        sysimage.build(julia, project)


@pytest.mark.parametrize(
    ("said", "fails"),
    [
        ("PackageCompiler, which builds system images, cannot be had; what it says is above", "import Pkg"),
        ("PackageCompiler could not build the system image; what it says is above", "import PackageCompiler"),
    ],
)
def test_what_julia_cannot_do_is_one_sentence(
    said: str, fails: str, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake-julia"
    fake.write_text(f'#!/bin/sh\necho says why\ncase "$*" in *"{fails}"*) exit 1;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("JULIA_CC", "cc")
    monkeypatch.setattr(sysimage, "_numbers", lambda **environment: [1.0])
    with pytest.raises(EngineUnavailable) as caught:
        sysimage.build(str(fake), project)
    assert str(caught.value) == said
    assert left(project) == []


def test_an_image_that_computes_otherwise_is_not_kept(
    julia: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JULIA_CC", "cc")
    monkeypatch.setattr(
        sysimage, "_numbers", lambda **environment: [1.0 * ("PYTHON_JULIACALL_SYSIMAGE" in environment)]
    )
    with pytest.raises(EngineUnavailable, match="computes otherwise"):
        sysimage.build(julia, project)
    assert left(project) == []


@pytest.mark.usefixtures("made")
def test_the_engine_takes_the_image_that_fits_unless_told_another(
    julia: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHON_JULIACALL_SYSIMAGE", raising=False)
    assert engine._image(julia, project) == {}
    image = sysimage.build(julia, project)
    told = engine._image(julia, project)
    assert told["PYTHON_JULIACALL_SYSIMAGE"] == str(image)
    assert told[sysimage.LIBPYTHON].split()[0] == str(os.getpid())
    monkeypatch.setenv("PYTHON_JULIACALL_SYSIMAGE", "mine.so")
    assert engine._image(julia, project)["PYTHON_JULIACALL_SYSIMAGE"] == "mine.so"
    monkeypatch.delenv("PYTHON_JULIACALL_SYSIMAGE")
    changed_source(project, julia)
    assert engine._image(julia, project) == {}


@pytest.mark.usefixtures("made")
def test_the_doctor_says_whether_there_is_an_image(
    julia: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHON_JULIACALL_SYSIMAGE", raising=False)
    monkeypatch.setattr(engine, "place", lambda: (julia, project))
    finding = doctor._image()
    assert (finding.ok, finding.found) == (False, "none")
    assert "pyflux-prune build-sysimage" in finding.mend
    image = sysimage.build(julia, project)
    assert doctor._image() == doctor.Finding("system image", True, str(image))
    changed_source(project, julia)
    finding = doctor._image()
    assert (finding.ok, "is stale" in finding.found, str(image) in finding.found) == (False, True, True)
    monkeypatch.setenv("PYTHON_JULIACALL_SYSIMAGE", "mine.so")
    assert doctor._image().found == "mine.so, as PYTHON_JULIACALL_SYSIMAGE says"


@pytest.mark.usefixtures("made")
def test_the_command_prints_the_file(
    julia: str, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "place", lambda: (julia, project))
    for arguments in ([], ["--json"]):
        cli.cli.main(["build-sysimage", *arguments], standalone_mode=False)
    text, record = capfd.readouterr().out.splitlines()
    image = sysimage.find(julia, project)
    assert text == f"{image}: 5 bytes"
    assert json.loads(record) == {"file": str(image), "bytes": 5}


def test_without_julia_the_command_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON_JULIA")} | {
        "PATH": "/nowhere",
        "PYTHON_JULIAPKG_OFFLINE": "yes",
        "PYTHON_JULIAPKG_PROJECT": str(tmp_path / "empty"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pyflux_prune", "build-sysimage"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Julia could not be started" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.julia
def test_the_workload_runs_and_repeats() -> None:
    first, second = (np.reshape(sysimage.workload(), (2, 5)) for _ in range(2))
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    # Which kernels infer is measured, so these may differ by rounding.
    np.testing.assert_allclose(first[:, 3:], second[:, 3:], rtol=1e-5)
