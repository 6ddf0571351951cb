"""The row order selected by ``data.order``."""

from collections.abc import Sequence

import numpy as np

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.images import ImageSource
from roadwork_dist.storage.remote.image import are_on_server
from roadwork_dist.trainer.feed.order import ShardOrder


def shard_order_of(
    images: Sequence[ImageSource], config: DataConfig, *, reads_photos: bool = True
) -> ShardOrder | None:
    """The row order selected by ``data.order``; None = shuffled over the whole set.

    Args:
        images: the photo of each row; those in shards have a ``location``.
        config: order and shuffle window.
        reads_photos: whether each epoch reads photos, instead of features stored on this machine.

    Raises:
        ConfigError: the order is ``shards``, but a photo is not in a shard.
    """
    by_itself = reads_photos and are_on_server(images)
    if config.order == "shuffled" or (config.order == "auto" and not by_itself):
        return None
    number_of: dict[str, int] = {}
    locations = [getattr(image, "location", None) for image in images]
    if None in locations:
        raise ConfigError(
            f"data.order is 'shards', but {images[locations.index(None)].name} is not in a shard: set it to "
            "auto, or write shards with `roadwork-dist shard`"
        )
    numbers = [number_of.setdefault(str(location), len(number_of)) for location in locations]
    return ShardOrder(np.array(numbers, dtype=np.int64), config.shuffle_shards)
