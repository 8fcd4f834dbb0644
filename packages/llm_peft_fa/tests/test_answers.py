from pathlib import Path

import pytest
import sacrebleu
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from labs_common.errors import LabError
from llm_peft_fa.answers import Prompt, answers, collected_prompts, scores
from llm_peft_fa.base import load_model, load_tokenizer
from llm_peft_fa.config import GenerationOptions, MethodOptions
from llm_peft_fa.data import Conversation, Reading
from llm_peft_fa.methods import Setting, apply_method, resolved
from llm_peft_fa.templates import encode_prompt

QUESTION = [{"role": "user", "content": "پایتخت ایران کجاست؟"}]


def test_scores_against_sacrebleu_and_by_hand() -> None:
    prompts = [
        Prompt(QUESTION, "تهران", True),
        Prompt(QUESTION, "علي و كتاب", True),
        Prompt(QUESTION, "الف ب ج"),
        Prompt(QUESTION),
    ]
    said = ["تهران.", "علی  و کتاب", "الف ب ب", "الف"]
    found = scores(prompts, said)
    assert found["exact match"] == 1.0, "a full stop, spacing and Arabic letters are not mistakes"
    references = ["تهران", "علي و كتاب", "الف ب ج"]
    assert found["chrF"] == pytest.approx(sacrebleu.metrics.CHRF().corpus_score(said[:3], [references]).score)
    assert found["distinct-1"] == 6 / 8
    assert found["distinct-2"] == 4 / 4
    assert found["words per answer"] == 2.0
    assert scores(prompts[:1], ["تهران بزرگ"])["exact match"] == 0.0
    assert "exact match" not in scores(prompts[2:], said[2:])
    assert scores(prompts[3:], [""]) == {"words per answer": 0.0}


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
        assert answer == tokenizer.decode(out, skip_special_tokens=True).strip()


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
        assert len(set(batched)) > 1


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
