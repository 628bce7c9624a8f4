"""`from_pretrained`: a name, a directory or a module to a teacher."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capdistill.errors import ConfigError, MissingExtra, shortened, suggest
from capdistill.teachers import huggingface
from capdistill.teachers.directory import HUB
from capdistill.teachers.huggingface.base import Adapter
from capdistill.teachers.huggingface.teacher import HuggingFaceTeacher, end_token

OTHER = "image-text-to-text"
_WRAP = "capdistill.teachers.wrap(module, adapt, tokenizer) takes any captioner"


def from_pretrained(
    name_or_path_or_module: str | os.PathLike[str] | nn.Module,
    tokenizer: Any = None,
    image_processor: Any = None,
    prompt: str | None = None,
    dtype: Any = None,
    device_map: Any = None,
) -> HuggingFaceTeacher:
    """A captioner of Hugging Face transformers as a teacher.

    Example:
        .. code-block:: python

            teacher = cd.teachers.from_pretrained("Salesforce/blip-image-captioning-base")
            teacher.caption("dog.jpg", beam_size=3)

    Args:
        name_or_path_or_module: A name on the Hub (also behind "hf:"), a directory that
            `save_pretrained` wrote, or a model. BLIP, BLIP-2, GIT, Florence-2, VisionEncoderDecoder
            (ViT-GPT2), and whatever `AutoModelForImageTextToText` loads (SmolVLM, Qwen-VL,
            PaliGemma, ...).
        tokenizer: Of a module; otherwise what lies beside the weights. A tokenizer of transformers.
        image_processor: Of a module; otherwise what lies beside the weights. Prompted models need
            the whole processor, which may also hold the tokenizer.
        prompt: Text that the captions continue, a request of a chat model, or a task of Florence-2.
            By default what the family's captioning models were trained with.
        dtype: Type of the weights, such as torch.bfloat16 or "bfloat16"; None is that of the file.
            A module is converted in place.
        device_map: As in transformers; it needs the package accelerate.

    Raises:
        MissingExtra: transformers is not installed.
        ConfigError: it is not a captioner of a supported family, its parts are missing or cannot
            be loaded.
    """
    _require_transformers()
    given, dtype = name_or_path_or_module, _dtype(dtype)
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(f"from_pretrained: prompt is {shortened(prompt)}; expected text.")
    source, missing = None, ()
    if isinstance(given, nn.Module):
        name = type(given).__name__
        adapter_class = _adapter_class(getattr(given, "config", None), name)
        _require_class(given, adapter_class)
        processor, tokenizer = _parts_of_a_module(name, image_processor, tokenizer)
        _require_parts(adapter_class, name, processor, tokenizer)
        module = given if dtype is None else given.to(dtype)
        if device_map is not None:
            raise ConfigError(
                "from_pretrained: device_map places what is loaded, but a module was given. Load "
                "the module with device_map, or give its name or directory."
            )
    elif isinstance(given, (str, os.PathLike)):
        place = _place(os.fspath(given))
        name = Path(place).name
        adapter_class = _adapter_class(_load("AutoConfig", place), name)
        if tokenizer is None and image_processor is None:
            source = {"name_or_path_or_module": place, "prompt": prompt, "device_map": device_map}
            source["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        processor, tokenizer = _parts_beside(place, image_processor, tokenizer)
        _require_parts(adapter_class, name, processor, tokenizer)
        placement = {} if device_map is None else {"device_map": device_map}
        how = {"dtype": dtype or "auto", "output_loading_info": True, **placement}
        module, report = _load(adapter_class.model_class, place, **how)
        missing = report["missing_keys"]
    else:
        raise ConfigError(
            f"from_pretrained: {shortened(given)} was given; expected a name on the Hub, a "
            "directory, or a model of transformers."
        )
    adapter = adapter_class(module, processor, tokenizer, prompt)
    _require_head(adapter, name, missing)
    return _teacher(adapter, name, source)


def _place(given: str) -> str:
    """A directory as an absolute path, or a name on the Hub.

    Raises:
        ConfigError: it is empty.
    """
    given = given.removeprefix(HUB)
    if not given:
        raise ConfigError("from_pretrained: an empty name was given; '.' is the current directory.")
    path = Path(os.path.expanduser(given))
    return str(path.resolve()) if path.is_dir() else given


def _dtype(given: Any) -> Any:
    """A type of weights, by its name too.

    Raises:
        ConfigError: it is something else.
    """
    if given is None or given == "auto":
        return None
    kinds = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
    found = kinds.get(str(given).removeprefix("torch."))
    if found is None:
        hint = suggest(str(given), kinds)
        raise ConfigError(f"from_pretrained: dtype={shortened(given)} is unknown. {hint}")
    return found


def _require_parts(adapter: type[Adapter], name: str, processor: Any, tokenizer: Any) -> None:
    """Refuse what is no tokenizer, or does not read what the model reads.

    Raises:
        ConfigError: one is something else.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(
            f"from_pretrained: the tokenizer of {name} is {type(tokenizer).__name__}; expected a "
            "fast tokenizer of transformers, as AutoTokenizer.from_pretrained(...) gives it."
        )
    reads = "no images"
    if hasattr(getattr(processor, "image_processor", processor), "preprocess"):
        if hasattr(processor, "tokenizer") or not adapter.model_class.startswith("Auto"):
            return
        reads = "images alone; a prompted model needs the whole processor"
    raise ConfigError(
        f"from_pretrained: the image processor of {name} is {type(processor).__name__}, which "
        f"reads {reads}. Give image_processor=AutoProcessor.from_pretrained(...)."
    )


