"""Features of the frozen backbone, kept on disk."""

from roadwork_dist.features.store.feature_store import FeatureStore
from roadwork_dist.features.store.space import FeatureSpace

__all__ = ["FeatureSpace", "FeatureStore"]
