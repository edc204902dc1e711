"""Images: decoding, preparation, augmentation."""
