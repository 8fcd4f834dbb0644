"""What the model is taught, in colour."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from llm_peft_fa.templates import Encoded


def show_learnt(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Encoded]) -> None:
    """Prints conversations as the tokenizer decodes them: learnt tokens green, the others grey.

    Without colours, learnt stretches stand in ⟦ ⟧.
    """
    console = Console(highlight=False, soft_wrap=True)
    for item in conversations:
        text = Text()
        for start, end in _stretches(item.learnt):
            piece = str(tokenizer.decode(item.ids[start:end]))
            if not item.learnt[start]:
                text.append(piece, "bright_black")
            else:
                text.append(piece if console.is_terminal else f"⟦{piece}⟧", "bold green")
        console.rule(f"{item.where}: {len(item.ids)} tokens, {sum(item.learnt)} learnt", align="left")
        console.print(text)


def _stretches(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """The ranges over which `flags` stays the same."""
    ends = [place for place in range(1, len(flags)) if flags[place] != flags[place - 1]] + [len(flags)]
    return list(zip([0, *ends], ends, strict=False))
