"""Keys and values of the words so far: written once, in room made beforehand, copied for no beam.

The beams of an image share one row, and a mask says which words are whose.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 64  # words for which room is made at once, and 24 for every beam


class Cache:
    """Self-attention's memory of all layers, one row an image.

    It behaves as a value: a second continuation of the same past gets room of its own, so that
    what was written for the first stays. Where gradients are wanted nothing is written in place.

    Example:
        >>> with torch.no_grad():
        ...     cache = Cache.empty(layers=1, like=torch.zeros(2, 1, 1, 4)).extend(3)
        ...     keys, values = cache.put(0, torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        >>> keys.shape, cache.keep(torch.tensor([1])).used
        (torch.Size([2, 1, 3, 4]), 3)

    Args:
        rooms: Keys, values, keys, values, ... of the layers, (I, heads, capacity, d).
        used: Slots that hold words; the others are free.
        new: How many of them are still to be `put`.
        tip: The last slot that anybody wrote, shared by all caches of the same rooms.
    """

    def __init__(
        self, rooms: list[Tensor], used: int = 0, new: int = 0, tip: list[int] | None = None
    ) -> None:
        self.rooms, self.used, self.new = rooms, used, new
        self.tip = [used] if tip is None else tip
        self.moves = tip is None  # the words so far have to be copied to new rooms first

    @classmethod
    def empty(cls, layers: int, like: Tensor) -> Cache:
        """No word yet, for as many images, heads and dimensions as keys (I, heads, N, d) have."""
        return cls([like.new_empty(*like.shape[:2], 0, like.shape[3])] * (2 * layers))

    def extend(self, slots: int) -> Cache:
        """Place for as many words more, an image; they are then `put`, layer by layer."""
        used = self.used + slots
        free = self.tip[0] == self.used and used <= self.rooms[0].shape[2]
        if not free or torch.is_grad_enabled():
            return Cache([*self.rooms], used, slots)
        self.tip[0] = used
        return Cache([*self.rooms], used, slots, self.tip)

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest words (I, heads, k, d) of a layer; gives all, (I, heads, used, d)."""
        return self._put(2 * layer, key), self._put(2 * layer + 1, value)

    def _put(self, place: int, words: Tensor) -> Tensor:
        room, before = self.rooms[place], self.used - self.new
        past = room[:, :, :before]
        if torch.is_grad_enabled():
            self.rooms[place] = torch.cat([past, words.to(room.dtype)], 2)
            return self.rooms[place]
        if self.moves:
            room = room.new_empty(*room.shape[:2], before + max(ROOM, 24 * self.new), room.shape[3])
            room[:, :, :before] = past
            self.rooms[place] = room
        room[:, :, before : self.used] = words
        return room[:, :, : self.used]

    def keep(self, images: Tensor) -> Cache:
        """Only the given images."""
        rooms = [room[images] for room in self.rooms]
        return Cache(rooms, self.used, tip=[self.used])
