import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from labs_common.errors import LabError
from llm_peft_fa import base, general_text
from llm_peft_fa.answers import (
    LONGEST_LIMIT,
    SHORTEST_LIMIT,
    answer_limit,
    answers,
    before_and_after,
    collected_prompts,
    streamed_answer,
)
from llm_peft_fa.base import load_model, load_tokenizer, longest_row, positions
from llm_peft_fa.config import GenerationOptions, MethodOptions, TrainConfig
from llm_peft_fa.data import Conversation, Reading
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.metrics import Prompt
from llm_peft_fa.saved import plain_base
from llm_peft_fa.templates import encode_prompt

TEXTS = {
    language: (Path(general_text.__file__).parent / f"general_{language.lower()}.txt").read_text("utf-8").splitlines()
    for language in ("Persian", "English")
}
QUESTION = [{"role": "user", "content": "پایتخت ایران کجاست؟"}]


def test_batched_answers_equal_transformers_one_by_one(model_dir: Path) -> None:
    tokenizer, model = load_tokenizer(str(model_dir)), load_model(str(model_dir))
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    prompts = [Prompt([{"role": "user", "content": "کتاب " * n}]) for n in (9, 1, 20, 3, 5)]
    options = GenerationOptions(max_new_tokens=12, generation_batch=2)
    said = answers(model, tokenizer, prompts, options, Accelerator(cpu=True))
    for prompt, answer in zip(prompts, said, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt.messages)])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert answer.text == tokenizer.decode(out, skip_special_tokens=True).strip()
        stopped = {tokenizer.eos_token_id, *np.atleast_1d(plain.generation_config.eos_token_id).tolist()}
        assert answer.truncated == (not stopped & set(out.tolist()))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_batched_answers_of_soft_prompts_equal_one_by_one(model_dir: Path, method: str) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(model_dir))
    options = resolved(MethodOptions(method=method, virtual_tokens=5, prompt_init="random"))
    model = apply_method(load_model(str(model_dir)), options, Setting(tokenizer, 5))
    prompts = [Prompt([{"role": "user", "content": "کتاب " * n}]) for n in (9, 1, 20, 3, 9)]
    batched, single = (
        answers(
            model, tokenizer, prompts, GenerationOptions(max_new_tokens=8, generation_batch=size), Accelerator(cpu=True)
        )
        for size in (4, 1)
    )
    assert batched == single
    if "llama" in str(model_dir):  # the random Gemma ends its answers at once
        assert len({answer.text for answer in batched}) > 1


def test_rows_and_answers_stay_within_the_positions_of_a_model(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, model = load_tokenizer(str(llama_dir)), load_model(str(llama_dir))
    model.config.max_position_embeddings = 60
    usual, asked = model.generate, []

    def generate(**options: Any) -> torch.Tensor:
        asked.append((options["input_ids"].shape[1], options["max_new_tokens"]))
        return usual(**options)

    monkeypatch.setattr(model, "generate", generate)
    prompts = [Prompt([{"role": "user", "content": "کتاب " * n}]) for n in (1, 10, 90)]
    options = GenerationOptions(max_new_tokens=30, generation_batch=1)
    answers(model, tokenizer, prompts, options, Accelerator(cpu=True))
    said = "answering: 1 of 3 prompts lost their beginning: the model reads 60 tokens"
    assert [line for line in capsys.readouterr().err.splitlines() if "beginning" in line] == [said]
    answers(model, tokenizer, prompts[:1], options, Accelerator(cpu=True))
    assert "beginning" not in capsys.readouterr().err
    (short, most), middle, (cut, left), _ = asked
    assert (most, left) == (30, 30)
    assert short < middle[0] < cut == 30, "a prompt that is too long loses its beginning"
    assert all(sum(one) <= 60 for one in asked)
    with pytest.raises(LabError, match="tokens, more than the model reads"):
        list(streamed_answer(model, tokenizer, prompts[-1].messages, 5))
    monkeypatch.setattr(base, "base_config", lambda name: model.config)
    config = TrainConfig()
    assert longest_row(config) == 60
    config.method.virtual_tokens = 8
    assert longest_row(config) == 52
    config.data.max_length = 40
    assert longest_row(config) == 40


ROPE = {"rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Qwen2Config(max_position_embeddings=100), 100),
        (Qwen2Config(max_position_embeddings=100, rope_parameters=ROPE | {"rope_type": "yarn"}), 400),
        (
            Qwen2Config(
                max_position_embeddings=400,
                rope_parameters=ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 100},
            ),
            400,
        ),
        # DeepSeek-Coder and Chinese-Alpaca-2-16K count the factor, Vicuna-16K does not; Gemma 3's is one layer type's.
        (LlamaConfig(max_position_embeddings=400, rope_scaling={"type": "linear", "factor": 4.0}), 400),
        (
            LlamaConfig(
                max_position_embeddings=100, max_sequence_length=400, rope_scaling={"type": "linear", "factor": 4.0}
            ),
            400,
        ),
        (
            Gemma3TextConfig(
                max_position_embeddings=800,
                rope_parameters={
                    "full_attention": ROPE | {"rope_type": "linear"},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            ),
            800,
        ),
        (
            LlamaConfig(
                max_position_embeddings=800,
                rope_parameters=ROPE
                | {"rope_type": "llama3", "original_max_position_embeddings": 100}
                | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            ),
            800,
        ),
        (FalconConfig(alibi=True), sys.maxsize),
        (FalconConfig(alibi=False), 2048),
        (BloomConfig(), sys.maxsize),
        (GPT2Config(n_positions=300), 300),
    ],
)
def test_scaled_rotary_positions_count_as_scaled_and_alibi_has_no_limit(config: Any, expected: int) -> None:
    assert positions(config) == expected


