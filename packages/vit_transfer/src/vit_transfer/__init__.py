"""One trainable block of a pre-trained CNN or vision transformer."""
