"""The front of a network that does not train: the proof that it stays as it was, the cut, its output on disk."""
