"""Moved to labs_common.data.classes, .images."""

from labs_common.data.classes import LabelledPictures, checked, stratified_parts
from labs_common.data.images import NAMED, digests_of, examined, named_picture, refusal
from labs_common.options import OnBadData

__all__ = [
    "NAMED",
    "LabelledPictures",
    "OnBadData",
    "checked",
    "digests_of",
    "examined",
    "named_picture",
    "refusal",
    "stratified_parts",
]
