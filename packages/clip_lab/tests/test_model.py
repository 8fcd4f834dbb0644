"""Towers and models: what sees what, and what the parts are equal to."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from transformers import BertConfig, BertModel

from clip_lab.config import TINY, HeadOptions, ImageOptions
from clip_lab.image import ImageTower, make_image_tower
from clip_lab.losses import OBJECTIVES, caption_loss, suffix_targets
from clip_lab.model import ClipModel, CocaModel, Scale, SimVlmModel, tower_rows, training_mode
from clip_lab.text import PretrainedText, TextTower, last_of
from labs_common.decoding import SpecialTokens, Tensors, beam_search, write
from labs_common.errors import LabError
from labs_common.options import DecodingOptions

pytestmark = pytest.mark.quick

HEAD = HeadOptions(embedding=24, queries=3, decoder_layers=2)
WORDS = torch.tensor([[2, 5, 6, 7, 3, 0, 0], [2, 8, 9, 10, 11, 12, 3]])


@pytest.fixture(scope="module", autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def towers() -> tuple[ImageTower, TextTower]:
    return make_image_tower(ImageOptions()), TextTower(20, 32, 2, 4, 9, 3)


def test_the_text_tower_sees_only_what_came_before_and_reads_at_the_end() -> None:
    text = towers()[1].eval()
    read = text(WORDS)
    later = WORDS.clone()
    later[0, 5:], later[1, 4:] = 9, 13
    other = text(later)
    torch.testing.assert_close(read.states[1, :4], other.states[1, :4])
    assert not torch.allclose(read.states[1, 4:], other.states[1, 4:])
    torch.testing.assert_close(read.feature[0], other.feature[0])  # what follows the end is nothing
    torch.testing.assert_close(read.feature, torch.stack([read.states[0, 4], read.states[1, 6]]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (TINY, {}), (TINY, {"image_size": 48}), (TINY, {"image_stages": 3}), ("test_vit", {"image_size": 32}),
        ("test_convnext", {"image_size": 64}), ("test_resnet", {"image_size": 64}), ("test_efficientnet", {"image_size": 64}),
        ("swin_tiny_patch4_window7_224", {}),
    ],
)  # fmt: skip
def test_image_towers_give_a_feature_and_places(name: str, options: dict[str, int]) -> None:
    if "swin" in name:  # its grid has its channels last
        tower = ImageTower(name, {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64}, 64)
    else:
        tower = make_image_tower(dataclasses.replace(ImageOptions(name, False), **options))
    tower.eval()
    pictures = torch.randn(2, 3, tower.size, tower.size)
    seen = tower(pictures)
    assert seen.feature.shape == (2, tower.width)
    assert seen.places.shape == (2, tower.count, tower.width)
    if tower.stages:
        torch.testing.assert_close(seen.feature, seen.places.mean(1))
    else:
        torch.testing.assert_close(seen.feature, tower.network(pictures))


@pytest.mark.parametrize(("name", "small"), [("vgg11", {"mlp_ratio": 0.001}), ("mobilenetv3_small_050", {})])
def test_a_classifier_of_several_layers_is_read_before_them_and_left_out(name: str, small: dict[str, float]) -> None:
    """Nothing may train that no gradient reaches: processes would wait for it."""
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0, **small).eval()
    tower = ImageTower(name, small, 64)
    tower.network.load_state_dict({key: whole.state_dict()[key] for key in tower.network.state_dict()})
    pictures = torch.randn(2, 3, 64, 64)
    seen = tower.eval()(pictures)
    torch.testing.assert_close(seen.feature, whole.forward_features(pictures).mean((2, 3)))
    seen.feature.square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert len(list(tower.parameters())) < len(list(whole.parameters()))


def test_unknown_towers_and_stages_are_named() -> None:
    with pytest.raises(LabError, match="resnet50"):
        make_image_tower(ImageOptions(image="resnt50"))
    with pytest.raises(LabError, match="--image-stages 9"):
        make_image_tower(ImageOptions(image_stages=9))
    with pytest.raises(LabError, match="--image-size 33"):
        make_image_tower(ImageOptions(image="test_vit", image_size=33))


def test_the_scale_never_passes_a_hundred_and_can_come_down_again() -> None:
    scale = Scale(1 / 0.07)
    assert scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        scale.logit_scale.fill_(math.log(500))
    found = scale()
    assert found.item() == pytest.approx(100, rel=1e-5)
    found.backward()
    assert scale.logit_scale.grad is not None
    assert float(scale.logit_scale.grad) > 0


@pytest.mark.parametrize("objective", ["clip", "siglip", "coca"])
def test_rows_of_a_frozen_tower_give_what_pictures_give(objective: str) -> None:
    model = OBJECTIVES[objective].model(*towers(), HEAD).eval()
    assert isinstance(model, ClipModel | CocaModel)
    pictures = torch.randn(2, 3, 32, 32)
    found, again = model(pictures, WORDS), model(tower_rows(model, pictures), WORDS)
    for one, other in zip(found, again, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.image.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found.text, model.embed_texts(WORDS))
    assert (found.bias is not None) == (objective == "siglip")
    if objective == "siglip":
        assert (found.scale.item(), found.bias.item()) == (pytest.approx(10), -10)


def test_coca_writes_from_the_picture_and_what_came_before() -> None:
    model = CocaModel(*towers(), HEAD).eval()
    pictures = torch.randn(2, 3, 32, 32)
    logits = model(pictures, WORDS).logits
    assert logits.shape == (2, 6, 20)
    later, other = WORDS.clone(), pictures.clone()
    later[1, 4] = 17
    torch.testing.assert_close(model(pictures, later).logits[1, :4], logits[1, :4])
    assert not torch.allclose(model(pictures, later).logits[1, 4], logits[1, 4])
    other[0] += 1
    assert not torch.allclose(model(other, WORDS).logits[0], logits[0])
    # Several captions of a picture, and captions in any order, get their own picture.
    two = model(pictures, WORDS.repeat_interleave(2, 0)).logits
    torch.testing.assert_close(two[::2], logits)
    turned = model(pictures, WORDS.flip(0), torch.tensor([1, 0])).logits
    torch.testing.assert_close(turned.flip(0), logits)


def test_simvlm_reads_its_prefix_both_ways_and_writes_the_rest() -> None:
    model = SimVlmModel(*towers(), HEAD).eval()
    pictures = torch.randn(2, 3, 32, 32)
    prefix = torch.tensor([1, 3])
    logits = model(pictures, WORDS, prefix)
    later = WORDS.clone()
    later[1, 2] = 17  # within the prefix: seen from all places, also those before it
    assert not torch.allclose(model(pictures, later, prefix)[1, 0], logits[1, 0])
    later = WORDS.clone()
    later[1, 4] = 17  # after it: only seen from there on
    torch.testing.assert_close(model(pictures, later, prefix)[1, :4], logits[1, :4])
    assert not torch.allclose(model(pictures, later, prefix)[1, 4], logits[1, 4])
    rows = tower_rows(model, pictures)
    torch.testing.assert_close(model.next_words(rows, WORDS), model(rows, WORDS, torch.ones(2, dtype=torch.long)))


SPECIAL = SpecialTokens(start=2, end=3, pad=0, never=(0, 1, 2))


@pytest.fixture(params=[("coca", 0), ("simvlm", 0), ("simvlm", 2)], ids=str)
def writer(request: pytest.FixtureRequest) -> tuple[Any, Any, torch.Tensor]:
    """A model that writes, the same as the search sees it, and rows of four pictures' places."""
    torch.manual_seed(1)
    name, layers = request.param
    model: Any = OBJECTIVES[name].model(*towers(), dataclasses.replace(HEAD, encoder_layers=layers)).eval()
    begin = partial(model.begin, start=SPECIAL.start) if model.continues else model.begin
    return model, SimpleNamespace(begin=begin, step=model.step), torch.randn(4, model.image.count * model.image.width)


