from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capdistill.data import read_image
from capdistill.data.images import centre_square, random_square
from tests.data.data_pictures import noise


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 50))
def test_every_size_becomes_the_square_asked_for(height: int, width: int, seed: int) -> None:
    image = torch.full((3, height, width), 9, dtype=torch.uint8)
    for made in (
        centre_square(image, 24),
        random_square(image, 24, torch.Generator().manual_seed(seed)),
    ):
        assert made.shape == (3, 24, 24)
        assert made.dtype == torch.uint8
        assert (made == 9).all()


def test_a_square_of_the_right_size_is_untouched() -> None:
    image = read_image(noise(32))
    assert torch.equal(centre_square(image, 32), image)


def test_the_centre_is_kept_of_a_long_picture() -> None:
    image = torch.zeros(3, 10, 50, dtype=torch.uint8)
    image[:, :, 20:30] = 200
    assert (centre_square(image, 10) == 200).all()


def test_a_very_long_picture_costs_no_more_than_others() -> None:
    assert centre_square(torch.zeros(3, 1, 2_000_000, dtype=torch.uint8), 64).shape[2] == 64


def test_downsizing_does_not_alias() -> None:
    checks = torch.zeros(3, 64, 64, dtype=torch.uint8)
    checks[:, ::2, 1::2] = 255
    checks[:, 1::2, ::2] = 255
    small = centre_square(checks, 16)[:, 2:-2, 2:-2].float()
    assert (small - 127.5).abs().max() < 6


@pytest.mark.parametrize("flip", [True, False])
def test_pictures_are_mirrored_only_on_request(flip: bool) -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, :, 20:] = 200
    crops = [
        random_square(image, 16, torch.Generator().manual_seed(n), flip=flip) for n in range(40)
    ]
    mirrored = sum(bool(crop[0, 8, 0] > crop[0, 8, -1]) for crop in crops)
    assert 8 <= mirrored <= 32 if flip else mirrored == 0


def test_a_training_crop_keeps_most_of_the_picture() -> None:
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200).contiguous()
    for seed in range(40):
        crop = random_square(ramp, 50, torch.Generator().manual_seed(seed))
        assert int(crop[0, 0, -1]) - int(crop[0, 0, 0]) > 0.8 * 200
