"""Every command that computes, on a GPU that is pretended: no tensor is on the wrong device."""

from pathlib import Path

import pytest
import torch
from labs_testing.pretended import pretended_gpu
from labs_testing.pretended_runs import Asked, assert_in_bf16, on_pretended_gpu

from caption_lab.config import DecoderOptions
from caption_lab.decoder import CAPTIONERS, Sizes

pytestmark = pytest.mark.pretended

MODELS = ("show_tell", "show_attend_tell", "transformer")


def test_every_captioner_and_every_command(scenes: Path, languages: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    small = ("--data", scenes, "--epochs", "1", "--max-steps", "2", "--batch-size", "32")
    train = ("--data", scenes, "--max-steps", "2", "--batch-size", "32", "--track", "none", "--precision", "bf16",
             "--no-report")  # fmt: skip
    own = ("--no-pretrained", "--width", "32", *train)
    run = folder / "transformer-no-pretrained-width=32" / "seed-0"
    *_, measured, described, drawn = on_pretended_gpu(
        ["caption_lab.compare"],
        tmp_path / "said",
        Asked("caption_lab.compare", (*small, "--models", ",".join(f"{name}:no-pretrained:width=32" for name in MODELS),
                                      "--output", folder)),
        Asked("caption_lab.train", ("--objective", "scst", "--start", run, *train, "--output", tmp_path / "rewarded")),
        Asked("caption_lab.train", ("--model", "transformer", *own, "--mask-words", "0.2",
                                    "--label-smoothing", "0.1", "--output", tmp_path / "masked")),
        Asked("caption_lab.train", ("--model", "show_attend_tell", *own, "--unfreeze", "1", "--scheduled-sampling", "0.5",
                                    "--output", tmp_path / "unfrozen")),
        Asked("caption_lab.train", ("--model", "clipcap", "--language-model", languages["gpt2"], "--lora", "2", "--prefix",
                                    "3", "--no-pretrained", *train, "--output", tmp_path / "clipcap")),
        Asked("caption_lab.evaluate", ("--checkpoint", run, "--beams", "1,3", "--output", tmp_path / "again")),
        Asked("caption_lab.caption", (next(scenes.rglob("*.jpg")), "--checkpoint", run, "--beam", "2",
                                       "--heatmap", tmp_path / "looks.png")),
        Asked("caption_lab.caption", (next(scenes.rglob("*.jpg")), "--checkpoint", run, "--top-p", "0.9")),
    )  # fmt: skip
    assert (folder / "comparison.json").exists()
    assert_in_bf16(measured, described, drawn)


def test_an_lstm_stays_in_float32_under_autocast() -> None:
    """cuDNN's own would be float16, even where bfloat16 is asked for."""
    decoder = CAPTIONERS["show_tell"].decoder(Sizes(20, 10, 6, 9), DecoderOptions(width=16))
    dtypes: list[torch.dtype] = []
    decoder.lstm.register_forward_hook(lambda module, inputs, output: dtypes.append(output[0].dtype))
    with pretended_gpu():
        decoder.to("cuda")
        features, words = torch.randn(3, 10, device="cuda"), torch.ones(3, 4, dtype=torch.long, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert decoder(features, words).logits.dtype == torch.bfloat16
            fixed, moving = decoder.begin(features)
            decoder.step(words[:, :1], fixed, moving)
    assert dtypes == [torch.float32] * 2
