"""The four axes, the optimisers and the training options, as frozen dataclasses.

An axis is a base class and a choice one of its subclasses: a new choice is known by its name everywhere.
Every class has the name and the fields of its Julia struct (a trailing underscore, as in ``lambda_``, is
dropped on the way), so that one conversion serves them all. Values are checked when an object is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .errors import InvalidInput

Sparsity = float | tuple[float, ...]
"""One sparsity, or one per prunable layer."""


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, per_layer: bool = False
) -> float | tuple[float, ...]:
    """Return a number in [low, high), or in (low, high) with ``open_low``, as a float.

    With ``per_layer``, a sequence of such numbers is allowed too, and returned as a tuple. InvalidInput otherwise.
    """
    if per_layer and isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) and len(value) > 0:
        return tuple(check_number(name, v, low, high, open_low=open_low) for v in value)  # type: ignore[misc]
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        number = float(value)
        if low <= number < high and not (open_low and number == low):
            return number
    raise InvalidInput(
        f"{name} must be a number in {'(' if open_low else '['}{low:g}, {high:g})"
        f"{', or one per layer' if per_layer else ''}, not {value!r}"
    )


def check_sparsity(value: object, name: str = "sparsity") -> Sparsity:
    """Return a sparsity in [0, 1), or one per layer as a tuple; InvalidInput otherwise."""
    return check_number(name, value, 0, 1, per_layer=True)


def check_count(name: str, value: object, low: int, *, below: int | None = None) -> int:
    """Return a whole number of at least ``low`` (and below ``below``); InvalidInput otherwise."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if whole and low <= value and (below is None or value < below):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload,no-any-return]
    limit = "" if below is None else f" and below {below}"
    raise InvalidInput(f"{name} must be a whole number of at least {low}{limit}, not {value!r}")


def check_choice(name: str, value: object, *kinds: type) -> None:
    """Raise InvalidInput unless ``value`` is an instance of one of ``kinds``, or a choice on such an axis."""
    allowed = [c for kind in kinds for c in kind.__subclasses__() or [kind]]
    if not isinstance(value, tuple(allowed)):
        names = " or ".join("None" if c is type(None) else c.__name__ for c in allowed)
        raise InvalidInput(f"{name} must be {names}, not {value!r}")


def _check(owner: object, **checks: Callable[[str, Any], Any]) -> None:
    """Check the named fields of a frozen dataclass and store what the checks return."""
    for name, check in checks.items():
        checked = check(f"{type(owner).__name__}'s {name.rstrip('_')}", getattr(owner, name))
        object.__setattr__(owner, name, checked)


def _share(name: str, value: object) -> Any:
    return check_sparsity(value, name)


def _positive(name: str, value: object) -> Any:
    return check_number(name, value, 0, math.inf, open_low=True)


def _rounds(name: str, value: object) -> int:
    return check_count(name, value, 1)


def _each(rule: Callable[..., float], *values: Sparsity) -> Sparsity:
    """Apply a scalar rule to scalars, or layer by layer where any value is one per layer."""
    lengths = {len(v) for v in values if isinstance(v, tuple)}
    if not lengths:
        return rule(*values)
    if len(lengths) > 1:
        raise InvalidInput(f"per-layer values must all have the same length, not {sorted(lengths)}")
    n = lengths.pop()
    columns = [v if isinstance(v, tuple) else (v,) * n for v in values]
    return tuple(rule(*row) for row in zip(*columns, strict=True))


# --- axis 1: saliency ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saliency:
    """How much does a weight matter?"""


@dataclass(frozen=True)
class Magnitude(Saliency):
    """Score \\|w\\| (Janowsky 1989; Han et al. 2015, arXiv:1506.02626)."""


@dataclass(frozen=True)
class RandomSaliency(Saliency):
    """Score uniform on [0, 1): the baseline. The same ``seed`` gives the same scores on the same engine."""

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, seed=lambda name, value: check_count(name, value, 0, below=2**63))


# --- axis 2: structure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """What competes with what, and what goes together?"""


@dataclass(frozen=True)
class Global(Structure):
    """All prunable weights of the network compete with each other."""


@dataclass(frozen=True)
class Layerwise(Structure):
    """Weights compete within their layer; a sparsity may then be one number, or one per layer."""


# --- axis 3: schedule ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneShot:
    """All at once: a single round at ``sparsity``."""

    sparsity: Sparsity

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, sparsity=_share)

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        return [self.sparsity]


