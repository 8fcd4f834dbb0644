"""Every command that computes, on a GPU that is pretended: no tensor is on the wrong device."""

from pathlib import Path

from labs_testing.pretended_runs import Asked, on_pretended_gpu

MODELS = ("show_tell", "show_attend_tell", "transformer")


def test_every_captioner_and_every_command(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    small = ("--data", scenes, "--epochs", "1", "--max-steps", "2", "--batch-size", "32")
    train = ("--data", scenes, "--max-steps", "2", "--batch-size", "32", "--track", "none", "--precision", "bf16",
             "--no-report")  # fmt: skip
    own = ("--no-pretrained", "--width", "32", *train)
    run = folder / "transformer-no-pretrained-width=32" / "seed-0"
    on_pretended_gpu(
        ["caption_lab.compare"],
        tmp_path / "said",
        Asked("caption_lab.compare", (*small, "--models", ",".join(f"{name}:no-pretrained:width=32" for name in MODELS),
                                      "--output", folder)),
        Asked("caption_lab.train", ("--objective", "scst", "--start", run, *train, "--output", tmp_path / "rewarded")),
        Asked("caption_lab.train", ("--model", "transformer", *own, "--mask-words", "0.2",
                                    "--label-smoothing", "0.1", "--output", tmp_path / "masked")),
        Asked("caption_lab.train", ("--model", "show_attend_tell", *own, "--unfreeze", "1", "--scheduled-sampling", "0.5",
                                    "--output", tmp_path / "unfrozen")),
        Asked("caption_lab.evaluate", ("--checkpoint", run, "--beams", "1,3", "--output", tmp_path / "again")),
        Asked("caption_lab.caption", (next(scenes.rglob("*.jpg")), "--checkpoint", run, "--beam", "2")),
        Asked("caption_lab.caption", (next(scenes.rglob("*.jpg")), "--checkpoint", run, "--top-p", "0.9")),
    )  # fmt: skip
