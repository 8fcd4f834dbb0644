"""CLIP on Flickr8k from scratch, CoCa and SimVLM beside it; search, linear probe and zero-shot."""
