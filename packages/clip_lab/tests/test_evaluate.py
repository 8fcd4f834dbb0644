"""Recall against scikit-learn and chance, the command, probabilities of captions against their words one by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labs_testing import commands as lab_commands
from PIL import Image

from clip_lab.encoder import load_encoder
from clip_lab.evaluate import likelihood_matrix, log_likelihoods, picture_rows_of, written
from clip_lab.metrics import chance_metrics, metric_intervals, retrieval_metrics
from clip_lab.report import RIGHT, framed
from clip_lab.saved import load_model
from labs_common.data.captions import read_captioned
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


def test_what_is_no_number_is_ranked_last() -> None:
    similarity = torch.eye(12)
    similarity[3] = similarity[:, 3] = torch.nan
    found = retrieval_metrics(similarity, np.arange(12))
    assert found["text_to_image/recall@10"] == found["image_to_text/recall@10"] == pytest.approx(11 / 12)
    assert retrieval_metrics(torch.full((12, 12), torch.nan), np.arange(12))["mean recall"] == 0.0


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


def test_captions_are_the_most_probable_words_one_by_one(coca: Path, scenes: Path) -> None:
    """Against reading every beginning anew; and the run keeps what it wrote with its scores."""
    loaded = load_model(coca)
    model: Any = loaded.model
    pictures = read_captioned(scenes).subset(range(3))
    rows = picture_rows_of(loaded, pictures)
    found = written(loaded, rows, pictures, DecodingOptions(beam=1))
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


def test_intervals_hold_what_new_pictures_would_give() -> None:
    """Of 20 draws from one world, nearly all intervals hold the world's own recall."""
    world = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    of_picture = np.arange(120).repeat(5)

    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ease = world[torch.randint(len(world), (120,), generator=generator)]  # captions of a picture are alike
        similarity = torch.randn(600, 120, generator=generator)
        similarity[torch.arange(600), of_picture] += (1 + ease[of_picture]).clamp(min=0)
        return similarity

    every = [retrieval_metrics(drawn(seed), of_picture) for seed in range(100, 220)]
    truth = {name: sum(one[name] for one in every) / len(every) for name in every[0]}
    held = {name: 0 for name in truth if name != "mean recall"}
    for seed in range(20):
        intervals = metric_intervals(drawn(seed), of_picture)
        assert intervals.keys() == held.keys()
        for name, (low, high) in intervals.items():
            held[name] += low <= truth[name] <= high
    assert min(value for name, value in held.items() if "recall" in name) >= 17, held


def test_any_model_is_measured_on_any_captioned_pictures(run: Path, scenes: Path, tmp_path: Path) -> None:
    """By the command on a run, and on the same model as another library's: the same ranks, by hand too."""
    exported = tmp_path / "exported"
    lab_commands.here("clip_lab.export", "--checkpoint", run, "--output", exported)
    found = []
    for name, checkpoint in (("own", run), ("theirs", exported)):
        lab_commands.here("clip_lab.evaluate", "--checkpoint", checkpoint, "--data", scenes, "--split", "all",
                          "--output", tmp_path / name)  # fmt: skip
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert (found[0]["pictures"], found[0]["captions"]) == (60, 300)
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], abs=0.01)
    for name, (low, high) in found[0]["intervals"].items():
        assert low <= found[0]["metrics"][name] <= high
    encoder = load_encoder(str(run))
    captions: dict[str, list[str]] = {}
    for line in (scenes / "Flickr8k.token.txt").read_text().splitlines():
        captions.setdefault(line.split("#")[0], []).append(line.split("\t")[1])
    names = sorted(captions)
    views = []
    for name in names:
        with Image.open(scenes / "Images" / name) as image:
            views.append(encoder.view(image.convert("RGB")))
    cosines = encoder.read([c for name in names for c in captions[name]]) @ encoder.embedded(torch.stack(views)).T
    own = cosines[torch.arange(300), torch.arange(300) // 5]
    hits = float(((cosines > own[:, None]).sum(1) < 5).double().mean())
    assert found[0]["metrics"]["text_to_image/recall@5"] == pytest.approx(hits, abs=0.005)
    html = (tmp_path / "own" / "report.html").read_text()
    assert "95 % interval" in html
    assert "not to be compared" in html
    refused = lab_commands.here("clip_lab.evaluate", "--checkpoint", exported, code=2)
    assert "--data" in refused.errors[0]
