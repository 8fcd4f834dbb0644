"""Every loss against an independent peer, or written out as a double loop."""

import math
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from zsi_contrastive.ssl import losses

pytestmark = pytest.mark.quick


@pytest.fixture
def views() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    first = torch.randn(10, 6, dtype=torch.float64)
    return first, first + 0.7 * torch.randn(10, 6, dtype=torch.float64)


def lightly() -> object:
    return pytest.importorskip("lightly.loss", reason="lightly is the independent peer")


def with_gradients(function, *rows):
    rows = [row.clone().requires_grad_() for row in rows]
    loss = function(*rows)
    return loss.detach(), torch.autograd.grad(loss, rows)


def assert_same(ours, theirs, *rows) -> None:
    torch.testing.assert_close(with_gradients(ours, *rows), with_gradients(theirs, *rows))


@pytest.mark.parametrize("chunk", [4096, 64 * 3])
def test_hadsell(chunk: int) -> None:
    torch.manual_seed(0)
    rows, labels, margin = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3, 2.5

    def loops(rows: torch.Tensor) -> torch.Tensor:
        losses = []
        for one in range(9):
            for two in range(9):
                if one != two:
                    distance = (rows[one] - rows[two]).norm()
                    same = labels[one] == labels[two]
                    losses.append(distance**2 if same else max(margin - distance, 0 * distance) ** 2)
        return torch.stack(losses).mean()

    assert_same(lambda rows: losses.hadsell_loss(rows, labels, margin, chunk), loops, rows)
    equal = rows[:2] * 0  # the slope of a distance of 0 is not a number
    _, (slope,) = with_gradients(lambda rows: losses.hadsell_loss(rows, torch.arange(2), margin), equal)
    assert slope.isfinite().all()


def test_hadsell_is_pytorch_metric_learnings(views) -> None:
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import LpDistance

    rows, labels = torch.cat(views), torch.arange(20) % 10
    from pytorch_metric_learning.reducers import DoNothingReducer

    peer = peers.ContrastiveLoss(0, 2.0, distance=LpDistance(normalize_embeddings=False), reducer=DoNothingReducer())
    expected = sum(part["losses"].square().sum() for part in peer(rows, labels).values()) / (20 * 19)
    torch.testing.assert_close(losses.hadsell_loss(rows, labels, 2.0), expected)


def test_nce() -> None:
    torch.manual_seed(0)
    scores, noise, log_q, log_q_noise = torch.randn(5), torch.randn(5, 3), -torch.rand(5), -torch.rand(5, 3)
    total = 0.0
    for place in range(5):
        ratio = scores[place].exp() / (scores[place].exp() + 3 * log_q[place].exp())
        total -= math.log(ratio)
        for draw in range(3):
            p, q = noise[place, draw].exp(), log_q_noise[place, draw].exp()
            total -= math.log(3 * q / (p + 3 * q))
    assert float(losses.nce_loss(scores, noise, log_q, log_q_noise)) == pytest.approx(total / 5, rel=1e-5)


def test_nce_finds_the_normaliser() -> None:
    """An unnormalised model's free constant becomes −log Z: what the estimator is for."""
    torch.manual_seed(0)
    data, noise = torch.randn(4000, 1), 2 * torch.randn(4000, 8)
    normal = torch.distributions.Normal(0, 2)
    free = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=30)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = losses.nce_loss(-data[:, 0] ** 2 / 2 + free, -(noise**2) / 2 + free,
                                   normal.log_prob(data[:, 0]), normal.log_prob(noise))  # fmt: skip
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(free.detach()) == pytest.approx(-0.5 * math.log(2 * math.pi), abs=0.05)


