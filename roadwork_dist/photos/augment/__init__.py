"""Augmentation of training views: what each operation does, how often, and with which draws."""

from roadwork_dist.photos.augment.policy import Augmenter, augmenter_for, draw_epoch

__all__ = ["Augmenter", "augmenter_for", "draw_epoch"]
