"""Every option of the lab, once, with its help text and default. Imports nothing heavy: `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from labs_common.options import (
    CommandOptions,
    ComparisonOptions,
    Count,
    CountOrNone,
    CountOrZero,
    NotNegative,
    OnBadData,
    PageOptions,
    PlanOptions,
    RunOptions,
    TrainingOptions,
    number,
    one_of,
)

Method = Annotated[str, one_of("llm_peft_fa.methods:METHODS")]
Optimizer = Annotated[str, one_of("llm_peft_fa.optimizers:OPTIMIZERS")]
PromptInit = Literal["random", "text", "vocabulary"]
Attention = Literal["auto", "blocks", "flash", "varlen", "flex"]
Packing = Literal["auto", "always", "never"]
Which = Literal["first", "last", "both"]
OnTooLong = Literal["error", "truncate", "skip"]
Thinking = Literal["off", "keep"]


@dataclass
class ModelOptions:
    """The base model and its chat template."""

    model: str = "tiny"
    """tiny (made on first use, offline), a Hugging Face id such as google/gemma-2-2b, or a directory."""
    template: str = "auto"
    """Chat template: auto is the tokenizer's own, or plain if it has none; plain; or a file with a Jinja template."""
    thinking: Thinking = "off"
    """Of models that think before they answer: off answers at once (Qwen's enable_thinking=False); keep leaves it to
    the model, and the <think>…</think> of the data's answers is learnt. Saved with the result, for its answers too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    fit_memory: bool = True
    """On a GPU: turn --gradient-checkpointing on if a row would not fit without it, and choose --tokens-per-batch if it
    is not given; --plan shows how. On a CPU nothing is chosen."""
    packing: Packing = "auto"
    """Rows of many conversations without padding, which see nothing of each other: auto if they are shown to compute
    what the model's own attention computes for each alone, else padded batches; always stops then; never pads."""
    attention: Attention = "auto"
    """How packed conversations attend: blocks (anywhere), flash (the package flash_attn), varlen (PyTorch's own), flex
    (compiled; soft-caps and windows); auto takes the first that works on the GPU and agrees with blocks, and says
    which. prefix_tuning takes blocks."""


@dataclass
class ReadingOptions:
    """Reading and cleaning of data files."""

    data: str | None = None
    """Conversations: a .json, .jsonl or .parquet file, a directory, or a Hugging Face id such as
    universitytehran/SlimOrca. Without it, Persian tasks are generated."""
    split: str = "train"
    """Split of the directory or dataset that --data names; auto, of evaluate: test, else validation, else train."""
    columns: tuple[str, ...] = ()
    """The columns to read, where they are not found by themselves: conversations=dialogue, or prompt=question
    answer=reply and perhaps system=rules."""
    limit: CountOrZero = 0
    """Take at most this many usable conversations of --data, and of each of --mix, the first, and read no further; 0
    takes all."""
    streaming: bool = False
    """Read a Hugging Face dataset row by row, without a copy of it on this disk; with --limit only so much of it. What
    was read is kept, and not asked for again."""
    normalise: bool = True
    """Persian normalisation: Arabic letters and digits to Persian ones, half-spaces tidied; diacritics stay, and so do
    lines in Arabic."""
    on_bad_data: OnBadData = "error"
    """What to do with rows that cannot be used: stop and name them, or leave them out and count them."""


