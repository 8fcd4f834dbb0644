"""Loss, answers and scores of any run, adapter or model, beside those of its base.

`python -m llm_peft_fa.evaluate --checkpoint runs/NAME` repeats the evaluation of a run, on its data or on other.
"""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.evaluate()

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from labs_common.cache import path_name
from labs_common.cli import to_plain
from labs_common.errors import LabError, reason_of, text_of
from labs_common.lock import check_new, new_folder
from labs_common.progress import console
from labs_common.report.page import Section, Table, Text, making_report, write_report
from labs_common.run import Run
from llm_peft_fa.answers import before_and_after, check_instruct, collected_prompts
from llm_peft_fa.base import load_tokenizer, positions
from llm_peft_fa.config import EvaluateConfig, TrainConfig
from llm_peft_fa.data import Reading, read_conversations, splits
from llm_peft_fa.model import Adapted, PackedCausalLM, arithmetic, base_of, mean_loss, rope_boundary, virtual_tokens
from llm_peft_fa.packing import Packing
from llm_peft_fa.rate import check_judge_file, write_judge_file
from llm_peft_fa.report import answers_section, numbers_section, saved_answers
from llm_peft_fa.saved import Subject, plain_base, subject_of
from llm_peft_fa.sources import own_splits
from llm_peft_fa.table import Rows, encode_all
from llm_peft_fa.verification import like_prompt, settle

TOKENS_PER_ROW = 2048  # as --tokens-per-batch has it in training
# What lm-evaluation-harness 0.4.13 ships in Persian: reading, knowledge, exams, common sense.
PERSIAN_TASKS = (
    "belebele_pes_Arab", "global_mmlu_full_fa", "include_base_44_persian", "global_piqa_parallel_cloze_pes_arab",
)  # fmt: skip

# By task, and by measure of it.
Harness = dict[str, dict[str, float]]


def evaluate(config: EvaluateConfig) -> None:
    """Answers prompts with a model and its base, and writes scores, a report and perhaps a table for judges."""
    check_new(config.output)
    subject = subject_of(config.subject, config.base)
    base = subject.base if config.generation.answer_base else None
    accelerator = Accelerator()
    if config.judge_file is not None:
        if base is None:
            raise LabError("--judge-file: needs two models to compare; name a run, an adapter, or a --base")
        check_judge_file(config.judge_file)
    tasks, manager = harness_tasks(config.lm_eval, accelerator)
    check_instruct(config.generation, subject.base, accelerator.is_main_process)
    output = new_folder(config.output, _own_folder(config, subject))
    seed = subject.trained.run.seed if subject.trained is not None else config.seed
    reading, held_out = _readings(config, subject)
    prompts = collected_prompts(reading, config.generation, seed)
    tokenizer = load_tokenizer(subject.tokenizer, config.template)
    tuned = subject.load()
    room = positions(base_of(tuned).config) - virtual_tokens(tuned)
    encoded = encode_all(tokenizer, held_out, min(config.max_length, room), "skip")
    losses = {"after": loss_of(tuned, encoded, accelerator)}
    harness: dict[str, Harness] = {}
    if tasks:
        harness["after"] = harness_scores(tuned, tokenizer, tasks, manager, config)

    @contextmanager
    def measured_base(base: str) -> Iterator[Adapted]:
        with plain_base(tuned, base) as model:
            losses["before"] = loss_of(model, encoded, accelerator, adapted=False)
            if tasks:
                harness["before"] = harness_scores(model, tokenizer, tasks, manager, config)
            yield model

    before = None if base is None else measured_base(base)
    both = before_and_after(tuned, before, tokenizer, prompts, config.generation, accelerator)
    for side, values in both.scores.items():
        if (loss := losses.get(side)) is not None:
            values["validation loss"] = loss
    if not accelerator.is_main_process:
        return
    output.mkdir(parents=True, exist_ok=True)
    run = Run(output)
    results = {"config": to_plain(config), "scores": both.scores, "kinds": both.kinds, "answers": saved_answers(both)}
    if tasks:
        results["lm-eval"] = harness
    run.save_json("evaluation.json", results)
    if config.judge_file is not None:
        asked = ["\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
                 if len(prompt.messages) > 1 else prompt.messages[0]["content"] for prompt in prompts]  # fmt: skip
        name = subject.name if subject.name != "base" else "tuned"  # of runs/base
        sides = {"base": both.said["before"], name: both.said["after"]}
        said = {name: [answer.text for answer in answers] for name, answers in sides.items()}
        write_judge_file(config.judge_file, asked, said, seed)
    with making_report():
        sections = [
            Section("Data", [Table(("source", "conversations"), [(reading.source, len(reading.conversations))])]),
            numbers_section(both),
            *([harness_section(harness)] if tasks else []),
            answers_section(both),
        ]
        path = write_report(run, f"Evaluation of {subject.name}", f"Base: {subject.base or 'none'}", sections)
    for name, values in both.scores.items():
        console.print(f"{name}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(f"report: {path}")


def loss_of(model: Adapted, encoded: Rows, accelerator: Accelerator, adapted: bool = True) -> float | None:
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
    packing.virtual, packing.padded, packing.boundary = virtual_tokens(subject), chosen.padded, rope_boundary(subject)
    with arithmetic(base_of(model)):
        return mean_loss(PackedCausalLM(subject), packing.rows(encoded), accelerator)


def harness_tasks(asked: str | None, accelerator: Accelerator) -> tuple[list[str], Any]:
    """Lists the tasks of --lm-eval, if there are any, with the harness's manager that knows them.

    Raises:
        LabError: lm-evaluation-harness is not installed or has no such task, a task file is more than data, or there
            are several processes.
    """
    if asked is None:
        return [], None
    if importlib.util.find_spec("lm_eval") is None:
        raise LabError("--lm-eval: needs lm-evaluation-harness; install the extra llm-peft-fa[lm-eval]")
    if accelerator.num_processes > 1:
        raise LabError("--lm-eval: takes a model that is in one process; start it without accelerate launch")
    from lm_eval import utils  # of an extra
    from lm_eval.tasks import TaskManager

    named = [name.strip() for name in asked.split(",") if name.strip()]
    tasks = [task for name in named for task in (PERSIAN_TASKS if name == "persian" else (name,))]
    own = [task for task in tasks if task.endswith(".yaml")]
    unknown = [task for task in own if not Path(task).is_file()]
    if not unknown:
        check_task_files([Path(task) for task in own])
        sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        sandbox.filters |= utils.env.filters
        utils.env = sandbox  # a template of the harness could call anything
        # Reading the 14,000 that it ships takes a while.
        manager = TaskManager(include_defaults=own != tasks)
        unknown = [task for task in tasks if task not in own and task not in manager.all_tasks]
    if unknown or not tasks:
        raise LabError(f"--lm-eval {asked}: no task {', '.join(unknown)}; `lm-eval ls tasks` lists them; one of your "
                       "own is named by its .yaml file")  # fmt: skip
    return tasks, manager


def check_task_files(files: Sequence[Path]) -> None:
    """Refuses task files of which the harness would run Python: they are data, from anywhere.

    Raises:
        LabError: one of them, or one that is included, names a !function or a metric's script, or cannot be read.
    """
    from lm_eval.api.registry import METRIC_REGISTRY  # of an extra

    class Data(yaml.SafeLoader):  # knows no tag but those of data
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            found = super().construct_mapping(node, deep)
            if found.get("hf_evaluate") or str(found.get("metric", "acc")) not in METRIC_REGISTRY:
                raise yaml.YAMLError(f"metric {found.get('metric')!r} is a script")
            return found

    coming = [*files]
    for file in coming:  # grows
        try:
            found = yaml.load(text_of(file, f"--lm-eval {file}"), Data)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or reason_of(error)
            raise LabError(
                f"--lm-eval {file}: {reason}; take one that is data alone, by the harness's metrics"
            ) from error
        included = found.get("include", []) if isinstance(found, dict) else []
        more = [file.resolve().parent / str(one) for one in (included if isinstance(included, list) else [included])]
        coming += [one for one in more if one not in coming]


def harness_scores(
    model: Adapted, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], manager: Any, config: EvaluateConfig
) -> Harness:
    """Measures a loaded model, adapter and soft prompt included, by lm-evaluation-harness, without a chat template.

    Raises:
        LabError: a task's data cannot be loaded, or the harness fails otherwise.
    """
    from lm_eval import simple_evaluate  # of an extra
    from lm_eval.models.huggingface import HFLM

    try:
        with arithmetic(base_of(model)):
            measured = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.generation.generation_batch)
            found = simple_evaluate(
                measured, tasks=[*tasks], task_manager=manager, limit=config.lm_eval_limit, bootstrap_iters=1000,
                log_samples=False,
            )  # fmt: skip
    except Exception as error:  # of the network, of data sets, of each task's own code
        raise LabError(f"--lm-eval {config.lm_eval}: failed ({reason_of(error)})") from error
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }


