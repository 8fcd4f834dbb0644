"""Moved to labs_common.data.captions."""

from labs_common.data.captions import Captions, PictureTensors, Transform, at_most, read_captions, truth_of

__all__ = [
    "Captions",
    "PictureTensors",
    "Transform",
    "at_most",
    "read_captions",
    "truth_of",
]
