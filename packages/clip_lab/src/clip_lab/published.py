"""What is published about the released CLIP weights, in per cent."""

PROBED = "Radford et al. 2021, table 10 (CIFAR-10)"
MEASURED = "open_clip's results table (CIFAR-10)"
# Linear probe and zero-shot accuracy on CIFAR-10.
REFERENCE = {
    "RN50": (88.7, 71.57),
    "RN101": (91.1, 80.78),
    "ViT-B/32": (95.1, 89.83),
    "ViT-B/16": (96.2, 90.77),
    "ViT-L/14": (98.0, 95.59),
}