@pytest.mark.parametrize("chunk", [4096, 3])
def test_info_nce(views, chunk: int) -> None:
    def loops(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        losses = []
        for place in range(10):
            products = torch.stack([queries[place] @ key / 0.3 for key in keys])
            losses.append(-(products[place].exp() / products.exp().sum()).log())
        return torch.stack(losses).mean()

    assert_same(lambda q, k: losses.info_nce_loss(q, k, 0.3, chunk=chunk), loops, *views)


@pytest.mark.parametrize("group", [4, 64])
def test_info_nce_in_groups(views, group: int) -> None:
    """Of ten rows in fours the last two are left out; a group that is too large is all of them."""

    def loops(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        losses = []
        for members in [range(4), range(4, 8)] if group == 4 else [range(10)]:
            for place in members:
                products = torch.stack([queries[place] @ keys[other] for other in members])
                losses.append(-((queries[place] @ keys[place]).exp() / products.exp().sum()).log())
        return torch.stack(losses).mean()

    assert_same(lambda q, k: losses.info_nce_loss(q, k, group=group), loops, *views)


@pytest.mark.parametrize("chunk", [4096, 7])
def test_nt_xent_is_lightlys(views, chunk: int) -> None:
    peer = lightly().NTXentLoss(temperature=0.2)
    assert_same(lambda a, b: losses.nt_xent_loss(a, b, 0.2, chunk), peer, *views)


def test_nt_xent_is_pytorch_metric_learnings(views) -> None:
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    peer = peers.NTXentLoss(temperature=0.2)
    expected = peer(torch.cat(views), torch.arange(10).repeat(2))
    torch.testing.assert_close(losses.nt_xent_loss(*views, 0.2), expected)


@pytest.mark.parametrize(("hardness", "prior"), [(0.0, 0.1), (0.0, 0.0), (1.5, 0.1), (0.5, 0.7)])
def test_debiased_and_hard_negatives(views, hardness: float, prior: float) -> None:
    temperature = 0.5

    def loops(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        rows = F.normalize(torch.cat([first, second]), dim=1)
        losses = []
        for place in range(20):
            twin = (place + 10) % 20
            right = (rows[place] @ rows[twin] / temperature).exp()
            others = [rows[place] @ rows[j] / temperature for j in range(20) if j not in (place, twin)]
            weights = torch.stack([(hardness * product).exp() for product in others])
            weights = weights / weights.mean()
            mean = torch.stack([w * product.exp() for w, product in zip(weights, others, strict=True)]).mean()
            corrected = (mean - prior * right) / (1 - prior)
            corrected = torch.maximum(corrected, torch.tensor(math.exp(-1 / temperature), dtype=corrected.dtype))
            losses.append(-(right / (right + len(others) * corrected)).log())
        return torch.stack(losses).mean()

    ours = lambda a, b: losses.debiased_loss(a, b, temperature, prior, hardness, 6)  # noqa: E731
    assert_same(ours, loops, *views)
    if not hardness:
        debiased = losses.debiased_loss(*views, temperature, prior)
        torch.testing.assert_close(debiased, loops(*views))


def test_byol_is_lightlys(views) -> None:
    peer = lightly().NegativeCosineSimilarity()
    predicted, target = views
    expected = 2 + 2 * peer(predicted, target)
    torch.testing.assert_close(losses.byol_loss(predicted, target), expected)
    target = target.clone().requires_grad_()
    assert losses.byol_loss(predicted.clone().requires_grad_(), target).requires_grad
    assert torch.autograd.grad(losses.byol_loss(predicted.clone().requires_grad_(), target), target,
                               allow_unused=True)[0] is None  # fmt: skip


def test_moco_is_lightlys(views) -> None:
    peer = lightly().NTXentLoss(temperature=0.1, memory_bank_size=(32, 6))
    queue = peer.memory_bank.bank.clone().double()
    queue = queue if queue.shape == (32, 6) else queue.T.contiguous()
    queries, keys = views
    expected = peer(queries.float(), keys.float())
    torch.testing.assert_close(losses.moco_loss(queries, keys, queue, 0.1, 3).float(), expected)


def test_dino_and_its_centre_are_lightlys() -> None:
    torch.manual_seed(0)
    peer = lightly().DINOLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1, center_momentum=0.9)
    centre = torch.zeros(12)
    for _ in range(3):
        student, teacher = torch.randn(4, 5, 12), torch.randn(2, 5, 12)
        expected = peer(list(teacher), list(student), teacher_temp=0.05)
        found = losses.dino_loss(student, losses.sharpened(teacher, centre, 0.05), 0.1)
        torch.testing.assert_close(found, expected)
        centre = losses.moved_centre(centre, teacher, 0.9)
        torch.testing.assert_close(centre, peer.center.flatten())


@pytest.mark.parametrize("chunk", [4096, 7])
def test_nce_of_views(views, chunk: int) -> None:
    def loops(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        rows = F.normalize(torch.cat([first, second]), dim=1)
        total = []
        for place in range(20):
            twin = (place + 10) % 20
            odds = [(rows[place] @ rows[other] / 0.5).exp() / 18 for other in range(20)]
            wrong = [1 / (1 + odds[other]) for other in range(20) if other not in (place, twin)]
            total.append(-torch.stack([odds[twin] / (1 + odds[twin]), *wrong]).log().sum())
        return torch.stack(total).mean()

    assert_same(lambda a, b: losses.nce_of_views(a, b, 0.5, chunk), loops, *views)


@pytest.mark.parametrize("chunk", [4096, 7])
def test_supervised_is_pytorch_metric_learnings(views, chunk: int) -> None:
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    labels = torch.arange(10) % 4
    peer = peers.SupConLoss(temperature=0.1)
    assert_same(
        lambda a, b: losses.supervised_loss(a, b, labels, 0.1, chunk),
        lambda a, b: peer(torch.cat([a, b]), labels.repeat(2)),
        *views,
    )


def test_barlow_twins_and_vicreg_are_lightlys(views) -> None:
    assert_same(losses.barlow_twins_loss, lightly().BarlowTwinsLoss(), *views)
    small = [0.3 * view for view in views]  # of a deviation below 1, which the variance's term holds against them
    assert_same(losses.vicreg_loss, lightly().VICRegLoss(), *small)


def test_koleo_is_lightlys(views) -> None:
    assert_same(lambda rows: losses.koleo_loss(rows, 3), lightly().KoLeoLoss(), views[0])


def test_sinkhorn_knopp_is_lightlys_and_balances() -> None:
    swav = pytest.importorskip("lightly.loss.swav_loss", reason="lightly is the independent peer")
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(losses.sinkhorn_knopp(logits, 0.5, 3), swav.sinkhorn(logits, 3, 0.5))
    balanced = losses.sinkhorn_knopp(logits, 0.5, 200)
    torch.testing.assert_close(balanced.sum(0), torch.full((4,), 4.0).double())
    torch.testing.assert_close(balanced.sum(1), torch.ones(16).double())
    assert losses.sinkhorn_knopp(logits * 1000, 0.04).isfinite().all()


LABELS = torch.arange(8) % 4  # the same in both halves
LOSSES = {
    "nt-xent": losses.nt_xent_loss,
    "debiased": losses.debiased_loss,
    "hard": lambda first, second: losses.debiased_loss(first, second, hardness=1.0),
    "info-nce": losses.info_nce_loss,
    "nce": losses.nce_of_views,
    "supervised": lambda first, second: losses.supervised_loss(first, second, LABELS[: len(first)], 0.5),
    "barlow": losses.barlow_twins_loss,
    "vicreg": losses.vicreg_loss,
    "koleo": lambda first, second: losses.koleo_loss(first) + 0 * second.sum(),
    "hadsell": lambda first, second: losses.hadsell_loss(first, second[:, 0] > 0, 3.0) + 0 * second.sum(),
    "sinkhorn": lambda first, second: (losses.sinkhorn_knopp(first, 0.5) * second).sum(1).mean() + 0 * first.sum(),
    "centre": lambda first, second: (
        (losses.moved_centre(torch.zeros(6), first[None]) * second).sum(1).mean() + 0 * first.sum()
    ),
}


def both() -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(3)
    return torch.randn(8, 5), torch.randn(8, 5), torch.nn.Linear(5, 6)


def one_of_two(rank: int, file: str) -> None:
    expected = {}
    first, second, layer = both()
    for name, loss in LOSSES.items():
        whole = loss(layer(first), layer(second))
        expected[name] = whole.detach(), torch.autograd.grad(whole, layer.weight)[0]
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)
    for name, loss in LOSSES.items():
        mine = loss(layer(first[part]), layer(second[part]))
        (gradient,) = torch.autograd.grad(mine, layer.weight)
        for found, wanted in zip((mine.detach(), gradient), expected[name], strict=True):
            torch.distributed.all_reduce(found)
            torch.testing.assert_close(found / 2, wanted, msg=lambda said, name=name: f"{name}: {said}")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # what the test needs has been imported here
    processes = [context.Process(target=one_of_two, args=(rank, os.fspath(tmp_path / "met"))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_no_square_matrix_is_held() -> None:
    """What autograd keeps for the backward pass grows with the batch, not with its square."""
    kept = []
    rows = torch.randn(512, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        losses.nt_xent_loss(rows, rows + 1, chunk=64).backward()
    assert max(kept) <= 64 * 1024
