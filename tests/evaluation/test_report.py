import itertools

import pytest
import torch

from capdistill.evaluation.report import Gallery

PICTURE = torch.zeros(3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("offered", [0, 1, 5, 12, 13, 100, 1000])
def test_pictures_are_spread_over_the_data_and_no_more_than_wanted(offered: int) -> None:
    gallery = Gallery(wanted=12)
    for i in range(offered):
        gallery.offer(str(i), PICTURE)
    shown = [int(image) for image in gallery.pictures()]
    assert shown == sorted(set(shown))
    assert len(shown) == min(12, offered)
    if offered >= 100:
        assert shown[-1] > 0.8 * offered
        assert max(b - a for a, b in itertools.pairwise(shown)) < 0.25 * offered


def test_memory_stays_bounded() -> None:
    gallery = Gallery(wanted=3)
    for i in range(1000):
        gallery.offer(str(i), PICTURE)
    assert len(gallery._kept) <= 6
