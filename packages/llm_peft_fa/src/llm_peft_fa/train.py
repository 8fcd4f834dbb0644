"""Fine-tunes a language model on conversations: `accelerate launch -m llm_peft_fa.train --method lora`."""

import time
from typing import TYPE_CHECKING

from labs_common.cli import run_command
from llm_peft_fa.config import TrainConfig

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from accelerate import Accelerator

    from labs_common.freezing import FrozenAudit
    from labs_common.run import Run
    from llm_peft_fa.packed import PackedCausalLM
    from llm_peft_fa.packing import PackedSteps
    from llm_peft_fa.templates import Encoded


def main() -> None:
    """The command."""
    run_command(train, TrainConfig, "python -m llm_peft_fa.train")


def train(config: TrainConfig) -> None:
    """The road: data, model, method, training, evaluation, report."""
    from accelerate.utils import set_seed

    from labs_common.report import trained_section
    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator
    from llm_peft_fa.adapters import adapted_model, save_adapter, save_merged
    from llm_peft_fa.answers import collected_prompts, compared
    from llm_peft_fa.data import training_and_validation
    from llm_peft_fa.methods import METHODS
    from llm_peft_fa.model import load_model, load_tokenizer, model_path, stop_ids
    from llm_peft_fa.packed import PackedCausalLM, check_packed_loss
    from llm_peft_fa.packing import PackedSteps
    from llm_peft_fa.results import data_section, finish_report, print_refused
    from llm_peft_fa.show import show_learnt
    from llm_peft_fa.templates import check_before_training, encode_all

    clock = {"start": time.perf_counter()}
    check_run_options(config.run)
    readings = dict(zip(("training", "validation"), training_and_validation(config.data, config.run.seed), strict=True))
    prompts = collected_prompts(readings["validation"], config.generation, config.run.seed)
    accelerator = make_accelerator(config.training)
    with accelerator.main_process_first():
        model_path(config.model.model)  # makes the tiny base model if this is its first use
    tokenizer = load_tokenizer(config.model.model, config.model.template)
    encoded = {
        name: encode_all(tokenizer, reading, config.data.max_length, config.data.on_too_long)
        for name, reading in readings.items()
    }
    if accelerator.is_main_process:
        print_refused(readings.values())
    base = load_model(config.model.model, accelerator.mixed_precision)
    check_before_training(tokenizer, [*encoded["training"], *encoded["validation"]], stop_ids(base, tokenizer))
    if config.data.show_batch:
        show_learnt(tokenizer, encoded["training"][: config.training.batch_size])
        return
    check_packed_loss(base)

    set_seed(config.run.seed)
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PackedCausalLM(METHODS[config.method.method](base, config.method))
    source = PackedSteps(
        encoded["training"], config.training.batch_size, config.data.tokens_per_batch,
        config.run.seed, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    name = f"{config.method.method}-{config.model.model.strip('./').replace('/', '-')}"
    run = Run.start(config, config.run, name, accelerator)
    clock["prepared"] = time.perf_counter()
    prepared, audit = fine_tune(config, run, accelerator, model, source, encoded["validation"])
    save_adapter(accelerator, prepared, tokenizer, run.path / "adapter")
    sections = [data_section(run, readings, encoded), trained_section(audit)]
    clock["trained"] = time.perf_counter()

    # The evaluation is of what was written: base and adapter are read back.
    del prepared, audit, model, base
    accelerator.free_memory()
    tuned = adapted_model(run.path / "adapter", config.model.model).to(accelerator.device)
    comparison = compared(tuned, tokenizer, prompts, config.generation, accelerator)
    if config.training.merge and accelerator.is_main_process:
        save_merged(tuned, tokenizer, run.path / "merged")
    clock["evaluated"] = time.perf_counter()
    finish_report(run, config, sections, comparison, clock)
    accelerator.end_training()


def fine_tune(
    config: TrainConfig,
    run: "Run",
    accelerator: "Accelerator",
    model: "PackedCausalLM",
    source: "PackedSteps",
    validation: "list[Encoded]",
) -> "tuple[torch.nn.Module, FrozenAudit]":
    """Trains what the method left trainable; returns the model as it was prepared, and the passed audit.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    import torch

    from labs_common.freezing import FrozenAudit
    from labs_common.training import Loop

    options = config.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    audit = FrozenAudit(accelerator.unwrap_model(prepared))
    if accelerator.is_main_process:
        if run.resumed:
            audit.check(run.load_json("frozen.json"))
        else:
            run.save_json("frozen.json", audit.before)
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="tokens")
    if loop.step_number == 0:
        loop.evaluated(validation_loss(prepared, source, validation, accelerator))
    prepared.train()
    for row in loop.batches():
        loss = prepared(row.to(accelerator.device)) * row.weight
        loop.step(loss, row.tokens)
        if loop.evaluation_due:
            loop.evaluated(validation_loss(prepared, source, validation, accelerator), watch="validation/loss")
            prepared.train()
    audit.check()
    return prepared, audit


def validation_loss(
    model: "torch.nn.Module", source: "PackedSteps", validation: "list[Encoded]", accelerator: "Accelerator"
) -> dict[str, float]:
    """Mean negative log-likelihood over the learnt tokens of `validation`, in nats, and its exponential."""
    import math

    import torch

    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row in source.rows_of(validation):
            total += model(row.to(accelerator.device)).double().cpu() * row.weight
    mean = accelerator.reduce(total.to(accelerator.device), "mean").item()
    return {"validation/loss": mean, "validation/perplexity": math.exp(min(mean, 700.0))}


if __name__ == "__main__":
    main()
