"""Axis 1: how much does a weight, or a neuron, matter? In every score higher is more important.

``w`` is a weight, ``g`` the gradient of the mean cross-entropy in it, ``x`` what it is multiplied with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .checks import Choice, choices_on, count, flag, number, positive, steps
from .training import Adam, Training, check_training


def _tau(name: str, value: object) -> Any:
    return None if value is None else positive(name, value)


@dataclass(frozen=True)
class Saliency(
    Choice,
    scaled=flag,
    q=positive,
    tau=_tau,
    squared=flag,
    batchsize=count(1),
    per_class=count(1),
    temperature=positive,
    iterations=steps,
    exact=flag,
    full=flag,
    damping=number(0, math.inf),
    training=check_training,
    zeros=flag,
    activations=flag,
    sparsity=number(0, 1),
    seed=count(0),
):
    """How much does a weight matter?"""

    _data: ClassVar[bool] = False
    of_neurons: ClassVar[bool] = False
    """Whether there is one score per neuron of each layer, (out,), for ``Neurons``, and not one per weight."""
    random: ClassVar[bool] = False
    """Whether the two engines draw different numbers."""
    normalises: ClassVar[bool] = False
    """Whether batch normalisation uses the statistics of the batches that ``training`` makes."""

    @property
    def of_dense_layers(self) -> bool:
        """Whether the network must be of dense layers only."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether scores depend on samples."""
        return self._data


@dataclass(frozen=True)
class Magnitude(Saliency):
    """Score \\|w\\| (Janowsky 1989; Han et al. 2015, arXiv:1506.02626).

    With ``scaled``, divided by the root mean square of the layer's kept weights, so that layers of different
    scale compete fairly.
    """

    scaled: bool = False


@dataclass(frozen=True)
class Threshold(Saliency):
    """Keep where \\|w\\| ≥ τ (Han et al. 2015, arXiv:1506.02626): score \\|w\\| / τ, cut at 1.

    τ is ``tau``, or ``q`` times the standard deviation of the layer's kept weights where ``tau`` is None. Pruned
    without a sparsity, all weights that score below 1 go; with one, the scores rank the weights.
    """

    q: float = 1.0
    tau: float | None = None


@dataclass(frozen=True)
class Taylor(Saliency):
    """First-order change of the loss, mean of (g·w)² over batches (Molchanov et al. 2019, arXiv:1906.10771).

    ``g`` is the gradient of the mean loss of a batch of ``batchsize`` consecutive samples. Without ``squared``,
    the mean of \\|g·w\\|.
    """

    _data: ClassVar[bool] = True
    squared: bool = True
    batchsize: int = 60


@dataclass(frozen=True)
class SNIP(Saliency):
    """Connection sensitivity \\|g·w\\| of one balanced batch (Lee et al. 2019, arXiv:1810.02340).

    The batch is the first ``per_class`` samples of each class. Made for networks that are not trained yet.
    """

    _data: ClassVar[bool] = True
    per_class: int = 10


@dataclass(frozen=True)
class GraSP(Saliency):
    """Preserved gradient flow, w·(H g), of one balanced batch (Wang et al. 2020, arXiv:2002.07376).

    ``H`` is the Hessian, ``g`` the gradient of the loss in the prunable weights, the network's outputs divided by
    ``temperature``. The paper's S = −w·(H g) is the gain in gradient flow when w is deleted, and the largest S
    go first. The batch is the first ``per_class`` samples of each class.
    """

    _data: ClassVar[bool] = True
    per_class: int = 10
    temperature: float = 200.0


@dataclass(frozen=True)
class SynFlow(Saliency):
    """Synaptic flow, |w|·∂R/∂|w| with R = 1ᵀ |W_L| ⋯ |W_1| 1 (Tanaka et al. 2020, arXiv:2006.05467).

    Needs no data. Pruned in ``iterations`` steps, the density falling exponentially, scored anew in each.
    """

    iterations: int = 100


@dataclass(frozen=True)
class OBD(Saliency):
    """Optimal brain damage, ½·h·w², h = ∂²L/∂w² (LeCun, Denker & Solla 1990).

    h by LeCun's backward recursion over the diagonal, in its Levenberg–Marquardt form, without the second
    derivatives of the activations: h_ij = E[d_i·x_j²], d = σ'(a)²·(W²)ᵀd of the layer above, p·(1 − p) at the
    softmax. With ``exact``, the diagonal of the Hessian itself, for networks of at most 20,000 parameters.
    """

    _data: ClassVar[bool] = True
    exact: bool = False

    @property
    def of_dense_layers(self) -> bool:
        """Whether the network must be of dense layers only."""
        return not self.exact


