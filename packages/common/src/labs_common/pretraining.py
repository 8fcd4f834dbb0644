"""Moved to labs_common.tiny."""

from labs_common.tiny import pretrain, reproducible

__all__ = ["pretrain", "reproducible"]
