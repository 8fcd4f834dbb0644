"""Fine-tunes a language model on conversations: `accelerate launch -m llm_peft_fa.train --method lora`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import dataclasses
import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from labs_common.cache import path_name
from labs_common.errors import LabError
from labs_common.freezing import FrozenAudit
from labs_common.run import Run, check_run_options
from labs_common.training import Loop, make_accelerator, state_bytes, total_steps
from llm_peft_fa.answers import before_and_after, collected_prompts
from llm_peft_fa.base import check_quantization, load_model, load_tokenizer, model_path, stop_ids
from llm_peft_fa.config import MethodOptions, TrainConfig
from llm_peft_fa.data import plain_paragraphs, training_and_validation
from llm_peft_fa.methods import METHODS, Setting, apply_method, complete
from llm_peft_fa.model import PackedCausalLM, check_packed_loss, mean_loss, structure_of, virtual_tokens
from llm_peft_fa.packing import PackedSteps
from llm_peft_fa.report import (
    Costs,
    data_section,
    disk_bytes,
    finish_report,
    print_refused,
    show_learnt,
    structure_section,
)
from llm_peft_fa.saved import initial_update, load_tuned, plain_base, result_folder, save_merged, save_tuned
from llm_peft_fa.templates import Encoded, check_before_training, encode_all, encode_plain


def train(config: TrainConfig) -> None:
    """Walks the road: data, model, method, training, evaluation, report."""
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
    adapted = apply_method(base, config.method, Setting(tokenizer, total_steps(options, source)))
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    source.virtual = virtual_tokens(adapted)
    initial, structure = initial_update(adapted), structure_of(adapted)
    held_out = {
        "validation": encoded["validation"],
        "plain text": encode_plain(tokenizer, paragraphs, config.data.max_length),
    }
    run = Run.start(config, config.run, f"{method}-{path_name(config.model.model)}", accelerator)
    clock["prepared"] = time.perf_counter()
    prepared, audit, optimizer_bytes = fine_tune(config, run, accelerator, PackedCausalLM(adapted), source, held_out)
    save_tuned(accelerator, prepared, tokenizer, run.path, initial)
    sections = [data_section(run, readings, encoded), structure_section(run, structure, audit, config.method)]
    clock["trained"] = time.perf_counter()

    # The evaluation is of the files that were written: base and adapter are read back.
    del prepared, audit, adapted, base
    accelerator.free_memory()
    tuned = load_tuned(run.path, config.model.model, quantized=method == "qlora").to(accelerator.device)
    before = plain_base(tuned, config.model.model) if config.generation.answer_base else None
    both = before_and_after(tuned, before, tokenizer, prompts, config.generation, accelerator)
    if config.merge and accelerator.is_main_process:
        save_merged(run.path / "adapter", config.model.model, tokenizer, run.path / "merged")
    clock["evaluated"] = time.perf_counter()
    costs = Costs(structure.trainable, structure.parameters, optimizer_bytes, disk_bytes(result_folder(run.path)))
    finish_report(run, config, sections, both, costs, clock)
    accelerator.end_training()


def check_machine(options: MethodOptions, accelerator: Accelerator) -> None:
    """Makes sure that the method can run on this machine and under this launcher, before any work is done.

    Raises:
        LabError: it cannot; the line says what to take instead.
    """
    kind = accelerator.distributed_type
    stage_3 = kind == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
    if options.method == "adalora" and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise LabError(
            "--method adalora: chooses ranks by whole gradients, which DeepSpeed and FSDP cut up; launch with "
            "multi_gpu.yaml, or take lora"
        )
    if (options.method == "full" or options.train_head) and stage_3:
        raise LabError("a head that trains is not supported under DeepSpeed ZeRO-3: launch with deepspeed_zero2.yaml")
    if options.method == "qlora":
        check_quantization()


def fine_tune(
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    model: PackedCausalLM,
    source: PackedSteps,
    held_out: dict[str, list[Encoded]],
) -> tuple[torch.nn.Module, FrozenAudit, int]:
    """Trains what the method left trainable; returns the prepared model, the passed audit and the optimizer's bytes.

    Raises:
        RunStopped: the loss is NaN, or something fixed has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    options = config.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    also = METHODS[config.method.method].also
    state = None if also is None else also(model.model, optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    audit = FrozenAudit(accelerator.unwrap_model(prepared))
    if accelerator.is_main_process:
        if run.resumed:
            audit.check(run.load_json("frozen.json"))
        else:
            run.save_json("frozen.json", audit.before)
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="tokens", also=state)
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
    model: torch.nn.Module, source: PackedSteps, held_out: dict[str, list[Encoded]], accelerator: Accelerator
) -> dict[str, float]:
    """Measures `NAME/loss`, in nats per token, of each text that is there, and the perplexity of the validation."""
    found = {
        f"{name}/loss": mean_loss(model, source.rows_of(encoded), accelerator)
        for name, encoded in held_out.items()
        if encoded
    }
    # exp(710) is more than a float holds.
    return {**found, "validation/perplexity": math.exp(min(found["validation/loss"], 700.0))}
