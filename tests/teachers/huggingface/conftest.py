"""A teacher of each family, made once."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch

pytest.importorskip("transformers")

import capdistill as cd
from capdistill.outputs import Batch
from capdistill.tokenizer import pad_batch
from tests.teachers.huggingface import tiny

CAPTIONS = ("a dog runs", "the cat sits on the grass", "a man rides a horse", "a red dog")


@cache
def made(family):
    """(teacher, processor) of a family; the model, the processor and the tokenizer are random."""
    module, processor, tokenizer = tiny.make(family)
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor)
    with warnings.catch_warnings():  # a cache that transformers broke; see test_cache
        warnings.simplefilter("ignore")
        teacher.spec()
    return teacher, processor


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def teacher(family):
    return made(family)[0]


@pytest.fixture
def processor(family):
    return made(family)[1]


def batch_of(teacher, captions=CAPTIONS, images=2, side=tiny.SIDE, seed=0):
    """The first captions belong to the first image, and so on."""
    tokenizer = teacher.tokenizer
    ids, mask = pad_batch([tokenizer.encode(text) for text in captions], tokenizer.pad_id)
    generator = torch.Generator().manual_seed(seed)
    shape = (images, 3, side, side)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Batch(pixels, ids, mask, tuple(captions), tuple(map(str, range(images))))


@pytest.fixture
def batch(teacher):
    return batch_of(teacher)
