"""The Transformer decoder against one written plainly, with its own weights, in float64."""

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from capdistill.decoders.transformer import sinusoids
from tests.decoders.decoder_cases import every_form, inputs, make


def heads_of(x, heads):
    return x.chunk(heads, -1)


def mix(query, keys, values, heads, visible=None):
    """One row: (T, W) queries over (S, W) keys; `visible[t]` keys may be seen by query t."""
    seen = []
    parts = (heads_of(part, heads) for part in (query, keys, values))
    for q, k, v in zip(*parts, strict=True):
        rows = []
        for t in range(len(q)):
            n = len(k) if visible is None else visible[t]
            rows.append((k[:n] @ q[t] / math.sqrt(q.shape[1])).softmax(0) @ v[:n])
        seen.append(torch.stack(rows))
    return torch.cat(seen, -1)


def by_hand(decoder, ids, features):
    """Logits (T, V) of one caption of one image."""
    width = decoder.width
    places = [
        [
            (math.sin if i % 2 == 0 else math.cos)(t / 10_000 ** ((i - i % 2) / width))
            for i in range(width)
        ]
        for t in range(len(ids))
    ]
    x = decoder.embedding.weight[ids] * math.sqrt(width) + torch.tensor(places, dtype=torch.float64)
    for block in decoder.blocks:
        q, k, v = block.query_key_value(block.self_norm(x)).chunk(3, -1)
        visible = [t + 1 for t in range(len(ids))]
        x = x + block.self_output(mix(q, k, v, block.heads, visible))
        k, v = block.cross.key_value(features).chunk(2, -1)
        q = block.cross.query(block.cross_norm(x))
        x = x + block.cross_output(mix(q, k, v, block.heads))
        inner = F.gelu(F.linear(block.ffn_norm(x), block.ffn[0].weight, block.ffn[0].bias))
        x = x + F.linear(inner, block.ffn[3].weight, block.ffn[3].bias)
    return decoder.final_norm(decoder.output(x)) @ decoder.embedding.weight.T


def test_a_caption_follows_the_equations():
    decoder, (ids, features) = make("transformer"), inputs(images=2, k=2)
    logits = decoder(ids, features).logits
    for row in range(4):
        expected = by_hand(decoder, ids[row], features[row // 2])
        assert_close(logits[row], expected, rtol=0, atol=1e-12)


def test_positions_are_the_same_from_wherever_they_are_counted():
    table = sinusoids(0, 60, 12)
    for first, count in ((0, 1), (7, 1), (59, 1), (13, 40)):
        assert_close(sinusoids(first, count, 12), table[first : first + count], rtol=0, atol=1e-14)


@every_form
def test_a_caption_longer_than_any_seen_runs(form):
    decoder, (ids, features) = make(form), inputs(length=120)
    assert torch.isfinite(decoder(ids, features).logits).all()