@dataclass(frozen=True)
class OBS(Saliency):
    """Optimal brain surgeon, w²/(2·[H⁻¹]_qq), the survivors adjusted (Hassibi & Stork 1993).

    By layer, H = E[x·xᵀ], shared by the layer's outputs (Frantar & Alistarh 2022, arXiv:2208.11580); with
    ``full``, the Gauss–Newton matrix of the loss in all parameters, for at most 5,000 of them. ``damping`` times
    the mean of its diagonal is added to the diagonal. Survivors move by the least change of the quadratic form,
    −H_KK⁻¹·H_KP·Δw_P; pruned in ``iterations`` steps, the density falling exponentially.
    """

    _data: ClassVar[bool] = True
    full: bool = False
    damping: float = 0.01
    iterations: int = 10

    @property
    def of_dense_layers(self) -> bool:
        """Whether the network must be of dense layers only."""
        return self.full


@dataclass(frozen=True)
class Wanda(Saliency):
    """|w|·‖x‖₂ over the samples (Sun et al. 2023, arXiv:2306.11695); there with the structure ``PerOutput``."""

    _data: ClassVar[bool] = True


@dataclass(frozen=True)
class Movement(Saliency):
    """Movement, −Σ w·g over the steps of fine-tuning (Sanh et al. 2020, arXiv:2005.07683).

    A copy of the network is fine-tuned as ``training`` says, over the samples in their order, and discarded.
    """

    _data: ClassVar[bool] = True
    normalises: ClassVar[bool] = True
    training: Training = field(default_factory=lambda: Training(epochs=1))


@dataclass(frozen=True)
class Activation(Saliency):
    """Of neurons: mean \\|a\\| over samples, or with ``zeros`` the share of samples with a ≠ 0.

    The latter is 1 − APoZ, the average percentage of zeros (Hu et al. 2016, arXiv:1607.03250).
    """

    _data: ClassVar[bool] = True
    of_neurons: ClassVar[bool] = True
    zeros: bool = False


@dataclass(frozen=True)
class Redundancy(Saliency):
    """Of neurons: what is lost when another takes a neuron's place (Srinivas & Babu 2015, arXiv:1507.06149).

    Neuron j is replaced by α times neuron i plus β: its outgoing weights v_j are added to those of i, α-fold, and
    β·v_j to the next bias. By default the incoming weights decide: the cost is ‖u_j − α·u_i‖²·‖v_j‖², with u
    the incoming weights and bias and β = 0; α is the best α ≥ 0 for relu and identity and 1 otherwise. With
    ``activations``, α and β are those of the regression of a_j on a_i over the samples, and the cost is its mean
    squared error times ‖v_j‖². Greedily, cheapest first, so that of duplicates one stays.
    """

    of_neurons: ClassVar[bool] = True
    activations: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether scores depend on samples."""
        return self.activations

    @property
    def of_dense_layers(self) -> bool:
        """Whether the network must be of dense layers only."""
        return True


@dataclass(frozen=True)
class EdgePopup(Saliency):
    """Learned scores over frozen weights (Ramanujan et al. 2020, arXiv:1911.13299).

    In each layer the network uses the weights with the highest scores, ``round(sparsity·n)`` of n left out; the
    gradient goes straight through to all scores, ∂L/∂s = w·∂L/∂(w·m). Scores begin at |w| and are trained as
    ``training`` says, over the samples in their order. Use it on an untrained network with ``Layerwise`` and the
    same sparsity.
    """

    _data: ClassVar[bool] = True
    sparsity: float = 0.5
    training: Training = field(default_factory=lambda: Training(epochs=20, optimiser=Adam(3e-3)))


@dataclass(frozen=True)
class RandomSaliency(Saliency):
    """Score uniform on [0, 1): the baseline. The same ``seed`` gives the same scores on the same engine."""

    random: ClassVar[bool] = True
    seed: int = 0


SALIENCIES = {c.__name__.removesuffix("Saliency").lower(): c for c in choices_on(Saliency)}
