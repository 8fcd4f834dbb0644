"""Fine-tunes a language model on conversations: `accelerate launch -m llm_peft_fa.train --method lora`."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import dataclasses
import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labs_common.cache import path_name
from labs_common.errors import LabError
from labs_common.fitting import Fitted, Fitting, begin
from labs_common.launch import main_process_first
from labs_common.run import Run, written_whole
from labs_common.sharding import reads_weights, whole_outside_layers, zero_stage
from labs_common.training import total_steps
from llm_peft_fa.answers import before_and_after, check_instruct, collected_prompts
from llm_peft_fa.attention import NAME
from llm_peft_fa.base import check_quantization, load_model, load_tokenizer, longest_row, model_path, stop_ids
from llm_peft_fa.config import TrainConfig
from llm_peft_fa.data import plain_paragraphs, splits
from llm_peft_fa.methods import METHODS, Setting, apply_method, complete
from llm_peft_fa.model import PackedCausalLM, base_of, mean_loss, rope_boundary, structure_of, virtual_tokens
from llm_peft_fa.optimizers import check_optimizer, optimizer_of
from llm_peft_fa.packing import Packing
from llm_peft_fa.plan import fitted, print_plan
from llm_peft_fa.report import (
    TIMED,
    costs_of,
    data_section,
    finish_report,
    print_expected_time,
    print_first_screen,
    print_refused,
    print_rows,
    show_learnt,
    structure_section,
)
from llm_peft_fa.saved import computed_prompt, initial_update, load_tuned, placed, plain_base, save_tuned, write_merged
from llm_peft_fa.table import Rows, check_before_training, encode_all, text_sum
from llm_peft_fa.templates import Encoded, encode_plain
from llm_peft_fa.verification import FEW, settle


def train(config: TrainConfig) -> None:
    """Walks the road: data, model, method, training, evaluation of what was written, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    if config.plan.plan:
        print_plan(config)
        return
    options, name = config.training, config.model.model
    accelerator = begin(config.run, options)
    check_machine(config, accelerator)
    readings = splits(config.data, config.run.seed)
    prompts = collected_prompts(readings["test"], config.generation, config.run.seed)
    paragraphs = plain_paragraphs(config)
    check_instruct(config.generation, name, accelerator.is_main_process)
    with main_process_first(accelerator):
        model_path(name)  # makes the tiny base model if this is its first use
    tokenizer = load_tokenizer(name, config.model.template, config.model.thinking)
    longest = longest_row(config)
    rows = {
        side: encode_all(tokenizer, readings[side], longest, config.data.on_too_long)
        for side in ("training", "validation")
    }
    if accelerator.is_main_process:
        print_refused(readings.values())
    config = fitted(config, accelerator, rows["training"].lengths.tolist())
    if accelerator.is_main_process and not config.show_batch:
        print_first_screen(config, accelerator, readings, rows, tokenizer)
    quantized = METHODS[config.method.method].quantized
    read = reads_weights(accelerator)
    base = load_model(name, accelerator.mixed_precision, quantized, read)
    check_before_training(tokenizer, [*rows.values()], stop_ids(base, tokenizer))
    if config.show_batch:
        show_learnt(tokenizer, rows["training"][: options.batch_size])
        return
    packing = packing_of(config, base, accelerator, rows["training"])
    plain = encode_plain(tokenizer, paragraphs, longest)
    texts: dict[str, Sequence[Encoded]] = {**rows, "plain text": plain}

    set_seed(config.run.seed)
    steps = total_steps(options, packing.steps(texts["training"], options.batch_size, config.run.seed))
    adapted = apply_method(base, config.method, Setting(tokenizer, steps))
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing.virtual, packing.boundary = virtual_tokens(adapted), rope_boundary(adapted)
    structure = structure_of(adapted)
    run = Run.start(config, config.run, f"{config.method.method}-{path_name(name)}", accelerator)
    run.data = text_sum(texts.values())
    result = fit(config, run, accelerator, PackedCausalLM(adapted, config.model.attention), packing, texts, tokenizer)
    clock |= result.clock
    sections = (
        [data_section(run, readings, rows), structure_section(run, structure, result.audit, config.method)]
        if config.run.report
        else []
    )
    results = costs_of(run, config, result, structure, clock)

    # The evaluation is of the files that were written: base and adapter are read back, in the place of these.
    del result, adapted, base
    accelerator.free_memory()
    tuned = placed(load_tuned(run.path, name, quantized, read), accelerator)
    before = plain_base(tuned, name, accelerator) if config.generation.answer_base else None
    both = before_and_after(tuned, before, tokenizer, prompts, config.generation, accelerator)
    if accelerator.is_main_process:
        if config.merge:
            with written_whole(run.path / "merged") as part:
                write_merged(run.path / "adapter", name, quantized, part)
        clock["evaluated"] = time.perf_counter()
        finish_report(run, config, sections, both, results, clock)
    accelerator.end_training()


