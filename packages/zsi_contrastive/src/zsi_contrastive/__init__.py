"""Zero-shot instance segmentation: finds, boxes and outlines things of classes that no training picture showed."""

TINY = "tiny"  # the backbone, of both halves, that learns drawn things on a CPU in minutes
