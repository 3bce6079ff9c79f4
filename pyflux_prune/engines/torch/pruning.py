"""Scores, selection, compensation and masks, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...choices import Neurons, NofM, Saliency, Sparsity, Structure, Threshold
from ..base import Samples
from .saliency import compensate, score
from .structure import Contest

if TYPE_CHECKING:
    from .model import TorchModel


def prune(
    model: TorchModel, saliency: Saliency, sparsity: Sparsity | None, structure: Structure, data: Samples | None
) -> None:
    """Prune a model in place; after InvalidInput it may be pruned in part."""
    contest = Contest(structure, model.names, model.masks)
    for kept in _steps(model, saliency, sparsity, structure, contest):
        if kept is None or (contest.counts(model.masks) > kept).any():
            masks = contest.choose(score(saliency, model, data), model.masks, kept)
            compensate(saliency, model, data, masks)
            model.mask(masks)


def _steps(
    model: TorchModel, saliency: Saliency, sparsity: Sparsity | None, structure: Structure, contest: Contest
) -> list[Tensor | None]:
    """Return how many units of each group stay after each step; None where scores below 1 go."""
    if sparsity is None and isinstance(saliency, Threshold) and not isinstance(structure, (Neurons, NofM)):
        return [None]
    last, first = contest.kept(sparsity, model.masks), contest.counts(model.masks)
    steps = getattr(saliency, "iterations", 1)
    ratio = last / first.clamp(min=1)
    return [*((first * ratio ** (step / steps)).round().long() for step in range(1, steps)), last]
