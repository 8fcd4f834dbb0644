"""A page in the browser that describes pictures: `python -m caption_lab.demo` (extra `demo`)."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.demo()

from dataclasses import replace
from pathlib import Path
from typing import Any

from caption_lab.config import FINISHED, TRAIN, DemoConfig
from caption_lab.report import attention_maps, word_tiles
from caption_lab.saved import load_captioner
from labs_common.device import inference_accelerator
from labs_common.options import DecodingOptions
from labs_common.pages import check_page, serve
from labs_common.run import newest_run


def demo(config: DemoConfig) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        LabError: Gradio is not installed, no captioner is there, or the port is taken.
    """
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    check_page(config.page, "caption-lab[demo]")
    serve(caption_page(checkpoint, config.decoding), config.page)


def caption_page(checkpoint: Path, decoding: DecodingOptions) -> Any:
    """Makes the page: a picture in, its caption and where the captioner looked out."""
    import gradio  # an extra, which may be missing

    captioner, accelerator = load_captioner(checkpoint), inference_accelerator()
    captioner.model.to(accelerator.device)

    def describe(image: Any, beam: float) -> tuple[str, list[Any]]:
        if image is None:
            return "", []
        options = replace(decoding, beam=int(beam))
        image = image.convert("RGB")
        with accelerator.autocast():
            if maps := attention_maps(captioner, [image], options):
                ((words, attention),) = maps
                return " ".join(words), word_tiles(image, words, attention)
            (numbers,) = captioner.describe([image], options).words
        return captioner.vocabulary.decode(numbers), []

    with gradio.Blocks(title="caption_lab") as page:
        gradio.Markdown(f"### What is in the picture? ({captioner.kind})")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", label="Picture", elem_id="picture")
                beam = gradio.Slider(1, 10, value=decoding.beam, step=1, label="Beams")
                send = gradio.Button("Describe", variant="primary", elem_id="send")
            with gradio.Column():
                caption = gradio.Textbox(label="Caption", elem_id="caption", interactive=False)
                looks = gradio.Gallery(label="Where it looked for each word", columns=4, elem_id="looks")
        send.click(describe, [image, beam], [caption, looks])
    return page
