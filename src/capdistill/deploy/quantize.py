"""8-bit graphs of an exported captioner, and the images for calibration.

Convolutions are quantized statically (`convolutions`), products with matrices by rows (`products`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capdistill.captioner import Captioner
from capdistill.data.dataset import CaptionData, Splits
from capdistill.data.folder import Images
from capdistill.data.pixels import is_many, read_batches
from capdistill.deploy.convolutions import quantize_convolutions
from capdistill.deploy.products import Products, quantize_products
from capdistill.errors import ConfigError, DataError, shortened
from capdistill.int8 import Ranges

_CALIBRATION, _BATCH = 128, 8  # images for calibration, and how many are run at once


@dataclass(frozen=True)
class Calibration:
    """How the inputs and outputs of convolutions are rounded.

    Args:
        images: Batches, (I, 3, S, S) uint8, which show the ranges.
        ranges: Those of a training with quantize="int8", which take the place of what is shown.
        correct_biases: As for `quantize_convolutions`. Weights that were trained while rounded have
            nothing to correct.
    """

    images: Sequence[npt.NDArray[np.uint8]]
    ranges: Ranges | None = None
    correct_biases: bool = True

    @classmethod
    def of(cls, captioner: Captioner, data: Any) -> Calibration:
        """By images, if there are any, else as in training.

        Raises:
            ConfigError, DataError: as `calibration_batches`.
        """
        size, trained = captioner.image_size, captioner.activation_ranges
        if data is None and trained is not None:
            black = np.zeros((1, len(captioner.encoder.mean), size, size), np.uint8)
            return cls([black], trained, correct_biases=False)
        images = [*calibration_batches(data, size)]  # one that cannot be read is found at once
        return cls(images, correct_biases=trained is None)


def quantize_graphs(
    encoder: Path, step: Path, calibration: Calibration, products: Products = "row"
) -> None:
    """Replace two float32 graphs by 8-bit ones.

    Args:
        encoder, step: The files; each is replaced.
        calibration: For convolutions.
        products: As for `quantize_products`.
    """
    import onnx

    model = onnx.load(encoder)
    if any(node.op_type == "Conv" for node in model.graph.node):
        made = encoder.with_name("quantized.onnx")
        quantize_convolutions(
            encoder, made, calibration.images, calibration.correct_biases, calibration.ranges
        )
        made.replace(encoder)
    for path in (encoder, step):
        model = onnx.load(path)
        quantize_products(model, products)
        onnx.save(model, path)


def calibration_batches(data: Any, size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """At most 128 images, evenly spaced, as (8, 3, size, size) uint8.

    Args:
        data: A folder, a data set, its splits (of which the training images are taken), or images
            in any form that `Captioner.caption` takes.
        size: Side in pixels.

    Raises:
        ConfigError: something else, or nothing, was given.
        DataError: an image cannot be read, or there is none.
    """
    data = data.train if isinstance(data, Splits) else data
    if isinstance(data, (str, os.PathLike)):
        data = Images(Path(data))
    if isinstance(data, CaptionData):
        data = [example.path for example in data.examples]
    if data is None or not is_many(data):
        raise ConfigError(
            f"export: calibration={shortened(data)} was given; quantize='int8' needs images like "
            "those that will be captioned, a hundred or so: a folder, a data set or a list."
        )
    images = list(data)
    if not images:
        raise DataError("export: calibration holds no image. Give a hundred or so.")
    chosen = images[:: -(-len(images) // _CALIBRATION)]
    read = read_batches(chosen, size, _BATCH, "raise")
    return (np.stack([image for image in batch if image is not None]) for batch in read)
