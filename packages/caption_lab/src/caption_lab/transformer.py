"""The transformer captioner: torch's decoder in training, the same weights with kept keys and values while writing."""

import torch
import torch.nn.functional as F
from torch import nn

from caption_lab.decoders import Output, Step, Tensors
from caption_lab.vocabulary import PAD


class TransformerCaptioner(nn.Module):
    """Words attend to the words before them and to the places of the picture (Vaswani et al. 2017, pre-norm).

    Places are projected to the decoder's width and get a learnt position, as words do.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        places: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        length: int,
    ) -> None:
        """`length` is the most positions of a caption, `<start>` included."""
        super().__init__()
        self.mask_number, self.heads = vocabulary, heads  # a word that is hidden in training; it is never written
        self.embedding = nn.Embedding(vocabulary + 1, width, padding_idx=PAD)
        self.positions = nn.Parameter(torch.randn(length, width))
        self.from_places = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.place_positions = nn.Parameter(torch.randn(places, width))
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.dropout = nn.Dropout(dropout)
        self.to_words = nn.Linear(width, vocabulary)
        with torch.no_grad():
            self.embedding.weight.normal_(std=width**-0.5)[PAD] = 0
        for parameter in self.layers.parameters():  # torch clones one layer: all would begin the same
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: torch.Tensor, words: torch.Tensor, of_features: torch.Tensor | None = None) -> Output:
        """Features (pictures, places, width of features) and words (captions, length) to what follows each word.

        `of_features` (captions,) says whose captions they are; without it, one of each picture.
        """
        length = words.shape[1]
        memory = self.from_places(features) + self.place_positions
        memory = memory if of_features is None else memory[of_features]
        causal = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)  # true: may not be looked at
        x = self.dropout(self._embedded(words) + self.positions[:length])
        x = self.layers(x, memory, tgt_mask=causal, tgt_key_padding_mask=words == PAD, tgt_is_causal=True)
        return Output(self.to_words(x), None)

    def begin(self, features: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Fixed and moving before the first word, with one beam."""
        memory = self.from_places(features) + self.place_positions
        fixed, moving = {}, {}
        pictures, _, width = memory.shape
        empty = memory.new_zeros(pictures, 1, self.heads, 0, width // self.heads)
        for number, layer in enumerate(self.layers.layers):
            attend = layer.multihead_attn
            weight, bias = attend.in_proj_weight[width:], attend.in_proj_bias[width:]
            keys, values = F.linear(memory, weight, bias).chunk(2, -1)
            fixed[f"keys {number}"], fixed[f"values {number}"] = self._by_head(keys), self._by_head(values)
            moving[f"keys {number}"], moving[f"values {number}"] = empty, empty
        return fixed, moving

    def step(self, words: torch.Tensor, fixed: Tensors, moving: Tensors) -> Step:
        """One more word (pictures, beams): only its own query is computed, the keys and values before it are kept."""
        position = moving["keys 0"].shape[3]
        x = self._embedded(words) + self.positions[position]  # (pictures, beams, width)
        moved: Tensors = {}
        attention = x
        for number, layer in enumerate(self.layers.layers):
            own = layer.self_attn
            query, key, value = F.linear(layer.norm1(x), own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
            query, key, value = (t.unflatten(-1, (self.heads, -1))[:, :, :, None] for t in (query, key, value))
            keys = torch.cat([moving[f"keys {number}"], key], 3)  # (pictures, beams, heads, words, width of a head)
            values = torch.cat([moving[f"values {number}"], value], 3)
            moved[f"keys {number}"], moved[f"values {number}"] = keys, values
            x = x + own.out_proj(F.scaled_dot_product_attention(query, keys, values).flatten(2))
            cross = layer.multihead_attn
            width = x.shape[-1]
            query = F.linear(layer.norm2(x), cross.in_proj_weight[:width], cross.in_proj_bias[:width])
            # All beams of a picture ask the same keys: (pictures, heads, beams, places)
            scores = self._by_head(query) @ fixed[f"keys {number}"].transpose(-1, -2) * (width // self.heads) ** -0.5
            attention = scores.softmax(-1)
            x = x + cross.out_proj((attention @ fixed[f"values {number}"]).transpose(1, 2).flatten(2))
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        assert self.layers.norm is not None
        return Step(self.to_words(self.layers.norm(x)), moved, attention.mean(1))

    def _embedded(self, words: torch.Tensor) -> torch.Tensor:
        return self.embedding(words) * self.embedding.embedding_dim**0.5

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """(pictures, places, width) to (pictures, heads, places, width of a head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