@dataclass(frozen=True)
class Constant:
    """Each of ``rounds`` rounds prunes the share ``rate`` of the initial weights: s_k = k·rate."""

    rate: Sparsity
    rounds: int

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, rate=_share, rounds=_rounds)
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        if any(r * self.rounds >= 1 for r in rates):
            raise InvalidInput(f"Constant: rate × rounds must be below 1, not {self.rate!r} × {self.rounds}")

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        return [_each(lambda r, k=k: k * r, self.rate) for k in range(1, self.rounds + 1)]


@dataclass(frozen=True)
class Exponential:
    """Each of ``rounds`` rounds prunes the share ``rate`` of what is left: s_k = 1 − (1 − rate)^k.

    The schedule of iterative magnitude pruning (Frankle & Carbin 2019, arXiv:1803.03635).
    """

    rate: Sparsity
    rounds: int

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, rate=_share, rounds=_rounds)

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        return [_each(lambda r, k=k: 1 - (1 - r) ** k, self.rate) for k in range(1, self.rounds + 1)]


@dataclass(frozen=True)
class Polynomial:
    """From 0 to ``sparsity``, fast first: s_k = sparsity·(1 − (1 − k/rounds)^power).

    With ``power=3`` the cubic schedule of Zhu & Gupta 2017 (arXiv:1710.01878).
    """

    sparsity: Sparsity
    rounds: int
    power: float = 3.0

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, sparsity=_share, rounds=_rounds, power=_positive)

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        n, p = self.rounds, self.power
        return [_each(lambda s, k=k: s * (1 - (1 - k / n) ** p), self.sparsity) for k in range(1, n + 1)]


Schedule = OneShot | Constant | Exponential | Polynomial | Sequence[float | Sequence[float]]


def sparsities(schedule: Schedule) -> list[Sparsity]:
    """Return the target sparsity of each round of a schedule, or of any list of sparsities.

    Raises:
        InvalidInput: a sparsity outside [0, 1), an empty list, or a schedule that goes down.

    """
    if isinstance(schedule, (OneShot, Constant, Exponential, Polynomial)):
        given: Sequence[Any] = schedule.sparsities()
    elif isinstance(schedule, (Sequence, np.ndarray)) and not isinstance(schedule, str):
        given = schedule
    else:
        raise InvalidInput(
            "schedule must be OneShot, Constant, Exponential, Polynomial or a list of sparsities, "
            f"not {schedule!r}"
        )
    targets = [check_sparsity(s, "each sparsity of a schedule") for s in given]
    if not targets:
        raise InvalidInput("schedule must hold at least one sparsity, not an empty list")
    for before, after in itertools.pairwise(targets):
        down = _each(lambda a, b: float(b < a), before, after)
        if any(down if isinstance(down, tuple) else (down,)):
            raise InvalidInput(
                f"schedule must never go down, but {after!r} follows {before!r}: pruned stays pruned"
            )
    return targets


# --- axis 4: fine-tuning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restart:
    """What do the survivors restart from?"""


@dataclass(frozen=True)
class Continue(Restart):
    """The survivors keep their trained values and are trained on (Han et al. 2015)."""


@dataclass(frozen=True)
class Rewind(Restart):
    """The survivors go back to their values after ``to`` training steps; 0 is the initialisation.

    Frankle & Carbin 2019 (``to=0``); late rewinding: Frankle et al. 2020, arXiv:1912.05671.
    """

    to: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, to=lambda name, value: check_count(name, value, 0))


@dataclass(frozen=True)
class Reinitialize(Restart):
    """The survivors start from new random values; biases and all else from their initial ones."""


FineTune = Restart | None
"""``None``: prune without training again."""

# --- training --------------------------------------------------------------------------------------------


def _pair(name: str, value: object) -> tuple[float, float]:
    pair = check_sparsity(value, name)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise InvalidInput(f"{name} must be two numbers in [0, 1), not {value!r}")
    return pair


_RULE_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "eta": _positive,
    "rho": lambda name, value: check_number(name, value, 0, 1),
    "beta": _pair,
    "lambda_": lambda name, value: check_number(name, value, 0, math.inf),
    "epsilon": _positive,
}


