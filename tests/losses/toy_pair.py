"""Two invented models' outputs: nothing is trained, so that every number can be checked by hand."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.nn.functional as F

from capdistill.outputs import Batch, CaptionerOutput, ModelSpec

WORDS = tuple("abcdefghi")
STUDENT = ModelSpec(6, 9, 1, (2, 4), (7, 8), WORDS, has_attention=True, name="small")
TEACHER = ModelSpec(4, 12, 0, (4, 3), (5, 4, 6), WORDS, has_attention=True, name="large")


def make_batch(lengths, captions_per_image=2):
    """`lengths[b]` valid targets in row b."""
    lengths = torch.tensor(lengths)
    steps = torch.arange(int(lengths.max()) + 1)
    mask = steps[None] <= lengths[:, None]
    images = len(lengths) // captions_per_image
    return Batch(
        images=torch.zeros(images, 3, 4, 4, dtype=torch.uint8),
        input_ids=torch.randint(0, len(WORDS), mask.shape),
        mask=mask,
        captions=("",) * len(lengths),
        image_ids=tuple(str(i) for i in range(images)),
    )


def make_output(batch, spec, seed=0, dtype=torch.float64, grad=True):
    """Leaves of the shapes that `spec` says."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.targets.shape

    def leaf(*shape, attention=False):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = value.softmax(-1) if attention else value
        return value.to(dtype).requires_grad_(grad)

    return CaptionerOutput(
        logits=leaf(rows, length, len(spec.vocabulary)),
        hidden=tuple(leaf(rows, length, width) for width in spec.hidden_dims),
        features=leaf(batch.num_images, spec.tokens, spec.feature_dim),
        attention=leaf(rows, length, spec.tokens, attention=True),
        mask=batch.target_mask,
    )


def leaves(output):
    """Every tensor of an output that a gradient could reach."""
    return [output.logits, *output.hidden, output.features, output.attention]


def gradients(output):
    return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves(output)]


def map_output(output, tokenwise, imagewise):
    """`tokenwise` on what has a row a token, `imagewise` on the features."""
    return CaptionerOutput(
        logits=tokenwise(output.logits),
        hidden=tuple(tokenwise(layer) for layer in output.hidden),
        features=imagewise(output.features),
        attention=tokenwise(output.attention),
        mask=output.mask,
    )


def pad(batch, output, columns):
    """The same with `columns` more of padding, filled with NaN: nobody may look there."""
    longer = replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, columns)),
        mask=F.pad(batch.mask, (0, columns)),
    )
    padded = map_output(
        output, lambda x: F.pad(x, (0, 0, 0, columns), value=torch.nan), lambda x: x
    )
    return longer, replace(padded, mask=longer.target_mask)


def part(batch, output, images):
    """Only the images of a slice, with their captions."""
    k = batch.captions_per_image
    rows = slice(images.start * k, images.stop * k)
    cut = {f.name: getattr(batch, f.name) for f in fields(batch)}
    cut |= {name: cut[name][rows] for name in ("input_ids", "mask", "captions")}
    cut |= {name: cut[name][images] for name in ("images", "image_ids")}
    smaller = map_output(output, lambda x: x[rows], lambda x: x[images])
    return Batch(**cut), replace(smaller, mask=output.mask[rows])


def cast(output, dtype):
    return map_output(output, lambda x: x.detach().to(dtype), lambda x: x.detach().to(dtype))
