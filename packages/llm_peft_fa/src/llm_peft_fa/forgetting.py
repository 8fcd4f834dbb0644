"""Plain text of the base's world: how well the model still predicts it shows what fine-tuning made it forget."""

from itertools import islice

from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError
from llm_peft_fa import persian_tasks
from llm_peft_fa.config import TrainConfig
from llm_peft_fa.templates import Encoded

PARAGRAPHS = 200
GENERATED_SEED = 2  # the tiny base was pre-trained on that of seed 1


def plain_paragraphs(config: TrainConfig) -> list[str]:
    """The paragraphs of --plain-text, or generated ones for the tiny base; none for another base without the option.

    Raises:
        LabError: the file cannot be read or is empty.
    """
    file = config.data.plain_text
    if file is None:
        made = persian_tasks.plain_text(PARAGRAPHS, GENERATED_SEED)
        return [text.strip() for text in made] if config.model.model == "tiny" else []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--plain-text {file}: cannot be read; name a text file with a paragraph per line") from error
    found = list(islice((line.strip() for line in lines if line.strip()), PARAGRAPHS))
    if not found:
        raise LabError(f"--plain-text {file}: is empty; write a paragraph per line")
    return found


def encoded_plain(tokenizer: PreTrainedTokenizerBase, paragraphs: list[str], max_length: int) -> list[Encoded]:
    """The paragraphs as tokens, each of which is predicted; long ones are cut."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = []
    for number, text in enumerate(paragraphs, 1):
        ids = (start + tokenizer(text, add_special_tokens=False).input_ids)[:max_length]
        if len(ids) > 1:
            encoded.append(Encoded(ids, [True] * len(ids), f"plain text {number}"))
    return encoded
