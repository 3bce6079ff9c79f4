"""Axis 1: scores. A criterion is a method of ``score``, and one of ``compensate`` if survivors change."""

from . import activation, flow, gradient, learned, magnitude, obd, obs, redundancy
from .base import compensate, score

__all__ = [
    "activation",
    "compensate",
    "flow",
    "gradient",
    "learned",
    "magnitude",
    "obd",
    "obs",
    "redundancy",
    "score",
]
