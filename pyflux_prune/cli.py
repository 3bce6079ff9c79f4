"""The command line, ``pyflux-prune``. Results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__, choices
from .engines import ACTIVATIONS, ENGINES
from .errors import InvalidInput, PruneError

if TYPE_CHECKING:
    from .datasets import Dataset
    from .engines import Part
    from .network import Network


class _Group(click.Group):
    """Ends with one line and exit code 2 on bad input, whichever layer finds it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: click.echo(f"pyflux-prune: {message}", err=True)
                return super().invoke(ctx)
        except PruneError as error:
            raise click.UsageError(str(error)) from error


def main() -> NoReturn:
    """Run the command line."""
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        message = " ".join(error.format_message().split())
        click.echo(f"pyflux-prune: {message}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("pyflux-prune: interrupted", err=True)
        sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Prune neural networks in Julia's Flux, and check them against PyTorch."""


def _sparsity(ctx: click.Context, param: click.Parameter, value: str | None) -> choices.Sparsity | None:
    """Read 0.8, or 0.9,0.9,0.5: one per layer."""
    if value is None:
        return None
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        raise InvalidInput(
            f"--sparsity must be a number in [0, 1), or several with commas, not {choices.shown(value)}"
        ) from None
    return choices.check_sparsity(numbers if len(numbers) > 1 else numbers[0], "--sparsity")


def _widths(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        widths = [int(part) for part in value.split(",")] if value else []
    except ValueError:
        widths = [0]
    if any(n < 1 for n in widths):
        raise InvalidInput(
            f"{param.opts[0]} must be whole numbers with commas, such as 300,100, not {choices.shown(value)}"
        )
    return widths


def _path(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    from .files import to_path

    name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
    return None if value is None else to_path(value, name)


def _finetune(ctx: click.Context, param: click.Parameter, value: str) -> choices.FineTune:
    return choices.finetune_by_name(value)


def _axis(name: str, default: str, classes: dict[str, type[Any]], help: str) -> Callable[..., Any]:
    """Return the option of an axis: one of ``classes``, with what fields it should have."""
    return click.option(
        f"--{name}",
        default=default,
        show_default=True,
        callback=lambda ctx, param, value: choices.by_name(f"--{name}", classes, value),
        metavar="NAME[:FIELD=VALUE,…]",
        help=f"{help}: {', '.join(classes)}.",
    )


def _experiment(epochs: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that say which experiment to run."""
    options = [
        click.option(
            "--data",
            default="digits",
            show_default=True,
            metavar="digits|mnist:DIR|cifar10:DIR|FILE.npz",
            help="What to train and test on.",
        ),
        click.option(
            "--network",
            default="mlp",
            show_default=True,
            type=click.Choice(["mlp", *_OF_IMAGES]),
            help="What to prune: a multilayer perceptron, or for images LeNet-5, a small VGG, or VGG-16.",
        ),
        click.option(
            "--hidden",
            callback=_widths,
            metavar="N,N,…",
            help="Widths of the hidden dense layers.  [default: mlp 300,100; vgg and vgg16 none]",
        ),
        _axis("saliency", "magnitude", choices.SALIENCIES, "How much a weight matters"),
        _axis("structure", "global", choices.STRUCTURES, "What competes with what"),
        click.option(
            "--schedule",
            default="exponential",
            show_default=True,
            type=click.Choice(list(choices.SCHEDULES)),
            help="How much goes at each round.",
        ),
        click.option(
            "--sparsity",
            callback=_sparsity,
            metavar="S",
            help="Share of the weights (of the neurons, with neurons) pruned in the end; for layerwise and "
            "peroutput also one per layer, with commas.  [default: 20 % of what is left per round]",
        ),
        click.option("--rounds", type=click.IntRange(1), help="Rounds of pruning.  [default: 12; crosscheck: 3]"),
        click.option(
            "--finetune",
            default="rewind",
            show_default=True,
            callback=_finetune,
            metavar=choices.FINETUNES,
            help="What survivors restart from.",
        ),
        click.option(
            "--epochs",
            default=epochs,
            show_default=True,
            type=click.IntRange(0),
            help="Epochs of training in each round.",
        ),
        click.option(
            "--decay",
            default=1.0,
            show_default=True,
            help="The learning rate is multiplied by this after each epoch.",
        ),
        click.option(
            "--pretrain/--no-pretrain",
            default=True,
            show_default=True,
            help="Whether the network is trained before the first pruning.",
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Of the initial weights and the order of the batches.",
        ),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_ENGINE = click.option(
    "--engine",
    default="auto",
    show_default=True,
    type=click.Choice(ENGINES),
    help="Julia, or the PyTorch reference; auto falls back to it, with a warning.",
)
_OF_IMAGES = ("lenet5", "vgg", "vgg16")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")


def _plan(
    schedule: str, sparsity: Any, rounds: int | None, epochs: int, decay: float, **others: Any
) -> dict[str, Any]:
    """Return what the options of ``_experiment`` mean, as arguments of ``iterative_prune``."""
    return others | {
        "schedule": choices.schedule_by_name(schedule, sparsity, rounds),
        "training": choices.Training(epochs=epochs, decay=decay),
    }


def _network(name: str, hidden: list[int] | None, data: Dataset, seed: int, engine: str) -> Network:
    """Return the network that ``--network`` and ``--hidden`` name, for these data."""
    from .architectures import mlp

    if name == "mlp":
        widths = [300, 100] if hidden is None else hidden
        return mlp([data.features, *widths, data.classes], seed=seed, engine=engine)
    if data.shape is None:
        raise InvalidInput(
            f"--network {name} needs images, x of the shape (samples, channels, height, width), but {data.name} "
            f"has samples of {data.features} features"
        )
    if name == "lenet5" and hidden is not None:
        raise InvalidInput("--hidden is for --network mlp, vgg and vgg16; that of lenet5 is always 120,84")
    units = {} if hidden is None else {"hidden": hidden}
    return _of_images(name, input_shape=data.shape, classes=data.classes, seed=seed, engine=engine, **units)


def _of_images(name: str, **options: Any) -> Network:
    from .architectures import VGG16, lenet5, vgg

    if name == "lenet5":
        return lenet5(**options)
    return vgg(VGG16, **options) if name == "vgg16" else vgg(**options)


def _print(as_json: bool, value: Any, table: Callable[[], Any]) -> None:
    if as_json:
        from .files import json_text

        click.echo(json_text(value))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = 1000  # tables take what they need
        console.print(table())


@cli.command()
@_experiment(epochs=15)
@_ENGINE
@click.option(
    "--out", type=click.Path(), callback=_path, help="A new or empty directory.  [default: run, run-2, …]"
)
@click.option(
    "--resume",
    "resume_from",
    type=click.Path(),
    callback=_path,
    metavar="DIR",
    help="Go on with the run in DIR; of the other options only --data, --engine and --json count.",
)
@_JSON
def run(
    data: str,
    network: str,
    hidden: list[int] | None,
    seed: int,
    engine: str,
    out: Path | None,
    resume_from: Path | None,
    as_json: bool,
    **plan: Any,
) -> None:
    """Train a network, prune it round by round, and report.

    Without arguments: a 64–300–100–10 network on scikit-learn's digits, 12 rounds that each prune the 20 % of
    weights of the least magnitude and rewind the others to their initial values.
    """
    from . import datasets, experiment, report

    dataset = datasets.load(data)
    if resume_from is not None:
        folder = resume_from
        done = experiment.resume(folder, dataset, engine=None if engine == "auto" else engine)
    else:
        folder = _free_directory() if out is None else out
        net = _network(network, hidden, dataset, seed, engine)
        done = experiment.iterative_prune(net, dataset, seed=seed, out=folder, **_plan(**plan))
    record = done.to_json()
    shown = {k: record[k] for k in ("engine", "data", "seed", "baseline", "rounds")}
    _print(as_json, shown | {"model": str(folder / "model.safetensors")}, lambda: report.table(done))
    if not as_json:
        click.echo(f"{folder}/: run.json, rounds.csv, model.safetensors, curve.png")


def _free_directory() -> Path:
    """Return run, or the first of run-2, run-3, … that does not exist."""
    number = 1
    while (folder := Path("run" if number == 1 else f"run-{number}")).exists():
        number += 1
    return folder


@cli.command()
@_experiment(epochs=5)
@_JSON
def crosscheck(
    data: str,
    network: str,
    hidden: list[int] | None,
    schedule: str,
    rounds: int | None,
    seed: int,
    as_json: bool,
    **plan: Any,
) -> None:
    """Run the same experiment in Julia and in PyTorch, and show the differences.

    Exits with 1 if any is out of tolerance.
    """
    from dataclasses import asdict

    from . import datasets
    from .crosscheck import crosscheck as check

    dataset = datasets.load(data)
    if rounds is None and schedule != "oneshot":
        rounds = 3
    net = _network(network, hidden, dataset, seed, "torch")
    result = check(net, dataset, seed=seed, **_plan(schedule, rounds=rounds, **plan))
    shown = {"ok": result.ok, "differences": [asdict(d) | {"ok": d.ok} for d in result.differences]}
    _print(as_json, shown, result.table)
    sys.exit(0 if result.ok else 1)


@cli.command()
@click.argument("model", type=click.Path(), callback=_path)
@_JSON
def inspect(model: Path, as_json: bool) -> None:
    """Show each layer of a model file: shape, density, size and FLOPs."""
    from .files import read_model
    from .measure import measure, table

    parts, metadata = read_model(model)
    rows = measure(parts, sparse=metadata["storage"] == "sparse")
    shown = {"file": str(model), "bytes": model.stat().st_size, "layers": [r.to_json() for r in rows]}
    _print(as_json, shown, lambda: table(rows, model.stat().st_size))


@cli.command()
@click.argument("source", metavar="IN", type=click.Path(), callback=_path)
@click.argument("target", metavar="OUT", type=click.Path(), callback=_path)
@click.option("--sparse", is_flag=True, help="Write only kept values and mask bits (safetensors).")
@click.option(
    "--activation",
    type=click.Choice(ACTIVATIONS),
    help="Of the hidden layers of a .pt state dict, which does not say.",
)
@click.option("--compact", is_flag=True, help="Leave out the neurons that do nothing, on the engine.")
@_ENGINE
@_JSON
def convert(
    source: Path, target: Path, sparse: bool, activation: str | None, compact: bool, engine: str, as_json: bool
) -> None:
    """Convert a model file: .safetensors, dense or --sparse, or .pt, a PyTorch state dict.

    A .pt to read must be of dense layers only: it does not say what else a network consists of.
    """
    from . import exchange, files
    from .engines import get_engine

    kinds = (".safetensors", ".pt")
    for name, path in (("IN", source), ("OUT", target)):
        if path.suffix not in kinds:
            raise InvalidInput(f"{name} must end in .safetensors or .pt, not {path.name!r}")
    if sparse and target.suffix != ".safetensors":
        raise InvalidInput(f"--sparse needs an OUT that ends in .safetensors, not {target.name!r}")
    if activation is not None and source.suffix != ".pt":
        raise InvalidInput(f"--activation is for an IN that ends in .pt: {source.name!r} says which it has")
    parts: Sequence[Part]
    if source.suffix == ".pt":
        parts = exchange.read_state_dict(source, activation=activation)
    else:
        parts, _ = files.read_model(source)
    if compact:
        parts = get_engine(engine).build(parts).compact().parts()
    if target.suffix == ".pt":
        exchange.write_state_dict(target, parts)
    else:
        files.write_model(target, parts, sparse=sparse)
    size = target.stat().st_size
    if as_json:
        click.echo(json.dumps({"file": str(target), "bytes": size}))
    else:
        click.echo(f"{target}: {size:,} bytes", err=True)


@cli.command()
@click.option(
    "--network",
    default="mlp",
    show_default=True,
    type=click.Choice(["mlp", *_OF_IMAGES]),
    help="A multilayer perceptron, or for images of 28×28 LeNet-5, or a small VGG, or for 3×32×32 VGG-16.",
)
@click.option("--hidden", callback=_widths, help="Of mlp, widths of the hidden layers.  [default: 300,100]")
@click.option("--features", type=click.IntRange(1), help="Of mlp, inputs.  [default: 784]")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(1), help="Outputs.")
@click.option("--batch", default="64", show_default=True, callback=_widths, help="Samples per step.")
@click.option(
    "--sparsity",
    "sparsities",
    multiple=True,
    default=["0.9"],
    show_default=True,
    callback=lambda ctx, param, values: [_sparsity(ctx, param, value) for value in values],
    help="Of each layer of the pruned networks; may be given several times.",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Of all that is measured.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(1), help="The best of these counts.")
@click.option("--start-up", is_flag=True, help="Add the time from the start of Python to the first trained batch.")
@click.option("--peers", "runtimes", is_flag=True, help="Add ONNX Runtime and OpenVINO, if installed.")
@click.option("--deepsparse", metavar="PYTHON", help="Add the DeepSparse of this interpreter.")
@_JSON
def bench(
    network: str,
    hidden: list[int] | None,
    features: int | None,
    classes: int,
    batch: list[int],
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure training and inference side by side with PyTorch and others, alternating in one run.

    --hidden and --batch take several numbers with commas.
    """
    from .bench import bench as measure_speed

    measured: list[int] | Network
    if network == "mlp":
        measured = [784 if features is None else features, *([300, 100] if hidden is None else hidden), classes]
    elif (hidden, features) != (None, None):
        raise InvalidInput("--hidden and --features are for --network mlp")
    else:
        size = {"input_shape": (3, 32, 32)} if network == "vgg16" else {}
        # Julia starts with the threads that are measured.
        measured = _of_images(network, classes=classes, engine="torch", **size)
    result = measure_speed(measured, batches=batch, **settings)
    _print(as_json, result.to_json(), result.table)


@cli.command()
@_JSON
def build_sysimage(as_json: bool) -> None:
    """Build a Julia that starts at once, for this Python environment; takes some minutes and a C compiler.

    The Julia engine uses it by itself from then on, as long as neither Julia nor a package changes.
    """
    from . import sysimage
    from .engines.julia import place

    image = sysimage.build(*place())
    size = image.stat().st_size
    click.echo(json.dumps({"file": str(image), "bytes": size}) if as_json else f"{image}: {size:,} bytes")


@cli.command()
@_JSON
def doctor(as_json: bool) -> None:
    """Say what is found, what is missing, and the command that mends it; exits with 1 if Julia cannot be used."""
    from .doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([f.to_json() for f in findings]))
    else:
        for f in findings:
            click.echo(
                f"{'ok     ' if f.ok else 'missing'} {f.what}: {f.found}"
                + (f"\n        {f.mend}" if f.mend else "")
            )
    sys.exit(0 if all(f.ok for f in findings if f.needed) else 1)
