"""`OnnxCaptioner`: an exported captioner, run by ONNX Runtime. Nothing here loads torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from capdistill.data.pixels import OneImage, Pixels, SeveralImages, is_many, read_batches
from capdistill.deploy.choice import Array, image_keys
from capdistill.deploy.constraints import saved_spec
from capdistill.deploy.manifest import (
    ENCODER,
    GENERATION,
    MANIFEST,
    STEP,
    TOKENIZER,
    read_manifest,
)
from capdistill.deploy.search import State, decode
from capdistill.errors import CheckpointError, DataError, MissingExtra, require_bool, require_int
from capdistill.files import user_path
from capdistill.generation.config import GenerationConfig, GenerationSpec, resolve
from capdistill.generation.hypotheses import CaptionResult, Hypothesis, with_text
from capdistill.generation.words import token_texts
from capdistill.tokenizers.saved import load as load_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from capdistill.deploy.manifest import Manifest
    from capdistill.generation.config import CaptionOptions, DecodingOptions, GenerationOptions
    from capdistill.tokenizer import WordTokenizer
    from capdistill.tokenizers.huggingface import HuggingFace


CPUINFO = Path("/proc/cpuinfo")
_ENCODED = 4  # images encoded at once: more take as long, and 6 MB of memory each
_MAX_THREADS = 256  # ONNX Runtime takes minutes to start a thousand


class OnnxCaptioner:
    """A captioner that `capdistill.deploy.export` wrote, without torch.

    It gives the captions of the captioner that was exported: it reads images with the same code,
    and has the same options. It needs NumPy, Pillow and ONNX Runtime. Several threads may use it.
    A pickled one is loaded again from its directory.

    Example:
        `OnnxCaptioner.load("exported").caption("dog.jpg", beam_size=3)` gives "a brown dog runs
        through the grass".

    Attributes:
        manifest: What the directory holds.
        name: Name of the captioner.
        tokenizer: Captions to ids and back.
    """

    def __init__(
        self,
        sessions: tuple[Any, Any],
        manifest: Manifest,
        tokenizer: WordTokenizer | HuggingFace,
        spec: GenerationSpec,
        load_again: Callable[[], OnnxCaptioner],
    ) -> None:
        self.manifest, self.name, self.tokenizer = manifest, manifest.name, tokenizer
        self._encoder, self._step = encoder, step = sessions
        self._spec, self._load_again = spec, load_again
        self._first = [output.name for output in encoder.get_outputs()]
        self._next = [output.name.removeprefix("next_") for output in step.get_outputs()]
        self._inputs = {each.name for each in step.get_inputs()}

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True
    ) -> OnnxCaptioner:
        """Read what `capdistill.deploy.export` wrote.

        Args:
            directory: As given to `export`.
            threads: Threads that compute one image; None leaves the number to ONNX Runtime, which
                takes one per core.
            verify: Compare the files with their checksums first.

        Raises:
            CheckpointError: it is no exported captioner, or one of a newer format, or a file is
                missing, truncated or changed; the message names it.
            ConfigError: threads < 1 or > 256.
            MissingExtra: ONNX Runtime is not installed.
        """
        if threads is not None:
            require_int("OnnxCaptioner: threads", threads, 1, _MAX_THREADS)
        require_bool("OnnxCaptioner: verify", verify)
        folder = user_path(directory, CheckpointError)
        manifest = read_manifest(folder, verify=verify)
        sessions = _session(folder / ENCODER, threads), _session(folder / STEP, threads)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        spec = saved_spec(folder / GENERATION, manifest)
        _require_unchanged(folder, manifest)
        _require_fit(folder, manifest, *sessions, tokenizer)
        again = partial(cls.load, folder.absolute(), threads=threads, verify=verify)
        return cls(sessions, manifest, tokenizer, spec, again)

    def __reduce__(self) -> tuple[Callable[[], OnnxCaptioner], tuple[()]]:
        return self._load_again, ()

    def __repr__(self) -> str:
        return (
            f"OnnxCaptioner '{self.name}': {self.manifest.precision}, images of "
            f"{self.image_size} pixels, {self.manifest.vocabulary:,} vocabulary entries, "
            f"{self.manifest.size / 1e6:.1f} MB"
        )

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it reads."""
        return self.manifest.image_size

    @overload
    def caption(
        self, images: OneImage, *, details: Literal[False] = ..., **how: Unpack[CaptionOptions]
    ) -> str: ...
    @overload
    def caption(
        self, images: OneImage, *, details: Literal[True], **how: Unpack[CaptionOptions]
    ) -> CaptionResult: ...
    @overload
    def caption(
        self, images: SeveralImages, *, details: Literal[False] = ..., **how: Unpack[CaptionOptions]
    ) -> list[str]: ...
    @overload
    def caption(
        self, images: SeveralImages, *, details: Literal[True], **how: Unpack[CaptionOptions]
    ) -> list[CaptionResult]: ...
    @overload
    def caption(
        self,
        images: Any,
        *,
        details: bool = ...,
        errors: Literal["raise", "skip"] = ...,
        **how: Unpack[CaptionOptions],
    ) -> Any: ...

    def caption(
        self,
        images: Any,
        *,
        batch_size: int = 32,
        errors: Literal["raise", "skip"] = "raise",
        details: bool = False,
        progress: bool = False,
        **generation: Any,
    ) -> Any:
        """Caption an image, or each of an iterable of images, as `capdistill.Captioner.caption`.

        Args:
            images: A path, bytes, PIL image, array or tensor gives a text; an iterable of any
                length, or a (I, 3, H, W) array, gives a list of texts in the same order.
            batch_size: Images in memory, and in the model, at once.
            errors: For an image that cannot be read: "raise", or "skip", which names it in a
                warning and puts None in its place.
            details: Return a `CaptionResult` (log-probabilities, n-best) per image. Its `attention`
                is None.
            progress: Show a bar; it needs the package tqdm.
            generation: Fields of `GenerationConfig`, or a whole one as `generation=`. By default
                those that were exported.

        Raises:
            DataError: an image that cannot be read, by name.
            ConfigError: batch_size < 1, or invalid options of generation.
        """
        many = is_many(images)
        wanted: dict[str, Any] = {"batch_size": batch_size, "errors": errors, "details": details}
        stream = self.caption_stream(images if many else [images], **wanted, **generation)
        if not many:
            return next(stream)
        return list(_bar(stream, images) if progress else stream)

    def caption_stream(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 32,
        errors: Literal["raise", "skip"] = "raise",
        details: bool = False,
        **generation: Unpack[DecodingOptions],
    ) -> Iterator[Any]:
        """As `caption` for an iterable; each caption comes as soon as its batch is done.

        Nothing is kept: the iterable may be endless (a camera, a queue).

        Example:
            `for text in captioner.caption_stream(frames, batch_size=1): print(text)`
        """
        spec = self._generation_spec(**generation)
        for squares in read_batches(images, self.image_size, batch_size, errors):
            readable = [square for square in squares if square is not None]
            made = iter(self._captions(np.stack(readable), spec, details) if readable else ())
            yield from (None if square is None else next(made) for square in squares)

    def generate(
        self,
        images: Pixels,
        generation: GenerationConfig | Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Hypothesis]:
        """One caption per image, greedily by default, with its probabilities.

        Args:
            images: (I, 3, S, S) uint8, S the `image_size`.
            generation: A whole configuration; that which was exported by default.
            options: Fields of `GenerationConfig`; they override those of `generation`.

        Raises:
            DataError: images of another size or type.
            ConfigError: invalid options.
        """
        return self._generate(images, self._generation_spec(generation, **options))

    def _generation_spec(
        self, generation: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> GenerationSpec:
        if generation is None and not options:
            return self._spec
        config = resolve(self._spec.config if generation is None else generation, options)
        if _words_of(config) == _words_of(self._spec.config):  # subwords need no library again
            longest = config.max_length or self.tokenizer.max_length + 1
            return replace(self._spec, config=config, max_length=longest)
        spec = GenerationSpec.of(config, self.tokenizer)
        spec.require_a_word(self.manifest.vocabulary)
        return spec

    def _captions(
        self, pixels: Pixels, spec: GenerationSpec, details: bool
    ) -> Sequence[str | CaptionResult]:
        hypotheses = self._generate(pixels, spec)
        if not details:
            return [hypothesis.text for hypothesis in hypotheses]
        return [self._result(*pair) for pair in zip(hypotheses, pixels, strict=True)]

    def _result(self, hypothesis: Hypothesis, pixels: Any) -> CaptionResult:
        return CaptionResult(
            text=hypothesis.text,
            tokens=token_texts(self.tokenizer, hypothesis.tokens),
            log_prob=hypothesis.log_prob,
            token_log_probs=hypothesis.token_log_probs,
            finished=hypothesis.finished,
            n_best=hypothesis.n_best or (hypothesis,),
            attention=None,
            grid=None,
            prefix_tokens=0,
            image=pixels,
        )

    def _generate(self, images: Pixels, spec: GenerationSpec) -> list[Hypothesis]:
        size, shape = self.image_size, tuple(getattr(images, "shape", ()))
        kind = getattr(images, "dtype", type(images).__name__)
        if shape[1:] != (3, size, size) or kind != np.uint8:
            raise DataError(
                f"{self.name}: {kind} {shape} was given; expected an array of NumPy, uint8 "
                f"(I, 3, {size}, {size}). `caption` reads images of any kind and size."
            )
        if not len(images):
            return []
        keys = image_keys(images) if spec.config.sample else None
        found = decode(self._read_words, self._start(images), len(images), spec, keys)
        return [with_text(hypothesis, self.tokenizer) for hypothesis in found]

    def _start(self, images: Pixels) -> State:
        places = range(0, len(images), _ENCODED)
        parts = [self._encoder.run(None, {"images": images[i : i + _ENCODED]}) for i in places]
        joined = map(np.concatenate, zip(*parts, strict=True))
        first = dict(zip(self._first, joined, strict=True))
        return State(
            {name: first[name] for name in self.manifest.image_inputs},
            {name: first[name][:, None] for name in self.manifest.state},
        )

    def _read_words(self, tokens: Array, position: int, state: State) -> tuple[Array, State]:
        feeds = {"tokens": tokens, "position": np.array(position), **state.image, **state.row}
        given = {name: value for name, value in feeds.items() if name in self._inputs}
        values = dict(zip(self._next, self._step.run(None, given), strict=True))
        image = {name: values.get(name, value) for name, value in state.image.items()}
        row = {name: values.get(name, value) for name, value in state.row.items()}
        return values["logits"], State(image, row)


def _words_of(config: GenerationConfig) -> tuple[object, ...]:
    """The options that stand in ids in a specification."""
    words = config.banned_words, config.not_last, config.prefix, config.min_length > 0
    return *words, config.allow_unknown


def _bar(stream: Iterator[Any], images: Any) -> Iterator[Any]:
    from operator import length_hint

    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtra(
            "progress=True needs tqdm. Install it (pip install tqdm), or leave progress out."
        ) from error
    yield from tqdm(stream, total=length_hint(images) or None, desc="captioning", unit="image")


def _session(path: Path, threads: int | None) -> Any:
    """A graph ready to run, without a pool of memory that would keep what a large batch needed."""
    try:
        onnxruntime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtra(
            f"OnnxCaptioner needs onnxruntime ({error}). Install it: pip install onnxruntime."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if may_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has classes of its own for every reason
        raise CheckpointError(
            f"{path} is not a graph that ONNX Runtime {onnxruntime.__version__} runs ({error}). "
            "Export the captioner again, or upgrade onnxruntime."
        ) from error


def may_overflow() -> bool:
    """Whether 16-bit sums of products of 8 bits may overflow: on x86 without VNNI, or if unknown.

    There ONNX Runtime computes exactly on request. With VNNI it is exact anyway, and the request
    would more than double the time of an encoder.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    try:
        processor = CPUINFO.read_text()
    except OSError:  # it is not Linux
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(processor.split())


def _require_unchanged(folder: Path, manifest: Manifest) -> None:
    """Refuse what another process replaced after its checksums were compared.

    An export removes the manifest first and writes it last.
    """
    try:
        is_same = read_manifest(folder, verify=False) == manifest
    except CheckpointError:
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"{folder} was exported again while it was being read. Load it again when that is done."
        )


def _require_fit(
    folder: Path,
    manifest: Manifest,
    encoder: Any,
    step: Any,
    tokenizer: WordTokenizer | HuggingFace,
) -> None:
    """Refuse graphs and a tokenizer that are not those which the manifest describes."""
    side, names = manifest.image_size, {*manifest.image_inputs, *manifest.state}
    first, given = _by_name(encoder.get_outputs()), _by_name(encoder.get_inputs())
    read, made = _by_name(step.get_inputs()), _by_name(step.get_outputs())
    values = {name.removeprefix("next_"): each for name, each in made.items()}
    logits = values.pop("logits", None)
    fits = {
        ENCODER: {*given} == {"images"}
        and [*given["images"].shape[1:]] == [3, side, side]
        and {*first} == names,
        STEP: {*read} <= names | {"tokens", "position"}
        and {*values} <= names
        and logits is not None
        and logits.shape[-1] == manifest.vocabulary
        and all(_agree(first[name], read[name]) for name in names & read.keys() & first.keys())
        and all(_agree(each, read[name]) for name, each in values.items() if name in read),
        TOKENIZER: len(tokenizer.vocabulary) == manifest.vocabulary,
    }
    for name in (name for name, is_right in fits.items() if not is_right):
        raise CheckpointError(
            f"{folder / name} is of another captioner than {folder / MANIFEST}. Copy all files of "
            "one export, or export the captioner again."
        )


def _by_name(tensors: Iterable[Any]) -> dict[str, Any]:
    return {each.name: each for each in tensors}


def _agree(given: Any, read: Any) -> bool:
    """Whether one graph reads what another gives. Those of hypotheses get an axis more."""
    sizes = zip(reversed(given.shape), reversed(read.shape), strict=False)
    known = (pair for pair in sizes if all(isinstance(side, int) for side in pair))
    return given.type == read.type and all(mine == theirs for mine, theirs in known)
