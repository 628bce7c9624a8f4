"""Teacher forcing and cached decoding with an adapter: the same logits in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capdistill.decoders.base import Decoder, DecoderState
from capdistill.outputs import DecoderOutput
from capdistill.teachers.huggingface.base import Adapter, Encoded

_WORDS_READ = frozenset({"hidden", "attention"})


def teacher_forced(
    adapter: Adapter,
    encoded: Encoded,
    words: Tensor,
    need: frozenset[str] = frozenset(),
    use_cache: bool = True,
) -> DecoderOutput:
    """What a model predicts at each word of given captions.

    Args:
        adapter: Of the model.
        encoded: Of I images.
        words: (I * k, T - 1) ids of the captions, behind the prompt.
        need: "hidden" and "attention".
        use_cache: Whether image and prompt may be read once for the k captions.

    Returns:
        (I * k, T, V) logits of the first word and of what follows each word; the others alike.
    """
    if adapter.first_words is None:
        return _teacher_forced(adapter, encoded, words, need, use_cache)
    swap = adapter.first_words.to(words.device)
    words = torch.cat([swap[words[:, :1]], words[:, 1:]], 1)
    output = _teacher_forced(adapter, encoded, words, need, use_cache)
    return replace(output, logits=torch.cat([output.logits[:, :1, swap], output.logits[:, 1:]], 1))


def _teacher_forced(
    adapter: Adapter, encoded: Encoded, words: Tensor, need: frozenset[str], use_cache: bool
) -> DecoderOutput:
    images, k, length = len(encoded), len(words) // len(encoded), words.shape[1] + 1
    if not (use_cache and adapter.reads_prompt_once):
        ids = torch.cat([_prompt(adapter, words), words], 1)
        return _read(adapter, ids, encoded.repeat(k), need, length, None)
    cache = adapter.new_cache()
    start = _prompt(adapter, words[:images])
    first = _read(adapter, start, encoded, need, 1, cache)
    first = _mapped(lambda each: each.repeat_interleave(k, 0), first)
    if length == 1:
        return first
    if k > 1:
        cache.batch_repeat_interleave(k)
    rest = _read(adapter, words, encoded.repeat(k), need, length - 1, cache)
    return _mapped(lambda *parts: torch.cat(parts, 1), first, rest)


def spaced_words(adapter: Adapter, vocabulary: Sequence[str]) -> Tensor | None:
    """(V,) the id that a model reads for each id of a first word, where they differ.

    Behind a prompt that ends with a word, a caption goes on with a space, and its first piece is
    another one than at the beginning of a text: they change places. None where they do not differ.
    """
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    last = int(adapter.prompt_ids[-1])
    mark = next((mark for mark in ("Ġ", "▁") if mark + "a" in ids and "a" in ids), None)
    if mark is None or last in adapter.tokenizer.all_special_ids:
        return None
    ends_with_space = adapter.tokenizer.decode([last])[-1:].isspace()
    if ends_with_space or vocabulary[adapter.ids_of("a")[0]] != "a":
        return None
    swap = torch.arange(len(vocabulary))
    for piece, index in ids.items():
        spaced = ids.get(mark + piece)
        if spaced is not None and not piece.startswith(mark):
            swap[index], swap[spaced] = spaced, index
    return swap


def _prompt(adapter: Adapter, words: Tensor) -> Tensor:
    """(R, P) ids before each row of words."""
    return adapter.prompt_ids.to(words.device).expand(len(words), -1)


def _read(
    adapter: Adapter,
    ids: Tensor,
    encoded: Encoded,
    need: frozenset[str],
    keep: int,
    cache: Any,
) -> DecoderOutput:
    """The outputs at the last `keep` of the ids."""
    options = adapter.with_cache(cache)
    if "hidden" in need:
        options["output_hidden_states"] = True
    if "attention" in need:
        options["output_attentions"] = True
        if adapter.reader.config._attn_implementation != "eager":
            adapter.reader.set_attn_implementation("eager")  # fused kernels do not return it
    output = adapter.read(ids, encoded, keep, **options)
    hidden = attention = None
    if "hidden" in need:
        layers = _first(output, "decoder_hidden_states", "hidden_states")[1:]  # without the words'
        hidden = tuple(layer[:, -keep:] for layer in layers)
    if "attention" in need:
        heads = _first(output, "cross_attentions", "attentions")[-1]  # (R, heads, L, columns)
        attention = heads.mean(1)[:, -keep:, adapter.image_columns].float()
        attention = attention / attention.sum(-1, keepdim=True)
    return DecoderOutput(output.logits[:, -keep:], hidden, attention)


def _first(output: Any, *names: str) -> Any:
    return next(output[name] for name in names if name in output)


def _mapped(change: Any, *outputs: DecoderOutput) -> DecoderOutput:
    """A function of each tensor of some outputs."""
    hidden = [each.hidden for each in outputs if each.hidden is not None]
    attention = [each.attention for each in outputs if each.attention is not None]
    return DecoderOutput(
        change(*(each.logits for each in outputs)),
        tuple(change(*layers) for layers in zip(*hidden, strict=True)) if hidden else None,
        change(*attention) if attention else None,
    )


@dataclass(frozen=True)
class CachedState(DecoderState):
    """State of a Hugging Face model between two words.

    A step changes the model's cache in place, so only the newest state may be used.

    Args:
        past: The model's own cache; without one, `row` holds all words so far.
    """

    past: Any = None

    def expand(self, k: int) -> CachedState:
        """As for every state."""
        if self.past is not None and k > 1:
            self.past.batch_repeat_interleave(k)
        rows = {key: value.repeat_interleave(k, 0) for key, value in self.row.items()}
        return replace(self, row=rows, beams=self.beams * k)

    def reorder(self, index: Tensor) -> CachedState:
        """As for every state."""
        if self.past is not None:
            self.past.batch_select_indices(index)
        return replace(self, row={key: value[index] for key, value in self.row.items()})

    def keep(self, images: Tensor) -> CachedState:
        """As for every state."""
        rows = torch.arange(len(next(iter(self.image.values()))) * self.beams, device=images.device)
        index = rows.view(-1, self.beams)[images].flatten()
        kept = {key: value[images] for key, value in self.image.items()}
        return replace(self.reorder(index), image=kept)


class CachedDecoder(Decoder):
    """The language model of an adapter, word by word.

    Args:
        adapter: Of the model.
        vocabulary: V.
        use_cache: False reads the whole caption again for every word (the image is encoded once).
        suppressed: Ids that the model's generation configuration never generates.
        suppressed_first: The same for the first word.
    """

    hidden_dims = ()

    def __init__(
        self,
        adapter: Adapter,
        vocabulary: int,
        use_cache: bool = True,
        suppressed: tuple[int, ...] = (),
        suppressed_first: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.adapter, self.vocabulary, self.use_cache = adapter, vocabulary, use_cache
        self.has_attention = "attention" in adapter.knowledge
        self.ends = adapter.end_ids()
        self.suppressed, self.suppressed_first = suppressed, suppressed_first

    def build_vocabulary(self, vocabulary: int) -> None:
        """Do nothing: the vocabulary is the model's."""

    def forward(
        self, input_ids: Tensor, features: Any, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids, the start token first, and encoded images to logits (B, T, V)."""
        words, need = input_ids[:, 1:], need & _WORDS_READ
        return teacher_forced(self.adapter, features, words, need, self.use_cache)

    def start(self, features: Any) -> CachedState:
        """Image and prompt are read; the first logits are in the state."""
        rows = len(features)
        words = torch.zeros(rows, 0, dtype=torch.int64, device=features.device)
        past = self.adapter.new_cache() if self.use_cache else None
        ids = _prompt(self.adapter, words)
        logits = _read(self.adapter, ids, features, frozenset(), 1, past).logits[:, 0]
        row = {"logits": logits} if self.use_cache else {"logits": logits, "words": words}
        return CachedState(features.values, row, past=past)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, CachedState]:
        """(R,) words to logits (R, V); the start token gives those that are in the state."""
        row = dict(state.row)
        after = replace(state, row=row, position=state.position + 1)
        swap = self.adapter.first_words
        if not state.position:
            logits = self._allowed(row.pop("logits"), self.suppressed_first)
            return logits if swap is None else logits[:, swap.to(logits.device)], after
        if state.position == 1 and swap is not None:
            tokens = swap.to(tokens.device)[tokens]
        words = tokens[:, None]
        if state.past is None:
            row["words"] = words = torch.cat([row["words"], words], 1)
            words = torch.cat([_prompt(self.adapter, words), words], 1)
        encoded = Encoded(state.image).repeat(state.beams)
        output = _read(self.adapter, words, encoded, frozenset(), 1, state.past)
        return self._allowed(output.logits[:, -1]), after

    def _allowed(self, logits: Tensor, also: tuple[int, ...] = ()) -> Tensor:
        """The logits with one end token, and without ids that are never generated."""
        end, *others = self.ends
        dropped = [*others, *self.suppressed, *also]
        if dropped:
            logits = logits.clone()
            logits[:, end] = logits[:, self.ends].logsumexp(-1)
            logits[:, dropped] = -torch.inf
        return logits
