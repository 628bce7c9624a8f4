"""What a caption result shows at a prompt and in a notebook."""

import base64
import io

import pytest
import torch
from PIL import Image

from capdistill.generation.hypotheses import CaptionResult, Hypothesis


def result(**changed: object) -> CaptionResult:
    values: dict = {
        "text": "a <dog>",
        "tokens": ("a", "<dog>"),
        "log_prob": -1.5,
        "token_log_probs": (-0.5, -0.5, -0.5),
        "finished": True,
        "n_best": (Hypothesis((4, 5), -1.5, finished=True),),
        "attention": torch.full((2, 7), 1 / 7),
        "grid": (2, 3),
        "prefix_tokens": 1,
        "image": torch.full((3, 300, 300), 200, dtype=torch.uint8),
    }
    return CaptionResult(**{**values, **changed})


def test_a_result_has_one_line_without_its_tensors() -> None:
    line = repr(result())
    assert line == (
        "CaptionResult('a <dog>': 2 tokens, log_prob -1.50, 1 hypotheses, attention on (2, 3) map, "
        "image 300x300)"
    )
    assert "no attention" in repr(result(attention=None))
    assert "cut at the length limit" in repr(result(finished=False))


def test_a_notebook_shows_the_image_and_the_escaped_caption() -> None:
    page = result()._repr_html_()
    assert "<figcaption>a &lt;dog&gt;<br>" in page
    data = page.split("base64,")[1].split('"')[0]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (192, 192)
    assert picture.getpixel((90, 90)) == pytest.approx((200, 200, 200), abs=3)
    assert "(empty)" in result(text="")._repr_html_()
