"""An LSTM decoder with spatial attention, in a recurrent and in a parallel form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.decoders.base import CrossAttention, Decoder, DecoderState, require_sizes
from capdistill.decoders.recurrence import lstm_layer, suits
from capdistill.errors import ConfigError
from capdistill.outputs import DecoderOutput


class LSTMDecoder(Decoder):
    """LSTM layers with attention over visual tokens.

    `attention="recurrent"`: the last layer's previous state is the query, and the context is part
    of the next word's input, so words are read one after the other. `attention="parallel"`: the
    first layer reads all words with the mean of the image, its states are the queries, and the
    layers above read its states and their contexts, so a whole caption is one call per layer.

    Example:
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, layers=2, heads=2)
        >>> decoder.build(vocabulary=11)
        >>> ids, features = torch.zeros(4, 5, dtype=torch.int64), torch.randn(2, 9, 8)
        >>> out = decoder(ids, features, need=frozenset({"attention", "hidden"}))
        >>> out.logits.shape, out.attention.shape, [h.shape[-1] for h in out.hidden]
        (torch.Size([4, 5, 11]), torch.Size([4, 5, 9]), [12, 12, 6])

    Args:
        dim: D, width of the features.
        embed: Width of word embeddings and, if tied, of the vector before the vocabulary
            projection.
        hidden: H, width of the LSTM's states.
        layers: LSTM layers.
        heads: Attention heads; must divide `dim`.
        dropout: Dropout on embeddings, between layers and before the vocabulary projection.
        attention: "recurrent" or "parallel", see above.
        tied: Whether the embedding matrix is also the output projection.

    Raises:
        ConfigError: `dim` is not a multiple of `heads`, `attention` is unknown, or a size or
            `dropout` is out of range.

    Source:
        Recurrent form: Xu et al. (2015), section 3.1.2, with the dot-product attention of
        Vaswani et al. (2017). Parallel form: after Anderson et al. (2018), section 3.2, without
        the feedback of the upper layer.
    """

    def __init__(
        self,
        dim: int,
        *,
        embed: int = 256,
        hidden: int = 512,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.3,
        attention: Literal["recurrent", "parallel"] = "parallel",
        tied: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "embed": embed, "hidden": hidden, "layers": layers, "heads": heads}
        require_sizes("LSTMDecoder", dropout, **sizes)
        if dim % heads:
            raise ConfigError(f"LSTMDecoder: dim {dim} must be a multiple of heads {heads}.")
        if attention not in ("recurrent", "parallel"):
            raise ConfigError(
                f"LSTMDecoder: attention='{attention}' is unknown. Use 'recurrent' or 'parallel'."
            )
        self.dim, self.embed, self.tied = dim, embed, tied
        self.recurrent = attention == "recurrent"
        self.hidden_dims = (*(hidden,) * layers, embed if tied else hidden)
        self.attention = CrossAttention(hidden, dim, heads, inner=dim)
        above = hidden if self.recurrent else hidden + dim
        inputs = [embed + dim, *[above if i == 0 else hidden for i in range(layers - 1)]]
        self.cells = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in inputs)
        self.initial = nn.Linear(dim, 2 * layers * hidden)
        self.output = nn.Linear(hidden + dim, self.hidden_dims[-1])
        self.drop = nn.Dropout(dropout)

    def build_vocabulary(self, vocabulary: int) -> None:
        """Create the word embedding and, unless tied, a separate output projection."""
        self.embedding = nn.Embedding(vocabulary, self.embed)
        nn.init.normal_(self.embedding.weight, std=self.embed**-0.5)
        if not self.tied:
            self.vocabulary_output = nn.Linear(self.hidden_dims[-1], vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, input_ids: Tensor, features: Tensor, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids and (I, N, D) features to logits (B, T, V) and the needed outputs."""
        state = self.start(features).expand(input_ids.shape[0] // features.shape[0])
        words = self.drop(self.embedding(input_ids) * self.embed**0.5)  # (B, T, E)
        hidden, weights, _ = self.run(words, state, "attention" in need)
        return DecoderOutput(
            logits=self.score(hidden[-1]),
            hidden=tuple(hidden) if "hidden" in need else None,
            attention=weights,
        )

    def start(self, features: Tensor) -> DecoderState:
        """Keys and values of the features, and states made from their mean."""
        keys, values = self.attention.project(features)
        mean = features.mean(1)  # (I, D)
        states = torch.tanh(self.initial(mean)).view(len(mean), 2, len(self.cells), -1)
        h, c = states.unbind(1)  # (I, layers, H)
        return DecoderState({"keys": keys, "values": values, "mean": mean}, {"h": h, "c": c})

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """(R,) words to logits (R, V)."""
        words = self.embedding(tokens)[:, None] * self.embed**0.5  # (R, 1, E)
        hidden, _, row = self.run(words, state, False)
        after = DecoderState(state.image, row, state.beams, state.position + 1)
        return self.score(hidden[-1])[:, 0], after

    def run(
        self, words: Tensor, state: DecoderState, need: bool
    ) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor]]:
        """(B, T, E) words, starting from a state, to hidden, attention if needed, and new rows."""
        form = self.run_recurrent if self.recurrent else self.run_parallel
        return form(words, state, need)

    def run_parallel(
        self, words: Tensor, state: DecoderState, need: bool
    ) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor]]:
        """All words one layer at a time: the first layer's states query, the others follow."""
        mean = state.image["mean"].repeat_interleave(state.beams, 0)[:, None]  # (B, 1, D)
        x = torch.cat([words, mean.expand(-1, words.shape[1], -1).to(words.dtype)], -1)
        first, *above = self._cells()
        x, end = run_cell(first, x, state, 0)
        context, weights = self.look(x, state, need)
        layers, ends = [x], [end]
        x = torch.cat([x, context.to(x.dtype)], -1)  # (B, T, H + D)
        for i, cell in enumerate(above, start=1):
            x, end = run_cell(cell, self.drop(x), state, i)
            layers.append(x)
            ends.append(end)
        return [*layers, self.merge(layers[-1], context)], weights, stack_states(ends)

    def run_recurrent(
        self, words: Tensor, state: DecoderState, need: bool
    ) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor]]:
        """One word at a time: the last state is the query, and words are read with contexts."""
        seen: list[tuple[Tensor, ...]] = []
        looked: list[Tensor] = []
        for word in torch.split(words, 1, dim=1):
            context, weights = self.look(state.row["h"][:, -1:], state, need)
            layers, row = self.run_word(torch.cat([word, context.to(word.dtype)], -1), state)
            state = DecoderState(state.image, row, state.beams)
            seen.append((*layers, context))
            looked += [] if weights is None else [weights]
        *hidden, context = (torch.cat(part, 1) for part in zip(*seen, strict=True))
        attention = torch.cat(looked, 1) if looked else None
        return [*hidden, self.merge(hidden[-1], context)], attention, state.row

    def run_word(self, x: Tensor, state: DecoderState) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One word (B, 1, E + D) through all layers."""
        layers: list[Tensor] = []
        ends: list[tuple[Tensor, Tensor]] = []
        for i, cell in enumerate(self._cells()):
            x, end = run_cell(cell, self.drop(x) if i else x, state, i)
            layers.append(x)
            ends.append(end)
        return layers, stack_states(ends)

    def _cells(self) -> Iterator[nn.LSTM]:
        return cast("Iterator[nn.LSTM]", iter(self.cells))

    def look(self, x: Tensor, state: DecoderState, need: bool) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) states to contexts (B, T, D) and attention (B, T, N)."""
        seen: tuple[Tensor, Tensor | None] = self.attention(
            x, state.image["keys"], state.image["values"], need
        )
        return seen

    def merge(self, hidden: Tensor, context: Tensor) -> Tensor:
        """State and context to the input of the vocabulary projection."""
        merged: Tensor = self.output(self.drop(torch.cat([hidden, context.to(hidden.dtype)], -1)))
        return merged

    def score(self, x: Tensor) -> Tensor:
        """(B, T, E or H) to logits (B, T, V)."""
        return F.linear(self.drop(x), *self.output_layer())

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """The embedding, if tied, or a matrix of its own; and the bias."""
        return (self.embedding if self.tied else self.vocabulary_output).weight, self.bias


def run_cell(
    cell: nn.LSTM, x: Tensor, state: DecoderState, layer: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(B, T, .) through one layer from its state; the outputs (B, T, H) and the state after."""
    h, c = (state.row[key][:, layer].contiguous() for key in ("h", "c"))
    if x.shape[1] == 1 and type(cell) is nn.LSTM:  # the layer's own call costs more than one word
        h, c = torch.lstm_cell(x[:, 0], (h, c), *cell.all_weights[0])
        return h[:, None], (h, c)
    if suits(cell, x):
        out, h, c = lstm_layer(x, h, c, cell)
        return out, (h, c)
    out, (h, c) = cell(x, (h[None], c[None]))
    return out, (h[0], c[0])


def stack_states(ends: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """States of all layers, each (B, H), as rows (B, layers, H)."""
    h, c = zip(*ends, strict=True)
    return {"h": torch.stack(h, 1), "c": torch.stack(c, 1)}
