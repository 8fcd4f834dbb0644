"""Moved to labs_common.data.classes, .images."""

from labs_common.data.classes import LabelledPictures, stratified_parts
from labs_common.data.images import NAMED, checked, digests_of, examined, refusal
from labs_common.options import OnBadData

__all__ = [
    "NAMED",
    "LabelledPictures",
    "OnBadData",
    "checked",
    "digests_of",
    "examined",
    "refusal",
    "stratified_parts",
]
