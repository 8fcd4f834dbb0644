"""The shortened last block computes what the whole one does, gradients included."""

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer

from vit_transfer.config import ModelOptions
from vit_transfer.first_tokens import FirstTokens, can_be_shortened, read_tokens
from vit_transfer.model import create, transfer

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qkv_bias": True, "init_values": 0.3}])
def test_first_tokens_are_the_blocks_with_gradients(count: int, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    block = Block(24, 3, **options).double().eval()
    with torch.no_grad():  # norms that do something
        for norm in (block.norm1, block.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    assert can_be_shortened(block)
    x = torch.randn(5, 11, 24, dtype=torch.float64)
    weight = torch.randn(5, count, 24, dtype=torch.float64)
    short = FirstTokens(block, count)
    torch.testing.assert_close(short(x), block(x)[:, :count], atol=1e-12, rtol=0)
    names = [name for name, _ in block.named_parameters()]
    assert names == [name for name, _ in short.named_parameters()]
    plain = torch.autograd.grad((block(x)[:, :count] * weight).sum(), list(block.parameters()))
    shortened = torch.autograd.grad((short(x) * weight).sum(), list(short.parameters()))
    for name, one, other in zip(names, plain, shortened, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0, msg=name)


def test_only_where_it_is_exact() -> None:
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    assert read_tokens(VisionTransformer(**small)) == 1
    assert read_tokens(VisionTransformer(**small, global_pool="avg")) == 0
    assert read_tokens(create(ModelOptions(model="tiny-deit", pretrained=False), 10)) == 2
    assert not can_be_shortened(Block(24, 3, qk_norm=True))
    assert not can_be_shortened(Block(24, 3, attn_drop=0.1))
    pooled = VisionTransformer(**small, global_pool="avg", num_classes=3)
    pooled.pretrained_cfg = {"classifier": "head"}
    model = transfer(pooled.eval(), ModelOptions(image_size=32), cached=True)
    assert model.cut is not None
    assert not any(isinstance(layer, FirstTokens) for layer in model.cut.back.modules())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(model.cut.front(images)), pooled(images), atol=1e-5, rtol=0)
