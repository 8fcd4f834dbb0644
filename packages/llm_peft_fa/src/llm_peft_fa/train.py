"""Fine-tunes a language model on conversations: `accelerate launch -m llm_peft_fa.train --method lora`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import dataclasses
import time
from typing import TYPE_CHECKING

from labs_common.cache import path_name
from llm_peft_fa.config import TrainConfig, complete

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch
    from accelerate import Accelerator

    from labs_common.freezing import FrozenAudit
    from labs_common.run import Run
    from llm_peft_fa.packed import PackedCausalLM
    from llm_peft_fa.packing import PackedSteps
    from llm_peft_fa.templates import Encoded


def train(config: TrainConfig) -> None:
    """The road: data, model, method, training, evaluation, report."""
    from accelerate.utils import set_seed

    from labs_common.run import Run, check_run_options
    from labs_common.training import make_accelerator, total_steps
    from llm_peft_fa.adapters import initial_update, load_tuned, plain_base, result_folder, save_merged, save_tuned
    from llm_peft_fa.answers import collected_prompts, compared
    from llm_peft_fa.architecture import structure_of
    from llm_peft_fa.data import training_and_validation
    from llm_peft_fa.forgetting import encoded_plain, plain_paragraphs
    from llm_peft_fa.methods import METHODS, Setting, check_machine
    from llm_peft_fa.model import load_model, load_tokenizer, model_path, stop_ids
    from llm_peft_fa.packed import PackedCausalLM, check_packed_loss, virtual_tokens
    from llm_peft_fa.packing import PackedSteps
    from llm_peft_fa.results import Costs, data_section, disk_bytes, finish_report, print_refused, structure_section
    from llm_peft_fa.show import show_learnt
    from llm_peft_fa.templates import check_before_training, encode_all

    clock = {"start": time.perf_counter()}
    config = complete(config)
    options, method = config.training, config.method.method
    check_run_options(config.run)
    readings = dict(zip(("training", "validation"), training_and_validation(config.data, config.run.seed), strict=True))
    prompts = collected_prompts(readings["validation"], config.generation, config.run.seed)
    paragraphs = plain_paragraphs(config)
    accelerator = make_accelerator(options)
    check_machine(config.method, accelerator)
    with accelerator.main_process_first():
        model_path(config.model.model)  # makes the tiny base model if this is its first use
    tokenizer = load_tokenizer(config.model.model, config.model.template)
    encoded = {
        name: encode_all(tokenizer, reading, config.data.max_length, config.data.on_too_long)
        for name, reading in readings.items()
    }
    if accelerator.is_main_process:
        print_refused(readings.values())
    base = load_model(config.model.model, accelerator.mixed_precision, quantized=method == "qlora")
    check_before_training(tokenizer, [*encoded["training"], *encoded["validation"]], stop_ids(base, tokenizer))
    if config.show_batch:
        show_learnt(tokenizer, encoded["training"][: options.batch_size])
        return
    check_packed_loss(base)

    set_seed(config.run.seed)
    source = PackedSteps(
        encoded["training"], options.batch_size, config.data.tokens_per_batch,
        config.run.seed, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    setting = Setting(tokenizer, total_steps(options, source))
    adapted = METHODS[method](base, config.method, setting)
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    source.virtual = virtual_tokens(adapted)
    initial, structure = initial_update(adapted), structure_of(adapted)
    held_out = {
        "validation": encoded["validation"],
        "plain text": encoded_plain(tokenizer, paragraphs, config.data.max_length),
    }
    run = Run.start(config, config.run, f"{method}-{path_name(config.model.model)}", accelerator)
    clock["prepared"] = time.perf_counter()
    prepared, audit, optimizer_bytes = fine_tune(config, run, accelerator, PackedCausalLM(adapted), source, held_out)
    save_tuned(accelerator, prepared, tokenizer, run.path, initial)
    sections = [data_section(run, readings, encoded), structure_section(run, structure, audit)]
    clock["trained"] = time.perf_counter()

    # The evaluation is of what was written: base and adapter are read back.
    del prepared, audit, adapted, base
    accelerator.free_memory()
    tuned = load_tuned(run.path, config.model.model, quantized=method == "qlora").to(accelerator.device)
    before = plain_base(tuned, config.model.model) if config.generation.answer_base else None
    comparison = compared(tuned, before, tokenizer, prompts, config.generation, accelerator)
    if config.merge and accelerator.is_main_process:
        save_merged(run.path / "adapter", config.model.model, tokenizer, run.path / "merged")
    clock["evaluated"] = time.perf_counter()
    costs = Costs(structure.trainable, structure.parameters, optimizer_bytes, disk_bytes(result_folder(run.path)))
    finish_report(run, config, sections, comparison, costs, clock)
    accelerator.end_training()


def fine_tune(
    config: TrainConfig,
    run: "Run",
    accelerator: "Accelerator",
    model: "PackedCausalLM",
    source: "PackedSteps",
    held_out: "dict[str, list[Encoded]]",
) -> "tuple[torch.nn.Module, FrozenAudit, int]":
    """Trains what the method left trainable; returns the prepared model, the passed audit and the optimizer's bytes.

    Raises:
        RunStopped: the loss is not a number, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    import torch

    from labs_common.freezing import FrozenAudit
    from labs_common.training import Loop, state_bytes
    from llm_peft_fa.adalora import RankBudget

    options = config.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    budget = RankBudget(model.model, optimizer) if config.method.method == "adalora" else None
    prepared, optimizer = accelerator.prepare(model, optimizer)
    audit = FrozenAudit(accelerator.unwrap_model(prepared))
    if accelerator.is_main_process:
        if run.resumed:
            audit.check(run.load_json("frozen.json"))
        else:
            run.save_json("frozen.json", audit.before)
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="tokens", also=budget)
    if loop.step_number == 0:
        # Of the base: an update starts at zero, and a soft prompt is left out.
        model.prompted, plain = False, dataclasses.replace(source, virtual=0)
        loop.evaluated(held_out_losses(prepared, plain, held_out, accelerator))
        model.prompted = True
    prepared.train()
    for row in loop.batches():
        loss = prepared(row.to(accelerator.device)) * row.weight
        loop.step(loss, row.tokens)
        if loop.evaluation_due:
            loop.evaluated(held_out_losses(prepared, source, held_out, accelerator), watch="validation/loss")
            prepared.train()
    audit.check()
    return prepared, audit, state_bytes(optimizer)


def held_out_losses(
    model: "torch.nn.Module", source: "PackedSteps", held_out: "dict[str, list[Encoded]]", accelerator: "Accelerator"
) -> dict[str, float]:
    """`NAME/loss` of each text that is there, and the perplexity of the validation."""
    import math

    from llm_peft_fa.packed import mean_loss

    found = {
        f"{name}/loss": mean_loss(model, source.rows_of(encoded), accelerator)
        for name, encoded in held_out.items()
        if encoded
    }
    return {**found, "validation/perplexity": math.exp(min(found["validation/loss"], 700.0))}
