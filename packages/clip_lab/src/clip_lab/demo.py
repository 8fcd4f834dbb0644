"""A page in the browser that searches: `python -m clip_lab.demo --data photos` (extra `demo`)."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.demo()

from typing import Any

import torch

from clip_lab.config import DemoConfig
from clip_lab.encoder import load_encoder
from clip_lab.retrieve import known_captions, nearest, nearest_captions, open_index
from labs_common.data.images import decoded
from labs_common.pages import check_page, serve
from labs_common.report.page import shown

BATCH = 64  # pictures through the tower at once, as in retrieve


def demo(config: DemoConfig) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        LabError: Gradio is not installed, no model or picture is there, or the port is taken.
    """
    check_page(config.page, "clip-lab[demo]")
    serve(search_page(config), config.page)


def search_page(config: DemoConfig) -> Any:
    """Builds the page: a sentence in, pictures out; a picture in, captions and similar pictures out."""
    import gradio  # an extra

    encoder = load_encoder(config.checkpoint)
    index, test = open_index(config.data, encoder, config.index, BATCH)
    if config.search == "faiss":
        _ = index.inverted  # made now, and not while somebody waits for the first search
    captions = known_captions(config.captions, config.data, test)
    read = encoder.read(captions) if captions else torch.empty(0)

    def tiles(queries: torch.Tensor) -> list[tuple[Any, str]]:
        (results,) = nearest(queries, index, config.top, config.search)
        return [(shown(decoded(one.file)), f"{one.score:.3f} {one.file.name}") for one in results if one.file]

    def by_sentence(sentence: str) -> list[tuple[Any, str]]:
        return tiles(encoder.read([sentence])) if sentence.strip() else []

    def by_picture(image: Any) -> tuple[list[list[Any]], list[tuple[Any, str]]]:
        if image is None:
            return [], []
        vector = encoder.embedded(encoder.view(image.convert("RGB"))[None])
        rows = [[f"{one.score:.3f}", one.said] for one in nearest_captions(vector, captions, read, config.top)[0]]
        return rows, tiles(vector)

    with gradio.Blocks(title="clip_lab") as page:
        gradio.Markdown(f"### Search {len(index.files):,} pictures ({encoder.name})")
        with gradio.Tab("A sentence"):
            sentence = gradio.Textbox(label="What to look for", elem_id="sentence")
            search = gradio.Button("Search", variant="primary", elem_id="search")
            found = gradio.Gallery(label="Most similar first", columns=4, elem_id="found")
        with gradio.Tab("A picture"):
            image = gradio.Image(type="pil", label="Picture", elem_id="picture")
            ask = gradio.Button("Search", variant="primary", elem_id="ask")
            said = gradio.Dataframe(headers=["cosine", "caption"], label="Captions", elem_id="captions")
            like = gradio.Gallery(label="Similar pictures", columns=4, elem_id="like")
        search.click(by_sentence, [sentence], [found])
        sentence.submit(by_sentence, [sentence], [found])
        ask.click(by_picture, [image], [said, like])
    return page
