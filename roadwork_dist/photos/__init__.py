"""Photos: decoding, views, augmentation, masks, and the manifest that lists them."""
