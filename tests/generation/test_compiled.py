"""`torch.compile` of a decoder's step: the documented line, and the same captions."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from capdistill.generation import GenerationConfig, GenerationSpec, generate
from tests.generation.decoding_cases import END, PAD, START, pictures, real, same

pytestmark = pytest.mark.slow
compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="there is no C++ compiler"
)


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        pytest.param("recurrent", "inductor", marks=compiler),
        ("parallel", "eager"),  # traced and guarded as for any backend, without its minutes
        ("transformer", "eager"),
    ],
)
def test_a_compiled_step_gives_the_same_captions(form, backend):
    spec = GenerationSpec(START, END, 4, GenerationConfig(beam_size=2), banned=(PAD, START))
    expected = generate(real(form, 3), pictures(2), spec)
    decoder = real(form, 3)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder.step = torch.compile(decoder.step, dynamic=True, backend=backend)
        found = generate(decoder, pictures(2), spec)
    assert all(map(same, found, expected))