@dataclass
class DataOptions(ReadingOptions):
    """The conversations to train and to validate on."""

    mix: tuple[str, ...] = ()
    """Further conversations to train on, each with its share of all: other.jsonl:0.3 someone/name:0.1. What is left is
    of --data, which is not cut for it; of the others as many are drawn as make their share."""
    validation_data: str | None = None
    """Conversations to validate with; as --data. By default the files or split of that name which --data has. Half of
    them is for the test if that has no data of its own."""
    validation_split: str = "validation"
    """Split of the directory or Hugging Face dataset that --validation-data names."""
    validation_fraction: Annotated[float, number(float, "(0, 1)")] = 0.05
    """Share of --data set aside for validation, and as much for the test, where they have no data of their own."""
    validation_limit: CountOrZero = 2000
    """Most conversations to validate with, drawn by the seed: they are measured after every epoch; 0 takes all."""
    test_data: str | None = None
    """Conversations to take test prompts from, by which nothing is chosen; as --validation-data."""
    test_split: str = "test"
    """Split of the directory or Hugging Face dataset that --test-data names."""
    conversations: Count = 3000
    """Number of conversations that are generated when there is no --data."""
    max_length: Count = 4096
    """Longest conversation, in tokens."""
    on_too_long: OnTooLong = "error"
    """What to do with a longer one: stop and name it, cut its end off, or leave it out."""
    tokens_per_batch: CountOrZero = 0
    """Conversations are packed, without padding, into rows of up to this many tokens; a longer one fills its own. 0 is
    2048, and on a GPU what fits its memory. The result does not depend on it."""
    plain_text: Path | None = None
    """Text file of the base's world, a paragraph per line: its loss before and after shows what was forgotten. With the
    tiny base it is generated."""


@dataclass
class MethodOptions:
    """The fine-tuning method. An option that is not given has the method's own default; config.yaml tells it."""

    method: Method = "lora"
    """Fine-tuning method: soft prompts, low-rank and other small updates (qlora on a 4-bit base), or without PEFT some
    layers or the full model; docs/llm_peft_fa.md says when to use which."""
    rank: CountOrNone = None
    """LoRA family: rank of the update; of adalora, the mean rank at the end."""
    alpha: Annotated[float | None, number(float, "(0, inf)", None)] = None
    """LoRA family: the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: Annotated[float | None, number(float, "[0, 1)", None)] = None
    """LoRA family and oft: dropout before the update, in training."""
    target_modules: tuple[str, ...] | None = None
    """LoRA family, oft, ia3: names of the layers to adapt, such as q_proj v_proj; all-linear is every linear layer but
    the vocabulary's."""
    block_size: CountOrNone = None
    """oft: width of the rotated blocks; it must divide the layers' input widths."""
    virtual_tokens: CountOrNone = None
    """Soft prompts: number of virtual tokens before each conversation."""
    prompt_init: PromptInit | None = None
    """prompt_tuning: random, text (the embeddings of --prompt-text) or vocabulary (of random tokens). prefix_tuning:
    random, or text (the keys and values that the base computes for --prompt-text)."""
    prompt_text: str | None = None
    """The text of --prompt-init text, repeated or cut to --virtual-tokens."""
    encoder_width: Annotated[int | None, number(int, "[0, inf)", None)] = None
    """p_tuning, prefix_tuning: width of the network that makes the virtual tokens in training. 0: prefix_tuning without
    projection, p_tuning with the model's width."""
    layers: CountOrNone = None
    """layers: number of decoder layers that train at each end."""
    which: Which | None = None
    """layers: the end that trains: first, last or both."""
    train_embeddings: bool = False
    """layers: train the token embeddings too."""
    train_final_norm: bool = False
    """layers: train the final norm too."""
    train_head: bool = False
    """layers: train the vocabulary projection too."""
    pure_bf16: bool = False
    """layers, full: keep what trains in bf16 instead of float32, rounded at random after each step so that small steps
    are not lost; with --optimizer adamw_8bit or paged_adamw_8bit a third of the memory."""


@dataclass
class GenerationOptions:
    """Generation of answers for the evaluation."""

    prompts: Path | None = None
    """Text file with one prompt per line to be answered before and after."""
    test_prompts: CountOrZero = 150
    """Number of prompts of the test data that are answered."""
    max_new_tokens: CountOrZero = 0
    """Longest answer, in tokens; 0: what 99 in 100 of the data's own answers need, from 64 to 1,024."""
    generation_batch: Count = 32
    """Prompts answered at a time."""
    answer_base: bool = True
    """Answer the prompts with the base model too."""
    also_instruct: str | None = None
    """Answer them also with this model, in its own chat template: the instruct model of the base's maker, such as
    google/gemma-2-2b-it. It is loaded beside the other."""