@dataclass(frozen=True)
class Optimiser:
    """An optimiser with the name and fields of its rule in Optimisers.jl."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, **{f.name: _RULE_CHECKS[f.name] for f in fields(self)})


@dataclass(frozen=True)
class Descent(Optimiser):
    """Gradient descent: w ← w − η·g."""

    eta: float = 0.1


@dataclass(frozen=True)
class Momentum(Optimiser):
    """Gradient descent with momentum ρ."""

    eta: float = 0.01
    rho: float = 0.9


@dataclass(frozen=True)
class Nesterov(Optimiser):
    """Gradient descent with Nesterov momentum ρ."""

    eta: float = 0.001
    rho: float = 0.9


@dataclass(frozen=True)
class RMSProp(Optimiser):
    """RMSProp with decay ρ (not centred)."""

    eta: float = 0.001
    rho: float = 0.9
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980)."""

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay λ, w ← w − η·λ·w (Loshchilov & Hutter 2019, arXiv:1711.05101).

    λ is 0.01 by default, as in PyTorch; Optimisers.jl's default is 0.
    """

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    lambda_: float = 0.01
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Training:
    """How each round is trained: softmax cross-entropy, shuffled batches, optimiser memory empty at the start.

    Attributes:
        epochs: passes over the training set in each round.
        batchsize: samples per step; the last batch of an epoch may be smaller.
        optimiser: one of ``Descent``, ``Momentum``, ``Nesterov``, ``RMSProp``, ``Adam``, ``AdamW``.

    """

    epochs: int = 15
    batchsize: int = 60
    optimiser: Optimiser = field(default_factory=lambda: Adam(1.2e-3))

    def __post_init__(self) -> None:
        """Check the fields."""
        _check(self, epochs=lambda name, value: check_count(name, value, 0), batchsize=_rounds)
        check_choice("Training's optimiser", self.optimiser, Optimiser)


# --- by name ---------------------------------------------------------------------------------------------

SALIENCIES = {c.__name__.removesuffix("Saliency").lower(): c for c in Saliency.__subclasses__()}
STRUCTURES = {c.__name__.lower(): c for c in Structure.__subclasses__()}


SCHEDULES = ("oneshot", "constant", "exponential", "polynomial")


def schedule_by_name(name: str, sparsity: Sparsity | None, rounds: int | None) -> Schedule:
    """Return the schedule of this name that ends at ``sparsity`` after ``rounds``.

    By default there are 12 rounds, and each prunes 20 % of what is left (or the sparsity that this ends at).
    """
    if name == "oneshot":
        if rounds not in (None, 1):
            raise InvalidInput(f"rounds must be 1 with the schedule oneshot, not {rounds}")
        return OneShot(0.8 if sparsity is None else sparsity)
    rounds = _rounds("rounds", 12 if rounds is None else rounds)
    if sparsity is None and name == "exponential":
        return Exponential(rate=0.2, rounds=rounds)
    target: Sparsity = 1 - 0.8**rounds if sparsity is None else check_sparsity(sparsity)
    if name == "exponential":
        return Exponential(_each(lambda s: 1 - (1 - s) ** (1 / rounds), target), rounds)
    if name == "constant":
        return Constant(_each(lambda s: s / rounds, target), rounds)
    if name == "polynomial":
        return Polynomial(target, rounds)
    raise InvalidInput(f"schedule must be one of {', '.join(SCHEDULES)}, not {name!r}")


def finetune_by_name(name: str) -> FineTune:
    """Return the fine-tuning called none, continue, rewind, rewind:STEP or reinitialize."""
    kind, colon, step = name.partition(":")
    if kind == "rewind" and (not colon or step.isdecimal()):
        return Rewind(int(step or 0))
    if not colon and kind in ("none", "continue", "reinitialize"):
        return {"none": None, "continue": Continue(), "reinitialize": Reinitialize()}[kind]
    raise InvalidInput(f"finetune must be none, continue, rewind, rewind:STEP or reinitialize, not {name!r}")


# --- as JSON ---------------------------------------------------------------------------------------------


def to_json(choice: object) -> Any:
    """Return a choice as JSON values: an object with the name of its class and its fields; None stays None."""
    if choice is None:
        return None
    return {"name": type(choice).__name__} | {
        f.name: to_json(v) if isinstance(v := getattr(choice, f.name), Optimiser) else v
        for f in fields(choice)  # type: ignore[arg-type]
    }


def from_json(value: Any) -> Any:
    """Return the choice that ``to_json`` wrote; InvalidInput where no such choice exists."""
    if value is None:
        return None
    axes = (Saliency, Structure, Restart, Optimiser)
    classes = {c.__name__: c for c in (Training, *(choice for axis in axes for choice in axis.__subclasses__()))}
    try:
        given = {k: from_json(v) if isinstance(v, dict) else v for k, v in value.items() if k != "name"}
        return classes[value["name"]](**given)
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidInput(f"{value!r} is not a choice that this version knows") from error
