"""Output heads: roadwork, roadwork per view, weather, masks.

B batch · V views · H width of the head · K classes · M mask classes
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.config.batch import CLASSES, MASK_CLASSES, WEATHER
from roadwork_dist.detector.layers import SMALL_STD, init_linear

_MASK_CHANNELS = (192, 96, 64, 32)
"""Channels of the mask head at 4, 8, 16 and 32 cells per side; most weights are at low resolution, where
they are cheap."""

_FIRST_SIDE = 4


class Classifier(nn.Module):
    """Roadwork or not: H → H/2 → GELU → dropout → 2 raw logits.

    Args:
        width: H.
        dropout: probability of dropping a hidden element.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width // 2)
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(width // 2, len(CLASSES))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights; logits start near 0, a probability of ½."""
        init_linear(self.hidden)
        init_linear(self.logits, std=SMALL_STD)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H] → [B, K]."""
        out: Tensor = self.logits(self.dropout(F.gelu(self.hidden(x))))
        return out


class LinearHead(nn.Module):
    """Raw logits from one linear layer, per view (K classes) or for the weather.

    Args:
        width: H.
        classes: number of logits.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights; logits start near 0."""
        init_linear(self.logits, std=SMALL_STD)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., classes]."""
        out: Tensor = self.logits(x)
        return out


def view_head(width: int) -> LinearHead:
    """Roadwork per view: [B, V, H] → [B, V, K], for the consistency loss."""
    return LinearHead(width, len(CLASSES))


def weather_head(width: int) -> LinearHead:
    """Seven weather classes, [B, H] → [B, 7]; null, the eighth index of the input, is not predicted."""
    return LinearHead(width, len(WEATHER))


class MaskHead(nn.Module):
    """Masks of six classes on the global view from one vector; about 2 M parameters at H = 512.

    A linear layer maps to 192 channels at 4×4 cells; four transposed convolutions double the side to 64.
    Their stride 2 divides the kernel size 4, which avoids checkerboard artefacts
    (https://distill.pub/2016/deconv-checkerboard).

    Args:
        width: H.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layout = nn.Linear(width, _MASK_CHANNELS[0] * _FIRST_SIDE**2)
        channels = (*_MASK_CHANNELS, len(MASK_CLASSES))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1)
            for before, after in pairwise(channels)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights; mask logits start near 0.

        Each output cell gets 2×2 of the 4×4 kernel, so the fan-in is 4·channels; the factor 2
        compensates for the activation (He et al., arXiv 1502.01852).
        """
        init_linear(self.layout)
        for layer in self.up:
            assert isinstance(layer, nn.ConvTranspose2d)
            std = SMALL_STD if layer is self.up[-1] else (2 / (4 * layer.in_channels)) ** 0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H] → logits [B, M, 64, 64]."""
        cells: Tensor = self.layout(x).view(-1, _MASK_CHANNELS[0], _FIRST_SIDE, _FIRST_SIDE)
        for layer in self.up:
            cells = layer(F.gelu(cells))
        return cells
