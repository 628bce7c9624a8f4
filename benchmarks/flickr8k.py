"""Teacher, student and distilled student on Flickr8k: the runs behind the tables in the docs.

    python benchmarks/flickr8k.py teacher --data flickr8k --weights lite2.safetensors --out runs/t
    python benchmarks/flickr8k.py student --data flickr8k --weights lite0.safetensors --out runs/ce
    python benchmarks/flickr8k.py student --data flickr8k --weights lite0.safetensors \\
        --teacher runs/t/best --out runs/kd

`--weights` may be left out to take them from timm's hub. Each run goes on where it stopped when it
is started again. The last line it prints is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import capdistill as cd


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = cd.data.Flickr8k(options.data)
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=options.min_count)
    torch.manual_seed(options.seed)
    captioner = make_captioner(options, tokenizer)
    print(f"{captioner.num_parameters():,} parameters, {len(tokenizer)} words", flush=True)
    trainer = make_trainer(options, captioner)
    began = time.perf_counter()
    history = trainer.fit(
        data.train,
        data.val,
        out=options.out,
        resume=(options.out / "state.pt").exists(),
        **training_options(options),
    )
    minutes = (time.perf_counter() - began) / 60
    print(json.dumps(summary(captioner, history, minutes)), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["teacher", "student"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", default=True, help="file of encoder weights (default: hub)")
    parser.add_argument("--encoder", help="timm name (lite2 for the teacher, lite0 the student)")
    parser.add_argument("--trainable", default="none", help="none, all, or n last stages")
    parser.add_argument("--tail", type=int, default=0, help="train n last stages, others cached")
    parser.add_argument("--encoder-options", type=json.loads, default={}, help="JSON")
    parser.add_argument("--decoder", type=json.loads, default={}, help="JSON, over the defaults")
    parser.add_argument("--start", type=Path, help="a saved captioner whose decoder to start from")
    parser.add_argument("--teacher", type=Path, help="a saved captioner to distil from")
    parser.add_argument("--losses", type=json.loads, default={"token": {"name": "token"}})
    parser.add_argument("--term-weights", type=json.loads, default={})
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--min-count", type=int, default=5, help="of a word, to be in the tokenizer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--set", type=json.loads, default={}, help="JSON, training options")
    return parser.parse_args()


def make_captioner(options: argparse.Namespace, tokenizer: cd.WordTokenizer) -> cd.Captioner:
    teacher = options.what == "teacher"
    trainable = options.trainable
    backbone = options.encoder or f"tf_efficientnet_lite{2 if teacher else 0}"
    encoder = cd.encoders.create(
        "timm",
        name=backbone,
        dim=512 if teacher else 256,
        weights=options.weights,
        trainable=options.tail or (int(trainable) if trainable.isdigit() else trainable),
        **options.encoder_options,
    )
    defaults: dict[str, Any] = (
        {"name": "transformer", "dim": 512, "width": 512, "layers": 2, "ffn": 1024, "dropout": 0.3}
        if teacher
        else {"name": "lstm", "dim": 256, "embed": 256, "hidden": 384, "layers": 2}
    )
    chosen = {**defaults, **options.decoder}
    decoder = cd.decoders.create(chosen.pop("name"), **chosen)
    captioner = cd.Captioner(encoder, decoder, tokenizer, name=options.what)
    if options.start:
        start = cd.Captioner.load(options.start)
        captioner.decoder.load_state_dict(start.decoder.state_dict())
        captioner.encoder.project.load_state_dict(start.encoder.project.state_dict())
    return captioner


def make_trainer(options: argparse.Namespace, captioner: cd.Captioner) -> cd.Trainer:
    if options.teacher is None:
        return cd.Trainer(captioner)
    teacher = cd.Captioner.load(options.teacher)
    return cd.Distiller(teacher, captioner, losses=options.losses, weights=options.term_weights)


def training_options(options: argparse.Namespace) -> dict[str, Any]:
    defaults = {
        "epochs": 8,
        "batch_size": 16,
        "captions_per_image": 5,
        "learning_rate": 1e-3,
        "schedule": "warmup_cosine",
        "label_smoothing": 0.1,
        "cache_features": options.trainable == "none",  # --tail included
        "seed": options.seed,
        "progress": None,
    }
    return {**defaults, **options.set}


def summary(captioner: cd.Captioner, history: Any, minutes: float) -> dict[str, Any]:
    best = history.best or history.epochs[-1]
    return {
        "parameters": captioner.num_parameters(),
        "minutes": round(minutes, 1),
        "best_epoch": best["epoch"],
        **{name: round(value, 4) for name, value in best["scores"].items()},
    }


if __name__ == "__main__":
    main()
