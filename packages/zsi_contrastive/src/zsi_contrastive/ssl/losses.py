"""The objectives, one function each, and nothing of them kept in memory that grows with the square of the batch.

Rows belong to pictures, patches or words; d is their length. Where a batch is spread over processes each function
takes this process's rows and returns their mean: the mean of that over processes is the whole batch's loss, and its
gradient too. What compares rows with all others brings those of the other processes with `gathered`.
"""

import math

import torch
import torch.nn.functional as F

from labs_common.gathering import CHUNK, gathered, in_chunks, mean_over_processes, several_processes


def hadsell_loss(rows: torch.Tensor, labels: torch.Tensor, margin: float = 1.0, chunk: int = CHUNK) -> torch.Tensor:
    """Pairs of one class are drawn together, others pushed a margin apart (Hadsell et al. 2006, eq. 4).

    Squared distance for the former, max(0, margin − distance)² for the latter; the mean over all ordered pairs.

    Args:
        rows: (n, d).
        labels: class of each (n,).
        margin: the distance from which others are left alone.
        chunk: rows at once.
    """
    columns, of = gathered(rows), gathered(labels)
    place = _first(len(rows)) + torch.arange(len(rows), device=rows.device)

    def pairs(
        own: torch.Tensor, label: torch.Tensor, place: torch.Tensor, columns: torch.Tensor, of: torch.Tensor
    ) -> torch.Tensor:
        squared = (own[:, None] - columns).square().sum(-1)
        distance = squared.clamp(min=1e-12).sqrt()  # whose slope at 0 is not a number
        loss = torch.where(label[:, None] == of, squared, (margin - distance).clamp(min=0).square())
        return loss.scatter(1, place[:, None], 0.0).sum()

    # Differences (chunk, n, d) are held, not products: no cancellation between rows that are close.
    total = in_chunks(pairs, (rows, labels, place), (columns, of), max(1, chunk // 64))
    return total / (len(rows) * (len(columns) - 1))


def nce_loss(
    scores: torch.Tensor, noise_scores: torch.Tensor, log_noise: torch.Tensor, log_noise_of_noise: torch.Tensor
) -> torch.Tensor:
    """Noise-contrastive estimation: tell data from noise by log p − log q (Gutmann & Hyvärinen 2010, eq. 3).

    Args:
        scores: log p of the data under the model, which need not be normalised (n,).
        noise_scores: log p of the noise (n, k), k draws for each.
        log_noise: log q of the data under the noise's distribution (n,).
        log_noise_of_noise: log q of the noise (n, k).
    """
    count = math.log(noise_scores.shape[1])
    real = F.logsigmoid(scores - log_noise - count)
    false = F.logsigmoid(-(noise_scores - log_noise_of_noise - count))
    return -(real + false.sum(1)).mean()


def info_nce_loss(
    queries: torch.Tensor, keys: torch.Tensor, temperature: float = 1.0, group: int = 0, chunk: int = CHUNK
) -> torch.Tensor:
    """Which key belongs to each query? −log exp(q·k) / Σ exp(q·k') (van den Oord et al. 2018, CPC, eq. 4).

    Args:
        queries: (n, d), such as contexts after their W_k.
        keys: (n, d), the one that belongs to each.
        temperature: by which products are divided.
        group: each query is told only from the keys of its own `group` rows, as they stand (what is left over for a
            whole group is left out); 0 compares all with all, over all processes.
        chunk: rows at once.
    """
    if group:
        count = max(1, len(queries) // group)
        size = min(group, len(queries))
        own, others = (rows[: count * size].view(count, size, -1) for rows in (queries, keys))
        products = (own @ others.transpose(1, 2) / temperature).flatten(0, 1)  # (n, group)
        return F.cross_entropy(products, torch.arange(size, device=queries.device).repeat(count))

    def part(query: torch.Tensor, place: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(query @ keys.T / temperature, place, reduction="sum")

    place = _first(len(queries)) + torch.arange(len(queries), device=queries.device)
    return in_chunks(part, (queries, place), (gathered(keys),), chunk) / len(queries)


def nt_xent_loss(
    first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5, chunk: int = CHUNK
) -> torch.Tensor:
    """Which of all other views is the other view of this picture? (Chen et al. 2020, SimCLR, eq. 1).

    `first` and `second` (n, d) are two views of the same pictures; cosines divided by `temperature`.
    """
    rows, own, other, columns = _two_views(first, second)

    def part(rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        logits = (rows @ columns.T / temperature).scatter(1, own[:, None], -math.inf)
        return F.cross_entropy(logits, other, reduction="sum")

    return in_chunks(part, (rows, own, other), (columns,), chunk) / len(rows)


def debiased_loss(
    first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5, prior: float = 0.1, hardness: float = 0.0,
    chunk: int = CHUNK,
) -> torch.Tensor:  # fmt: skip
    """NT-Xent's positives against negatives that are corrected for being of the same class (Chuang et al. 2020, eq. 8).

    `prior` is the share of such false negatives: with it 0 this is the decoupled form of NT-Xent's sum. With
    `hardness` β above 0 negatives count by exp(β f·f⁻) besides (Robinson et al. 2021, section 3); f·f⁻ are cosines
    divided by `temperature`. Shapes are those of `nt_xent_loss`.
    """
    rows, own, other, columns = _two_views(first, second)
    count = len(columns) - 2

    def part(rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        products = rows @ columns.T / temperature
        right = products.gather(1, other[:, None])[:, 0]
        negatives = products.scatter(1, torch.stack([own, other], 1), -math.inf)
        if hardness:
            seen = ((1 + hardness) * negatives).logsumexp(1) - (hardness * negatives).logsumexp(1)
        else:
            seen = negatives.logsumexp(1) - math.log(count)
        corrected = (seen.exp() - prior * right.exp()) / (1 - prior)
        whole = right.exp() + count * corrected.clamp(min=math.exp(-1 / temperature))
        return (whole.log() - right).sum()

    return in_chunks(part, (rows, own, other), (columns,), chunk) / len(rows)


def hard_negative_loss(
    first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5, prior: float = 0.1, hardness: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:  # fmt: skip
    """`debiased_loss` with negatives that count by how near they are (Robinson et al. 2021, section 3)."""
    return debiased_loss(first, second, temperature, prior, hardness, chunk)


def byol_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared distance of directions, 2 − 2 cos, from predicted to target (n, d) (Grill et al. 2020, BYOL, eq. 2).

    The target gets no gradient.
    """
    return 2 - 2 * F.cosine_similarity(predicted, target.detach(), dim=1).mean()


def moco_loss(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float = 0.1, chunk: int = CHUNK
) -> torch.Tensor:
    """Which key is of the same picture: its own, or one of the queue? (He et al. 2020, MoCo, eq. 1).

    `queries` and `keys` (n, d), `queue` (m, d); only the queries get a gradient.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.detach(), dim=1)

    def part(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
        right = (query * key).sum(1, keepdim=True)
        logits = torch.cat([right, query @ queue.T], 1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).sum()

    return in_chunks(part, (queries, keys), (F.normalize(queue.detach(), dim=1),), chunk) / len(queries)


def dino_loss(student: torch.Tensor, targets: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Cross-entropy of the student's views with the teacher's of other views (Caron et al. 2021, DINO, eq. 3).

    Args:
        student: logits (views, n, k); the first of them are the views that the teacher saw.
        targets: the teacher's distributions (global views, n, k), from `sharpened` or `sinkhorn_knopp`.
        temperature: the student's.
    """
    logs = (student / temperature).log_softmax(-1)
    pairs = -torch.einsum("tnk,snk->ts", targets.detach(), logs)
    others = ~torch.eye(len(targets), len(student), dtype=torch.bool, device=pairs.device)
    return pairs[others].sum() / (int(others.sum()) * student.shape[1])


def sharpened(logits: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """The teacher's distributions: its logits (…, k) less their `centre` (k,), by a low temperature (DINO, section 3).

    Centring keeps one answer from winning everywhere, sharpening keeps all from being equal.
    """
    return ((logits - centre) / temperature).softmax(-1)


def moved_centre(centre: torch.Tensor, logits: torch.Tensor, momentum: float = 0.9) -> torch.Tensor:
    """The centre (k,) after the teacher's logits (views, n, k) of this step, over all processes (DINO, eq. 4)."""
    return centre * momentum + mean_over_processes(logits.detach().flatten(0, -2).mean(0)) * (1 - momentum)


@torch.no_grad()
def sinkhorn_knopp(logits: torch.Tensor, temperature: float, rounds: int = 3) -> torch.Tensor:
    """Distributions (n, k) over prototypes that all are used equally (Caron et al. 2020, SwAV, section 3.1).

    DINOv2 takes it in the place of the centre. Rows of all processes are balanced together.
    """
    logs = (logits / temperature).double()
    for _ in range(rounds):
        of_prototype = gathered(logs.logsumexp(0, keepdim=True)).logsumexp(0)
        logs = (logs - of_prototype).log_softmax(1)
    return logs.exp().to(logits.dtype)


def koleo_loss(rows: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """−mean log of the distance to the nearest other row, which spreads rows (n, d) evenly.

    Sablayrolles et al. 2019, eq. 2, on directions as in DINOv2 (Oquab et al. 2024, section 4).
    """
    rows = F.normalize(rows, dim=1)
    columns = gathered(rows)
    place = _first(len(rows)) + torch.arange(len(rows), device=rows.device)

    def part(rows: torch.Tensor, place: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            nearest = (rows @ columns.T).scatter(1, place[:, None], -2.0).argmax(1)
        # As torch's pairwise distance has it: 1e-8 keeps the slope of equal rows a number.
        return -(F.pairwise_distance(rows, columns[nearest], eps=1e-8) + 1e-8).log().sum()

    return in_chunks(part, (rows, place), (columns,), chunk) / len(rows)


def _first(count: int) -> int:
    """The place of this process's first row among those of all, `count` in each."""
    return torch.distributed.get_rank() * count if several_processes() else 0


def _two_views(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both views' directions as rows (2n, d), each one's own place and its other view's, and all processes' columns."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    columns = torch.cat([gathered(first), gathered(second)])
    own = _first(len(first)) + torch.arange(len(first), device=first.device)
    other = own + len(columns) // 2
    return torch.cat([first, second]), torch.cat([own, other]), torch.cat([other, own]), columns
