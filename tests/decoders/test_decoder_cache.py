"""The memory of earlier words is a value, although it is written in place."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from capdistill.decoders.base import ROOM, Cache
from tests.decoders.decoder_cases import inputs, make


@pytest.mark.parametrize("grad", [True, False])
def test_two_continuations_of_one_past_do_not_see_each_other(grad):
    decoder, (ids, features) = make("transformer"), inputs(k=1)
    with torch.set_grad_enabled(grad):
        _, past = decoder.step(ids[:, 0], decoder.start(features))
        _, mine = decoder.step(ids[:, 1], past)
        _, theirs = decoder.step(ids[:, 2], past)
        logits, _ = decoder.step(ids[:, 3], mine)
        others, _ = decoder.step(ids[:, 3], theirs)
        expected = decoder(ids[:, [0, 1, 3]], features).logits[:, -1]
        expected_others = decoder(ids[:, [0, 2, 3]], features).logits[:, -1]
    assert_close(logits, expected, rtol=0, atol=1e-12)
    assert_close(others, expected_others, rtol=0, atol=1e-12)


def test_a_gradient_flows_through_steps_as_through_forward():
    decoder, (ids, features) = make("transformer", dropout=0.0), inputs(k=1)
    features.requires_grad_()
    state, total = decoder.start(features), 0.0
    for word in ids.T:
        logits, state = decoder.step(word, state)
        total = total + logits.sin().sum()
    (stepped,) = torch.autograd.grad(total, features)
    (whole,) = torch.autograd.grad(decoder(ids, features).logits.sin().sum(), features)
    assert_close(stepped, whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_captions_longer_than_the_first_room_go_on():
    decoder, (ids, features) = make("transformer"), inputs(k=2, length=ROOM)
    state = decoder.start(features).expand(2)
    logits = []
    for word in ids.T:
        out, state = decoder.step(word, state)
        logits.append(out)
    assert state.cache.used == 2 * ROOM
    assert_close(torch.stack(logits, 1), decoder(ids, features).logits, rtol=0, atol=1e-11)


@torch.no_grad()
def test_rooms_are_made_once_and_never_for_a_beam():
    decoder, (ids, features) = make("transformer"), inputs(k=3)
    _, state = decoder.step(ids[::3, 0], decoder.start(features))
    rooms = [room.data_ptr() for room in state.cache.rooms]
    state = state.expand(3)
    for word in ids.T[1:]:
        _, state = decoder.step(word, state)
        state = state.reorder(torch.tensor([2, 0, 0, 4, 5, 3]))
    assert [room.data_ptr() for room in state.cache.rooms] == rooms
    assert {room.shape[0] for room in state.cache.rooms} == {2}


@torch.no_grad()
def test_kept_images_have_rooms_of_their_own():
    like = torch.zeros(3, 1, 1, 2)
    cache = Cache.empty(1, like).extend(1)
    cache.put(0, torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, 2), like)
    kept = cache.keep(torch.tensor([2, 0]))
    keys, _ = kept.extend(1).put(0, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
    assert keys[:, 0, :, 0].tolist() == [[2.0, 1.0], [0.0, 1.0]]
    assert cache.rooms[0][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
