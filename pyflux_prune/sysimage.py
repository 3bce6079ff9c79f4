"""A system image: Julia with Flux and PrunableFlux compiled into it, so that it starts at once.

An image never runs other code than would run without it: its name is a digest of all that it was built from, and
the engine takes the one whose name is the digest of what is there now.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np

from .errors import EngineUnavailable

LIBPYTHON = "PYFLUX_PRUNE_LIBPYTHON"
"""The environment variable that tells an image in which process Python is, and where in memory."""

SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

PACKAGE_COMPILER = """
import Pkg
Pkg.activate(ARGS[1])
Pkg.offline(ARGS[2] == "offline")
Pkg.add(Pkg.PackageSpec(name = "PackageCompiler", uuid = "9b87118b-4619-50d2-8e1e-99f35a4d4d9d", version = "2"))
"""

# PythonCall starts with the image, before juliacall tells it about Python: a module that starts earlier does.
EMBEDDED = f"""
module Embedded
function __init__()
    process, address = split(get(ENV, "{LIBPYTHON}", "0 0"))
    parse(Int, process) == getpid() && @eval Main __PythonCall_libptr = Ptr{{Cvoid}}($(parse(UInt, address)))
end
end
"""

IMAGE = """
import PackageCompiler
image, project, statements, embedded = ARGS
PackageCompiler.create_sysimage(
    ["Flux", "PrunableFlux", "PythonCall"];
    sysimage_path = image, project, precompile_statements_file = statements, import_into_main = false,
    sysimage_build_args = `--load=$embedded`)
"""


def built(project: Path) -> list[Path]:
    """Return the images that were built for this project, whether they fit or not."""
    return sorted(_folder(project).glob(f"sysimage-*{SUFFIX}"))


def find(julia: str, project: Path) -> Path | None:
    """Return the image that fits this Julia, these packages and this processor, if there is one."""
    images = built(project)
    fitting = _path(julia, project) if images else None
    return fitting if fitting in images else None


def build(julia: str, project: Path) -> Path:
    """Build the image for a project unless it is there, and remove those that do not fit; takes some minutes.

    Args:
        julia: Julia's executable.
        project: a Julia project with Flux, PrunableFlux and PythonCall.

    Raises:
        EngineUnavailable: what is needed for that is not here, or it fails; nothing is left behind then.

    """
    if found := find(julia, project):
        return found
    if os.name != "nt" and not (os.environ.get("JULIA_CC") or shutil.which("gcc") or shutil.which("clang")):
        raise EngineUnavailable("a system image needs a C compiler: install gcc or clang, or name one in JULIA_CC")
    image = _path(julia, project)
    try:
        image.parent.mkdir(parents=True, exist_ok=True)
        # On the same disk, so that renaming is one step.
        with tempfile.TemporaryDirectory(prefix="building-", dir=image.parent) as scratch:
            made = _make(julia, project, Path(scratch))
            if _path(julia, project) != image:
                raise EngineUnavailable(
                    "Julia's packages changed meanwhile; run pyflux-prune build-sysimage again"
                )
            made.replace(image)
        for other in built(project):
            if other != image:
                other.unlink()
    except OSError as error:
        raise EngineUnavailable(
            f"the system image cannot be written to {image.parent} ({error.strerror})"
        ) from error
    return image


def _make(julia: str, project: Path, scratch: Path) -> Path:
    """Build and try an image in a directory of its own."""
    import juliapkg

    image, statements, embedded = scratch / f"sysimage{SUFFIX}", scratch / "statements.jl", scratch / "embedded.jl"
    embedded.write_text(EMBEDDED)
    run = [julia, "--startup-file=no", f"--project={scratch}", "-e"]
    _run(
        [*run, PACKAGE_COMPILER, str(scratch), "offline" if juliapkg.offline(None) else "online"],
        "PackageCompiler, which builds system images, cannot be had",
    )
    expected = _numbers(PYTHON_JULIACALL_TRACE_COMPILE=str(statements))
    _run(
        [*run, IMAGE, *map(str, (image, project, statements, embedded))],
        "PackageCompiler could not build the system image",
    )
    if not np.allclose(_numbers(PYTHON_JULIACALL_SYSIMAGE=str(image)), expected, rtol=1e-3):
        raise EngineUnavailable("Julia computes otherwise with the system image than without; it was not kept")
    return image


def _run(command: list[str], failed: str, **environment: str) -> str:
    """Run a command, all that it prints on stderr; return nothing, or with an environment what it prints."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE if environment else 2,
        text=True,
        env={**os.environ, "JULIA_PYTHONCALL_EXE": sys.executable, **environment},
    )
    if done.returncode:
        raise EngineUnavailable(f"{failed}; what it says is above")
    return done.stdout