def packing_of(config: TrainConfig, base: PreTrainedModel, accelerator: Accelerator, training: Rows) -> Packing:
    """Settles whether conversations are packed, or padded because the model cannot be packed: then it says so.

    Raises:
        LabError: the model can be trained in neither way, or not as the options ask.
    """
    options = config.method
    packing = Packing(
        config.data.tokens_per_batch, accelerator.process_index, accelerator.num_processes, boundary=rope_boundary(base)
    )
    adapt = None
    if METHODS[options.method].kind == "soft prompt":
        few = dataclasses.replace(options, prompt_init="random", prompt_text=None, virtual_tokens=FEW)
        adapt = partial(apply_method, options=few, setting=Setting(cast(PreTrainedTokenizerBase, None), 1))
    attention, why = settle(base, accelerator, config.model.packing, adapt)
    packing.padded = attention != NAME
    if packing.padded and options.method == "prefix_tuning" and config.model.gradient_checkpointing:
        raise LabError(f"--gradient-checkpointing: keeps no prefix of conversations that are padded ({why}); take "
                       "--no-gradient-checkpointing --no-fit-memory, or --method prompt_tuning")  # fmt: skip
    if accelerator.is_main_process:
        share = packing.padding(training, config.training.batch_size, config.run.seed)
        print_rows(why, attention, share)
    return packing


def check_machine(config: TrainConfig, accelerator: Accelerator) -> None:
    """Makes sure that method and attention can run on this machine and under this launcher, before any work is done.

    Raises:
        LabError: it cannot; the line says what to take instead.
    """
    options, kernel = config.method, config.model.attention
    kind, method = accelerator.distributed_type, METHODS[options.method]
    check_optimizer(config, accelerator.mixed_precision, kind in (DistributedType.DEEPSPEED, DistributedType.FSDP))
    if kernel not in ("auto", "blocks") and accelerator.device.type != "cuda":
        raise LabError(f"--attention {kernel}: needs a GPU; take auto")
    if kernel == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise LabError("--attention flash: needs the package flash_attn, which is not installed; take auto")
    if config.training.compile and (kernel == "blocks" or accelerator.device.type != "cuda"):
        # Another graph for each number of blocks: after eight torch gives up, and three tiny steps have taken minutes.
        raise LabError("--compile: attention in blocks would be compiled for row after row; drop it, or take a GPU and "
                       "another --attention")  # fmt: skip
    stage_3 = zero_stage(accelerator) == 3
    if method.whole_gradients and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise LabError(
            f"--method {options.method}: chooses ranks by whole gradients, which DeepSpeed and FSDP cut up; launch "
            "with multi_gpu.yaml, or take lora"
        )
    if (method.trains_head or options.train_head) and stage_3:
        raise LabError("a head that trains is not supported under DeepSpeed ZeRO-3: launch with deepspeed_zero2.yaml")
    if method.quantized and (stage_3 or kind == DistributedType.FSDP):
        raise LabError(
            f"--method {options.method}: FSDP and ZeRO-3 do not spread 4-bit weights; launch with multi_gpu.yaml or "
            "deepspeed_zero2.yaml, or take lora"
        )
    if method.quantized:
        check_quantization()


def fit(
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    model: PackedCausalLM,
    packing: Packing,
    texts: Mapping[str, Sequence[Encoded]],
    tokenizer: PreTrainedTokenizerBase,
) -> Fitted:
    """Trains what the method left trainable, and writes `adapter/` or `model/` under the run.

    `texts` are conversations by "training" and "validation", and "plain text".

    Raises:
        RunStopped: the loss is NaN, or something frozen has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    options, initial = config.training, initial_update(model.model)
    optimizer = optimizer_of(config, model.parameters())
    also = METHODS[config.method.method].also
    state = None if also is None else also(model.model, optimizer)
    source = packing.steps(texts["training"], options.batch_size, config.run.seed)
    fitting = Fitting.start(run, accelerator, model, optimizer, source, options, config.run.seed, "tokens", state)
    loop = fitting.loop
    if loop.step_number == 0:
        # Of the base: an update starts at zero, and a soft prompt is left out.
        model.prompted = False
        plain = dataclasses.replace(packing, virtual=0, boundary=rope_boundary(base_of(model.model)))
        loop.evaluated(held_out_losses(fitting, plain, texts))
        model.prompted = True
    first, timed = loop.step_number + 1, list[float]()
    for row in loop.batches():
        loss = fitting.model(row.to(accelerator.device)) * row.weight
        loop.step(loss, row.tokens)
        if len(timed) < 2 and loop.step_number == first + TIMED * len(timed):
            timed.append(time.perf_counter())
            if len(timed) == 2 and accelerator.is_main_process:
                print_expected_time((timed[1] - timed[0]) / TIMED, loop.total - loop.step_number)
        if loop.evaluation_due:
            loop.evaluated(held_out_losses(fitting, packing, texts), watch="validation/loss")
    tuned = cast(PackedCausalLM, fitting.plain).model
    with whole_outside_layers(fitting.plain):
        prompt = computed_prompt(tuned)
    return fitting.finish(lambda weights: save_tuned(tuned, weights, tokenizer, run.path, initial, prompt))


def held_out_losses(fitting: Fitting, packing: Packing, texts: Mapping[str, Sequence[Encoded]]) -> dict[str, float]:
    """Measures `NAME/loss`, in nats per token, of all but the training text, and the perplexity of the validation."""
    found = {
        f"{name}/loss": mean_loss(fitting.model, packing.rows(encoded), fitting.accelerator)
        for name, encoded in texts.items()
        if encoded and name != "training"
    }
    fitting.model.train()
    # exp(710) is more than a float holds.
    return {**found, "validation/perplexity": math.exp(min(found["validation/loss"], 700.0))}
