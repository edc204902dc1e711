"""VGG networks with batch normalization."""
