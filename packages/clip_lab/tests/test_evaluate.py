"""Recall against scikit-learn and chance, probabilities of captions against their words one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_lab.evaluate import chance_metrics, likelihood_matrix, log_likelihoods, retrieval_metrics, written
from clip_lab.report import RIGHT, framed
from clip_lab.saved import load_model
from labs_common.options import DecodingOptions

SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (5, 5), (40, 30)])
def test_any_picture_gets_a_frame(size: tuple[int, int]) -> None:
    found = framed(Image.new("RGB", size), right=True)
    assert found.size == size
    assert found.getpixel((0, 0)) == tuple(bytes.fromhex(RIGHT[1:]))
    assert found.getpixel((size[0] // 2, size[1] // 2)) == ((0, 0, 0) if min(size) > 8 else found.getpixel((0, 0)))


def test_recall_is_scikit_learns() -> None:
    top_k = pytest.importorskip("sklearn.metrics").top_k_accuracy_score
    generator = torch.Generator().manual_seed(1)
    of_picture = torch.arange(12).repeat_interleave(5)
    similarity = torch.randn(60, 12, generator=generator)
    similarity[torch.arange(60), of_picture] += 1
    found = retrieval_metrics(similarity, of_picture.numpy())
    for k in (1, 5, 10):
        assert found[f"text_to_image/recall@{k}"] == pytest.approx(
            top_k(of_picture.numpy(), similarity.numpy(), k=k, labels=range(12))
        )
        # A picture has found its captions if one of them is among its first k.
        best = [
            any(of_picture[place] == picture for place in similarity[:, picture].topk(k).indices)
            for picture in range(12)
        ]
        assert found[f"image_to_text/recall@{k}"] == pytest.approx(sum(best) / 12)
    ranks = sorted(1 + int((similarity[row] > similarity[row, of_picture[row]]).sum()) for row in range(60))
    assert found["text_to_image/median rank"] == (ranks[29] + ranks[30]) / 2


def test_a_model_that_tells_nothing_apart_is_not_rewarded() -> None:
    found = retrieval_metrics(torch.ones(50, 10), torch.arange(10).repeat_interleave(5).numpy())
    assert found["text_to_image/recall@1"] == 0
    assert found["text_to_image/median rank"] == 5.5


def test_chance_is_what_random_scores_give() -> None:
    generator = torch.Generator().manual_seed(0)
    of_picture = torch.arange(30).repeat_interleave(5).numpy()
    drawn = [retrieval_metrics(torch.randn(150, 30, generator=generator), of_picture) for _ in range(150)]
    expected = chance_metrics(150, 30)
    for name, value in expected.items():
        mean = sum(one[name] for one in drawn) / len(drawn)
        assert mean == pytest.approx(value, rel=0.12, abs=0.01), name


def test_probabilities_of_captions(coca: Path) -> None:
    """A caption's log-likelihood is that of its words one by one; the matrix compares pictures for each caption."""
    loaded = load_model(coca)
    model: Any = loaded.model
    rows = torch.randn(3, model.image.count * model.image.width)
    words = loaded.words(SENTENCES)
    sums, counts = log_likelihoods(loaded, rows, words, torch.tensor([2, 0]))
    for place, picture in enumerate((2, 0)):
        numbers = loaded.words.numbers(SENTENCES[place])
        total = 0.0
        for at in range(1, len(numbers)):
            logits = model.next_words(rows[picture][None], torch.tensor([numbers[: at + 1]]))[0, -1]
            total += float(logits.log_softmax(0)[numbers[at]])
        assert float(sums[place]) == pytest.approx(total, abs=1e-3)
        assert int(counts[place]) == len(numbers) - 1
    found = likelihood_matrix(loaded, rows, SENTENCES)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found.exp().mean(1), torch.ones(2))


def test_captions_are_the_most_probable_words_one_by_one(coca: Path) -> None:
    """Against reading every beginning anew; and the run keeps what it wrote with its scores."""
    loaded = load_model(coca)
    model: Any = loaded.model
    rows = torch.randn(3, model.image.count * model.image.width)
    found = written(loaded, rows, DecodingOptions(beam=1))
    start, backend = loaded.words.numbers("")[0], loaded.words.backend
    never = [backend.pad_token_id, backend.unk_token_id, backend.bos_token_id]
    for row, caption in zip(rows, found, strict=True):
        numbers = [start]
        while len(numbers) < loaded.words.length and numbers[-1] != backend.eos_token_id:
            logits = model.next_words(row[None], torch.tensor([[*numbers, 0]]))[0, -1]
            logits[never] = -torch.inf
            numbers.append(int(logits.argmax()))
        assert caption == backend.decode(numbers, skip_special_tokens=True).strip()
    results = json.loads((coca / "results.json").read_text())
    said = json.loads((coca / "captions.json").read_text())
    assert len(said) == results["test"]["pictures"]
    assert results["written"]["scorer"]
    assert {"bleu-4", "cider", "rouge-l"} <= results["written"]["metrics"].keys()
    assert "written" in results["written"]["right"], "drawn scenes are judged"
