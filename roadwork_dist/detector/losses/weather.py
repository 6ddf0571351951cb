"""Cross-entropy loss of the weather, an auxiliary task of the visual path.

B batch
"""

from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.config.batch import WEATHER, Batch, ModelOutput
from roadwork_dist.detector.losses.part import PARTS, LossPart


def weather_loss_sum(logits: Tensor, weather: Tensor) -> Tensor:
    """Sum over rows with a known weather of the cross-entropy.

    The naive loop::

        total = 0.0
        for row, word in zip(logits, weather):
            if word != len(WEATHER):  # the index after the last word means unknown
                total += -log(softmax(row)[word])

    Args:
        logits: [B, len(WEATHER)], any floating dtype; computed in float32.
        weather: [B] int64, len(WEATHER) = unknown.

    Returns:
        Scalar float32; 0, attached to the graph, if no weather is known.
    """
    return F.cross_entropy(logits.float(), weather, ignore_index=len(WEATHER), reduction="sum")


@PARTS.register("weather")
class WeatherPart(LossPart):
    """Over the rows whose weather is known."""

    auto = (0.20, 0.15)

    def count(self, batch: Batch) -> int:
        """Rows with a known weather."""
        return int((batch["weather"] != len(WEATHER)).sum())

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """See :func:`weather_loss_sum`."""
        return weather_loss_sum(output.weather_logits, batch["weather"])
