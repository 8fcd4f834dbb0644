"""Moved to labs_common.scenes.captions."""

from labs_common.scenes.captions import GRAMMAR, KINDS, Claim, claims_of

__all__ = [
    "GRAMMAR",
    "KINDS",
    "Claim",
    "claims_of",
]
