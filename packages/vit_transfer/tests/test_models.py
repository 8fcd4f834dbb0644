"""The catalogue on the screen."""

from labs_testing.commands import here


def test_models_lists_and_names() -> None:
    out = here("vit_transfer.models", "--names", "resnet18,convnext_tiny").stdout
    assert "layer4.1.conv2.weight" in out
    assert "layer4.0" not in out
    assert "stages" in out
    assert "resnet18" in here("vit_transfer.models", "--names", "resnt18", code=2).stderr