def _numbers(**environment: str) -> list[float]:
    script = "import json; from pyflux_prune.sysimage import workload; print(json.dumps(workload()))"
    out = _run([sys.executable, "-c", script], "Julia could not train a network to build from", **environment)
    return [float(number) for number in json.loads(out)]


def workload() -> list[float]:
    """Do what Python asks of Julia, on networks of all kinds of layers, and return numbers that depend on it."""
    from . import choices, datasets
    from .architectures import mlp, vgg
    from .experiment import iterative_prune
    from .network import prune

    numbers: list[float] = []
    rng, training = np.random.default_rng(0), choices.Training(epochs=1, batchsize=16)
    for shape in ((16,), (1, 8, 8)):
        y = np.arange(40) % 3
        x = rng.normal(size=(40, *shape)).astype(np.float32) + y.reshape(-1, *(1 for _ in shape))
        data = datasets.arrays(x, y, test_size=0.2)
        if len(shape) == 1:
            net = mlp([16, 20, 10, 3], engine="julia")
        else:
            net = vgg([2, "M", 4], hidden=[8], input_shape=shape, classes=3, engine="julia")
        run = iterative_prune(net, data, schedule=[0.3, 0.6], training=training)
        numbers += [r.loss for r in run.rounds]
        for saliency in (choices.SNIP(), choices.Taylor(), choices.SynFlow()):
            prune(net.copy(), saliency, sparsity=0.7, structure=choices.Layerwise(), data=data)
        prune(net, choices.Magnitude(), sparsity=0.2, structure=choices.Neurons())
        numbers += [float(np.abs(net.compact()(x)).sum())]
        fast = net.sparsify()
        numbers += [float(np.abs(fast(x[:n])).sum()) for n in (1, 40)]
    return numbers


def _folder(project: Path) -> Path:
    return project / "pyflux_prune"


def _path(julia: str, project: Path) -> Path:
    return _folder(project) / f"sysimage-{_digest(julia, project)}{SUFFIX}"


def _digest(julia: str, project: Path) -> str:
    """Return a digest of Julia, the processor, the packages, and the sources of those that may change."""
    executable = Path(shutil.which(julia) or julia).resolve()
    version = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True).stdout
    files = sorted(project.glob("*.toml"))
    for source in sorted(p for manifest in project.glob("*Manifest*.toml") for p in _sources(manifest)):
        files += [source / "Project.toml", *sorted(p for d in ("src", "ext") for p in source.glob(f"{d}/**/*.*"))]
    facts = [version, str(executable), executable.stat().st_mtime_ns, _processor()]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for file in files:
        digest.update(f"\n{file}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _sources(manifest: Path) -> list[Path]:
    """Return where the packages are that are used from a directory, and not from a release."""
    toml = tomllib.loads(manifest.read_text())
    entries = [e for found in toml.get("deps", toml).values() if isinstance(found, list) for e in found]
    return [manifest.parent / e["path"] for e in entries if "path" in e]


def _processor() -> list[str]:
    """Return what a processor can do: on one that can do less, code that was compiled for it must not run."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    told = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return [platform.machine(), *(line for line in first if line.startswith(told))]
