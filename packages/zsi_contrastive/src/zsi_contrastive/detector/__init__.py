"""Zero-shot instance segmentation: a Mask R-CNN that finds classes it has never been shown."""
