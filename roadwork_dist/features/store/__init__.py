"""On-disk store for features of the frozen backbone."""

from roadwork_dist.features.store.feature_store import FeatureStore
from roadwork_dist.features.store.space import FeatureSpace

__all__ = ["FeatureSpace", "FeatureStore"]
