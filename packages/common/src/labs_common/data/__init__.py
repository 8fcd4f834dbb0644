"""Readers: one per real on-disk format."""

from labs_common.data.images import BadPictureError, decoded
from labs_common.data.pictures import LabelledPictures, OnBadData, checked, stratified_parts
from labs_common.data.readers import PictureSplits, read_pictures

__all__ = [
    "BadPictureError",
    "LabelledPictures",
    "OnBadData",
    "PictureSplits",
    "checked",
    "decoded",
    "read_pictures",
    "stratified_parts",
]
