import pytest
from test_scenes import is_true

from labs_common.scenes.files import captioned_scenes
from labs_common.scenes.judging import GRAMMAR, claims_of


def test_every_caption_is_right_of_its_own_scene() -> None:
    for _, scene, sentences in captioned_scenes(3, range(300)):
        for sentence in sentences:
            for said in (sentence, sentence.replace(",", ""), sentence.capitalize() + "."):
                claims = claims_of(said, scene)
                assert claims
                assert all(claim.right for claim in claims), (said, claims)


def test_of_other_scenes_it_agrees_with_an_independent_reader() -> None:
    scenes = [(scene, sentences) for _, scene, sentences in captioned_scenes(4, range(300))]
    agreed = {True: 0, False: 0}
    for (scene, _), (_, sentences) in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        for sentence in sentences:
            claims = claims_of(sentence, scene)
            true = is_true(sentence, scene)
            if true:  # there, "to the left" need not be clearly so
                assert all(claim.right for claim in claims if claim.kind != "relations"), (sentence, claims)
            elif sentence.startswith("there is") or " that is " in sentence or sentence.endswith(" picture"):
                # Lists and counts that leave something out are wrong there, and not here.
                assert not all(claim.right for claim in claims), (sentence, claims)
            agreed[true] += 1
    assert min(agreed.values()) > 5


@pytest.mark.parametrize("sentence", ["", "a red", "red star a", "a dog on a beach", "one stars", "a star and a moon"])
def test_what_is_no_sentence_of_the_grammar(sentence: str) -> None:
    _, scene, _ = next(captioned_scenes(0, [0]))
    (claim,) = claims_of(sentence, scene)
    assert (claim.kind, claim.right) == (GRAMMAR, False)


def test_each_claim_stands_for_itself() -> None:
    _, scene, _ = next(captioned_scenes(0, [0]))
    thing = scene.things[0]
    colour = next(c for c in ("red", "green", "blue", "white") if c not in {t.colour for t in scene.things})
    claims = claims_of(f"there is a {colour} {thing.shape} on a {scene.background} background", scene)
    assert [(claim.kind, claim.right) for claim in claims] == [
        ("objects", True), ("colours", False), ("background", True),
    ]  # fmt: skip