def test_own_prompts_come_first(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("سلام\n\n خوبی؟ \n", encoding="utf-8")
    answer = {"role": "assistant", "content": "تهران"}
    reading = Reading("a", [Conversation([*QUESTION, answer], f"a:{n}", verifiable=True) for n in range(9)])
    found = collected_prompts(reading, GenerationOptions(prompts=file, test_prompts=3), 0)
    assert [prompt.messages[0]["content"] for prompt in found[:2]] == ["سلام", "خوبی؟"]
    assert found[0].reference is None
    assert [(prompt.messages, prompt.reference, prompt.verifiable) for prompt in found[2:]] == [
        (QUESTION, "تهران", True)
    ] * 3
    for text in ("", None):
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        with pytest.raises(LabError, match=r"prompts\.txt"):
            collected_prompts(reading, GenerationOptions(prompts=file), 0)


def test_answers_are_as_long_as_those_of_the_data(llama_dir: Path) -> None:
    tokenizer = load_tokenizer(str(llama_dir))
    of = lambda count: Prompt(QUESTION, " ".join(["کتاب"] * count))  # noqa: E731
    needed = len(tokenizer("کتاب " * 199 + "کتاب", add_special_tokens=False).input_ids) + 1
    assert SHORTEST_LIMIT < needed < LONGEST_LIMIT
    assert answer_limit(tokenizer, [of(200)] * 3 + [of(1)] * 97, GenerationOptions()) == needed
    assert answer_limit(tokenizer, [of(400)] + [of(200)] * 99, GenerationOptions()) == needed, "one in a hundred is cut"
    assert answer_limit(tokenizer, [of(1)], GenerationOptions()) == SHORTEST_LIMIT
    assert answer_limit(tokenizer, [of(5000)], GenerationOptions()) == answer_limit(tokenizer, [], GenerationOptions())
    assert answer_limit(tokenizer, [of(200)], GenerationOptions(max_new_tokens=7)) == 7


@pytest.fixture(scope="module")
def read_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts everyday text better than by chance, after a few steps on it."""
    folder = tmp_path_factory.mktemp("read")
    tokenizer, model = load_tokenizer(str(llama_dir)), AutoModelForCausalLM.from_pretrained(llama_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for line in TEXTS["Persian"][:4] + TEXTS["English"][:4]:
        ids = torch.tensor([tokenizer(line, add_special_tokens=False).input_ids])
        for _ in range(4):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_an_instruct_model_answers_beside_the_others_and_text_is_measured(
    read_dir: Path, gemma_dir: Path, method: str
) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(read_dir))
    options = {"virtual_tokens": 5, "prompt_init": "random"} if method != "lora" else {"rank": 2}
    model = apply_method(
        load_model(str(read_dir)), resolved(MethodOptions(method=method, **options)), Setting(tokenizer, 5)
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    prompts = [Prompt(QUESTION, "تهران", True), Prompt([{"role": "user", "content": "مخالف شب چیست؟"}], "روز", True)]
    asked = GenerationOptions(max_new_tokens=3, also_instruct=str(gemma_dir))
    both = before_and_after(model, plain_base(model, str(read_dir)), tokenizer, prompts, asked, Accelerator(cpu=True))
    assert list(both.said) == ["before", "instruct", "after"]
    alone = {side: answers(load_model(str(folder)), load_tokenizer(str(folder)), prompts, asked, Accelerator(cpu=True))
             for side, folder in (("before", read_dir), ("instruct", gemma_dir))}  # fmt: skip
    assert {side: both.said[side] for side in alone} == alone
    for side, folder in (("before", read_dir), ("instruct", gemma_dir)):
        assert text_losses(folder) == pytest.approx(
            {name: value for name, value in both.scores[side].items() if "text loss" in name}, rel=1e-4
        )
    assert {"Persian text loss", "English text loss"} <= both.scores["before"].keys()
    assert "Persian text loss" not in both.scores["instruct"], "it is random: no better than chance"
    assert both.scores["after"]["Persian text loss"] != both.scores["before"]["Persian text loss"]
    assert set(both.kinds["after"]) == {"capital", "opposite"}


def text_losses(folder: Path) -> dict[str, float]:
    """By transformers' own loss of each paragraph; those no better than chance are left out."""
    tokenizer, model = (
        load_tokenizer(str(folder)),
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
    )
    found = {}
    for language, lines in TEXTS.items():
        total, count = 0.0, 0
        for line in lines:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(line, add_special_tokens=False).input_ids]])
            total += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        if total / count < np.log(model.config.vocab_size):
            found[f"{language} text loss"] = total / count
    return found
