"""Sources of image-caption pairs, one module each."""
