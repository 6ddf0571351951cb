"""Vision foundation models behind one interface: ``load_backbone`` and ``Backbone``."""

from roadwork_dist.detector.backbone.attention import attention_in_use
from roadwork_dist.detector.backbone.base import Backbone, BackboneInfo
from roadwork_dist.detector.backbone.loading import build_random, load_backbone, resolve_name
from roadwork_dist.detector.backbone.table import BACKBONES, BackboneSpec

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneInfo",
    "BackboneSpec",
    "attention_in_use",
    "build_random",
    "load_backbone",
    "resolve_name",
]
