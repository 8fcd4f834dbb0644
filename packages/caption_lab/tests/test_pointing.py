import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from labs_testing.commands import here

from caption_lab import report
from caption_lab.pointing import named_things, pointing, touched
from labs_common.scenes.world import Scene, Thing

STAR = Thing("star", "red", "striped", 0.25, 0.25, 0.1, 0.0)
CIRCLE = Thing("circle", "blue", "plain", 0.75, 0.75, 0.2, 0.0)
SCENE = Scene((STAR, CIRCLE), "dark", (1, 1, 1, 1), 0, 0, 0)


@pytest.mark.parametrize(
    ("caption", "kinds"),
    [
        ("a small red star to the left of a large blue circle",
         {"small": STAR, "red": STAR, "star": STAR, "large": CIRCLE, "blue": CIRCLE, "circle": CIRCLE,
          "to the left of": (STAR, CIRCLE)}),
        ("one star and two circles", {"star": STAR, "circles": CIRCLE}),
        ("a star that is red and striped", {"star": STAR, "red": STAR, "striped": STAR}),
        ("a red star , a blue circle and a blue star on a dark background",
         {"red": STAR, "star": STAR, "blue": CIRCLE, "circle": CIRCLE}),
        ("a picture with a red moon in the upper left corner", {}),
    ],
)  # fmt: skip
def test_words_name_the_things_that_their_whole_name_fits(caption: str, kinds: dict[str, object]) -> None:
    words = caption.split()
    found: dict[str, object] = {}
    relation = [place for place, kind, _ in named_things(words, SCENE) if kind == "relations"]
    for place, kind, things in named_things(words, SCENE):
        name = " ".join(words[n] for n in relation) if kind == "relations" else words[place]
        found[name] = tuple(things) if kind == "relations" else things[0]
        assert kind == "relations" or len(things) == 1
    assert found == kinds


def test_a_place_is_touched_where_the_thing_is() -> None:
    """The circle's radius is 0.184 about (0.75, 0.35): of 10 × 10 places those nearer than that, corner by corner."""
    across, down = (np.clip(at, np.arange(10) / 10, np.arange(1, 11) / 10) - at for at in (0.75, 0.35))
    expected = np.hypot(across[None], down[:, None]) < 0.184  # (rows, columns)
    assert (touched([replace(CIRCLE, y=0.35)], 10) != expected).sum() <= 2  # a polygon of 28 corners
    assert not touched([STAR], 10)[4:].any()


def test_maps_that_point_are_told_from_maps_that_do_not() -> None:
    at_star, at_circle = np.full((2, 4, 4), 0.01)
    at_star[1, 1], at_circle[3, 3] = 1.0, 1.0  # row and column
    swapped = Scene((CIRCLE, STAR), "dark", (1, 1, 1, 1), 0, 0, 0)
    words = ["a", "red", "star", "above", "a", "blue", "circle"]
    good = np.stack([at_star] * 4 + [at_circle] * 3)
    found = pointing([(words, good), (words, np.stack([at_circle] * 7))], [SCENE, swapped])
    assert (found["colours"].words, found["objects"].words, found["relations"].words) == (4, 4, 2)
    assert (found["colours"].hits, found["objects"].hits, found["relations"].hits) == (0.75, 0.75, 1.0)
    star, circle = touched([STAR], 4), touched([CIRCLE], 4)
    assert found["colours"].chance == pytest.approx((star.mean() + circle.mean()) / 2)
    right = [(at_star * star).sum(), (at_circle * circle).sum(), (at_circle * star).sum(), (at_circle * circle).sum()]
    assert found["colours"].mass == pytest.approx(np.mean(right) / at_star.sum())
    # The next word of the other picture: its map is at_circle for the first picture, at_star for the second.
    assert found["objects"].others == np.mean([False, True, True, False])


def test_reports_judge_the_maps_of_drawn_scenes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captioner that says "a star" of each picture, because a small one would need minutes to say so by itself."""
    monkeypatch.setattr(
        report,
        "attention_maps",
        lambda captioner, images, options: [(["a", "star"], torch.rand(2, 4, 4)) for _ in images],
    )
    output = tmp_path / "evaluation"
    here("caption_lab.evaluate", "--checkpoint", finished, "--split", "all", "--beams", "1", "--output", output)
    found = json.loads((output / "pointing.json").read_text())
    assert list(found) == ["objects"]
    assert 0 < found["objects"]["words"] < 60
    assert 0 < found["objects"]["chance"] < 1
    assert "Does the map point at what the word names?" in (output / "report.html").read_text()