def harness_section(harness: Mapping[str, Harness]) -> Section:
    """Tabulates what lm-evaluation-harness measured, with its standard errors."""
    rows: list[tuple[Any, ...]] = []
    for task, values in harness["after"].items():
        for name in values:
            if "_stderr" not in name:
                sides = [harness.get(side, {}).get(task, {}) for side in ("before", "after")]
                error = name.replace(",", "_stderr,") if "," in name else f"{name}_stderr"
                rows.append((task, name, *(_with_error(side.get(name), side.get(error)) for side in sides)))
    note = "By lm-evaluation-harness, on the text of its tasks without a chat template; ± is the standard error."
    return Section("Standard tasks", [Table(("task", "measure", "before", "after"), rows), Text(note)])


def _with_error(value: float | None, error: float | None) -> str | float | None:
    return value if value is None or error is None else f"{value:.3f} ± {error:.3f}"


def _readings(config: EvaluateConfig, subject: Subject) -> tuple[Reading, Reading]:
    """Reads what prompts are taken from and what the loss is of: --data, or test and validation of the run or tasks."""
    if config.reading.data is not None:
        data, split = config.reading.data, config.reading.split
        if split == "auto":
            split = next(iter(reversed(own_splits(data, "name one with --split"))), "train")
            console.print(f"--data {data}: its split {split} is measured (--split)")
        reading = read_conversations(data, split, config.reading)
        return reading, reading
    trained = subject.trained or TrainConfig()
    found = splits(trained.data, trained.run.seed)
    return found["test"], found["validation"]


def _own_folder(config: EvaluateConfig, subject: Subject) -> Path:
    """Names the directory of the evaluation: under the run or adapter, of a plain model under runs/."""
    if config.subject.model is not None:
        return Path("runs") / f"evaluation-{path_name(subject.name)}"
    return (config.subject.checkpoint or config.subject.adapter or Path("runs") / subject.name) / "evaluation"
