"""The objectives against other implementations and the paper's own gradient; gradient caching against the whole."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from open_clip import ClipLoss
from transformers import BertConfig, BertModel

from clip_lab.config import BatchOptions, HeadOptions, ImageOptions, TrainConfig
from clip_lab.data import Batches, Pairs, Step
from clip_lab.image import make_image_tower
from clip_lab.losses import (
    OBJECTIVES,
    PADDED,
    Embeddings,
    caption_loss,
    clip_loss,
    embedded,
    siglip_loss,
    suffix_targets,
)
from clip_lab.model import training_mode
from clip_lab.text import PretrainedText, TextTower
from clip_lab.tokens import Words

pytestmark = pytest.mark.quick

HEAD = HeadOptions(embedding=16, queries=3, decoder_layers=1)


def embeddings(count: int, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(image, dim=1).requires_grad_(), F.normalize(text, dim=1).requires_grad_()


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, of)


def test_clip_is_open_clips_in_value_and_gradient() -> None:
    open_clip = pytest.importorskip("open_clip")
    image, text = embeddings(11)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(11)
    for chunk in (1, 4, 4096):
        ours = clip_loss(Embeddings(image, text, ids, ids), scale, chunk=chunk)
        theirs = open_clip.ClipLoss()(image, text, scale)
        torch.testing.assert_close(ours, theirs)
        for one, other in zip(gradients(ours, image, text, scale), gradients(theirs, image, text, scale), strict=True):
            torch.testing.assert_close(one, other)


def test_siglip_is_open_clips_in_value_and_gradient() -> None:
    open_clip = pytest.importorskip("open_clip")
    image, text = embeddings(9)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (10.0, -10.0))
    ids = torch.arange(9)
    ours = siglip_loss(Embeddings(image, text, ids, ids), scale, bias, chunk=2)
    theirs = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(ours, theirs)
    every = (image, text, scale, bias)
    for one, other in zip(gradients(ours, *every), gradients(theirs, *every), strict=True):
        torch.testing.assert_close(one, other)


def test_coca_is_open_clips() -> None:
    open_clip = pytest.importorskip("open_clip")
    image, text = embeddings(5)
    scale = torch.tensor(7.0, dtype=torch.float64)
    logits = torch.randn(5, 6, 13, dtype=torch.float64)
    labels = torch.randint(1, 13, (5, 6))
    labels[:, 4:] = 0  # open_clip's padding
    theirs = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)(
        image, text, logits.permute(0, 1, 2), labels, scale
    )
    ids = torch.arange(5)
    ours = (
        clip_loss(Embeddings(image, text, ids, ids), scale),
        2.0 * caption_loss(logits, labels.masked_fill(labels == 0, PADDED)),
    )
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def test_several_positives_are_supervised_contrast() -> None:
    """Against SupConLoss of pytorch-metric-learning, one direction at a time."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    image, text = embeddings(6)
    more = F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=1)
    captions, temperature = torch.cat([text, more]), 0.2
    ids, text_ids = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 2, 3, 4, 0, 4, 4, 1, 2, 3, 0])
    supervised = losses.SupConLoss(temperature=temperature)
    expected = (
        supervised(image, ids, ref_emb=captions, ref_labels=text_ids)
        + supervised(captions, text_ids, ref_emb=image, ref_labels=ids)
    ) / 2
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    torch.testing.assert_close(clip_loss(Embeddings(image, captions, ids, text_ids), scale, chunk=5), expected)


def test_captions_of_one_picture_do_not_push_each_other_away() -> None:
    """With both captions of a picture where it is, its own second caption is no error; taken as a negative it is."""
    image = F.normalize(torch.eye(3, 4, dtype=torch.float64), dim=1)
    text, scale = image.repeat_interleave(2, 0), torch.tensor(100.0, dtype=torch.float64)
    ids = torch.arange(3)
    together = clip_loss(Embeddings(image, text, ids, ids.repeat_interleave(2)), scale)
    pairs = torch.arange(6)
    apart = clip_loss(Embeddings(text, text, pairs, pairs), scale)
    # Spread evenly over two captions: the entropy of that is what remains of one direction.
    assert float(together) == pytest.approx(torch.tensor(2.0).log().item() / 2, abs=1e-6)
    assert float(apart) > float(together)


