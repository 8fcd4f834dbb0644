"""What the papers report on Flickr8k, to be seen beside one's own figures."""

# BLEU-1 to BLEU-4 and METEOR in per cent, 5 references; None where the paper gives none. Figures of Xu et al. 2015,
# table 1, which also reports those of the others.
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "Show and Tell (Google NIC)": (63.0, 41.0, 27.0, None, None),
    "Log-bilinear": (65.6, 42.4, 27.7, 17.7, 17.31),
    "Show, Attend and Tell, soft attention": (67.0, 44.8, 29.9, 19.5, 18.93),
    "Show, Attend and Tell, hard attention": (67.0, 45.7, 31.4, 21.3, 20.30),
}
SOURCE = "arXiv 1502.03044, table 1"
