"""Self-supervised learning: features from pictures without labels, by several methods."""