def test_gradient_is_the_papers_closed_form() -> None:
    """Of one direction by an unnormalised picture vector: sum over captions of (p - y) times the cosine's gradient."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    tau, ids = 0.07, torch.arange(4)
    scale = torch.tensor(1 / tau, dtype=torch.float64)
    loss = clip_loss(Embeddings(F.normalize(x, dim=1), F.normalize(y, dim=1), ids, ids), scale)
    (found,) = gradients(loss, x)
    expected = torch.zeros_like(found)
    norms_x, norms_y = x.detach().norm(dim=1), y.norm(dim=1)
    s = x.detach() @ y.T / (tau * norms_x[:, None] * norms_y)
    by_picture, by_caption = s.softmax(1), s.softmax(0)
    for i in range(4):
        for j in range(4):
            own = float(i == j)
            weight = ((by_picture[i, j] - own) + (by_caption[i, j] - own)) / 8
            dot = x.detach()[i] @ y[j]
            slope = y[j] / (tau * norms_x[i] * norms_y[j]) - dot * x.detach()[i] / (tau * norms_x[i] ** 3 * norms_y[j])
            expected[i] += weight * slope
    torch.testing.assert_close(found, expected)


def test_rows_of_a_part_against_the_columns_of_all_are_the_whole() -> None:
    """The mean over two processes is the whole, in value and gradient."""
    image, text = embeddings(8)
    ids = torch.arange(8)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    columns = Embeddings(image, text, ids, ids)
    parts = [
        clip_loss(Embeddings(image[at], text[at], ids[at], ids[at]), scale, columns) for at in (slice(4), slice(4, 8))
    ]
    whole = clip_loss(Embeddings(image, text, ids, ids), scale)
    torch.testing.assert_close(sum(parts) / 2, whole)
    mine, expected = gradients(sum(parts) / 2, image, text, scale), gradients(whole, image, text, scale)
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other)


def one_of_two(rank: int, file: str) -> None:
    """Half of a batch: the mean of both halves' losses and gradients is that of the whole."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randn(16, 6)
    towers = [torch.nn.Linear(6, 5, bias=False) for _ in range(2)]
    scale, bias = torch.tensor(11.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    weights = [*(tower.weight for tower in towers), scale, bias]
    ids = torch.arange(8)

    def loss_of(name: str, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, alone: bool) -> torch.Tensor:
        image, text = F.normalize(towers[0](x), dim=1), F.normalize(towers[1](y), dim=1)
        of = ids.repeat_interleave(2)
        columns = None if alone else Embeddings(image, text, ids, of).of_all_processes()
        if name == "clip":
            return clip_loss(Embeddings(image, text, ids, of), scale, columns, 3) + 0 * bias
        return siglip_loss(Embeddings(image, text, ids, of), scale, bias, columns, 3)

    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    for name in ("clip", "siglip"):
        whole = loss_of(name, x, y, ids, True)
        mine = loss_of(
            name, x[4 * rank : 4 * rank + 4], y[8 * rank : 8 * rank + 8], ids[4 * rank : 4 * rank + 4], False
        )
        expected = [whole.detach(), *torch.autograd.grad(whole, weights)]
        for found, wanted in zip([mine.detach(), *torch.autograd.grad(mine, weights)], expected, strict=True):
            torch.distributed.all_reduce(found)
            torch.testing.assert_close(found / 2, wanted, atol=1e-5, rtol=1e-5)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # what the test needs has been imported here
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path / "met"))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_suffixes_begin_after_the_prefix_and_end_with_the_end() -> None:
    words = torch.tensor([[2, 7, 8, 9, 3, 0], [2, 5, 3, 0, 0, 0]])
    found = suffix_targets(words, torch.tensor([1, 2]), torch.tensor([4, 2]))
    assert found.tolist() == [[7, 8, 9, 3, PADDED], [PADDED, 3, PADDED, PADDED, PADDED]]
    assert suffix_targets(words, torch.tensor([3, 1]), torch.tensor([4, 2]))[0].tolist() == [
        PADDED,
        PADDED,
        9,
        3,
        PADDED,
    ]


