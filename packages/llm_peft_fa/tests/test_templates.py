from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from labs_common.errors import LabError
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.data import Conversation, Reading
from llm_peft_fa.report import show_learnt
from llm_peft_fa.templates import Encoded, check_before_training, encode, encode_all, encode_prompt, text_sum

pytestmark = pytest.mark.quick

CHAT = [
    {"role": "system", "content": "کوتاه بگو."},
    {"role": "user", "content": "پایتخت ایران کجاست؟"},
    {"role": "assistant", "content": "تهران"},
    {"role": "user", "content": "و ژاپن؟"},
    {"role": "assistant", "content": "توکیو\nدر شرق"},
]


def learnt_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[str]:
    """The learnt stretches, decoded."""
    encoded = encode(tokenizer, Conversation(messages, "here"))
    stretches: list[list[int]] = []
    before = False
    for token, learnt in zip(encoded.ids, encoded.learnt, strict=True):
        if learnt:
            if not before:
                stretches.append([])
            stretches[-1].append(token)
        before = learnt
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_other_tokens_or_other_marks_give_another_sum() -> None:
    texts = (
        [Encoded([1, 2], [False, True], "a")],
        [Encoded([2, 2], [False, True], "a")],
        [Encoded([1, 2], [True] * 2, "a")],
    )
    assert len({text_sum([text]) for text in texts}) == 3
    assert text_sum(texts) == text_sum([*texts, []])


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_exactly_the_answers_and_their_ends_are_learnt(model_dir: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(model_dir), template)
    end = "<eos>" if template == "plain" else "<end_of_turn>"
    assert learnt_text(tokenizer, CHAT) == [f"تهران{end}", f"توکیو\nدر شرق{end}"]


def test_the_same_answer_elsewhere_is_not_learnt(model_dir: Path) -> None:
    # A search for the answer's text, or for the marker before it, would find the user's words.
    tokenizer = load_tokenizer(str(model_dir))
    asked = "بگو <start_of_turn>model\nتهران<end_of_turn> تهران"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "تهران"}]
    assert learnt_text(tokenizer, messages) == ["تهران<end_of_turn>"]
    encoded = encode(tokenizer, Conversation(messages, "here"))
    assert sum(encoded.learnt) == len(tokenizer("تهران<end_of_turn>", add_special_tokens=False).input_ids)


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_one_bos_and_the_prompt_is_the_beginning(model_dir: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(model_dir), template)
    whole = encode(tokenizer, Conversation(CHAT, "here")).ids
    prompt = encode_prompt(tokenizer, CHAT[:-1])
    assert whole[: len(prompt)] == prompt
    assert whole.count(tokenizer.bos_token_id) == 1 == prompt.count(tokenizer.bos_token_id)
    assert whole[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_adds_bos_itself_gets_one(model_dir: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $0", special_tokens=[("<bos>", 2)])
    assert tokenizer("").input_ids == [2]
    assert encode(tokenizer, Conversation(CHAT, "here")).ids[:2].count(2) == 1


def test_gemma_has_no_system_role_so_it_goes_into_the_first_question(gemma_dir: Path, llama_dir: Path) -> None:
    text = {}
    for folder in (gemma_dir, llama_dir):
        tokenizer = load_tokenizer(str(folder))
        text[folder] = tokenizer.decode(encode(tokenizer, Conversation(CHAT, "here")).ids)
    assert "<start_of_turn>user\nکوتاه بگو.\n\nپایتخت ایران کجاست؟<end_of_turn>" in text[gemma_dir]
    assert "<start_of_turn>system\n\nکوتاه بگو.<end_of_turn>" in text[llama_dir]


def test_a_template_that_drops_the_system_message_does_not_lose_it(llama_dir: Path) -> None:
    tokenizer = load_tokenizer(str(llama_dir))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    assert "کوتاه بگو." in tokenizer.decode(encode(tokenizer, Conversation(CHAT, "here")).ids)


def test_troubles_are_caught_before_training(gemma_dir: Path) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    stops = {1, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    good = encode(tokenizer, Conversation(CHAT, "a.jsonl:3"))
    check_before_training(tokenizer, [good], stops)
    template = tokenizer.chat_template

    tokenizer.chat_template = template.replace("<end_of_turn>", "")
    with pytest.raises(LabError, match="never lets the model learn to stop"):
        check_before_training(tokenizer, [encode(tokenizer, Conversation(CHAT, "a"))], stops)

    tokenizer.chat_template = template.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    with pytest.raises(LabError, match="<bos> twice"):
        check_before_training(tokenizer, [encode(tokenizer, Conversation(CHAT, "a"))], stops)

    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(LabError, match=r"a\.jsonl:3.*nothing in it to learn"):
        check_before_training(tokenizer, [good, encode(tokenizer, Conversation(CHAT[1:], "a.jsonl:3"))], stops)

    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(LabError, match="rewrites earlier turns"):
        encode(tokenizer, Conversation(CHAT, "a"))


def test_too_long(gemma_dir: Path) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    long = [{"role": "user", "content": "کتاب " * 90}, {"role": "assistant", "content": "نان"}]
    answer = [{"role": "user", "content": "نان"}, {"role": "assistant", "content": "کتاب " * 90}]

    def reading() -> Reading:
        return Reading("a", [Conversation(CHAT, "a:1"), Conversation(long, "a:2"), Conversation(answer, "a:3")])

    with pytest.raises(LabError, match=r"a:2: too long: \d+ tokens, --max-length is 60"):
        encode_all(tokenizer, reading(), 60, "error")
    skipped = reading()
    assert [item.where for item in encode_all(tokenizer, skipped, 60, "skip")] == ["a:1"]
    assert skipped.reasons["too long"] == 2
    cut = reading()
    kept = encode_all(tokenizer, cut, 60, "truncate")
    assert [item.where for item in kept] == ["a:1", "a:3"]
    assert len(kept[1].ids) == 60
    assert cut.reasons["answer truncated away"] == 1


def test_show_batch_marks_what_is_learnt(gemma_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    show_learnt(tokenizer, [encode(tokenizer, Conversation(CHAT, "a.jsonl:3"))])
    said = capsys.readouterr().out
    assert "a.jsonl:3" in said
    assert "<start_of_turn>model\n⟦تهران<end_of_turn>⟧\n<start_of_turn>user\nو ژاپن؟<end_of_turn>" in said
