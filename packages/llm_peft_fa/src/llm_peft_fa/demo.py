"""A chat page in the browser: `python -m llm_peft_fa.demo` (extra `demo`)."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.demo()

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError
from labs_common.pages import check_page, serve
from llm_peft_fa.answers import streamed_answer
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import DemoConfig, SubjectOptions
from llm_peft_fa.model import Adapted
from llm_peft_fa.saved import Subject, runs_with_result, subject_of
from llm_peft_fa.spelling import normalise

Turns = list[dict[str, Any]]  # what Gradio keeps of a conversation: role and content


def demo(config: DemoConfig) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        LabError: Gradio is not installed, nothing is there to talk to, or the port is taken.
    """
    subjects = found_subjects(config)
    check_page(config.page, "llm-peft-fa[demo]")
    serve(chat_page(subjects, config.max_new_tokens), config.page)


def found_subjects(config: DemoConfig) -> dict[str, Subject]:
    """Lists what the page offers, by name: runs, the bases they were made from, and --models.

    Raises:
        LabError: nothing is there.
    """
    runs = [*config.checkpoint] or ([] if config.models else runs_with_result())
    if not runs and not config.models:
        raise LabError("no finished run under runs/; train one, or name --checkpoint or --models")
    found = [subject_of(SubjectOptions(checkpoint=run)) for run in runs]
    bases = dict.fromkeys([*(subject.base for subject in found if subject.base), *config.models])
    plain = [subject_of(SubjectOptions(model=name)) for name in bases]
    return {one.name: one for one in found} | {one.name if one.adapted else f"{one.name} (base)": one for one in plain}


def chat_page(subjects: dict[str, Subject], max_new_tokens: int) -> Any:
    """Builds the page: a question goes to the models on both sides; Persian runs from right to left."""
    import gradio  # of an extra

    loaded: dict[str, tuple[Adapted, PreTrainedTokenizerBase]] = {}

    def answer(name: str, turns: Turns) -> Iterator[str]:
        if name not in loaded:
            loaded[name] = (subjects[name].load(), load_tokenizer(subjects[name].tokenizer))
        model, tokenizer = loaded[name]
        trained = subjects[name].trained
        spelt = normalise if trained and trained.data.normalise else str  # as in training
        messages = [{"role": turn["role"], "content": spelt(_text(turn["content"]))} for turn in turns]
        said = ""
        for piece in streamed_answer(model, tokenizer, messages, max_new_tokens):
            said += piece
            yield said

    def ask(question: str, left: str, right: str, one: Turns, two: Turns) -> Iterator[tuple[str, Turns, Turns]]:
        if not question.strip():
            yield "", one, two
            return
        sides = [[*turns, {"role": "user", "content": question}] for turns in (one, two)]
        yield "", sides[0], sides[1]
        for place, name in enumerate((left, right)):
            before = sides[place]
            for said in answer(name, before):
                sides[place] = [*before, {"role": "assistant", "content": said}]
                yield "", sides[0], sides[1]

    names = list(subjects)
    with gradio.Blocks(title="llm_peft_fa") as page:
        gradio.Markdown("### Two models, one question")
        with gradio.Row():
            left = gradio.Dropdown(names, value=names[-1], label="Left", elem_id="left")
            right = gradio.Dropdown(names, value=names[0], label="Right", elem_id="right")
        with gradio.Row():
            one = gradio.Chatbot(rtl=True, label="Left", height=420, elem_id="answers-left", buttons=["copy"])
            two = gradio.Chatbot(rtl=True, label="Right", height=420, elem_id="answers-right", buttons=["copy"])
        question = gradio.Textbox(rtl=True, placeholder="پرسش خود را بنویسید", show_label=False, elem_id="question")
        with gradio.Row():
            send = gradio.Button("بپرس", variant="primary", elem_id="send")
            forget = gradio.Button("گفت‌وگوی تازه", elem_id="forget")
        inputs, outputs = [question, left, right, one, two], [question, one, two]
        question.submit(ask, inputs, outputs)
        send.click(ask, inputs, outputs)
        forget.click(lambda: ("", [], []), None, outputs)
        # Another model has not said what stands there.
        left.change(lambda: [], None, one)
        right.change(lambda: [], None, two)
    return page


def _text(content: Any) -> str:
    """Returns the text of a turn, which Gradio may keep as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))
