"""Figures of the literature, to stand beside those measured: COCO, the same splits, ResNet-101."""

# Zheng et al., CVPR 2021. The boxes of 48/17 are what the authors' result file scores; the rest is as their tables say.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "48_17": {
        "box": {
            "recall@0.4": 0.574,
            "recall@0.5": 0.539,
            "recall@0.6": 0.483,
            "ap@0.4": 0.125,
            "ap@0.5": 0.114,
            "ap@0.6": 0.099,
        },
        "mask": {"recall@0.4": 0.503, "recall@0.5": 0.449, "recall@0.6": 0.387, "ap@0.5": 0.090},
    },
    "65_15": {
        "box": {"recall@0.4": 0.619, "recall@0.5": 0.589, "recall@0.6": 0.544, "ap@0.5": 0.136},
        "mask": {"recall@0.4": 0.558, "recall@0.5": 0.500, "recall@0.6": 0.429, "ap@0.5": 0.105},
    },
}
