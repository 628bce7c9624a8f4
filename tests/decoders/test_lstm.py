"""Both forms of the LSTM decoder against their equations, word by word, by `nn.LSTMCell`."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.decoders.decoder_cases import inputs, make


def cell(layer, x, state):
    """The LSTM's equations."""
    h, c = state
    gates = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    gates = gates + F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def look(attention, x, features):
    """Plain multi-head attention of one vector over (N, D) features."""
    query = attention.query(x).chunk(attention.heads)
    keys, values = attention.key_value(features).chunk(2, -1)
    parts = [part.chunk(attention.heads, -1) for part in (keys, values)]
    weights = [(k @ q / len(q) ** 0.5).softmax(0) for q, k in zip(query, parts[0], strict=True)]
    return torch.cat([w @ v for w, v in zip(weights, parts[1], strict=True)]), sum(weights) / len(
        weights
    )


def by_hand(decoder, ids, features, recurrent):
    """Logits and attention (T, .) of one caption of one image."""
    layers, mean = len(decoder.cells), features.mean(0)
    h, c = decoder.initial(mean).tanh().view(2, layers, -1)
    states, logits, attention = list(zip(h, c, strict=True)), [], []
    for word in ids:
        x = decoder.embedding.weight[word] * decoder.embed**0.5
        if recurrent:
            context, weights = look(decoder.attention, states[-1][0], features)
        x = torch.cat([x, context if recurrent else mean])
        for i, layer in enumerate(decoder.cells):
            states[i] = cell(layer, x, states[i])
            x = states[i][0]
            if i == 0 and not recurrent:
                context, weights = look(decoder.attention, x, features)
                x = torch.cat([x, context])
        merged = decoder.output(torch.cat([states[-1][0], context]))
        matrix = decoder.embedding if decoder.tied else decoder.vocabulary_output
        logits.append(matrix.weight @ merged + decoder.bias)
        attention.append(weights)
    return torch.stack(logits), torch.stack(attention)


@pytest.mark.parametrize(
    "form", ["lstm-parallel", "lstm-parallel-1", "lstm-untied", "lstm-recurrent-untied"]
)
def test_a_caption_follows_the_equations(form):
    decoder, (ids, features) = make(form), inputs(images=2, k=2)
    out = decoder(ids, features, frozenset({"attention"}))
    for row in range(4):
        logits, seen = by_hand(decoder, ids[row], features[row // 2], decoder.recurrent)
        assert_close(out.logits[row], logits, rtol=0, atol=1e-12)
        assert_close(out.attention[row], seen, rtol=0, atol=1e-12)


def test_two_recurrent_layers_follow_the_equations():
    decoder, (ids, features) = make("lstm-recurrent"), inputs(images=1, k=1)
    logits, _ = by_hand(decoder, ids[0], features[0], recurrent=True)
    assert_close(decoder(ids, features).logits[0], logits, rtol=0, atol=1e-12)
