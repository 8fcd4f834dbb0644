"""Heat-maps against their definitions."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vit_transfer.config import ModelOptions
from vit_transfer.evaluate import attention_rollout, grad_cam, heat_maps
from vit_transfer.model import create


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_is_the_product_of_the_attentions(pool: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5, global_pool=pool, class_token=pool == "token"
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    found = attention_rollout(model, images)
    # By hand, from the blocks' own weights.
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        product = torch.eye(x.shape[1]).expand(2, -1, -1)
        for block in model.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(2, -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
            attention = (qkv[0] @ qkv[1].transpose(-2, -1) / 12**0.5).softmax(-1).mean(1)
            product = (0.5 * attention + 0.5 * torch.eye(x.shape[1])) @ product
            x = block(x)
    expected = product[:, 0, 1:] if pool == "token" else product.mean(1)
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-6, rtol=1e-4)
    assert model.blocks[0].attn.fused_attn is not None
    torch.testing.assert_close(attention_rollout(model, images), found)


def test_grad_cam_of_average_pooling_and_a_linear_head_is_cam() -> None:
    """There the weights are the head's over the number of places (Selvaraju et al. 2017, section 3.1)."""
    model = create(ModelOptions(model="tiny-cnn", pretrained=False), 5).eval()
    images, classes = torch.randn(3, 3, 48, 48), torch.tensor([4, 0, 2])
    with torch.no_grad():
        features = model.forward_features(images)
        places = features.shape[2] * features.shape[3]
        expected = torch.einsum("bc,bchw->bhw", model.fc.weight[classes] / places, features).relu()
    torch.testing.assert_close(grad_cam(model, images, classes), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "method"),
    [("tiny-vit", 48, "attention roll-out"), ("tiny-deit", 48, "attention roll-out"), ("resnet18", 64, "Grad-CAM"),
     ("swin_tiny_patch4_window7_224", 224, "Grad-CAM"), ("densenet121", 64, "Grad-CAM"),
     ("dm_nfnet_f0", 64, "Grad-CAM"), ("resnetv2_50", 64, "Grad-CAM"),
     ("coat_lite_tiny", 64, "gradient of the picture"), ("cait_xxs24_224", 64, "gradient of the picture")],
)  # fmt: skip
def test_maps_cover_the_picture(name: str, size: int, method: str) -> None:
    own = size if name.startswith(("cait", "coat")) else 0  # that they have to be told
    model = create(ModelOptions(model=name, pretrained=False, image_size=own, head="paper"), 5).eval()
    said, maps = heat_maps(model, torch.randn(2, 3, size, size), torch.tensor([1, 3]))
    assert said == method
    assert maps.shape == (2, size, size)
    assert float(maps.min()) >= 0
    assert 0.5 < float(maps.max()) <= 1
