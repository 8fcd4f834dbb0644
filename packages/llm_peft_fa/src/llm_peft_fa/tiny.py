"""The offline base model: a tiny Gemma 2 and its SentencePiece tokenizer, trained here on first use.

It is pre-trained on Persian text about the small world of `persian`: prose, and questions with answers in
several layouts, one of which looks like a chat without its turn tokens; those only occur as stray marks. It knows the
language and the facts, and does not answer in the chat format. A minute or two on two cores; then kept in the
user's cache.
"""

import hashlib
import io
import math
from pathlib import Path

import sentencepiece
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaTokenizer, PreTrainedTokenizerFast

from labs_common.cache import cached_directory
from labs_common.progress import tracked
from labs_common.saved import load_auto
from labs_common.tiny import reproducible
from llm_peft_fa import persian
from llm_peft_fa.attention import NAME
from llm_peft_fa.model import PackedCausalLM
from llm_peft_fa.packing import packed_row
from llm_peft_fa.templates import Encoded

# Chosen among about a dozen variants by the held-out tasks after fine-tuning; a minute or two on two cores.
RECIPE = {
    "vocabulary": 1024,
    "paragraphs": 30_000,
    "steps": 900,
    "blocks": 16,
    "block": 64,
    "learning_rate": 4e-3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "layers": 4,
}

TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]

# The turns of Gemma's own format; like Gemma, it has no system role.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def tiny_base() -> Path:
    """Returns the directory of the tiny base model, in the layout that transformers loads; makes it on first use."""
    recipe = RECIPE | {
        "text": hashlib.sha256(Path(persian.__file__).read_bytes()).hexdigest(),
        "template": CHAT_TEMPLATE,
        "format": 1,
    }
    return cached_directory("tiny-gemma2-fa", recipe, _make)


def _make(folder: Path) -> None:
    text = list(persian.plain_text(int(RECIPE["paragraphs"]), seed=1))
    tokenizer = _tokenizer(text, folder)
    _pretrained(tokenizer, text).save_pretrained(folder)


def _tokenizer(text: list[str], folder: Path) -> PreTrainedTokenizerFast:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:5000]), model_writer=trained, model_type="bpe",
        vocab_size=RECIPE["vocabulary"], byte_fallback=True, split_digits=True,
        # Latin letters and digits get pieces of their own; everything else unseen falls back to bytes.
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()[]{}\"'-_/",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=[*TURN_TOKENS, "user", "model"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    tokenizer: PreTrainedTokenizerFast = load_auto(
        GemmaTokenizer.from_pretrained, folder, said=str(folder), remedy="delete it"
    )
    tokenizer.init_kwargs.pop("vocab_file", None)  # a path that ends to exist when the directory is renamed
    tokenizer.add_special_tokens({"extra_special_tokens": TURN_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
    return tokenizer


def _pretrained(tokenizer: PreTrainedTokenizerFast, text: list[str]) -> Gemma2ForCausalLM:
    """Trains next-token prediction on shuffled blocks of the text, by AdamW with warm-up and cosine.

    The soft-caps are off meanwhile, which is a third faster; at the size of this model's scores they change
    next to nothing, and the model is saved with them.
    """
    block, blocks, steps = int(RECIPE["block"]), int(RECIPE["blocks"]), int(RECIPE["steps"])
    stream: list[int] = []
    for ids in tokenizer(text, add_special_tokens=False).input_ids:
        stream += [tokenizer.bos_token_id, *ids]
    data = [stream[at : at + block] for at in range(0, len(stream) - block, block)]
    with reproducible():
        model = Gemma2ForCausalLM._from_config(tiny_config(tokenizer, softcaps=False), attn_implementation=NAME)
        packed = PackedCausalLM(model.train())
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        picks = torch.randint(len(data), (steps, blocks)).tolist()
        for step in tracked(range(steps), "pre-training the tiny base model", steps):
            rate = float(RECIPE["learning_rate"]) * min(1.0, (step + 1) / 50)
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            row = packed_row([Encoded(data[pick], [True] * block, "") for pick in picks[step]])
            (packed(row) / len(row.targets)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.config = tiny_config(tokenizer)
    return model.eval()


def tiny_config(tokenizer: PreTrainedTokenizerFast, softcaps: bool = True) -> Gemma2Config:
    """Describes Gemma 2's architecture (soft-caps, sliding window on every other layer) at width 128."""
    return Gemma2Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=int(RECIPE["hidden_size"]), intermediate_size=int(RECIPE["intermediate_size"]),
        num_hidden_layers=int(RECIPE["layers"]), num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        query_pre_attn_scalar=32, sliding_window=512, max_position_embeddings=8192, initializer_range=0.05,
        attn_logit_softcapping=50.0 if softcaps else None, final_logit_softcapping=30.0 if softcaps else None,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]),
    )  # fmt: skip
