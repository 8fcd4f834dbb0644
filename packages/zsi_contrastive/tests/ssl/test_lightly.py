"""The configurations of lightly's CIFAR-10 benchmark against lightly's own heads, losses and transforms."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from labs_common.cli import config_from_yaml
from zsi_contrastive.ssl.config import PretrainConfig
from zsi_contrastive.ssl.data import pixels_of, recipes_of, sample, views_of
from zsi_contrastive.ssl.methods import METHODS, Memory, Step, complete
from zsi_contrastive.ssl.model import Encoder, Learner

pytest.importorskip("lightly.loss", reason="lightly is the independent peer")
from lightly import transforms
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.batchnorm import SplitBatchNorm
from lightly.models.modules import heads

CONFIGS = Path(__file__).parents[2] / "configs"
BENCHMARKED = ("simclr", "moco", "byol", "dino")
WIDTH, COUNT = 512, 16
SAMPLES = 400  # views of each kind


def configured(method: str) -> PretrainConfig:
    return complete(config_from_yaml(PretrainConfig, CONFIGS / f"cifar10_{method}.yaml"))


def their_head(method: str) -> nn.Module:
    """As in lightly's cifar10_benchmark.py."""
    if method == "simclr":
        return heads.SimCLRProjectionHead(WIDTH, 512, 128)
    if method == "moco":
        return heads.MoCoProjectionHead(WIDTH, 512, 128)
    if method == "byol":
        return heads.BYOLProjectionHead(WIDTH, 1024, 256)
    head = heads.DINOProjectionHead(WIDTH, 2048, 256, 2048, batch_norm=True)
    layers = [(WIDTH, 2048, nn.BatchNorm1d(2048), nn.GELU()), (2048, 256, None, None)]
    head.layers = heads.ProjectionHead(layers).layers
    return head


def their_loss(method: str, encoder: nn.Module, head: nn.Module, prediction: nn.Module, queue: Any, views: Any) -> Any:
    """As in lightly's cifar10_benchmark.py, at the first step, when the teacher is still equal to the learner.

    The second half of MoCo's there has the keys of the first half in its queue; here both have the queue of before.
    """
    one, two = (head(encoder(view)) for view in views)
    with torch.no_grad():
        keys = [head(encoder(view)) for view in views]
    if method == "simclr":
        return NTXentLoss()(one, two)
    if method == "dino":
        return DINOLoss(output_dim=2048)(keys, [one, two], epoch=0)
    if method == "byol":
        criterion = NegativeCosineSimilarity()
        return 0.5 * (criterion(prediction(one), keys[1]) + criterion(prediction(two), keys[0]))
    losses = []
    for query, key in ((one, keys[1]), (two, keys[0])):
        criterion = NTXentLoss(temperature=0.1, memory_bank_size=tuple(queue.shape))
        bank = criterion.memory_bank.bank
        bank.copy_(queue if bank.shape == queue.shape else queue.T)
        losses.append(criterion(query, key))
    return 0.5 * sum(losses)


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives lightly's head the weights of ours, layer by layer."""
    values = [value for name, value in ours.state_dict().items() if name != "prototypes"]
    targets = [value for name, value in theirs.state_dict().items() if not name.startswith("last_layer")]
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
    if hasattr(theirs, "last_layer"):
        theirs.last_layer.weight_v.data.copy_(ours.prototypes)


@pytest.mark.parametrize("method", BENCHMARKED)
def test_heads_and_losses_are_lightlys(method: str) -> None:
    config = configured(method)
    torch.manual_seed(0)
    # In the place of ResNet-18, which test_methods counts: what comes after it is what is compared.
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, WIDTH)), WIDTH)
    whole = METHODS[method].network(config)
    network = Learner(encoder, whole.projection, whole.prediction, config.own.norm_splits)
    theirs, prediction = their_head(method), heads.BYOLPredictionHead(256, 1024, 256)
    spreads = [[p.std() for p in head.parameters() if p.ndim > 1 and p.shape[1] > 1]
               for head in (network.projection, theirs)]  # fmt: skip
    if method != "dino":  # lightly's benchmark replaces the first layers of its own DINO head, and their first weights
        torch.testing.assert_close(*spreads, rtol=0.05, atol=0)
    copied(network.projection, theirs)
    if network.prediction is not None:
        copied(network.prediction, prediction)
    memory = Memory(config, network, torch.device("cpu"))
    queue = None if memory.queue is None else memory.queue.clone()
    views = [torch.randn(COUNT, 3, 8, 8) for _ in range(2)]
    found = METHODS[method].loss(
        Step(network, memory, config.own, Accelerator(cpu=True), views, config.own.teacher_temperature)
    )
    expected = their_loss(method, encoder, theirs, prediction, queue, views)
    weight = encoder.network[1].weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in (found, expected)))
    if method == "byol":  # 1 − cos in the place of −cos
        found = found - 1
    torch.testing.assert_close(found, expected)


