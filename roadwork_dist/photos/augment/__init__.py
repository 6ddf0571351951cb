"""Augmentation of training views: the operations, their probabilities and their random draws."""

from roadwork_dist.photos.augment.policy import Augmenter, augmenter_for, draw_epoch

__all__ = ["Augmenter", "augmenter_for", "draw_epoch"]
