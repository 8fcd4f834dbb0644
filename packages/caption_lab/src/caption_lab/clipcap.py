"""ClipCap (Mokady et al. 2021): a picture becomes a prefix, from which a frozen language model goes on in its tokens.

transformers and PEFT are imported where a language model is built: they take seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from caption_lab.config import TINY_LANGUAGE, DecoderOptions, VocabularyOptions
from caption_lab.tiny import tiny_language_model
from caption_lab.vocabulary import (
    END,
    SPECIAL,
    START,
    TOKENIZER,
    Vocabulary,
    cleaning_of,
    covering_length,
    in_groups,
    load_vocabulary,
)
from labs_common.decoding import NextWord, Output, Tensors
from labs_common.errors import LabError
from labs_common.saved import load_auto, load_network

LANGUAGE = "language_model"  # of a saved captioner: the language model's configuration
REMEDY = "name a causal language model of transformers, a hub id or a directory, such as openai-community/gpt2"
LONGEST = 2**20  # tokens of a caption, before its length is known
NEVER = 20.0  # so far below all other logits are those of what has no token: a billionth of the least probable one


@dataclass(frozen=True)
class LanguageVocabulary(Vocabulary):
    """The tokens of a language model, by their own numbers after `<pad>`, `<start>`, `<end>` and `<unk>`.

    `<end>` stands for the model's own end; `<start>` for the last vector of the prefix.

    Attributes:
        language: the model's tokenizer.
    """

    language: Tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own."""
        return self.language

    def for_others(self) -> Tokenizer:
        """Returns the model's own as it is: it knows none of the special words here."""
        return self.language

    def encode(self, caption: str) -> list[int]:
        """Turns a caption into numbers: `<start>`, the first `length` tokens of its cleaned words, `<end>`."""
        tokens = self.language.encode(" ".join(self.cleaning.words(caption)), add_special_tokens=False).ids
        return [START, *(token + len(SPECIAL) for token in tokens[: self.length]), END]

    def decode(self, numbers: Iterable[int]) -> str:
        """Joins the tokens before the first `<end>` as the tokenizer does."""
        tokens: list[int] = []
        for number in numbers:
            if number == END:
                break
            if number >= len(SPECIAL):
                tokens.append(number - len(SPECIAL))
        text: str = self.language.decode(tokens)
        return text.strip()


def language_vocabulary(captions: Sequence[str], options: VocabularyOptions, name: str) -> LanguageVocabulary:
    """Reads the tokenizer of the language model `name`; the captions say how many tokens are enough.

    Raises:
        LabError: it cannot be had, or has no fast version.
    """
    from transformers import AutoConfig, AutoTokenizer  # takes seconds

    source, said = language_path(name), f"--language-model {name}"
    tokenizer = load_auto(AutoTokenizer.from_pretrained, source, said=said, remedy=REMEDY)
    config = load_auto(AutoConfig.from_pretrained, source, said=said, remedy=REMEDY)
    if not tokenizer.is_fast:
        raise LabError(f"{said}: its tokenizer has no fast version, which is what is saved; {REMEDY}")
    backend, cleaning = tokenizer.backend_tokenizer, cleaning_of(options)
    backend.no_padding()
    backend.no_truncation()
    # Some models have more rows than tokens.
    words = tokenizer.convert_ids_to_tokens(range(config.get_text_config().vocab_size))
    words = tuple(word or f"<{number}>" for number, word in enumerate(words))
    whole = LanguageVocabulary((*SPECIAL, *words), cleaning, options.max_length or LONGEST, backend)
    length = options.max_length or covering_length([len(whole.encode(caption)) - 2 for caption in captions])
    return replace(whole, length=length)