@dataclass
class LanguageTrainingOptions(TrainingOptions):
    """Optimizer, schedule and checkpoints."""

    optimizer: Optimizer = "adamw"
    """adamw; adamw_8bit keeps its moments in 8 bits, a quarter of their memory (extra quantization); paged_adamw_8bit
    keeps them in the host's memory too, from which a GPU fetches them, slower."""
    epochs: Count = 2
    """Passes over the training data."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes the method's own, which differs between the tiny base
    and a real one (see docs/llm_peft_fa.md)."""


@dataclass
class TrainConfig:
    """Fine-tunes a language model on conversations and reports what that changed.

    `python -m llm_peft_fa.train` alone works offline in a few minutes: it makes a tiny base model and Persian
    tasks, and ends with the path of a report. The real thing is the same command:
    `accelerate launch -m llm_peft_fa.train --model google/gemma-2-2b --data chats.jsonl --learning-rate 2e-4`.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: LanguageTrainingOptions = field(default_factory=LanguageTrainingOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    merge: bool = False
    """Also write the base with the update merged in, as a model that transformers loads; llm_peft_fa.export does so
    later."""
    show_batch: bool = False
    """Print the first batch with the learnt tokens in colour, and stop."""


@dataclass
class SubjectOptions:
    """The model that answers: a finished run, an adapter, or any model."""

    checkpoint: Annotated[Path | None, tyro.conf.arg(aliases=["--run"])] = None  # as it was called before
    """Directory of a finished run, or of an adapter or model that was exported; by default the newest run under
    runs/."""
    adapter: Path | None = None
    """Directory of any adapter that PEFT loads, in the place of a run."""
    model: str | None = None
    """Any model or adapter (Hugging Face id or directory), in the place of a run."""


@dataclass
class EvaluateConfig:
    """Measures a finished run, any adapter or any model, and its base beside it: loss, answers, scores.

    `python -m llm_peft_fa.evaluate --checkpoint runs/NAME --data test.jsonl`
    `python -m llm_peft_fa.evaluate --adapter DIRECTORY --judge-file to_rate.csv`
    `python -m llm_peft_fa.evaluate --checkpoint runs/NAME --also-instruct google/gemma-2-2b-it --lm-eval persian`
    `python -m llm_peft_fa.evaluate --model google/gemma-2-2b-it --base google/gemma-2-2b --data test.jsonl`
    """

    subject: SubjectOptions = field(default_factory=SubjectOptions)
    base: str | None = None
    """The model to compare with; by default the one that the run or adapter was made from."""
    template: str = "auto"
    """Chat template, as in training; auto is the one that was saved with the run."""
    output: Path | None = None
    """Directory of evaluation.json and report.html; by default evaluation/ under the run or adapter."""
    judge_file: Path | None = None
    """Write a CSV table for people to rate, in a spreadsheet or by llm_peft_fa.rate: prompts with both answers as A and
    B in random order. Which is which goes to a .key.json beside it."""
    lm_eval: str | None = None
    """Tasks of lm-evaluation-harness, separated by commas, to measure too (extra `lm-eval`): names, .yaml files of your
    own, or persian for those that it ships in Persian. The harness loads their data from the hub."""
    lm_eval_limit: CountOrNone = None
    """Examples of each of those tasks; all if not given."""
    max_length: Count = 4096
    """Longer conversations are left out of the loss."""
    reading: ReadingOptions = field(default_factory=lambda: ReadingOptions(split="auto"))
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    seed: CountOrZero = 0
    """Seed of the choice of prompts; of a run it is the run's own."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class RateConfig:
    """Shows a person the pairs of a --judge-file one by one, on a page of this machine, and keeps what is chosen.

    `python -m llm_peft_fa.rate to_rate.csv` serves the page; closed and started again, it goes on.
    `python -m llm_peft_fa.rate to_rate.csv --read-ratings` says who won.
    """

    file: tyro.conf.Positional[Path] = Path("to_rate.csv")
    """The table that llm_peft_fa.evaluate --judge-file wrote; ratings made in a spreadsheet count too."""
    read_ratings: bool = False
    """Say how often which model was better, with a confidence interval and a test, in the place of the page."""
    port: Annotated[int, number(int, "[0, 65535]")] = 7861
    """Port to listen on."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ChatConfig:
    """Talks to a finished run, an adapter or any model. /reset forgets the conversation, /quit leaves.

    `python -m llm_peft_fa.chat --checkpoint runs/NAME`
    """

    subject: SubjectOptions = field(default_factory=SubjectOptions)
    system: str | None = None
    """System message."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    temperature: NotNegative = 0.0
    """0 always takes the likeliest token; higher values vary more."""
    seed: CountOrZero = 0
    """Seed of the variation."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class DemoConfig:
    """A chat page in the browser: pick base, runs or models and ask two of them side by side (extra `demo`).

    `python -m llm_peft_fa.demo`
    """

    checkpoint: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--run", "--runs"])] = ()  # as it was called before
    """Directories of finished runs, or of exported adapters and models; by default all runs under runs/, newest
    first."""
    models: tuple[str, ...] = ()
    """Further models or adapters: Hugging Face ids or directories."""
    page: PageOptions = field(default_factory=PageOptions)
    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ExportConfig:
    """Writes a finished run so that others can use it: a merged model or an adapter, with a model card, or on the hub.

    `python -m llm_peft_fa.export runs/NAME --to merged`
    `python -m llm_peft_fa.export runs/NAME --to hub --repo someone/name`
    """

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Directory of a finished run, or of any adapter of PEFT; by default the newest run under runs/."""
    to: Literal["merged", "adapter", "hub"] = "merged"
    """merged: one model that transformers, vLLM and llama.cpp load; adapter: what PEFT loads onto the base; hub: the
    adapter, or the whole model of layers and full, also pushed to --repo with the token of `hf auth login`."""
    merge: bool = False
    """--to hub: push the merged model in the place of the adapter."""
    repo: str | None = None
    """--to hub: where to push, as someone/name; it is made if it does not exist."""
    private: bool = True
    """--to hub: make a repository that others do not see; one that exists stays as it is."""
    output: Path | None = None
    """Directory to write, which must not exist yet; by default exported-model/ or exported-adapter/ under the run."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class InspectConfig:
    """Says what is in a model (parts, what a method would train, base or instruct) and in a data file.

    `python -m llm_peft_fa.inspect --model google/gemma-2-2b --method layers`
    `python -m llm_peft_fa.inspect --data chats.jsonl --bases google/gemma-2-2b google/gemma-2-2b-it`
    """

    model: str = "tiny"
    """The model: its parts are shown, and lengths are counted with its tokenizer. Its weights are not loaded."""
    method: MethodOptions = field(default_factory=MethodOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    template: str = "auto"
    """Chat template, as in training."""
    thinking: Thinking = "off"
    """Thinking of models that think, as in training."""
    bases: tuple[str, ...] = ()
    """Further models (google/gemma-2-2b meta-llama/Llama-3.2-3B, or directories) whose tokens per word of --data are
    counted."""
    samples: CountOrZero = 5
    """Number of conversations that are shown."""
    output: Path | None = None
    """Directory of report.html; by default a new one under runs/."""
    seed: CountOrZero = 0
    """Seed of the choice of samples."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class ComparedOptions:
    """The options that may follow a method's name after colons."""

    method: MethodOptions = field(default_factory=MethodOptions)
    learning_rate: NotNegative = 0.0
    """Highest learning rate."""


@dataclass
class CompareConfig:
    """Fine-tunes the same base with several methods on the same data and budget, and writes one report.

    `python -m llm_peft_fa.compare` alone compares a useful subset on the tiny base in some minutes. The same command
    started again goes on where it was stopped. With a real model:
    `python -m llm_peft_fa.compare --methods lora,dora,prefix_tuning,layers:which=last --model google/gemma-2-2b
    --data chats.jsonl --seeds 3 --search 3`
    """

    methods: str = "prompt_tuning,prefix_tuning,ia3,lora,dora,layers:layers=1,full"
    """Methods, separated by commas; options of one follow after colons: lora:rank=64,layers:which=last:layers=1."""
    search: CountOrZero = 0
    """Learning rates tried for each method, threefold steps around its own; 0 takes its own."""
    search_share: Annotated[float, number(float, "(0, 1]")] = 0.25
    """Share of a run's steps that each tried learning rate gets."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: LanguageTrainingOptions = field(default_factory=LanguageTrainingOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)
