"""Loss, answers and scores of any run, adapter or model, beside those of its base.

`python -m llm_peft_fa.evaluate --run runs/NAME` repeats the evaluation of a run, on its data or on other.
"""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.evaluate()

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from labs_common.cache import path_name
from llm_peft_fa.config import EvaluateConfig

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from collections.abc import Iterator

    from accelerate import Accelerator

    from llm_peft_fa.data import Reading
    from llm_peft_fa.methods import Adapted
    from llm_peft_fa.subjects import Subject
    from llm_peft_fa.templates import Encoded


def evaluate(config: EvaluateConfig) -> None:
    """Answers prompts with a model and its base, and writes scores, a report and perhaps a table for judges."""
    from accelerate import Accelerator

    from labs_common.cli import to_plain
    from labs_common.errors import LabError
    from labs_common.progress import console
    from labs_common.report import Section, Table, write_report
    from labs_common.run import Run, check_new, new_folder
    from llm_peft_fa.adapters import plain_base
    from llm_peft_fa.answers import collected_prompts, compared
    from llm_peft_fa.judging import check_judge_file, write_judge_file
    from llm_peft_fa.results import answers_section, numbers_section, saved_answers
    from llm_peft_fa.subjects import subject_of
    from llm_peft_fa.templates import encode_all

    check_new(config.output)
    subject = subject_of(config.run, config.adapter, config.model, config.base)
    with_base = config.generation.answer_base and subject.base is not None
    if config.judge_file is not None:
        if not with_base:
            raise LabError("--judge-file: needs two models to compare; name a run, an adapter, or a --base")
        check_judge_file(config.judge_file)
    output = new_folder(config.output, _own_folder(config, subject))
    seed = subject.trained.run.seed if subject.trained is not None else config.seed
    reading = _reading(config, subject)
    prompts = collected_prompts(reading, config.generation, seed)
    accelerator = Accelerator()
    tokenizer = subject.load_tokenizer(config.template)
    tuned = subject.load()
    encoded = encode_all(tokenizer, reading, config.max_length, "skip")
    losses = {"after": loss_of(tuned, encoded, accelerator)}

    @contextmanager
    def measured_base(base: str) -> "Iterator[Adapted]":
        with plain_base(tuned, base) as model:
            losses["before"] = loss_of(model, encoded, accelerator, adapted=False)
            yield model

    before = measured_base(subject.base) if with_base and subject.base is not None else None
    comparison = compared(tuned, before, tokenizer, prompts, config.generation, accelerator)
    for side, values in comparison.scores.items():
        if (loss := losses[side]) is not None:
            values["validation loss"] = loss
    if not accelerator.is_main_process:
        return
    output.mkdir(parents=True, exist_ok=True)
    run = Run(output)
    run.save_json(
        "evaluation.json",
        {"config": to_plain(config), "scores": comparison.scores, "answers": saved_answers(comparison)},
    )
    if config.judge_file is not None:
        write_judge_file(config.judge_file, comparison, subject.name, seed)
    sections = [
        Section("Data", [Table(("source", "conversations"), [(reading.source, len(reading.conversations))])]),
        numbers_section(comparison.scores),
        answers_section(comparison),
    ]
    title = f"Evaluation of {subject.name}"
    path = write_report(run, title, f"Base: {subject.base or 'none'}", sections)
    for name, values in comparison.scores.items():
        console.print(f"{name}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(f"report: {path}")


def loss_of(
    model: "Adapted", encoded: "list[Encoded]", accelerator: "Accelerator", adapted: bool = True
) -> float | None:
    """Mean loss over the learnt tokens; None for an architecture that cannot be packed.

    `adapted=False` is the base inside a model whose adapter is switched off.
    """
    from labs_common.errors import LabError
    from labs_common.progress import console
    from llm_peft_fa.packed import PackedCausalLM, base_of, check_packed_loss, mean_loss, virtual_tokens
    from llm_peft_fa.packing import PackedSteps

    try:
        check_packed_loss(base_of(model))
    except LabError as error:
        console.print(f"no validation loss: {error}")
        return None
    subject = model if adapted else base_of(model)
    steps = PackedSteps(
        encoded, len(encoded), 2048, 0, accelerator.process_index, accelerator.num_processes, virtual_tokens(subject)
    )
    return mean_loss(PackedCausalLM(subject), steps.rows_of(encoded), accelerator)


def _reading(config: EvaluateConfig, subject: "Subject") -> "Reading":
    """--data, or the validation data of the run, or the generated tasks that are held out."""
    from llm_peft_fa.config import TrainConfig
    from llm_peft_fa.data import read_conversations, training_and_validation

    if config.reading.data is not None:
        return read_conversations(config.reading.data, config.reading.split, config.reading)
    trained = subject.trained or TrainConfig()
    return training_and_validation(trained.data, trained.run.seed)[1]


def _own_folder(config: EvaluateConfig, subject: "Subject") -> Path:
    """Where the evaluation goes: under the run or adapter, of a plain model under runs/."""
    if subject.trained is None and config.adapter is None:
        return Path("runs") / f"evaluation-{path_name(subject.name)}"
    return (config.run or config.adapter or Path("runs") / subject.name) / "evaluation"
