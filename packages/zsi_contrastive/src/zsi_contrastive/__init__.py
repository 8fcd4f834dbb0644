"""Zero-shot instance segmentation: finds, boxes and outlines things of classes that no training picture showed."""
