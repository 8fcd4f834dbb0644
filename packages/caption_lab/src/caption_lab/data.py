"""Pictures and captions in: the splits, and pictures as the encoder sees them."""

from pathlib import Path

from caption_lab.encoder import Encoder
from caption_lab.tiny import RECIPE, demo_scene
from labs_common.data.described import Captions, Transform, read_captions
from labs_common.options import CaptionDataOptions

# The offline data. The numbers of its scenes are others than those that the encoder was pre-trained on: its seed is 0.
DEMO_SIDE, DEMO_COUNT = 64, 9000


def transform_of(encoder: Encoder) -> Transform:
    """What the encoder was trained on."""
    return Transform(encoder.size, encoder.mean, encoder.std, encoder.interpolation)


def read_data(options: CaptionDataOptions, seed: int, shown: bool) -> Captions:
    """The splits of --data, or of the drawn scenes; see `read_captions`."""
    return read_captions(options, seed, shown, drawn_scenes)


def drawn_scenes() -> Path:
    """Drawn scenes with five captions each; made now if never before."""
    from labs_common.scenes.files import cached_flickr8k

    recipe = {"side": DEMO_SIDE, "count": DEMO_COUNT, "scenes": RECIPE, "format": 1}
    return cached_flickr8k("captioned-scenes", recipe, DEMO_COUNT, DEMO_SIDE, demo_scene)