def load_language(folder: Path) -> LanguageVocabulary:
    """Reads what `LanguageVocabulary.save` wrote.

    Raises:
        LabError: it is missing or broken.
    """
    found = load_vocabulary(folder)
    try:
        language = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # tokenizers raises nothing more special
        raise LabError(f"{folder / TOKENIZER}: cannot be read ({error})") from error
    language.no_padding()  # which those of before have: pads would be read as words
    language.no_truncation()
    return LanguageVocabulary(found.words, found.cleaning, found.length, language)


def language_path(name: str) -> str:
    """Returns the hub id or directory of a language model; makes the tiny one on first use."""
    return str(tiny_language_model()) if name == TINY_LANGUAGE else name


@torch.no_grad()
def keeps_keys(model: Any) -> bool:
    """Tells whether a language model goes on from keys and values of each layer: reads one vector and looks."""
    from transformers import DynamicCache  # takes seconds

    cache: Any = DynamicCache()
    given = model.get_input_embeddings().weight[:1, None]
    try:
        model.eval()(inputs_embeds=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except Exception:  # recurrent and mixed models fail at any place
        return False
    return bool(cache.layers) and all(getattr(layer, "keys", None) is not None for layer in cache.layers)


class TiedHead(nn.Module):
    """Turns states into logits by the input embeddings, so that weights which are one are saved once."""

    embedding: Any

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a submodule: it is one of the language model's already

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps states (…, width) to logits (…, tokens)."""
        return F.linear(states, self.embedding.weight)


class ClipCap(nn.Module):
    """An MLP turns the picture's one vector into a prefix of embeddings; a causal language model goes on from there.

    The language model is frozen; with `lora`, low-rank matrices in its linear layers train as well (Hu et al. 2022).
    It has no weights of its own until `read` or a checkpoint brings them.
    """

    def __init__(self, sizes: tuple[int, int, int, int], options: DecoderOptions) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds

        super().__init__()
        said, (_, features, _, length) = f"--language-model {options.language_model}", sizes
        config = load_auto(AutoConfig.from_pretrained, language_path(options.language_model), said=said, remedy=REMEDY)
        model = load_auto(AutoModelForCausalLM.from_config, config, said=said, remedy=REMEDY, dtype=torch.float32)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if ends[0] is None:
            raise LabError(f"{said}: has no token that ends a text; {REMEDY}")
        most = getattr(config, "max_position_embeddings", None)
        if most and options.prefix + length > most:
            raise LabError(f"--prefix {options.prefix}: the language model reads {most} vectors and tokens, and "
                           f"captions have up to {length}")  # fmt: skip
        model.tie_weights()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if getattr(head, "weight", None) is None or not (embedding.weight.is_meta or keeps_keys(model)):
            raise LabError(f"{said}: {type(model).__name__} has no plain head, or does not go on from keys and values; "
                           f"{REMEDY}")  # fmt: skip
        if head.weight is embedding.weight:
            model.set_output_embeddings(TiedHead(embedding))
        if options.lora:
            from peft import LoraConfig, inject_adapter_in_model  # takes seconds
            from transformers.pytorch_utils import Conv1D

            turned = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's layers: (inputs, outputs)
            rank = options.lora
            found = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=turned)
            inject_adapter_in_model(found, model)
        self.language: Any = model
        self.end, self.prefix = int(ends[0]), options.prefix
        width = embedding.embedding_dim * options.prefix
        self.scaled = nn.LayerNorm(features)  # so that one learning rate fits encoders of any scale
        # As in the paper's code: half as many hidden values as come out.
        self.to_prefix = nn.Sequential(
            nn.Linear(features, width // 2), nn.Tanh(), nn.Dropout(options.dropout or 0.0), nn.Linear(width // 2, width)
        )
        self.requires_grad_(True)

    def read(self, name: str) -> None:
        """Takes the language model's weights from where `--language-model` says.

        Raises:
            LabError: they cannot be had.
        """
        from transformers import AutoModelForCausalLM  # takes seconds

        known = load_network(
            AutoModelForCausalLM, language_path(name), f"--language-model {name}", REMEDY, dtype=torch.float32
        ).state_dict()
        for place, tensor in self.language.state_dict().items():
            if ".lora_" not in place:
                tensor.copy_(known[place.replace(".base_layer.", ".")])

    def requires_grad_(self, requires_grad: bool = True) -> "ClipCap":
        """Lets everything train but the language model, of which only low-rank matrices ever do."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.language.named_parameters():
            parameter.requires_grad_(requires_grad and ".lora_" in name)
        return self

    def train(self, mode: bool = True) -> "ClipCap":
        """Leaves the language model in evaluation mode: what is frozen drops nothing."""
        super().train(mode)
        self.language.eval()
        return self

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Reads features (pictures, width of features) and words (captions, length); predicts what follows each word.

        `of_features` (captions,) says whose captions they are; without it there is one of each picture.
        """
        return in_groups(self, partial(self._read_all, self._prefix(features)), words, of_features)

    def begin(self, features: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Returns `fixed` and `moving` before the first word, with one beam: keys and values of the prefix.

        But for its last vector, which is read as the first word.
        """
        prefix = self._prefix(features)
        moving = self._read(prefix[:, :-1], {}, 1)[1] if self.prefix > 1 else {}
        return {"last": prefix[:, -1]}, moving

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> NextWord:
        """Reads one more word of each beam (pictures, beams)."""
        given = torch.where((words == START)[..., None], fixed["last"][:, None], self._embedded(words))
        logits, moved = self._read(given.flatten(0, 1)[:, None], moving, words.shape[1])
        return NextWord(self._of_words(logits).unflatten(0, words.shape), moved, None)

    def _read_all(self, prefix: torch.Tensor, words: torch.Tensor, of_prefix: torch.Tensor | None) -> torch.Tensor:
        """Reads words (captions, length) after prefixes (pictures, prefix, width); returns the logits of the next."""
        prefix = prefix if of_prefix is None else prefix[of_prefix]
        given = torch.cat([prefix, self._embedded(words[:, 1:])], 1)  # (captions, prefix + length - 1, width)
        return self._of_words(self.language(inputs_embeds=given, use_cache=False, logits_to_keep=words.shape[1]).logits)

    def _read(self, given: torch.Tensor, moving: Tensors, beams: int) -> tuple[torch.Tensor, Tensors]:
        """Reads embeddings (pictures * beams, …, width) after what is in `moving`; returns the last one's logits."""
        from transformers import DynamicCache  # takes seconds

        kept = [(moving[f"keys {layer}"].flatten(0, 1), moving[f"values {layer}"].flatten(0, 1))
                for layer in range(len(moving) // 2)]  # fmt: skip
        cache: Any = DynamicCache(kept or None)
        output = self.language(inputs_embeds=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        moved = {}
        for number, layer in enumerate(cache.layers):  # (pictures, beams, heads, words, width of a head)
            moved[f"keys {number}"] = layer.keys.unflatten(0, (-1, beams))
            moved[f"values {number}"] = layer.values.unflatten(0, (-1, beams))
        return output.logits[:, -1], moved

    def _prefix(self, features: torch.Tensor) -> torch.Tensor:
        """Maps vectors (pictures, width of features) to prefixes (pictures, prefix, width)."""
        found: torch.Tensor = self.to_prefix(self.scaled(features))
        return found.unflatten(-1, (self.prefix, -1))

    def _embedded(self, words: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.language.get_input_embeddings()((words - len(SPECIAL)).clamp(min=0))
        return found

    def _of_words(self, logits: torch.Tensor) -> torch.Tensor:
        """Puts logits of tokens (…, tokens) in the order of `LanguageVocabulary` (…, special + tokens)."""
        end, never = logits[..., self.end, None], logits.detach().amin(-1, keepdim=True) - NEVER
        special = [never] * len(SPECIAL)
        special[END] = end
        return torch.cat([*special, logits[..., : self.end], never, logits[..., self.end + 1 :]], -1)
