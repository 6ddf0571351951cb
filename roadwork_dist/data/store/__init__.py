"""Features of the frozen backbone, kept on disk."""

from roadwork_dist.data.store.space import FeatureSpace
from roadwork_dist.data.store.store import FeatureStore

__all__ = ["FeatureSpace", "FeatureStore"]
