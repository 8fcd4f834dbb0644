"""Pictures with classes or captions: readers for every published layout, checked once, split by a seed."""
