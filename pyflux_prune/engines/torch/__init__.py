"""The reference engine: the same operations made only of ``torch`` and ``torch.nn.utils.prune``.

It shares no numerical code with the Julia engine, so that agreement between the two means something. Derivatives
are torch's own wherever torch has them: ``torch.autograd`` and ``torch.func``.

Raises:
    EngineUnavailable: on import, where PyTorch is missing.

"""

from ...errors import EngineUnavailable

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise EngineUnavailable(
        f"PyTorch cannot be imported ({error}): install it with pip install 'torch<2.14'"
    ) from error

from .engine import TorchEngine
from .model import TorchModel
from .modules import ACTIVATION_MODULES, mask_weight, prunable_modules, sequential

__all__ = ["ACTIVATION_MODULES", "TorchEngine", "TorchModel", "mask_weight", "prunable_modules", "sequential"]
