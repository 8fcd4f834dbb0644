import json
from datetime import datetime
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from labs_common.errors import LabError
from llm_peft_fa.base import load_tokenizer
from llm_peft_fa.config import ReadingOptions
from llm_peft_fa.data import Conversation, Reading, read_conversations
from llm_peft_fa.report import show_learnt
from llm_peft_fa.spelling import Message
from llm_peft_fa.table import check_before_training, encode_all, text_sum
from llm_peft_fa.templates import (
    Encoded,
    encode,
    encode_prompt,
    set_template,
    stands_alone,
)

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
    stretches: list[list[int]] = []
    for row in encode(tokenizer, Conversation(messages, "here")):
        before = False
        for token, learnt in zip(row.ids, row.learnt, strict=True):
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
    (encoded,) = encode(tokenizer, Conversation(messages, "here"))
    assert sum(encoded.learnt) == len(tokenizer("تهران<end_of_turn>", add_special_tokens=False).input_ids)


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_one_bos_and_the_prompt_is_the_beginning(model_dir: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(model_dir), template)
    whole = encode(tokenizer, Conversation(CHAT, "here"))[0].ids
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
    assert encode(tokenizer, Conversation(CHAT, "here"))[0].ids[:2].count(2) == 1


def test_gemma_has_no_system_role_so_it_goes_into_the_first_question(gemma_dir: Path, llama_dir: Path) -> None:
    text = {}
    for folder in (gemma_dir, llama_dir):
        tokenizer = load_tokenizer(str(folder))
        text[folder] = tokenizer.decode(encode(tokenizer, Conversation(CHAT, "here"))[0].ids)
    assert "<start_of_turn>user\nکوتاه بگو.\n\nپایتخت ایران کجاست؟<end_of_turn>" in text[gemma_dir]
    assert "<start_of_turn>system\n\nکوتاه بگو.<end_of_turn>" in text[llama_dir]


def test_a_template_that_drops_the_system_message_does_not_lose_it(llama_dir: Path) -> None:
    tokenizer = load_tokenizer(str(llama_dir))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    assert "کوتاه بگو." in tokenizer.decode(encode(tokenizer, Conversation(CHAT, "here"))[0].ids)


