"""Caching features against a plain loop: torch's DataLoader and the model's forward in batches.

    python benchmarks/caching.py --images flickr8k/images --count 384
    python benchmarks/caching.py --images flickr8k/images --device cuda --workers 8 --count 6000
    python benchmarks/caching.py --images flickr8k/images --count 192 --views 4

Both sides decode, crop and resize the same JPEG files in the same number of worker processes, and
run the same encoder in the same precision and batches. The plain loop keeps nothing; ours checks
every value, writes the memory map and its marks, and brings them to the disk. The sides alternate;
the figure is the ratio of the medians of one run. `--hash` times the key of the images alone.
`--views` compares several views of each image, cached together and one after the other.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

import capdistill as cd
from capdistill.data.image_keys import images_key
from capdistill.data.loader import Loader
from capdistill.encoders import create
from capdistill.encoders.base import Encoder
from capdistill.feature_cache import Wanted, cache_trunks
from capdistill.runtime import autocast, evaluating, pick_device, pick_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="directory of JPEG files")
    parser.add_argument("--count", type=int, default=384, help="images of a round")
    parser.add_argument("--encoder", default="tf_efficientnet_lite0", help="a model of timm")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model on a CPU")
    parser.add_argument("--views", type=int, help="views of each image, together and apart")
    parser.add_argument("--hash", action="store_true", help="time the key of the images alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = sorted(options.images.glob("*.jpg"))[: options.count]
    if not files:
        parser.error(f"there are no JPEG files (*.jpg) in {options.images}")
    if options.hash:
        print(time_hashes(files))
    elif options.views:
        print(compare_views(files, options))
    else:
        print(compare(files, options))


def compare(files: list[Path], options: argparse.Namespace) -> str:
    device = pick_device(options.device)
    precision = pick_precision(device)
    encoder = create("timm", name=options.encoder, weights=False).eval().to(device)
    how = (encoder, files, options.batch_size, options.workers, precision)
    plain_loop(*how[:1], files[: options.batch_size], *how[2:])  # warm up
    times: dict[str, list[float]] = {
        name: [] for name in ("plain", "ours", "plain cpu", "ours cpu")
    }
    for _ in range(options.rounds):
        for name, side in (("plain", plain_loop), ("ours", our_caching)):
            busy = time.process_time()
            times[name].append(side(*how))
            times[f"{name} cpu"].append(time.process_time() - busy)
    plain, ours, plain_cpu, ours_cpu = (statistics.median(each) for each in times.values())
    return (
        f"{options.encoder}, {len(files)} images, {options.workers} workers, {device} {precision}: "
        f"plain {len(files) / plain:.1f} images/s, ours {len(files) / ours:.1f}, ratio of times "
        f"{ours / plain:.3f} (of processor times {ours_cpu / plain_cpu:.3f}, of the fastest rounds "
        f"{min(times['ours']) / min(times['plain']):.3f})"
    )


def compare_views(files: list[Path], options: argparse.Namespace) -> str:
    device = pick_device(options.device)
    precision = pick_precision(device)
    encoder = create("timm", name=options.encoder, weights=False).eval().to(device)
    wanted = [Wanted(encoder, f"view {view}", view) for view in range(options.views)]
    times: dict[str, list[float]] = {"apart": [], "together": []}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, groups in {"apart": [[each] for each in wanted], "together": [wanted]}.items():
            folder = Path(tempfile.mkdtemp())
            source = loader(files, encoder.image_size, options.batch_size, options.workers)
            began = time.perf_counter()
            for group in groups:
                cache_trunks(group, source, folder, precision)
            times[name] += [time.perf_counter() - began] * bool(number)
            shutil.rmtree(folder)
    apart, together = (statistics.median(each) for each in times.values())
    return (
        f"{options.encoder}, {len(files)} images in {options.views} views, {options.workers} "
        f"workers, {device} {precision}: apart {apart:.2f} s, together {together:.2f} s, ratio "
        f"{together / apart:.3f}"
    )


class Photos(Dataset[Tensor]):
    """Decoded, cropped and resized photos."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(np.array(Image.open(self.files[index]).convert("RGB")))
        square = F.center_crop(pixels.permute(2, 0, 1), [min(pixels.shape[:2])])
        return F.resize(square, [self.size, self.size], antialias=True)


def plain_loop(
    encoder: Encoder, files: list[Path], batch_size: int, workers: int, precision: str
) -> float:
    device = next(encoder.parameters()).device
    began = time.perf_counter()
    loader = DataLoader(Photos(files, encoder.image_size), batch_size, num_workers=workers)
    with evaluating(encoder), torch.no_grad(), autocast(device, precision):
        for images in loader:
            values = encoder.trunk(images.to(device)).half().cpu()
    assert values.ndim == 3
    return time.perf_counter() - began


def our_caching(
    encoder: Encoder, files: list[Path], batch_size: int, workers: int, precision: str
) -> float:
    folder = Path(tempfile.mkdtemp())
    source = loader(files, encoder.image_size, batch_size, workers)
    began = time.perf_counter()
    key = images_key(source.data.examples, folder)
    [cache] = cache_trunks([Wanted(encoder, key)], source, folder, precision)
    seconds = time.perf_counter() - began
    assert len(cache) == len(files)
    source.close()
    shutil.rmtree(folder)
    return seconds


def loader(files: list[Path], size: int, batch_size: int, workers: int) -> Loader:
    data = cd.data.CaptionData(cd.data.Example(f.name, f, ["a photo"]) for f in files)
    tokenizer = cd.WordTokenizer(["a", "photo"])
    how = {"image_size": size, "batch_size": batch_size, "num_workers": workers}
    return Loader(data, tokenizer, **how, captions_per_image=1)


def time_hashes(files: list[Path]) -> str:
    examples = [cd.data.Example(f.name, f, ["a photo"]) for f in files]
    folder = Path(tempfile.mkdtemp())
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        images_key(examples, folder)
        seconds.append(time.perf_counter() - began)
    shutil.rmtree(folder)
    size = sum(file.stat().st_size for file in files) / 1e6
    times = " and ".join(f"{each:.2f}" for each in seconds)
    return f"key of {len(files)} files, {size:.0f} MB: {times} s, the first and the second time"


if __name__ == "__main__":
    main()
