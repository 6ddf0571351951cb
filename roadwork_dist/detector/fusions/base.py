"""Base class of view fusions, and their registry.

B batch · V views · H width of the head
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from roadwork_dist.common.registry import Registry


class FusedViews(NamedTuple):
    """The vector of a photo, and the weight of each view in it."""

    pooled: Tensor  # [B, H]
    gates: Tensor  # [B, V] in [0, 1], 0 at padding


class ViewFusion(nn.Module, ABC):
    """Fuses the views of a photo into one vector.

    Args:
        width: H.

    Attributes:
        gates_views: whether the gates differ between views and so rate their importance.
    """

    gates_views: ClassVar[bool] = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh weights."""

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor) -> FusedViews:
        """Fuse.

        Args:
            x: normed views [B, V, H].
            mask: [B, V] bool, False = padding; at least one view per row.
        """


FUSIONS: Registry[type[ViewFusion]] = Registry("fusion of views")
"""Classes with H as their only argument."""
