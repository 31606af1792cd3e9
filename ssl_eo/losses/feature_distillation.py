"""How far a student's features point away from those of a frozen teacher.

B samples, D width of the teacher's features.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine_loss"]


def cosine_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean of 1 - cos(found, wanted) over the samples, both `[B, D]`: 0 where they point the same way, 2 at most.

    DOFA (arXiv 2403.15356) minimises -cos, which is less by 1 and has the same gradient.
    """
    return (1.0 - F.cosine_similarity(found, wanted, dim=-1)).mean()
