"""What a fusion of views is, and the registry of fusions.

B batch · V views · H width of the head
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from roadwork_dist.common.registry import Registry


class FusedViews(NamedTuple):
    """A photo's vector and how much each view had a say in it."""

    pooled: Tensor  # [B, H]
    gates: Tensor  # [B, V] in [0, 1], 0 at padding


class ViewFusion(nn.Module, ABC):
    """From the views of a photo to one vector.

    Args:
        width: H.

    Attributes:
        gates_views: its gates differ between views, so they say which views matter.
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
            mask: [B, V] bool, False = padding; at least one view a row.
        """


FUSIONS: Registry[type[ViewFusion]] = Registry("fusion of views")
"""Classes whose one argument is H."""
