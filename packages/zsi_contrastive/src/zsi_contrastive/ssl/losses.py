"""The losses, one function each. None keeps anything in memory that grows with the square of the batch.

Rows are embeddings of pictures or patches; d is their length. Where a batch is spread over processes, each function
takes this process's rows and returns their mean loss: the mean of that over processes is the whole batch's loss, and
its gradient is the whole batch's gradient. A loss that compares rows with all others collects those of the other
processes with `gathered`.
"""

import math

import torch
import torch.nn.functional as F

from labs_common.device import exact_float32, widest_float
from labs_common.gathering import CHUNK, full_precision, gathered, in_chunks, mean_over_processes
from zsi_contrastive.losses import info_nce_loss as info_nce_loss  # of this list too; the detector needs it without ssl
from zsi_contrastive.losses import own_places


def hadsell_loss(rows: torch.Tensor, labels: torch.Tensor, margin: float = 1.0, chunk: int = CHUNK) -> torch.Tensor:
    """Draws pairs of one class together and pushes others a margin apart (Hadsell et al. 2006, eq. 4).

    The loss is the squared distance for the former, max(0, margin − distance)² for the latter, averaged over all
    ordered pairs.

    Args:
        rows: (n, d).
        labels: the class of each row (n,).
        margin: the distance beyond which pairs of different classes cost nothing.
        chunk: rows at once.
    """
    columns, of = gathered(rows), gathered(labels)
    place = own_places(rows)

    def pairs(
        own: torch.Tensor, label: torch.Tensor, place: torch.Tensor, columns: torch.Tensor, of: torch.Tensor
    ) -> torch.Tensor:
        squared = (own[:, None] - columns).square().sum(-1)
        distance = squared.clamp(min=1e-12).sqrt()  # the square root's gradient at 0 is infinite
        loss = torch.where(label[:, None] == of, squared, (margin - distance).clamp(min=0).square())
        return loss.scatter(1, place[:, None], 0.0).sum()

    # Differences (chunk, n, d) and not products, which would cancel between close rows; so the chunks are smaller.
    total = in_chunks(pairs, (rows, labels, place), (columns, of), max(1, chunk // 64))
    return total / (len(rows) * (len(columns) - 1))


def nce_loss(
    scores: torch.Tensor, noise_scores: torch.Tensor, log_noise: torch.Tensor, log_noise_of_noise: torch.Tensor
) -> torch.Tensor:
    """Tells data from noise by log p − log q: noise-contrastive estimation (Gutmann & Hyvärinen 2010, eq. 3).

    Args:
        scores: log p of the data under the model, which need not be normalised (n,).
        noise_scores: log p of the noise (n, k), k samples for each row of data.
        log_noise: log q of the data under the noise's distribution (n,).
        log_noise_of_noise: log q of the noise (n, k).
    """
    count = math.log(noise_scores.shape[1])
    real = F.logsigmoid(scores - log_noise - count)
    false = F.logsigmoid(-(noise_scores - log_noise_of_noise - count))
    return -(real + false.sum(1)).mean()


def nt_xent_loss(
    first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5, chunk: int = CHUNK
) -> torch.Tensor:
    """Classifies which of all other views is the other view of the same picture (Chen et al. 2020, SimCLR, eq. 1).

    `first` and `second` (n, d) are two views of the same pictures; cosines are divided by `temperature`.
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
    """Corrects NT-Xent's negatives for being of the same class (Chuang et al. 2020, eq. 8).

    Args:
        first: one view of each picture (n, d).
        second: the other views (n, d).
        temperature: cosines f·f⁻ are divided by it.
        prior: the share of negatives that are of the same class; with 0 the correction vanishes.
        hardness: weighs negatives by exp(hardness · f·f⁻ / temperature), so that near ones count more (Robinson et al.
            2021, section 3, as in its authors' code); 0 weighs all alike.
        chunk: rows at once.
    """
    rows, own, other, columns = _two_views(first, second)
    count = len(columns) - 2

    def part(rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        products = rows @ columns.T / temperature  # (chunk, 2n)
        right = products.gather(1, other[:, None])[:, 0]
        negatives = products.scatter(1, torch.stack([own, other], 1), -math.inf)
        # The log of the (weighted) mean of exp(f·f⁻ / temperature) over the negatives.
        if hardness:
            mean = ((1 + hardness) * negatives).logsumexp(1) - (hardness * negatives).logsumexp(1)
        else:
            mean = negatives.logsumexp(1) - math.log(count)
        corrected = (mean.exp() - prior * right.exp()) / (1 - prior)
        whole = right.exp() + count * corrected.clamp(min=math.exp(-1 / temperature))  # its least possible value
        return (whole.log() - right).sum()

    return in_chunks(part, (rows, own, other), (columns,), chunk) / len(rows)


def nce_of_views(
    first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5, chunk: int = CHUNK
) -> torch.Tensor:
    """Tells the other view of a picture from those of all others by `nce_loss`.

    The others of the batch are the noise, and a cosine of `first` and `second` (n, d), divided by `temperature`, is
    log p − log q.
    """
    rows, own, other, columns = _two_views(first, second)
    # Of its row of 2n cosines each keeps 2n − 2 as noise; the two that do not count are infinitely unlikely.
    shift = math.log1p(-2 / len(columns))

    def part(rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        products = rows @ columns.T / temperature
        noise = products.scatter(1, torch.stack([own, other], 1), -math.inf)
        density = products.new_full((), shift)
        return nce_loss(products.gather(1, other[:, None])[:, 0], noise, density, density) * len(rows)

    return in_chunks(part, (rows, own, other), (columns,), chunk) / len(rows)


def supervised_loss(
    first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1, chunk: int = CHUNK
) -> torch.Tensor:
    """Draws all views of one class together: the supervised contrastive loss (Khosla et al. 2020, eq. 2, L_out).

    `first` and `second` (n, d) are two views of the same pictures, of these `labels` (n,).
    """
    rows, own, _, columns = _two_views(first, second)
    of = gathered(labels).repeat(2)

    def part(
        rows: torch.Tensor, own: torch.Tensor, label: torch.Tensor, columns: torch.Tensor, of: torch.Tensor
    ) -> torch.Tensor:
        logs = (rows @ columns.T / temperature).scatter(1, own[:, None], -math.inf).log_softmax(1)
        alike = (label[:, None] == of).scatter(1, own[:, None], False)
        return -(logs.masked_fill(~alike, 0.0).sum(1) / alike.sum(1)).sum()

    return in_chunks(part, (rows, own, labels.repeat(2)), (columns, of), chunk) / len(rows)


def barlow_twins_loss(first: torch.Tensor, second: torch.Tensor, off_diagonal: float = 5e-3) -> torch.Tensor:
    """Makes the correlations (d, d) of two views' outputs the identity (Zbontar et al. 2021, Barlow Twins, eq. 1).

    `first` and `second` (n, d) are two views of the same pictures; what is not on the diagonal has this weight.
    """
    one, two = (F.batch_norm(gathered(full_precision(rows)), None, None, training=True) for rows in (first, second))
    with exact_float32(one.device):
        correlations = one.T @ two / len(one)
    on = correlations.diagonal()
    return (on - 1).square().sum() + off_diagonal * (correlations.square().sum() - on.square().sum())


def vicreg_loss(
    first: torch.Tensor, second: torch.Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> torch.Tensor:
    """Keeps outputs alike for two views, spread over the batch and uncorrelated (Bardes et al. 2022, VICReg, eq. 6).

    `first` and `second` (n, d) are two views of the same pictures; the rest are the three terms' weights. That of the
    variance is of the mean of both views, as in the authors' code.
    """
    views = [gathered(full_precision(rows)) for rows in (first, second)]
    loss = invariance * F.mse_loss(views[0], views[1])
    for rows in views:
        rows = rows - rows.mean(0)
        with exact_float32(rows.device):
            covariances = rows.T @ rows / (len(rows) - 1)  # (d, d)
        variances = covariances.diagonal()
        loss = loss + variance / 2 * (1 - (variances + 1e-4).sqrt()).clamp(min=0).mean()  # 1e-4 is the authors'
        loss = loss + covariance * (covariances.square().sum() - variances.square().sum()) / rows.shape[1]
    return loss


def byol_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Measures how far predicted is from target (n, d): 2 − 2 cos (Grill et al. 2020, BYOL, eq. 2).

    The target gets no gradient.
    """
    return 2 - 2 * F.cosine_similarity(full_precision(predicted), full_precision(target.detach()), dim=1).mean()


def moco_loss(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float = 0.1, chunk: int = CHUNK
) -> torch.Tensor:
    """Classifies which key is of the query's picture: its own, or one of the queue (He et al. 2020, MoCo, eq. 1).

    `queries` and `keys` (n, d), `queue` (m, d); only the queries get a gradient.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.detach(), dim=1)

    def part(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
        right = (query * key).sum(1, keepdim=True)
        logits = torch.cat([right, query @ queue.T], 1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).sum()

    return in_chunks(part, (queries, keys), (F.normalize(queue.detach(), dim=1),), chunk) / len(queries)


def dino_loss(student: torch.Tensor, targets: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Compares the teacher's views with all other views of the student, by cross-entropy (Caron et al. 2021, eq. 3).

    `student` are logits (views, n, k), first those of the views that the teacher saw, and `temperature` is theirs;
    `targets` the teacher's distributions (full views, n, k), from `sharpened` or `sinkhorn_knopp`, without gradient.
    """
    logs = (full_precision(student) / temperature).log_softmax(-1)
    with exact_float32(logs.device):
        pairs = -torch.einsum("tnk,snk->ts", full_precision(targets.detach()), logs)  # (full views, views)
    others = ~torch.eye(len(targets), len(student), dtype=torch.bool, device=pairs.device)
    # A view is not compared with itself. Multiplied, since picking by truth values would wait for the device.
    return (pairs * others).sum() / (len(targets) * (len(student) - 1) * student.shape[1])


def sharpened(logits: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """Turns the teacher's logits (…, k), less their `centre` (k,), into distributions (DINO, section 3).

    Centring keeps one prototype from winning everywhere; a low temperature keeps all from being equally likely.
    """
    return ((logits - centre) / temperature).softmax(-1)


def moved_centre(centre: torch.Tensor, logits: torch.Tensor, momentum: float = 0.9) -> torch.Tensor:
    """Moves the centre (k,) towards the mean of the teacher's logits (views, n, k) of all processes (DINO, eq. 4)."""
    return centre * momentum + mean_over_processes(logits.detach().flatten(0, -2).mean(0)) * (1 - momentum)


@torch.no_grad()
def sinkhorn_knopp(logits: torch.Tensor, temperature: float, rounds: int = 3) -> torch.Tensor:
    """Turns logits (n, k) into distributions that use all prototypes equally (Caron et al. 2020, SwAV, section 3.1).

    DINOv2 does it instead of centring. Rows of all processes are balanced together.
    """
    logs = (logits / temperature).to(widest_float(logits.device))  # at low temperatures they span hundreds
    for _ in range(rounds):
        of_prototype = gathered(logs.logsumexp(0, keepdim=True)).logsumexp(0)  # (k,)
        logs = (logs - of_prototype).log_softmax(1)
    return logs.exp().to(logits.dtype)


def koleo_loss(rows: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Spreads rows (n, d) evenly: −mean log of each one's distance to the nearest other row.

    Sablayrolles et al. 2019, eq. 2, on unit vectors as in DINOv2 (Oquab et al. 2024, section 4).
    """
    rows = F.normalize(rows, dim=1)
    columns = gathered(rows)

    def part(rows: torch.Tensor, place: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            nearest = (rows @ columns.T).scatter(1, place[:, None], -2.0).argmax(1)
        # 1e-8, also inside torch's distance, keeps the loss and the gradient of equal rows finite.
        return -(F.pairwise_distance(rows, columns[nearest], eps=1e-8) + 1e-8).log().sum()

    return in_chunks(part, (rows, own_places(rows)), (columns,), chunk) / len(rows)


def _two_views(
    first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns both views as unit rows (2n, d), places of each row and of its other view, and all processes' rows."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    columns = torch.cat([gathered(first), gathered(second)])
    own = own_places(first)
    other = own + len(columns) // 2
    return torch.cat([first, second]), torch.cat([own, other]), torch.cat([other, own]), columns
