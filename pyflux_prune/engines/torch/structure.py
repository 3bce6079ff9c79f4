"""Axis 2: from scores to masks.

What competes are units: weights, or with ``Neurons`` neurons. A structure is a method of ``numbers``, which says
who competes with whom within a layer, and one of ``shares`` if it takes sparsities in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from itertools import pairwise

import torch
from torch import Tensor

from ...choices import ERK, Global, Layerwise, Neurons, NofM, PerOutput, Sparsity, Structure
from ...errors import InvalidInput

Shape = tuple[int, ...]
"""Of a weight: (out, in) or (out, in, height, width)."""

# --- who competes with whom ------------------------------------------------------------------------------


@singledispatch
def numbers(structure: Structure, layer: str, shape: Shape) -> Tensor:
    """Return the group of each of a layer's weights, of this shape, or neurons, (out,), as a number from 0."""
    raise InvalidInput(f"structure must be one that the torch engine has, not {structure!r}")


@numbers.register(Global)
@numbers.register(Layerwise)
@numbers.register(ERK)
def _(structure: Structure, layer: str, shape: Shape) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@numbers.register(PerOutput)
def _(structure: PerOutput, layer: str, shape: Shape) -> Tensor:
    return torch.arange(shape[0]).repeat_interleave(math.prod(shape[1:])).view(shape)