def test_troubles_are_caught_before_training(gemma_dir: Path) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    stops = {1, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    (good,) = encode(tokenizer, Conversation(CHAT, "a.jsonl:3"))
    check_before_training(tokenizer, [[good]], stops)
    template = tokenizer.chat_template

    tokenizer.chat_template = template.replace("<end_of_turn>", "")
    with pytest.raises(LabError, match="never lets the model learn to stop"):
        check_before_training(tokenizer, [encode(tokenizer, Conversation(CHAT, "a"))], stops)

    tokenizer.chat_template = template.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    with pytest.raises(LabError, match="<bos> twice"):
        check_before_training(tokenizer, [encode(tokenizer, Conversation(CHAT, "a"))], stops)

    tokenizer.chat_template = template + "{% generation %}{% endgeneration %}"
    with pytest.raises(LabError, match=r"a\.jsonl:3.*nothing in it to learn"):
        check_before_training(tokenizer, [[good, *encode(tokenizer, Conversation(CHAT, "a.jsonl:3"))]], stops)

    for impossible in (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
    ):
        tokenizer.chat_template = impossible
        with pytest.raises(LabError, match=r"^a: the chat template does not put the whole answer .*--template plain$"):
            encode(tokenizer, Conversation(CHAT, "a"))


def test_too_long(gemma_dir: Path) -> None:
    tokenizer = load_tokenizer(str(gemma_dir))
    long = [{"role": "user", "content": "کتاب " * 90}, {"role": "assistant", "content": "نان"}]
    answer = [{"role": "user", "content": "نان"}, {"role": "assistant", "content": "کتاب " * 90}]

    def reading() -> Reading:
        return Reading("a", [Conversation(CHAT, "a:1"), Conversation(long, "a:2"), Conversation(answer, "a:3")])

    with pytest.raises(LabError, match=r"a:2: too long: \d+ tokens, at most 60 can be"):
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
    show_learnt(tokenizer, encode(tokenizer, Conversation(CHAT, "a.jsonl:3")))
    said = capsys.readouterr().out
    assert "a.jsonl:3" in said
    assert "<start_of_turn>model\n⟦تهران<end_of_turn>⟧\n<start_of_turn>user\nو ژاپن؟<end_of_turn>" in said


# Of Mistral 7B Instruct v0.1: it refuses a system turn.
MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""
TRL = resources.files("trl") / "chat_templates" if find_spec("trl") else None
TEMPLATES = {"mistral": MISTRAL} | {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    for file in sorted(TRL.iterdir() if TRL else (), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}
# What is known of the templates without our code: they refuse system turns, read texts in parts, leave thinking open
# whatever they are told; render earlier answers in another way than the last.
NO_SYSTEM = ("mistral", "gemma", "gemma_training")
PARTS = ("idefics3", "llava_next", "smolvlm")
OPEN = ("deepseek_r1_distill", "deepseekv3")
REWRITING = {"gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", *OPEN}
REWRITING |= {f"{name}_training" for name in ("gptoss", "phi3", "phi3_5", *OPEN)}
CLOSING = ("qwen3_5_nothink", "qwen3_5_nothink_training")  # the generation prompt has an empty thought by itself
# Written by hand: what is learnt of two answers, the ends of the template's own making.
EXACT = {
    "mistral": ["تهران</s>", "توکیو\nدر شرق</s>"],
    "gemma": ["تهران<end_of_turn>", "توکیو\nدر شرق<end_of_turn>"],
    "llama3_1": ["تهران<|eot_id|>", "توکیو\nدر شرق<|eot_id|>"],
    "phi3": ["تهران<|end|>\n</s>", "توکیو\nدر شرق<|end|>\n</s>"],
    "qwen3": ["تهران<|im_end|>", "توکیو\nدر شرق<|im_end|>"],
    "qwen3_6": ["تهران<|im_end|>", "توکیو\nدر شرق<|im_end|>"],
    "deepseek_r1_distill": ["تهران<｜end▁of▁sentence｜>", "توکیو\nدر شرق<｜end▁of▁sentence｜>"],
    "gptoss": [
        "<|channel|>final<|message|>تهران<|return|>", "<|channel|>final<|message|>توکیو\nدر شرق<|return|>",
    ],
    "llava_next": [" تهران</s>", " توکیو\nدر شرق</s>"],
}  # fmt: skip


class FixedDate:
    """The clock of transformers, stopped at the date that we give to templates which write today's."""

    @staticmethod
    def now() -> datetime:
        return datetime(2024, 7, 26)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of which each byte is a token, so that no token lies on both sides of an answer's start."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def rendered(tokenizer: PreTrainedTokenizerBase, name: str, messages: list[Message], prompt: bool) -> str:
    """What transformers renders of a template at inference, for messages that were put as the template wants them."""
    if messages[0]["role"] == "system" and name in NO_SYSTEM:
        system, first, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    turns: list[dict[str, Any]] = list(messages)
    if name.startswith(PARTS):
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", FixedDate)
        text = str(tokenizer.apply_chat_template(
            turns, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt, enable_thinking=False,
        ))  # fmt: skip
    return f"{text}\n</think>\n\n" if prompt and name.startswith(OPEN) else text


@pytest.mark.skipif(TRL is None, reason="needs trl, of the development's dependencies")
@pytest.mark.parametrize("name", TEMPLATES)
def test_of_each_template_the_answers_are_learnt_behind_the_prompts_of_inference(
    name: str, bytes_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = bytes_tokenizer
    set_template(tokenizer, "auto", "off")
    tokenizer.chat_template = TEMPLATES[name]
    file = tmp_path / "chats.jsonl"
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    talks = (CHAT[1:3], CHAT[1:], CHAT, [{"role": "system", "content": " "}, *CHAT[1:]])
    rows = [{"messages": talk} for talk in talks] + [{"messages": CHAT, "tools": tools}]
    file.write_text("\n".join(map(json.dumps, rows)))
    read = read_conversations(str(file), "train", ReadingOptions()).conversations
    assert len(read) == len(rows)
    for talk, conversation in zip((*talks[:3], CHAT[1:], CHAT), read, strict=True):
        expected = []
        for place, message in enumerate(talk):
            if message["role"] == "assistant":
                prompt = rendered(tokenizer, name, talk[:place], True)
                # A text that nobody says stands in the answer's place: what is around it is the template's.
                whole = rendered(tokenizer, name, [*talk[:place], {"role": "assistant", "content": "☃"}], False)
                if name.startswith(OPEN):
                    whole = whole.replace("☃", "<think>\n\n</think>\n\n☃")
                assert whole.startswith(prompt)
                expected.append((prompt, whole[len(prompt) :].rstrip().replace("☃", message["content"])))
                assert tokenizer.decode(encode_prompt(tokenizer, talk[:place])) == prompt
        if name in EXACT:
            assert [learnt for _, learnt in expected] == EXACT[name][: len(expected)]
        encoded = encode(tokenizer, conversation)
        assert len(encoded) == (len(expected) if name in REWRITING else 1)
        found = []
        for row in encoded:
            starts = [at for at, learnt in enumerate(row.learnt) if learnt and not row.learnt[at - 1]]
            for start in starts:
                end = next((at for at in range(start, len(row.ids)) if not row.learnt[at]), len(row.ids))
                found.append((tokenizer.decode(row.ids[:start]), tokenizer.decode(row.ids[start:end])))
        assert found == expected


ASK = {"role": "user", "content": "۲+۲؟"}
THOUGHT = {"role": "assistant", "content": "<think>\nجمع است.\n</think>\n\n۴"}
PLAIN_ANSWER = {"role": "assistant", "content": "۴"}


@pytest.mark.skipif(TRL is None, reason="needs trl, of the development's dependencies")
@pytest.mark.parametrize(
    ("name", "answer", "prompt", "learnt"),
    [
        ("qwen3", THOUGHT, "assistant\n", "<think>\nجمع است.\n</think>\n\n۴<|im_end|>"),
        ("qwen3_5_think", THOUGHT, "assistant\n<think>\n", "جمع است.\n</think>\n\n۴<|im_end|>"),
        ("qwen3_5_think", PLAIN_ANSWER, "assistant\n<think>\n", "\n</think>\n\n۴<|im_end|>"),
        ("qwen3_8", THOUGHT, "assistant\n<think>\n", "جمع است.\n</think>\n\n۴<|im_end|>"),
        ("deepseek_r1_distill", THOUGHT, "<think>\n", "جمع است.\n</think>\n\n۴<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", PLAIN_ANSWER, "<think>\n", "\n</think>\n\n۴<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill_training", THOUGHT, "<think>\n", "جمع است.\n</think>\n\n۴<｜end▁of▁sentence｜>"),
        ("llama3", THOUGHT, "assistant<|end_header_id|>\n\n", "<think>\nجمع است.\n</think>\n\n۴<|eot_id|>"),
    ],
)
def test_thinking_is_learnt_if_it_is_kept_and_else_refused_where_it_would_be_lost(
    name: str, answer: Message, prompt: str, learnt: str, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = bytes_tokenizer
    tokenizer.chat_template = TEMPLATES[name]
    talk = [ASK, answer, ASK, answer]
    set_template(tokenizer, "auto", "keep")
    rows = encode(tokenizer, Conversation(talk, "here"))
    assert learnt_text(tokenizer, talk) == [learnt] * 2
    last = rows[-1]
    asked = encode_prompt(tokenizer, talk[:3])
    assert last.ids[: len(asked)] == asked
    assert tokenizer.decode(asked).endswith(prompt)
    set_template(tokenizer, "auto", "off")
    if answer is THOUGHT and name != "llama3":
        with pytest.raises(LabError, match=r"^here: an answer thinks .* take --thinking keep"):
            encode(tokenizer, Conversation(talk, "here"))
    else:
        assert learnt_text(tokenizer, talk)[-1] == learnt.removeprefix("\n</think>\n\n")


@pytest.mark.skipif(TRL is None, reason="needs trl, of the development's dependencies")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_kept_thought_stands_once_or_is_refused(name: str, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = bytes_tokenizer
    tokenizer.chat_template = TEMPLATES[name]
    set_template(tokenizer, "auto", "keep")
    if name in CLOSING:
        with pytest.raises(LabError, match=r"^here: an answer thinks .* closes the thinking before it begins; take"):
            encode(tokenizer, Conversation([ASK, THOUGHT], "here"))
        assert learnt_text(tokenizer, [ASK, PLAIN_ANSWER]) == ["۴<|im_end|>"]
        return
    (row,) = encode(tokenizer, Conversation([ASK, THOUGHT], "here"))
    _, said = tokenizer.decode(row.ids).split(ASK["content"])
    assert said.count("<think>") == said.count("</think>") == said.count("جمع است.") == 1


@pytest.mark.skipif(TRL is None, reason="needs trl, of the development's dependencies")
@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "deepseek_r1_distill", "llama3"])
def test_an_exported_template_asks_others_as_was_trained(name: str, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = bytes_tokenizer
    set_template(tokenizer, "auto", "off")
    tokenizer.chat_template = TEMPLATES[name]
    trained = [encode_prompt(tokenizer, CHAT[:count]) for count in (2, 4)]
    theirs = [tokenizer.apply_chat_template(CHAT[:count], add_generation_prompt=True).input_ids for count in (2, 4)]
    tokenizer.chat_template = stands_alone(tokenizer)
    found = [tokenizer.apply_chat_template(CHAT[:count], add_generation_prompt=True).input_ids for count in (2, 4)]
    assert found == trained == [encode_prompt(tokenizer, CHAT[:count]) for count in (2, 4)]
    assert (found == theirs) == (name == "llama3"), "else there was nothing to do"
    assert stands_alone(tokenizer) == tokenizer.chat_template
    set_template(tokenizer, "auto", "keep")
    assert tokenizer.chat_template == TEMPLATES[name].rstrip("\n" if name != "llama3" else ""), "and back"


def test_the_first_token_of_an_answer_is_not_the_last_of_its_prompt() -> None:
    """Line ends are one token in Qwen's vocabulary too, and a thought that was left out begins with one."""
    vocabulary = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary | {"ĊĊ": len(vocabulary)}, merges=[("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}\n{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    talk = [ASK, {"role": "assistant", "content": "\n۴"}] * 2
    (row,) = encode(tokenizer, Conversation(talk, "here"))
    asked = encode_prompt(tokenizer, talk[:1])
    assert row.ids[: len(asked)] == asked
    assert learnt_text(tokenizer, talk) == ["\n۴", "\n۴"]
    assert tokenizer.decode(row.ids) == "user\n۲+۲؟assistant\n\n۴" * 2


def test_thinking_is_saved_with_the_tokenizer(llama_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama_dir), "auto", "keep")
    tokenizer.chat_template += "{% if enable_thinking is defined %}off{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    ends = [
        tokenizer.decode(encode_prompt(load_tokenizer(str(tmp_path), "auto", thinking), [ASK])).endswith("off")
        for thinking in (None, "off", "keep")
    ]
    assert ends == [False, True, False]
    load_tokenizer(str(tmp_path), "auto", "off").save_pretrained(tmp_path / "again")
    assert "thinking" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