def test_words_one_by_one_give_what_whole_captions_give(writer: tuple[Any, Any, torch.Tensor]) -> None:
    """Also with several beams, whose words differ."""
    model, decoder, rows = writer
    words = torch.randint(4, 20, (4, 3, 7), generator=torch.Generator().manual_seed(0))  # (pictures, beams, length)
    words[:, :, 0] = SPECIAL.start
    with torch.no_grad():
        whole = model.next_words(rows.repeat_interleave(3, 0), words.flatten(0, 1)).unflatten(0, (4, 3))
        fixed, moving = decoder.begin(rows)
        moving: Tensors = {name: tensor.expand(-1, 3, *tensor.shape[2:]) for name, tensor in moving.items()}
        for place in range(6):
            logits, moving, _ = decoder.step(words[:, :, place], fixed, moving)
            torch.testing.assert_close(logits, whole[:, :, place])


def test_a_model_that_knows_its_captions_by_heart_writes_them(writer: tuple[Any, Any, torch.Tensor]) -> None:
    model, decoder, rows = writer
    words = torch.tensor([[2, 5, 6, 7, 3, 0], [2, 5, 8, 3, 0, 0], [2, 9, 9, 4, 11, 3], [2, 12, 3, 0, 0, 0]])
    targets = suffix_targets(words, torch.ones(4, dtype=torch.long), last_of(words, SPECIAL.end))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        caption_loss(model.next_words(rows, words), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = [[word for word in row[1:] if word] for row in words.tolist()]
    greedy = write(decoder, rows, SPECIAL, 8, DecodingOptions(beam=1))
    alone = beam_search(decoder, rows, SPECIAL, 8, DecodingOptions(beam=1))
    assert greedy.words == alone.words == beam_search(decoder, rows, SPECIAL, 8, DecodingOptions(beam=4)).words
    assert greedy.words == expected
    assert alone.log_probabilities == pytest.approx(greedy.log_probabilities, abs=1e-4)


def test_simvlms_encoder_reads_the_prefix_and_its_decoder_the_rest() -> None:
    model = SimVlmModel(*towers(), dataclasses.replace(HEAD, encoder_layers=1)).eval()
    pictures, prefix = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    logits = model(pictures, WORDS, prefix)

    def changed(place: int) -> torch.Tensor:
        later = WORDS.clone()
        later[1, place] = 17
        return model(pictures, later, prefix)[1]

    assert not torch.allclose(changed(2)[0], logits[1, 0]), "the prefix is seen from everywhere, by the encoder"
    torch.testing.assert_close(changed(4)[:4], logits[1, :4])
    assert not torch.allclose(changed(4)[4], logits[1, 4])
    other = pictures + 1
    assert not torch.allclose(model(other, WORDS, prefix)[1], logits[1])


@pytest.mark.parametrize("layers", [0, 1])
def test_what_is_probed_of_simvlm_are_its_states_of_the_picture(layers: int) -> None:
    """As the states at the places in a pass over picture and words, if the places see no word."""
    model: Any = SimVlmModel(*towers(), dataclasses.replace(HEAD, encoder_layers=layers)).eval()
    rows = torch.randn(2, model.image.count * model.image.width)
    seen: list[torch.Tensor] = []
    last, norm = ((model.encoder if layers else model.blocks)[-1], model.encoded if layers else model.norm)
    last.register_forward_hook(lambda module, given, states: seen.append(norm(states)))
    prefix = torch.zeros(2, dtype=torch.long)
    model.next_words(rows, WORDS, prefix)
    torch.testing.assert_close(model.pooled(rows), seen[0][:, : model.image.count].mean(1))


def test_a_hugging_face_encoder_reads_with_its_pooler_or_the_mean() -> None:
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    pooled = PretrainedText(BertModel(config), 9, 3).eval()
    read = pooled(WORDS)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    expected = pooled.network(input_ids=WORDS, attention_mask=mask)
    torch.testing.assert_close(read.feature, expected.pooler_output)
    plain = PretrainedText(BertModel(config, add_pooling_layer=False), 9, 3).eval()
    states = plain.network(input_ids=WORDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(plain(WORDS).feature[0], states[0, :5].mean(0))
    torch.testing.assert_close(plain(WORDS).feature[1], states[1].mean(0))


def test_frozen_towers_stay_in_evaluation_mode() -> None:
    tower = make_image_tower(ImageOptions())
    tower.requires_grad_(False)
    model = ClipModel(tower, TextTower(20, 32, 1, 4, 9, 3), HEAD)
    training_mode(model, model)
    assert not any(part.training for part in model.image.modules())
    assert model.text.training