def test_split_batches_are_lightlys_split_batch_norm() -> None:
    norm, theirs = nn.BatchNorm2d(5), SplitBatchNorm(5, 4)
    pictures = torch.randn(COUNT, 5, 3, 3) + torch.arange(float(COUNT)).view(-1, 1, 1, 1)
    network = Learner(Encoder(nn.Sequential(norm, nn.Flatten()), 45), nn.Identity(), splits=4)
    (first, second), _ = network([pictures, 2 * pictures])
    mixed = torch.arange(COUNT).view(4, -1).T.flatten()  # their parts are every fourth picture
    for found, view in ((first, pictures), (second, 2 * pictures)):
        torch.testing.assert_close(found[mixed], theirs(view[mixed]).flatten(1))
    theirs.eval()  # then the parts' statistics become their mean
    for own, other in ((norm.running_mean, theirs.running_mean), (norm.running_var, theirs.running_var)):
        torch.testing.assert_close(own, other[:5])
    assert norm.momentum == theirs.momentum


def their_transform(method: str) -> Any:
    """As in lightly's cifar10_benchmark.py."""
    if method == "dino":
        return transforms.DINOTransform(
            global_crop_size=32, n_local_views=0, cj_strength=0.5, gaussian_blur=(0, 0, 0), normalize=None
        )
    if method == "byol":
        return transforms.BYOLTransform(
            transforms.BYOLView1Transform(input_size=32, gaussian_blur=0.0, normalize=None),
            transforms.BYOLView2Transform(input_size=32, gaussian_blur=0.0, normalize=None),
        )
    return transforms.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)


@pytest.mark.parametrize("method", BENCHMARKED)
def test_views_are_sampled_by_the_settings_of_lightlys(method: str) -> None:
    config = configured(method)
    recipes = recipes_of(config.encoder, config.views, 2)
    for recipe, view in zip(recipes, their_transform(method).transforms, strict=True):
        theirs = {type(part).__name__: part for part in view.transform.transforms}
        found = sample(recipe, torch.ones(4000), torch.Generator().manual_seed(0))
        jitter = theirs["RandomApply"].transforms[0]
        turns = {"hue": found["hue"] / (2 * math.pi)}
        for name in ("brightness", "contrast", "saturation", "hue"):
            values = (dict(found) | turns)[name]
            assert [float(values.min()), float(values.max())] == pytest.approx(getattr(jitter, name), abs=0.01), name
        area = float((found["width"] * found["height"]).min())
        assert area == pytest.approx(theirs["RandomResizedCrop"].scale[0], abs=0.01)
        for ours, share in (
            (found["brightness"] != 1, theirs["RandomApply"].p),
            (found["mirrored"], theirs["RandomHorizontalFlip"].p),
            (found["grey"], theirs["RandomGrayscale"].p),
            (found["blurred"], theirs["GaussianBlur"].prob),
            (found["solarized"], theirs["RandomSolarization"].prob if "RandomSolarization" in theirs else 0.0),
        ):
            assert float(ours.float().mean()) == pytest.approx(share, abs=0.03)


def statistics(views: torch.Tensor) -> dict[str, torch.Tensor]:
    """Measures views (n, 3, 32, 32) of 0 to 1: mean and deviation over them of brightness, contrast and colour."""
    light = views.mean(1)
    colour = views.amax(1) - views.amin(1)
    of_each = {"brightness": light.mean((1, 2)), "contrast": light.std((1, 2)), "colour": colour.mean((1, 2))}
    return {name: torch.stack([values.mean(), values.std()]) for name, values in of_each.items()}


@pytest.mark.parametrize("method", ["simclr", "byol", "dino"])
def test_views_have_the_statistics_of_lightlys(method: str) -> None:
    config = configured(method)
    smooth = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(4))
    picture = (nn.functional.interpolate(smooth, (32, 32), mode="bicubic").clamp(0, 1) * 255).byte()
    ours = views_of(
        picture.expand(SAMPLES, -1, -1, -1), torch.ones(SAMPLES), recipes_of(config.encoder, config.views, 2), 0, 0,
        slice(0, SAMPLES),
    )  # fmt: skip
    torch.manual_seed(0)
    np.random.seed(0)  # which lightly's solarisation asks
    image, transform = Image.fromarray(picture[0].permute(1, 2, 0).numpy()), their_transform(method)
    theirs = [torch.stack(view) for view in zip(*(transform(image) for _ in range(SAMPLES)), strict=True)]
    for one, two in zip(ours, theirs, strict=True):
        found, expected = statistics(pixels_of(one).permute(0, 3, 1, 2) / 255), statistics(two)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
