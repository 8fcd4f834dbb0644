"""Each head against its computation written out, and where gradient goes; the contrastive heads."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zsi_contrastive.detector.heads import (
    BackgroundAwareRPNHead,
    SemanticBoxHead,
    SemanticMaskHead,
    SynchronisedBackground,
    direct,
    mask_logits,
    through_known,
    transferred,
)

pytestmark = pytest.mark.quick

D = 5


def moved(module: torch.nn.Module) -> set[str]:
    """The parameters that gradient reaches."""
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def test_proposals_compare_with_background_and_thing() -> None:
    torch.manual_seed(0)
    word = torch.randn(D)
    head = BackgroundAwareRPNHead(6, 3, word)
    assert torch.equal(head.background_vector(), word), "the learnt background starts at the word's vector"
    feature = torch.randn(2, 6, 4, 7)
    (scores,), (boxes,) = head([feature])
    assert scores.shape == (2, 3, 4, 7)
    assert boxes.shape == (2, 12, 4, 7)
    seen = F.relu(F.conv2d(feature, head.conv.weight, head.conv.bias, padding=1))
    for picture in range(2):
        for y in range(4):
            for x in range(7):
                weight = head.semantic.weight[:, :, 0, 0]
                vector = weight @ seen[picture, :, y, x] + head.semantic.bias
                for anchor in range(3):
                    two = torch.stack([vector @ head.background[anchor], vector @ head.thing[anchor]])
                    expected = two.softmax(0)[1]  # a softmax over background and thing
                    assert float(scores[picture, anchor, y, x].detach().sigmoid()) == pytest.approx(
                        float(expected.detach()), abs=1e-5
                    )
    scores.sum().backward()
    assert moved(head) == {"conv.weight", "conv.bias", "semantic.weight", "semantic.bias", "background", "thing"}


def test_background_is_synchronised_and_learnt() -> None:
    head = BackgroundAwareRPNHead(6, 3, torch.randn(D))
    word, seen = torch.randn(D), torch.randn(4, D)
    rows = SynchronisedBackground(word)
    assert torch.equal(rows(seen), torch.cat([word[None], seen]))
    classes = rows(seen, head.background_vector())
    assert torch.equal(classes[0], head.background.mean(0))
    F.cross_entropy(torch.randn(8, D) @ classes.T, torch.zeros(8, dtype=torch.int64)).backward()
    assert moved(head) == {"background"}, "the detector's loss trains the background of the proposals"


def test_box_head_is_its_layers() -> None:
    torch.manual_seed(0)
    head = SemanticBoxHead(2 * 3 * 3, 8, D, decoder=True)
    regions = torch.randn(4, 2, 3, 3)
    vectors, shifts, features = head(regions)
    flat = regions.numpy().reshape(4, -1).astype(np.float64)
    layers = {name: p.detach().numpy().astype(np.float64) for name, p in head.named_parameters()}
    one = np.maximum(flat @ layers["first.weight"].T + layers["first.bias"], 0)
    two = np.maximum(one @ layers["second.weight"].T + layers["second.bias"], 0)
    t = two @ layers["semantic.weight"].T + layers["semantic.bias"]
    back = t @ layers["decoder.weight"].T + layers["decoder.bias"]
    np.testing.assert_allclose(vectors.detach(), t, atol=1e-5)
    np.testing.assert_allclose(shifts[:, 0].detach(), two @ layers["box.weight"].T + layers["box.bias"], atol=1e-5)
    loss = head.reconstruction_loss(vectors, features)
    assert float(loss.detach()) == pytest.approx(float(((back - two) ** 2).mean()), rel=1e-5)
    loss.backward()
    assert moved(head) == {f"{name}.{kind}" for name in ("first", "second", "semantic", "decoder")
                           for kind in ("weight", "bias")}  # fmt: skip


def test_vocabulary_starts_as_a_detour_and_is_a_product() -> None:
    torch.manual_seed(0)
    words = torch.randn(40, D)
    plain, head = SemanticBoxHead(4, 8, D, False), SemanticBoxHead(4, 8, D, False, words)
    head.load_state_dict(plain.state_dict(), strict=False)
    regions = torch.randn(6, 4, 1, 1)
    torch.testing.assert_close(head(regions)[0], plain(regions)[0], atol=1e-4, rtol=1e-4)
    assert head.from_words is not None
    with torch.no_grad():
        head.from_words.weight.copy_(torch.randn(D, 40))
    expected = plain(regions)[0] @ words.T @ head.from_words.weight.T
    torch.testing.assert_close(head(regions)[0], expected)
    head(regions)[0].sum().backward()
    assert "from_words.weight" in moved(head)


def test_mask_head_is_a_fixed_convolution_of_the_words() -> None:
    torch.manual_seed(0)
    head = SemanticMaskHead(4, 6, 2, D, decoder=True)
    regions = torch.randn(3, 4, 7, 7)
    vectors, features = head(regions)
    assert vectors.shape == (3, D, 14, 14)
    x = regions
    for number in range(2):
        layer = head.convs[number][0]
        x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1))
    # Each convolution takes what the one before gives: all of them count.
    x = F.relu(F.conv_transpose2d(x, head.deconv.weight, head.deconv.bias, stride=2))
    torch.testing.assert_close(features, x)
    y = F.relu(F.conv2d(x, head.encoder[0].weight, head.encoder[0].bias, padding=1))
    y = F.conv2d(y, head.encoder[2].weight, head.encoder[2].bias, padding=1)
    classes = torch.randn(9, D)
    every = F.conv2d(y, classes[:, :, None, None])  # the paper's fixed 1 × 1 convolution over all classes
    labels = torch.tensor([2, 0, 8])
    torch.testing.assert_close(mask_logits(vectors, classes[labels]), every[torch.arange(3), labels])
    back = F.relu(F.conv2d(y, head.decoder[0].weight, head.decoder[0].bias, padding=1))
    back = F.conv2d(back, head.decoder[2].weight, head.decoder[2].bias, padding=1)
    loss = head.reconstruction_loss(vectors, features)
    assert float(loss.detach()) == pytest.approx(float(((back - x) ** 2).mean().detach()), rel=1e-5)
    mask_logits(vectors, classes[labels]).sum().backward()
    assert moved(head) == {name for name, _ in head.named_parameters() if not name.startswith("decoder")}


def test_transfer_by_hand() -> None:
    generator = np.random.default_rng(0)
    logits, known, asked = generator.normal(size=(4, 7)), generator.normal(size=(7, D)), generator.normal(size=(3, D))
    tensors = [torch.tensor(values, dtype=torch.float32) for values in (logits, known, asked)]
    found, things = transferred(*tensors), transferred(*tensors, temperature=2.0, background=False)
    for row in range(4):
        p = np.exp(logits[row]) / np.exp(logits[row]).sum()
        of_things = np.exp(logits[row, 1:] / 2) / np.exp(logits[row, 1:] / 2).sum()
        for column in range(3):
            score = sum(p[c] * known[c] @ asked[column] for c in range(7))
            assert float(found[row, column]) == pytest.approx(score, abs=1e-4)
            score = (1 - p[0]) * sum(of_things[c] * known[1 + c] @ asked[column] for c in range(6))
            assert float(things[row, column]) == pytest.approx(score, abs=1e-4)


def test_direct_transfer_by_hand() -> None:
    generator = np.random.default_rng(0)
    background, asked = generator.normal(size=(4, 1)), generator.normal(size=(4, 5))
    found = direct(torch.tensor(background), torch.tensor(asked), (3, 2), 2.0)
    for row in range(4):
        for group in ((0, 1, 2), (3, 4)):
            all_of = np.exp(background[row, 0] / 2) + sum(np.exp(asked[row, place] / 2) for place in group)
            for place in group:
                assert float(found[row, place]) == pytest.approx(np.exp(asked[row, place] / 2) / all_of)


def test_official_heads_are_the_published_codes() -> None:
    """Its forward written out, with its layers' names, matrices of words as columns, and its fixed convolutions."""
    torch.manual_seed(0)
    seen, unseen, words = 3, 2, 11
    voc, vec, vec_unseen = torch.randn(D, words), torch.randn(D, 1 + seen), torch.randn(D, unseen)
    head = SemanticBoxHead(4 * 9, 8, D, True, voc.T.contiguous(), official=1 + seen)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    rois = torch.randn(6, 4, 3, 3)
    x = F.relu(F.linear(rois.flatten(1), head.first.weight, head.first.bias))
    x = F.relu(F.linear(x, head.second.weight, head.second.bias))
    fc_semantic, kernel, d_kernel = head.semantic, head.from_words, head.to_words
    semantic = torch.mm(F.linear(x, fc_semantic.weight, fc_semantic.bias), voc)
    semantic = F.linear(semantic, kernel.weight, kernel.bias)
    back = torch.mm(F.linear(semantic, d_kernel.weight, d_kernel.bias), voc.t())
    back = F.linear(back, head.decoder.weight, head.decoder.bias)
    vectors, shifts, features = head(rois)
    torch.testing.assert_close(vectors @ vec, torch.mm(semantic, vec))
    torch.testing.assert_close(shifts.flatten(1), F.linear(x, head.box.weight, head.box.bias))
    torch.testing.assert_close(head.reconstruction_loss(vectors, features), F.mse_loss(x, back))
    scores = torch.mm(torch.mm(torch.mm(semantic, vec).softmax(1), vec.t()), vec_unseen)
    torch.testing.assert_close(transferred(vectors @ vec, vec.T, vec_unseen.T), scores)

    masks = SemanticMaskHead(4, 6, 1, D, True, official=True)
    for parameter in masks.parameters():
        torch.nn.init.normal_(parameter)
    conv, (conv_t, _, kernel), (d_kernel, _, d_conv_t, _) = masks.convs[0][0], masks.encoder, masks.decoder
    conv4 = F.relu(F.conv2d(rois, conv.weight, conv.bias, padding=1))  # of four, the last one's output is used
    conv4 = F.relu(F.conv_transpose2d(conv4, masks.deconv.weight, masks.deconv.bias, stride=2))
    x = F.relu(F.conv2d(conv4, conv_t.weight, conv_t.bias, padding=1))
    x = F.conv2d(x, kernel.weight, kernel.bias, padding=1)
    back = F.conv2d(x, d_kernel.weight, d_kernel.bias, padding=1)
    back = F.relu(F.conv2d(back, d_conv_t.weight, d_conv_t.bias, padding=1))
    pixels, features = masks(rois)
    torch.testing.assert_close(masks.reconstruction_loss(pixels, features), F.mse_loss(conv4, back))
    of_seen = F.conv2d(x, vec.t()[:, :, None, None])
    of_unseen = F.conv2d(F.conv2d(of_seen, vec[:, :, None, None]), vec_unseen.t()[:, :, None, None])
    classes = through_known(torch.cat([vec.T[1:], vec_unseen.T]), vec.T)
    found = torch.stack([mask_logits(pixels, one.expand(len(pixels), D)) for one in classes], 1)
    torch.testing.assert_close(found, torch.cat([of_seen[:, 1:], of_unseen], 1), rtol=1e-3, atol=1e-2)