def fitting_of(objective: str, words: Words, image: str = "test_vit", text: Any = None, **batch: Any) -> Any:
    """As much of a `Fitting` as the shares of the loss read."""
    torch.manual_seed(0)
    tower = make_image_tower(ImageOptions(image, False, image_size=32))
    text = text or TextTower(len(words), 32, 1, 4, words.length, words.end)
    model = OBJECTIVES[objective].model(tower, text, HEAD)
    training_mode(model, model)
    config = TrainConfig(objective=objective, head=HEAD, batch=BatchOptions(**batch))
    return SimpleNamespace(config=config, accelerator=Accelerator(cpu=True), model=model, plain=model)


def share(fitting: Any, step: Step, number: int) -> tuple[torch.Tensor, dict[str, float]]:
    return OBJECTIVES[fitting.config.objective].share(fitting, fitting.config, step, number)


def of_a_step(fitting: Any, pairs: Pairs, words: Words, chunk: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step of twelve pictures, and its gradient by every parameter."""
    batches = Batches(pairs, words, BatchOptions(chunk=chunk), 0, prefixes=fitting.config.objective == "simvlm")
    step, _ = batches(range(12), epoch=0)[0]
    assert len(step.parts) == (1 if not chunk else -(-12 // chunk))
    total = 0.0
    for number in range(len(step.parts)):
        loss, _ = share(fitting, step, number)
        loss.backward()
        total += loss.item()
    named = fitting.model.named_parameters()
    found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    fitting.model.zero_grad()
    return total, found


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(objective: str, pairs: tuple[Pairs, Words]) -> None:
    fitting = fitting_of(objective, pairs[1])
    whole, expected = of_a_step(fitting, *pairs, 0)
    for chunk in (5, 1):
        loss, found = of_a_step(fitting, *pairs, chunk)
        assert loss == pytest.approx(whole, abs=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    assert any("scale" in name for name in expected) == (objective != "simvlm")


def test_dropout_falls_the_same_way_in_both_passes(pairs: tuple[Pairs, Words]) -> None:
    """With another mask in the second pass, gradients would be of embeddings that were never compared."""
    data, words = pairs
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, hidden_dropout_prob=0.5)  # fmt: skip
    fitting = fitting_of("clip", words, text=PretrainedText(BertModel(config), words.length, words.end))
    step, _ = Batches(data, words, BatchOptions(chunk=4), seed=0)(range(12), 0)[0]
    seen: list[torch.Tensor] = []
    fitting.model.register_forward_hook(lambda _, __, output: seen.append(output.text.detach().clone()))
    for number in range(3):
        share(fitting, step, number)[0].backward()
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(seen[0], seen[1])


def test_batch_norms_count_each_picture_once(pairs: tuple[Pairs, Words]) -> None:
    fitting = fitting_of("clip", pairs[1], image="tiny-cnn")
    norm = fitting.model.image.network.bn1
    of_a_step(fitting, *pairs, 6)
    assert int(norm.num_batches_tracked) == 2  # a pass for each of two parts, the first passes not counted
    assert norm.momentum == 0.1


def test_without_multi_positives_every_other_caption_is_a_negative(pairs: tuple[Pairs, Words]) -> None:
    data, words = pairs
    step, _ = Batches(data, words, BatchOptions(), seed=0)(range(12), 0)[0]
    fitting = fitting_of("clip", words, multi_positive=False)
    found = embedded(fitting, step.parts[0])
    expected = ClipLoss()(found.image.repeat_interleave(2, 0), found.text, found.scale)
    torch.testing.assert_close(share(fitting, step, 0)[0], expected)
    together = share(fitting_of("clip", words), step, 0)[0]
    assert together.item() != pytest.approx(expected.item(), abs=1e-3)