def _teacher(adapter: Adapter, name: str, source: dict[str, Any] | None) -> HuggingFaceTeacher:
    """The teacher, with the tokenizer as wide as the model's logits.

    Raises:
        ConfigError: the tokenizer belongs to another model, or no end token is named.
    """
    from capdistill.tokenizers import HuggingFace

    head, end = adapter.reader.get_output_embeddings(), end_token(adapter, name)
    own = max(adapter.tokenizer.get_vocab().values(), default=-1) + 1
    size = own if head is None else int(head.weight.shape[0])
    if not own <= size <= 2 * own:
        raise ConfigError(
            f"from_pretrained: the tokenizer has {own} ids, but {name} has a vocabulary of {size}, "
            "so it is that of another model. Give the one that was saved beside the model: "
            "tokenizer=AutoTokenizer.from_pretrained(...)."
        )
    return HuggingFaceTeacher(
        adapter, HuggingFace(adapter.tokenizer, end=end, size=size), name, source=source
    )


def _require_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            'Teachers of Hugging Face need transformers: pip install "capdistill[hf]".'
        ) from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingExtra(
            f"transformers {transformers.__version__} is too old; version 5 or newer is needed: "
            'pip install -U "capdistill[hf]".'
        )


def _adapter_class(config: Any, name: str) -> type[Adapter]:
    """The adapter of a configuration.

    Raises:
        ConfigError: there is none.
    """
    kind = getattr(config, "model_type", None)
    if kind in huggingface.names() and kind != OTHER:
        return huggingface.get(kind)
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as PROMPTED,
    )

    if kind in PROMPTED:
        return huggingface.get(OTHER)
    known = ", ".join(each for each in huggingface.names() if each != OTHER)
    raise ConfigError(
        f"from_pretrained: {name} is of the type {kind!r}, which is no captioner that is "
        f"supported. Supported are {known}, and what AutoModelForImageTextToText of transformers "
        f"loads. {_WRAP}."
    )


def _require_class(module: nn.Module, adapter: type[Adapter]) -> None:
    """Refuse a model of the right family without the language-model head.

    Raises:
        ConfigError: it is of another class.
    """
    from transformers import GenerationMixin

    found, wanted = type(module).__name__, adapter.model_class
    if wanted.startswith("Auto"):
        fits = isinstance(module, GenerationMixin)
    else:
        fits = any(each.__name__ == wanted for each in type(module).__mro__)
    if not fits:
        raise ConfigError(
            f"from_pretrained: {found} is not a captioner; of this family, {wanted} is. {_WRAP}."
        )


def _require_head(adapter: Adapter, name: str, missing: Iterable[str]) -> None:
    """Refuse weights without the language-model head, which would be random.

    Raises:
        ConfigError: names what is missing.
    """
    head = adapter.reader.get_output_embeddings()
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    names = dict(adapter.module.named_parameters(remove_duplicate=False))
    lost = [each for each in sorted(missing) if id(names.get(each)) in own]
    if lost:
        raise ConfigError(
            f"from_pretrained: the weights of {name} have no language-model head "
            f"({', '.join(lost)}), so its captions would be random. Give the directory or the name "
            f"of a trained {type(adapter.module).__name__}."
        )


def _parts_of_a_module(name: str, processor: Any, tokenizer: Any) -> tuple[Any, Any]:
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    for part, fix in (
        (tokenizer, "tokenizer=AutoTokenizer.from_pretrained(...)"),
        (processor, "image_processor=AutoProcessor.from_pretrained(...)"),
    ):
        if part is None:
            raise ConfigError(
                f"from_pretrained: {name} was given as a module, which does not know its "
                f"{fix.split('=')[0].replace('_', ' ')}. Give {fix}."
            )
    return processor, tokenizer


def _parts_beside(place: str, processor: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Processor and tokenizer that lie beside the weights, where they were not given."""
    if processor is None:
        processor = _load("AutoProcessor", place)
        if not hasattr(processor, "image_processor"):  # a tokenizer, where there is no processor
            tokenizer = tokenizer or (processor if hasattr(processor, "vocab_size") else None)
            processor = _load("AutoImageProcessor", place)
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None) or _load("AutoTokenizer", place)
    return processor, tokenizer


def _load(kind: str, place: str, **options: Any) -> Any:
    """`transformers.<kind>.from_pretrained`, with its errors explained.

    Raises:
        ConfigError: it cannot be loaded.
    """
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(place, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library that it calls has its own
        raise ConfigError(
            f"from_pretrained: {kind} cannot be loaded from '{place}' ({error}). Expected a "
            "directory that save_pretrained of model and processor wrote, or a name on the Hub and "
            "a connection to it."
        ) from error
