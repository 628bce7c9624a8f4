"""Write Flickr8k again with several views of each training image: flips and random crops.

    python benchmarks/views.py --data flickr8k --out flickr8k_views --views 4

Features of frozen stages are cached, and a cache cannot be augmented while training. Views made
beforehand can: `flickr8k.py --data flickr8k_views --min-count 20` trains on four views of an image
as on four images (the count of a word is four times what it was). Development images stay as they
are. View 0 is the image itself, odd views are mirrored, views from 2 on are crops of 50 to 100 % of
the area; which ones depends on the seed, the image and the view alone.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

from PIL import Image, ImageOps

import capdistill as cd

SIDE = 260  # the largest input of the encoders used


def main() -> None:
    options = parse_arguments()
    data = cd.data.Flickr8k(options.data)
    images = options.out / "Images"
    images.mkdir(parents=True, exist_ok=True)
    rows, names = [], {"train": [], "dev": []}
    for split, views in (("train", options.views), ("dev", 1)):
        source = data.train if split == "train" else data.val
        for item in source.examples:
            for view in range(views):
                name = item.path.name if not view else f"{item.path.stem}_v{view}.jpg"
                write_view(item.path, images / name, view, options.seed)
                names[split].append(name)
                rows += [f"{name}#{i}\t{text}" for i, text in enumerate(item.captions)]
    (options.out / "Flickr8k.token.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for split, listed in names.items():
        (options.out / f"Flickr_8k.{split}Images.txt").write_text("\n".join(listed) + "\n")
    print(f"{len(names['train'])} training and {len(names['dev'])} development images")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_view(source: Path, target: Path, view: int, seed: int) -> None:
    if view == 0:
        shutil.copyfile(source, target)
        return
    chance = random.Random(f"{seed} {source.name} {view}")
    image = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    box = crop_box(*image.size, chance) if view >= 2 else (0, 0, *image.size)
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    if view % 2:
        image = ImageOps.mirror(image)
    image.save(target, quality=92)


def crop_box(width: int, height: int, chance: random.Random) -> tuple[float, float, float, float]:
    """A part of 50 to 100 % of the area, its sides at a ratio of 3:4 to 4:3 to the image's."""
    area, ratio = chance.uniform(0.5, 1.0), chance.uniform(0.75, 4 / 3)
    wide = width * min(1.0, (area * ratio) ** 0.5)
    high = height * min(1.0, (area / ratio) ** 0.5)
    left, top = chance.uniform(0, width - wide), chance.uniform(0, height - high)
    return left, top, left + wide, top + high


if __name__ == "__main__":
    main()
