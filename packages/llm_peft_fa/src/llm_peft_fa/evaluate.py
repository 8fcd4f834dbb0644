"""Loss, answers and scores of any run, adapter or model, beside those of its base.

`python -m llm_peft_fa.evaluate --checkpoint runs/NAME` repeats the evaluation of a run, on its data or on other.
"""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.evaluate()

import csv
import io
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from labs_common.cache import path_name
from labs_common.cli import to_plain
from labs_common.errors import LabError
from labs_common.lock import check_new, new_folder
from labs_common.progress import console
from labs_common.report.page import Section, Table, making_report, write_report
from labs_common.run import Run, write_atomically
from llm_peft_fa.answers import BeforeAndAfter, before_and_after, collected_prompts
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import EvaluateConfig, TrainConfig
from llm_peft_fa.data import Reading, read_conversations, training_and_validation
from llm_peft_fa.model import Adapted, PackedCausalLM, arithmetic, base_of, mean_loss, virtual_tokens
from llm_peft_fa.packing import Packing
from llm_peft_fa.report import answers_section, numbers_section, saved_answers
from llm_peft_fa.saved import Subject, plain_base, subject_of
from llm_peft_fa.templates import Encoded, encode_all
from llm_peft_fa.verification import like_prompt, settle

JUDGE_COLUMNS = ("number", "prompt", "answer A", "answer B", "better (A, B or =)")
TOKENS_PER_ROW = 2048  # as --tokens-per-batch has it in training


def evaluate(config: EvaluateConfig) -> None:
    """Answers prompts with a model and its base, and writes scores, a report and perhaps a table for judges."""
    check_new(config.output)
    subject = subject_of(config.subject, config.base)
    base = subject.base if config.generation.answer_base else None
    if config.judge_file is not None:
        check_judge_file(config.judge_file, base)
    output = new_folder(config.output, _own_folder(config, subject))
    seed = subject.trained.run.seed if subject.trained is not None else config.seed
    reading = _reading(config, subject)
    prompts = collected_prompts(reading, config.generation, seed)
    accelerator = Accelerator()
    tokenizer = load_tokenizer(subject.tokenizer, config.template)
    tuned = subject.load()
    encoded = encode_all(tokenizer, reading, config.max_length, "skip")
    losses = {"after": loss_of(tuned, encoded, accelerator)}

    @contextmanager
    def measured_base(base: str) -> Iterator[Adapted]:
        with plain_base(tuned, base) as model:
            losses["before"] = loss_of(model, encoded, accelerator, adapted=False)
            yield model

    before = None if base is None else measured_base(base)
    both = before_and_after(tuned, before, tokenizer, prompts, config.generation, accelerator)
    for side, values in both.scores.items():
        if (loss := losses[side]) is not None:
            values["validation loss"] = loss
    if not accelerator.is_main_process:
        return
    output.mkdir(parents=True, exist_ok=True)
    run = Run(output)
    results = {"config": to_plain(config), "scores": both.scores, "answers": saved_answers(both)}
    run.save_json("evaluation.json", results)
    if config.judge_file is not None:
        write_judge_file(config.judge_file, both, subject.name, seed)
    with making_report():
        sections = [
            Section("Data", [Table(("source", "conversations"), [(reading.source, len(reading.conversations))])]),
            numbers_section(both.scores),
            answers_section(both),
        ]
        path = write_report(run, f"Evaluation of {subject.name}", f"Base: {subject.base or 'none'}", sections)
    for name, values in both.scores.items():
        console.print(f"{name}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(f"report: {path}")


def loss_of(model: Adapted, encoded: list[Encoded], accelerator: Accelerator, adapted: bool = True) -> float | None:
    """Averages the loss, in nats, over the learnt tokens; None for an architecture that computes something unknown.

    `adapted=False` is the base inside a model whose adapter is switched off.
    """
    try:
        chosen = settle(base_of(model), accelerator, adapt=like_prompt(model) if adapted else None)
    except LabError as error:
        console.print(f"no validation loss: {error}")
        return None
    subject = model if adapted else base_of(model)
    packing = Packing(TOKENS_PER_ROW, accelerator.process_index, accelerator.num_processes)
    packing.virtual, packing.padded = virtual_tokens(subject), chosen.padded
    with arithmetic(base_of(model)):
        return mean_loss(PackedCausalLM(subject), packing.rows(encoded), accelerator)


def check_judge_file(file: Path, base: str | None) -> None:
    """Refuses a file that cannot be written or that somebody may have begun to fill in.

    Raises:
        LabError: it exists, its directory does not or cannot be written, or there is no base to compare with.
    """
    if base is None:
        raise LabError("--judge-file: needs two models to compare; name a run, an adapter, or a --base")
    if file.exists() or _key_of(file).exists():  # a table that was sent away cannot be read without its key
        raise LabError(f"--judge-file {file}: exists already and may hold ratings, or its key does; name another")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise LabError(f"--judge-file {file}: its directory does not exist or cannot be written")


def write_judge_file(file: Path, both: BeforeAndAfter, tuned: str, seed: int) -> None:
    """Writes a CSV table for people to rate, A and B in random order by row, and FILE.key.json with the true names.

    The byte-order mark makes spreadsheets read the Persian as UTF-8.
    """
    assert both.before is not None
    draw = random.Random(f"judges {seed}")
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(JUDGE_COLUMNS)
    key = []
    rows = zip(both.prompts, both.before, both.after, strict=True)
    for number, (prompt, before, after) in enumerate(rows, 1):
        sides = [("base", before), (tuned, after)]
        draw.shuffle(sides)
        asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
        if len(prompt.messages) == 1:
            asked = prompt.messages[0]["content"]
        table.writerow((number, *(_no_formula(text) for text in (asked, sides[0][1], sides[1][1])), ""))
        key.append({"number": number, "A": sides[0][0], "B": sides[1][0]})
    write_atomically(file, "\ufeff" + stream.getvalue())
    write_atomically(_key_of(file), json.dumps(key, indent=1) + "\n")


def _key_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.key.json")


def _no_formula(text: str) -> str:
    """Puts a space before what a spreadsheet would compute: a text from anywhere may be a command."""
    return f" {text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _reading(config: EvaluateConfig, subject: Subject) -> Reading:
    """Reads --data, or the validation data of the run, or the generated tasks that are held out."""
    if config.reading.data is not None:
        return read_conversations(config.reading.data, config.reading.split, config.reading)
    trained = subject.trained or TrainConfig()
    return training_and_validation(trained.data, trained.run.seed)[1]


def _own_folder(config: EvaluateConfig, subject: Subject) -> Path:
    """Names the directory of the evaluation: under the run or adapter, of a plain model under runs/."""
    if config.subject.model is not None:
        return Path("runs") / f"evaluation-{path_name(subject.name)}"
    return (config.subject.checkpoint or config.subject.adapter or Path("runs") / subject.name) / "evaluation"
