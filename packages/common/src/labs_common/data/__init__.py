"""Readers: one per real on-disk format."""

from labs_common.data.captions import CaptionedPictures, caption_splits, read_captioned
from labs_common.data.classes import LabelledPictures, stratified_parts
from labs_common.data.images import BadPictureError, checked, decoded
from labs_common.data.readers import PictureSplits, read_pictures
from labs_common.data.splits import print_left_out, record_splits
from labs_common.options import OnBadData

__all__ = [
    "BadPictureError",
    "CaptionedPictures",
    "LabelledPictures",
    "OnBadData",
    "PictureSplits",
    "caption_splits",
    "checked",
    "decoded",
    "print_left_out",
    "read_captioned",
    "read_pictures",
    "record_splits",
    "stratified_parts",
]
