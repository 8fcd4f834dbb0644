"""Text towers: our own causal transformer with its feature at the end token, or any Hugging Face encoder."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import _CACHED_NO_EXIST, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from clip_lab.decoder import Block, initialise
from labs_common.errors import LabError, json_of, reason_of
from labs_common.saved import load_auto, load_network

HEAD = ("pooler.",)  # what encoders trained on words alone lack, such as RoBERTa


class Read(NamedTuple):
    """A text tower's output: a feature per caption (captions, width), a state per word (captions, length, width)."""

    feature: torch.Tensor
    states: torch.Tensor


class TextTower(nn.Module):
    """CLIP's text tower (Radford et al. 2021, section 2.4): causal, so that CoCa can go on from its states.

    Attributes:
        length: most words, start and end token among them.
        end: the end token.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int, end: int) -> None:
        super().__init__()
        self.vocabulary, self.width, self.length, self.end = vocabulary, width, length, end
        self.heads = heads
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.01)  # CLIP's own start, as the 0.02 below
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.02)
        initialise(self.blocks, width, layers)

    def forward(self, words: torch.Tensor) -> Read:
        """Reads words (captions, length), each caption with an end token, after which nothing matters."""
        states = self.words(words) + self.places[: words.shape[1]]
        for block in self.blocks:
            states = block(states, causal=True)
        states = self.norm(states)
        return Read(states[torch.arange(len(words), device=words.device), last_of(words, self.end)], states)


class PretrainedText(nn.Module):
    """A Hugging Face encoder; its feature is what `pool` says, a key of `POOLS`, or `pooler`: its own output.

    Left to itself (`auto`) that is the pooler's output where it has one, else the mean over the words;
    `pretrained_text` asks a sentence-transformer first.
    """

    def __init__(self, network: Any, length: int, end: int, pool: str = "auto") -> None:
        super().__init__()
        self.network, self.end, self.pool = network, end, pool
        if pool in POOLS and getattr(network, "pooler", None) is not None:
            network.pooler = None  # nothing reads it: it would neither train nor be the same in two loads
        self.width = int(network.config.hidden_size)
        self.vocabulary = int(network.config.vocab_size)
        self.length = min(length, int(getattr(network.config, "max_position_embeddings", length)))

    def forward(self, words: torch.Tensor) -> Read:
        """Reads words (captions, length), each caption with an end token, after which nothing matters."""
        mask = torch.arange(words.shape[1], device=words.device) <= last_of(words, self.end)[:, None]
        found = self.network(input_ids=words, attention_mask=mask.long())
        states = found.last_hidden_state
        feature = getattr(found, "pooler_output", None)
        if self.pool in POOLS or feature is None:
            feature = POOLS.get(self.pool, mean)(states, mask)
        return Read(feature, states)


def mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Averages the states (captions, length, width) of what `mask` (captions, length) holds: (captions, width)."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the state of each caption's first token (captions, width)."""
    return states[:, 0]


def last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the state of each caption's end token (captions, width)."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


def largest(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the largest of each entry of the states of what `mask` holds: (captions, width)."""
    return states.masked_fill(~mask[..., None], -torch.inf).amax(1)


POOLS = {"mean": mean, "cls": first, "eot": last, "max": largest}
# Theirs (in 1_Pooling/config.json: "pooling_mode", or true after "pooling_mode_") to ours.
SENTENCE_POOLS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "max": "max",
                  "max_tokens": "max", "lasttoken": "eot"}  # fmt: skip


def last_of(words: torch.Tensor, end: int) -> torch.Tensor:
    """Returns the place of the first end token of each caption (captions,)."""
    return (words == end).int().argmax(1)


def pretrained_text(name: str, pretrained: bool, length: int, end: int, pool: str = "auto") -> PretrainedText:
    """Loads the Hugging Face encoder of this name or path, or builds it with random weights.

    Of weights without a pooler, such as RoBERTa's, the feature is the mean, unless `pool` says otherwise: the library
    would draw a pooler at random, another one in every load. A sentence-transformer's is what its own pooling says.

    Raises:
        LabError: there is none, it is no encoder, `pool` asks for a pooler that it lacks, or it pools in its own way.
    """
    said, remedy = f"--text {name}", "name a model of the hub or a directory"
    config = load_auto(AutoConfig.from_pretrained, name, said=said, remedy=remedy)
    if getattr(config, "is_encoder_decoder", False):
        raise LabError(f"--text {name}: is an encoder with a decoder; take an encoder such as bert-base-uncased")
    if not hasattr(config, "hidden_size"):
        raise LabError(f"--text {name}: {config.model_type} is no text encoder; take bert-base-uncased or its like")
    pool = sentence_pool(name) or pool if pool == "auto" else pool
    if pretrained:
        missing: list[str] = []
        network = load_network(AutoModel, name, said, remedy, new=() if pool == "pooler" else HEAD, missing=missing)
        pool = "mean" if missing and pool == "auto" else pool
    else:
        network = load_auto(AutoModel.from_config, config, said=said, remedy=remedy)
    reader = PretrainedText(network.float(), length, end, pool)
    if pool == "pooler":
        with torch.no_grad():
            found = network(input_ids=torch.full((1, 2), end, device=next(network.parameters()).device))
        if getattr(found, "pooler_output", None) is None:
            raise LabError(f"--text-pool pooler: {name} has none; take mean, cls or eot")
    return reader


def sentence_pool(name: str) -> str:
    """Returns the key of `POOLS` by which a sentence-transformer was trained; nothing for other models.

    Raises:
        LabError: it pools in another way, or the hub does not say: silently, it would be another feature.
    """
    try:
        file = cached_file(name, "1_Pooling/config.json")
    except Exception as error:  # of the hub, the network, the library; with no cause there is no such file
        known = isinstance(error.__cause__, LocalEntryNotFoundError) and (
            is_offline_mode() or try_to_load_from_cache(name, "1_Pooling/config.json") is _CACHED_NO_EXIST
        )
        if known or (type(error) is OSError and error.__cause__ is None):
            return ""
        failure = f"the hub does not say how its sentences are pooled ({reason_of(error)})"
        raise LabError(f"--text {name}: {failure}; try again, or say it with --text-pool") from error
    if file is None:
        return ""
    found = json_of(Path(file), f"--text {name}: 1_Pooling/config.json")
    said = found if isinstance(found, dict) else {}
    mode = said.get("pooling_mode")
    modes = [*map(str, mode if isinstance(mode, list) else [mode])] if mode is not None else [
        key.removeprefix("pooling_mode_") for key, value in said.items() if key.startswith("pooling_mode_") and value
    ]  # fmt: skip
    if len(modes) != 1 or modes[0] not in SENTENCE_POOLS:
        how = f"by {' and '.join(modes)}, which is not here" if modes else "in no way that it says"
        raise LabError(f"--text {name}: its sentences are pooled {how}; take another --text-pool")
    return SENTENCE_POOLS[modes[0]]