@numbers.register(NofM)
def _(structure: NofM, layer: str, shape: Shape) -> Tensor:
    outputs, inputs, *kernel = shape
    if inputs % structure.m:
        raise InvalidInput(
            f"layer {layer} has {inputs} inputs, not a multiple of m = {structure.m}; exclude in the structure "
            "leaves it alone"
        )
    groups = torch.arange(math.prod(shape) // structure.m).view(outputs, inputs // structure.m, *kernel)
    return groups.repeat_interleave(structure.m, 1)


@numbers.register(Neurons)
def _(structure: Neurons, layer: str, shape: Shape) -> Tensor:
    return torch.zeros(shape[0], dtype=torch.int64)


# --- how much of a group goes ----------------------------------------------------------------------------


@singledispatch
def shares(structure: Structure, shapes: Sequence[Shape], sparsity: Sparsity | None) -> list[float]:
    """Return the sparsity of the groups of each competing layer, given the shapes of the layers' weights."""
    return _as_given(structure, len(shapes), sparsity)


def _as_given(structure: Structure, layers: int, sparsity: Sparsity | None) -> list[float]:
    if sparsity is None:
        raise InvalidInput("sparsity must be given: only NofM, and Threshold for weights, have one of their own")
    if not isinstance(sparsity, tuple):
        return [sparsity] * layers
    if len(sparsity) != layers:
        raise InvalidInput(
            f"sparsity must be one number or one per competing layer, {layers} here, not {len(sparsity)} numbers"
        )
    return list(sparsity)


@shares.register(NofM)
def _(structure: NofM, shapes: Sequence[Shape], sparsity: Sparsity | None) -> list[float]:
    n, m = structure.n, structure.m
    most = max((m - n) / m, 1 - n / m)  # they may differ in the last place
    given = _as_given(structure, len(shapes), most if sparsity is None else sparsity)
    if given[0] > most:
        raise InvalidInput(f"sparsity must be at most {most:g} for {n} of {m} weights to stay, not {given[0]:g}")
    return given


@shares.register(ERK)
def _(structure: ERK, shapes: Sequence[Shape], sparsity: Sparsity | None) -> list[float]:
    uniform = _as_given(structure, len(shapes), sparsity)[0]
    sizes, sums = list(map(math.prod, shapes)), list(map(sum, shapes))
    kept = sum(sizes) - round(uniform * sum(sizes))
    others, dense = set(range(len(shapes))), set[int]()
    epsilon = 0.0
    while others:
        epsilon = (kept - sum(sizes[layer] for layer in dense)) / sum(sums[layer] for layer in others)
        more = {layer for layer in others if epsilon * sums[layer] > sizes[layer]}
        if not more:
            break
        others, dense = others - more, dense | more
    return [1 - epsilon * sums[layer] / sizes[layer] if layer in others else 0.0 for layer in range(len(shapes))]


# --- neurons ---------------------------------------------------------------------------------------------


def alive(masks: Sequence[Tensor]) -> list[Tensor]:
    """Return which neurons of each layer but the last have a kept incoming and a kept outgoing weight."""
    return [here.flatten(1).any(1) & by_source(after, len(here)).any(2).any(0) for here, after in pairwise(masks)]


def by_source(array: Tensor, neurons: int) -> Tensor:
    """Return a layer's array as (out, neurons, the rest), by the neurons of the layer before.

    The rest is the kernel of a convolution, and in a dense layer after ``Flatten`` the places of a channel.
    """
    return array.view(len(array), neurons, -1)


def neuron_scores(scores: Sequence[Tensor], masks: Sequence[Tensor], p: float) -> list[Tensor]:
    """Return sign(t)·|t|^(1/p), t = Σ s·|s|^(p − 1) over the scores s of the kept weights of each neuron."""
    found = []
    for values, mask in zip(scores, masks, strict=True):
        s = torch.where(mask, values.double(), 0.0)
        t = (s * s.abs() ** (p - 1)).flatten(1).sum(1)
        found.append(t.sign() * t.abs() ** (1 / p))
    return found


# --- selection -------------------------------------------------------------------------------------------


class Contest:
    """The groups of units that compete in a network."""

    def __init__(self, structure: Structure, names: Sequence[str], masks: Sequence[Tensor]) -> None:
        """Form the groups of a network whose layers have these names and masks.

        Raises:
            InvalidInput: the structure does not fit the network.

        """
        self._structure, self._names = structure, list(names)
        self._neurons = isinstance(structure, Neurons)
        self._together = isinstance(structure, Global) or (
            isinstance(structure, Neurons) and not structure.layerwise
        )
        self._layers = _competing(structure, len(masks))
        self._shapes = [tuple(mask.shape) for mask in masks]
        groups, self._places = [], [0] if self._together else []
        for layer, shape in enumerate(self._shapes):
            group = torch.full(shape[:1] if self._neurons else shape, -1)
            if layer in self._layers:
                group = numbers(structure, names[layer], shape)
                if not self._together:
                    group = group + len(self._places)
                    self._places += [self._layers.index(layer)] * (int(group.max()) + 1 - len(self._places))
            groups.append(group)
        self._sizes = [group.numel() for group in groups]
        self._group = torch.cat([group.flatten() for group in groups])
        self._layer = torch.arange(len(masks)).repeat_interleave(torch.tensor(self._sizes))

    def counts(self, masks: Sequence[Tensor]) -> Tensor:
        """Return how many kept weights, or neurons that are alive, each group has."""
        return self._count(self._live(masks))

    def kept(self, sparsity: Sparsity | None, masks: Sequence[Tensor]) -> Tensor:
        """Return how many units of each group stay at this sparsity.

        Raises:
            InvalidInput: the sparsity does not fit the structure, or a group is sparser already.

        """
        share = shares(self._structure, [self._shapes[layer] for layer in self._layers], sparsity)
        each = torch.tensor(share, dtype=torch.float64)[self._places]
        sizes, live = self._count(self._group >= 0), self.counts(masks)
        pruned = (each * sizes).round().long()  # ties to even
        for group in (live < sizes - pruned).nonzero()[:1]:
            raise InvalidInput(
                f"sparsity {float(each[group]):g} of {self._name(group)} means {int(pruned[group])} of "
                f"{int(sizes[group])} {self._units} pruned, but {int((sizes - live)[group])} are already: pruned "
                "stays pruned"
            )
        return sizes - pruned

    def choose(self, scores: Sequence[Tensor], masks: Sequence[Tensor], kept: Tensor | None) -> list[Tensor]:
        """Return the masks after the lowest scores of each group have gone, until as many as ``kept`` are left.

        Equal scores go by position: layer, output, input, then row and column of a kernel. No unit goes in a group
        that has no more than that; without ``kept``, all that score below 1 go.

        Args:
            scores: one tensor per layer, of its weight's shape, or (out,) of neurons; those of pruned weights do
                not matter.
            masks: one bool tensor per layer, of its weight's shape; left as they are.
            kept: what the method ``kept`` returns, or more.

        Raises:
            InvalidInput: a unit that competes scores NaN, or ``min_kept`` leaves a group too few that can go.

        """
        if isinstance(self._structure, Neurons) and scores[0].ndim > 1:
            scores = neuron_scores(scores, masks, self._structure.norm)
        values, live = torch.cat([layer.flatten() for layer in scores]), self._live(masks)
        for unit in (live & values.isnan()).nonzero()[:1]:
            name = self._names[int(self._layer[unit])]
            raise InvalidInput(f"layer {name} cannot be pruned: scores of its {self._units} are NaN")
        free = self._free(values, live)
        if kept is None:
            gone = free & (values < 1)
        else:
            excess = (self._count(live) - kept).clamp(min=0)
            for group in (self._count(free) < excess).nonzero()[:1]:
                raise InvalidInput(
                    f"{int(excess[group])} {self._units} of {self._name(group)} must be pruned, but min_kept = "
                    f"{self._structure.min_kept} leaves {int(self._count(free)[group])} that can be"
                )
            gone = _lowest(values, free, self._group, excess)
        return self._without(gone, masks)

    def _without(self, gone: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
        parts = torch.split(gone, self._sizes)
        if not self._neurons:
            return [mask & ~part.view_as(mask) for mask, part in zip(masks, parts, strict=True)]
        left = [mask.clone() for mask in masks]
        for mask, here in zip(left, parts, strict=True):
            mask[here] = False
        for mask, below in zip(left[1:], parts, strict=False):
            by_source(mask, len(below))[:, below] = False
        return left

    @property
    def _units(self) -> str:
        return "neurons" if self._neurons else "weights"

    def _live(self, masks: Sequence[Tensor]) -> Tensor:
        units = [*alive(masks), torch.zeros(len(masks[-1]), dtype=torch.bool)] if self._neurons else masks
        return torch.cat([unit.flatten() for unit in units]) & (self._group >= 0)

    def _count(self, units: Tensor) -> Tensor:
        return torch.bincount(self._group[units], minlength=len(self._places))

    def _free(self, values: Tensor, live: Tensor) -> Tensor:
        """Return which units can go: all but the ``min_kept`` highest of each layer, the later of equals."""
        if not self._structure.min_kept:
            return live
        excess = torch.bincount(self._layer[live], minlength=len(self._sizes)) - self._structure.min_kept
        return _lowest(values, live, self._layer, excess.clamp(min=0))

    def _name(self, group: Tensor) -> str:
        """Return what to call a group in messages."""
        if self._together:
            return "the network"
        members = (self._group == group).nonzero().squeeze(1)
        layer = int(self._layer[members[0]])
        name, shape = f"layer {self._names[layer]}", self._shapes[layer]
        if len(members) == self._sizes[layer]:
            return name
        first, last = torch.stack(torch.unravel_index(members - sum(self._sizes[:layer]), shape))[
            :, [0, -1]
        ].T.tolist()
        name = f"output {first[0]} of {name}"
        if len(members) == math.prod(shape[1:]):
            return name
        kernel = f" at {tuple(first[2:])} of the kernel" if len(shape) > 2 else ""
        return f"inputs {first[1]} to {last[1]}{kernel} of {name}"


def _competing(structure: Structure, layers: int) -> list[int]:
    """Return the numbers of the layers whose units compete."""
    if isinstance(structure, Neurons) and layers < 2:
        raise InvalidInput("structure Neurons needs a hidden layer, but the network has one layer only")
    excluded = {place % layers for place in structure.exclude}
    if isinstance(structure, Neurons):
        excluded.add(layers - 1)
    return [layer for layer in range(layers) if layer not in excluded]


def _lowest(values: Tensor, candidates: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Return which candidates are among the ``count[g]`` of the lowest value in group g, the first of equals."""
    order = candidates.nonzero().squeeze(1)
    order = order[values[order].argsort(stable=True)]
    if len(count) > 1:
        order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group[order], minlength=len(count))
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group[order]]
    lowest = torch.zeros_like(candidates)
    lowest[order[rank < count[group[order]]]] = True
    return lowest
