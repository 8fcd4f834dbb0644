"""Procedurally drawn scenes: the offline data, written in the real formats and read back by the same readers."""