def test_official_heads_start_as_the_published_code_says() -> None:
    torch.manual_seed(0)
    box = SemanticBoxHead(400, 300, 40, True, torch.randn(90, 40), official=49)
    masks = SemanticMaskHead(64, 48, 1, 40, True, official=True)
    rpn = BackgroundAwareRPNHead(64, 3, torch.randn(300), 1.0)
    for weight, deviation in (
        (rpn.thing, 1.0), (rpn.conv.weight, 0.01), (rpn.semantic.weight, 0.01), (rpn.box.weight, 0.01),
        (box.semantic.weight, 0.001), (box.box.weight, 0.001), (box.from_words.weight, 0.001),
        (box.first.weight, (2 / 700) ** 0.5), (box.second.weight, (2 / 600) ** 0.5),  # Xavier's: 2 / (in + out)
        (masks.encoder[0].weight, (2 / (9 * 40)) ** 0.5), (masks.encoder[2].weight, (2 / (9 * 40)) ** 0.5),
        (masks.decoder[2].weight, (2 / (9 * 48)) ** 0.5),  # He's, of the outputs
    ):  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(deviation, rel=0.06)
    for bias in (box.first.bias, box.semantic.bias, box.box.bias, box.from_words.bias, masks.encoder[2].bias):
        assert not bias.any()
