"""Captioners with random weights, saved so that their time and memory can be measured.

Neither depends on the weights. `python -m capdistill.evaluation.random_models MODEL DIRECTORY`
writes one; nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capdistill.errors import ConfigError, UnknownName, suggest
from capdistill.evaluation.timed_models import CONFIG, VISION
from capdistill.files import read_object, user_path

WORDS = 3000  # entries of the vocabulary of a preset, about those of Flickr8k


def published(name: str) -> Any:
    """The configuration of a published captioner of transformers, without a download.

    Args:
        name: "blip-base", "vit-gpt2" or "git-base", or the path of a config.json.

    Raises:
        UnknownName: there is no such model or file.
    """
    if name in _PUBLISHED:
        return _PUBLISHED[name]()
    path = user_path(name)
    if not path.is_file():
        raise UnknownName(
            f"{CONFIG}{name}: no such model, and no file config.json. {suggest(name, _PUBLISHED)}"
        )
    from transformers import AutoConfig

    content = read_object(path, "a configuration of transformers")
    kind = content.pop("model_type", None)
    if kind not in VISION:
        raise ConfigError(
            f"{path} is of the type {kind!r}; only {', '.join(VISION)} caption without a prompt."
        )
    return AutoConfig.for_model(kind, **content)


def _blip_base() -> Any:
    """Li et al. (2022): Salesforce/blip-image-captioning-base."""
    from transformers import BlipConfig

    # The default range, 1e-10, gives numbers that processors are slow with.
    return BlipConfig(vision_config={"initializer_range": 0.02})


def _git_base() -> Any:
    """Wang et al. (2022): microsoft/git-base."""
    from transformers import GitConfig

    return GitConfig()


def _vit_gpt2() -> Any:
    """nlpconnect/vit-gpt2-image-captioning: ViT-base and GPT-2 with cross-attention."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig

    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config())
    end = config.decoder.eos_token_id
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = end
    return config


_PUBLISHED: dict[str, Callable[[], Any]] = {
    "blip-base": _blip_base,
    "git-base": _git_base,
    "vit-gpt2": _vit_gpt2,
}


def write_random(model: str, directory: Path) -> None:
    """Save a preset, or a configuration of transformers, with random weights.

    Args:
        model: A preset, or "hf-config:" before what `published` takes.
        directory: Where it goes.

    Raises:
        UnknownName: there is no such preset or model.
    """
    if model.startswith(CONFIG):
        _write_transformers(published(model.removeprefix(CONFIG)), directory)
        return
    from capdistill.captioner import Captioner
    from capdistill.tokenizer import WordTokenizer

    tokenizer = WordTokenizer([f"w{number}" for number in range(WORDS)])
    Captioner.create(model, tokenizer=tokenizer, weights=False).save(directory)


def _write_transformers(config: Any, directory: Path) -> None:
    import transformers

    name, processor = VISION[config.model_type][:2]
    getattr(transformers, name)(config).save_pretrained(directory)
    vision = getattr(config, "vision_config", None) or config.encoder
    sides = {"height": vision.image_size, "width": vision.image_size}
    options = {"size": sides} if "CLIP" not in processor else {"size": sides, "crop_size": sides}
    getattr(transformers, processor)(**options).save_pretrained(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model that is named on the command line."""
    from capdistill.errors import CapdistillError

    model, directory = sys.argv[1:] if arguments is None else arguments
    try:
        write_random(model, Path(directory))
    except CapdistillError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
