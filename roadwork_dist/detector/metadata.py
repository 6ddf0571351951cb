"""Metadata encoder: GPS, weather, daytime, scene and description of a photo as one vector.

Most metadata is missing, in any combination. Each field has a learned vector for null, so nothing is
imputed and no combination gives NaN.

B batch
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from roadwork_dist.config.batch import TEXT_WIDTH, VOCABULARIES, Batch
from roadwork_dist.detector.layers import SMALL_STD, init_linear

GPS_WIDTH = 128
"""Width of the encoded coordinates."""

GPS_FREQUENCIES = GPS_WIDTH // 4
"""A sine and a cosine per frequency for latitude and for longitude make up ``GPS_WIDTH``."""

MAX_FREQUENCY = 10_000.0
"""Highest frequency: a period of 0.036° of longitude, about 4 km."""

WORD_WIDTH = 64
"""Width of the embedding of each categorical field."""

METADATA_WIDTH = GPS_WIDTH + WORD_WIDTH * len(VOCABULARIES) + TEXT_WIDTH
"""Width of the whole vector (704)."""

FIELDS = ("gps", *VOCABULARIES, "text")
"""Fields that metadata dropout draws for, in this order."""


def encode_gps(gps: Tensor) -> Tensor:
    """Sines and cosines of coordinates at 32 frequencies.

    sin and cos of lat·f·π/90 and lon·f·π/180 with f log-spaced over 1…10 000, computed in fp32
    (the largest angle, 31 416 rad, has no digits left in bf16).

    Args:
        gps: latitude and longitude in degrees [B, 2].

    Returns:
        [B, 128]: sin lat, cos lat, sin lon, cos lon, each at 32 frequencies.
    """
    frequencies = torch.logspace(
        0, math.log10(MAX_FREQUENCY), GPS_FREQUENCIES, device=gps.device, dtype=torch.float32
    )
    latitude, longitude = gps.float().unbind(dim=-1)
    lat = latitude.unsqueeze(-1) * (math.pi / 90) * frequencies  # [B, 32]
    lon = longitude.unsqueeze(-1) * (math.pi / 180) * frequencies
    return torch.cat([lat.sin(), lat.cos(), lon.sin(), lon.cos()], dim=-1)


class MetadataEncoder(nn.Module):
    """GPS 128, weather, daytime and scene 64 each, text 384 → [B, 704].

    In training every present field of every row is replaced by null with probability ``dropout``, so
    that the model does not come to depend on fields that may be missing at inference.

    Args:
        dropout: probability that a present field is dropped.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.gps_proj = nn.Linear(GPS_WIDTH, GPS_WIDTH)
        self.gps_null = nn.Parameter(torch.empty(GPS_WIDTH))
        self.words = nn.ModuleDict(
            {field: nn.Embedding(len(words) + 1, WORD_WIDTH) for field, words in VOCABULARIES.items()}
        )
        self.text_proj = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)
        self.text_null = nn.Parameter(torch.empty(TEXT_WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights, small, so that metadata contributes little at first."""
        init_linear(self.gps_proj, std=SMALL_STD)
        init_linear(self.text_proj, std=SMALL_STD)
        nn.init.trunc_normal_(self.gps_null, std=SMALL_STD)
        nn.init.trunc_normal_(self.text_null, std=SMALL_STD)
        for embedding in self.words.values():
            assert isinstance(embedding, nn.Embedding)
            nn.init.trunc_normal_(embedding.weight, std=SMALL_STD)

    def forward(self, batch: Batch) -> Tensor:
        """Encode a batch's metadata.

        Args:
            batch: ``view_mask`` (for the number of rows and the device) and any of ``gps`` with
                ``gps_known``, ``weather``, ``daytime``, ``scene``, ``text`` with ``text_known``.
                An absent field is null in every row.

        Returns:
            [B, 704].
        """
        fields = cast(Mapping[str, Tensor], batch)
        allowed = self._draw_allowed(batch["view_mask"])
        weight = self.gps_proj.weight

        gps, known = _blank_unknown(fields, "gps", allowed["gps"], 2)
        parts = [torch.where(known, self.gps_proj(encode_gps(gps).to(weight.dtype)), self.gps_null)]
        for field, words in VOCABULARIES.items():
            null = torch.full_like(allowed[field], len(words), dtype=torch.int64)
            parts.append(self.words[field](torch.where(allowed[field], fields.get(field, null), null)))
        text, known = _blank_unknown(fields, "text", allowed["text"], TEXT_WIDTH)
        parts.append(torch.where(known, self.text_proj(text.to(weight.dtype)), self.text_null))
        return torch.cat(parts, dim=-1)

    def _draw_allowed(self, view_mask: Tensor) -> dict[str, Tensor]:
        """For each field [B] bool, whether it may be used: one draw per row and field, present or not."""
        shape = (len(FIELDS), view_mask.shape[0])
        if self.training and self.dropout > 0:
            allowed = torch.rand(shape, device=view_mask.device) >= self.dropout
        else:
            allowed = torch.ones(shape, dtype=torch.bool, device=view_mask.device)
        return dict(zip(FIELDS, allowed.unbind(), strict=True))


def _blank_unknown(
    fields: Mapping[str, Tensor], field: str, allowed: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """A field's values [B, width], zero where unused, and the mask of used rows [B, 1].

    Unused rows are zeroed because a NaN there would reach the projection's gradient as 0 · NaN.
    """
    if field not in fields:
        absent = torch.zeros_like(allowed).unsqueeze(-1)
        return torch.zeros(allowed.shape[0], width, device=allowed.device), absent
    known = (fields[f"{field}_known"] & allowed).unsqueeze(-1)
    return fields[field].masked_fill(~known, 0.0), known
