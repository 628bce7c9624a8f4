"""`HuggingFaceTeacher`: a Hugging Face captioner with the interface of `Captioner`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capdistill.compatibility import device_of, require_output
from capdistill.decoders.base import Decoder
from capdistill.errors import ConfigError, IncompatibleModels, suggest
from capdistill.files import user_path
from capdistill.generation.decode import USUAL_SIZE, CaptionGenerator
from capdistill.outputs import FEATURES_ONLY, OUTPUTS, Batch, CaptionerOutput, ModelSpec
from capdistill.runtime import inference
from capdistill.teachers.directory import write_pretrained
from capdistill.teachers.huggingface.base import Adapter, Encoded
from capdistill.teachers.huggingface.reading import CachedDecoder, spaced_words, teacher_forced
from capdistill.tokenizer import Tokenizer
from capdistill.tokenizers.huggingface import HuggingFace

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the logits' spread; else 0.1


class HuggingFaceTeacher(CaptionGenerator):
    """A Hugging Face captioner as a teacher; made by `from_pretrained`, see there.

    An image is encoded once for its captions. Before the first use, one image is captioned word by
    word with the model's cache; if that gives other logits than reading whole captions, a warning
    says so and the cache is not used.

    Attributes:
        module: The model.
        tokenizer: Its tokenizer; batches hold its ids.
        name: Name of the model in messages.
        knowledge: What it can teach: "logits", "hidden" (one per layer, the last after the final
            norm), "features", "attention", and "captions" where it generates them.
        use_cache: Whether words are generated with the model's cache; None before the first use.
        source: The arguments of `from_pretrained`, if they are names; by them it is saved.
    """

    def __init__(
        self,
        adapter: Adapter,
        tokenizer: Tokenizer,
        name: str,
        use_cache: bool | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module: torch.nn.Module = adapter.module
        self.adapter, self.tokenizer, self.name = adapter, tokenizer, name
        self.knowledge = adapter.knowledge
        adapter.first_words = spaced_words(adapter, tokenizer.vocabulary)
        self.use_cache, self.source = use_cache, source
        self._spec: ModelSpec | None = None
        self.eval()

    def __repr__(self) -> str:
        return (
            f"HuggingFaceTeacher '{self.name}': {type(self.module).__name__}, "
            f"{len(self.tokenizer.vocabulary):,} vocabulary entries, {self.num_parameters():,} "
            f"parameters; gives {', '.join(sorted(self.knowledge))}"
        )

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """Teacher-forced outputs, aligned with `batch.targets`.

        Args:
            batch: B = I * k captions in the ids of the teacher's tokenizer. The first id of each
                is the start token, in whose place the model reads its own start or prompt.
            need: What the caller will use, of "logits", "features", "hidden" and "attention"; the
                others are None, but logits. {"features"} does not run the language model.

        Raises:
            ConfigError: `need` names something else.
            IncompatibleModels: the model does not give it.
        """
        self._require(need)
        if need != FEATURES_ONLY and self.use_cache is None:
            self._check_cache()
        return self._outputs(batch, need)

    def _outputs(self, batch: Batch, need: frozenset[str]) -> CaptionerOutput:
        encoded = self.adapter.encode(batch.images)
        features = self.adapter.features(encoded) if "features" in need else None
        if need == FEATURES_ONLY:
            return CaptionerOutput(features=features, mask=batch.target_mask)
        words = batch.inputs[:, 1:]
        out = teacher_forced(self.adapter, encoded, words, need, bool(self.use_cache))
        return CaptionerOutput(out.logits, out.hidden, features, out.attention, batch.target_mask)

    def _require(self, need: frozenset[str]) -> None:
        for name in sorted(need - OUTPUTS):
            raise ConfigError(f"need: there is no output '{name}'. {suggest(name, OUTPUTS)}")
        for name in sorted(need - self.knowledge):
            raise IncompatibleModels(
                f"'{self.name}' ({type(self.module).__name__}) gives no {name}; it gives "
                f"{', '.join(sorted(self.knowledge))}. Remove the loss that needs it."
            )

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """The specification, probed once on a made-up image without changing any state.

        Args:
            batch: Not needed.
        """
        if self._spec is None:
            need = (self.knowledge & OUTPUTS) - {"attention"}
            probe = self._probe_batch(1)
            with inference(self, fork_rng=True):
                output = self.forward(probe, need)
            words = len(self.tokenizer.vocabulary)
            require_output(f"'{self.name}' gives", output, probe, need, words)
            self._spec = self._spec_of(output)
        return self._spec

    def _spec_of(self, output: CaptionerOutput) -> ModelSpec:
        features, prefix = output.features, self.adapter.prefix_tokens
        tokens = None if features is None else features.shape[1]
        side = math.isqrt(tokens - prefix) if tokens and prefix is not None else 0
        grid = (side, side) if prefix is not None and tokens == prefix + side * side else None
        return ModelSpec(
            feature_dim=None if features is None else features.shape[2],
            tokens=tokens,
            prefix_tokens=prefix if prefix and grid else 0,
            grid=grid,
            hidden_dims=tuple(layer.shape[2] for layer in output.hidden or ()),
            vocabulary=self.tokenizer.vocabulary,
            has_attention="attention" in self.knowledge,
            name=self.name,
            tokenizer=self.tokenizer,
        )

    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, Encoded]:
        """The language model with its cache, and the encoded images."""
        if self.use_cache is None:
            self._check_cache()
        pixels = images.images if isinstance(images, Batch) else images
        return self._decoder(bool(self.use_cache)), self.adapter.encode(pixels)

    def _decoder(self, use_cache: bool) -> CachedDecoder:
        setting = self.adapter.setting
        first = tuple(setting("begin_suppress_tokens") or ())
        never = list(setting("suppress_tokens") or ())
        never += [ids[0] for ids in setting("bad_words_ids") or () if len(ids) == 1]
        words = len(self.tokenizer.vocabulary)
        return CachedDecoder(self.adapter, words, use_cache, tuple(never), first).eval()

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images it reads; its processor resizes others."""
        return self.adapter.image_size

    def trimmed(self, captions: Iterable[str], max_length: int = 40) -> HuggingFace:
        """A tokenizer for a student: of the teacher's pieces, those that occur in captions.

        `Distiller` maps its ids to the teacher's, so that all losses can be used.

        Args:
            captions: Those of the training split, such as `data.captions`.
            max_length: Pieces kept of a caption.
        """
        mine = self.tokenizer
        roles: dict[str, int] = {"start": mine.start_id, "end": mine.end_id, "pad": mine.pad_id}
        size = len(mine.vocabulary)
        return HuggingFace(self.adapter.tokenizer, captions, max_length, **roles, size=size)

    def save(self, directory: str | Path) -> None:
        """Write where the model lies and how it is used; `capdistill.teachers.load` reads it.

        The weights are not copied: the directory or the name on the Hub must stay.

        Raises:
            ConfigError: it was made of objects in memory, or the directory cannot be written.
        """
        if self.source is None:
            raise ConfigError(
                f"'{self.name}' was made of a module, a tokenizer or a processor, which no file "
                "describes. Write each with its save_pretrained(directory), and make the teacher "
                "by capdistill.teachers.from_pretrained(directory)."
            )
        write_pretrained(user_path(directory), self.source)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which `save` does not copy."""
        values = [*self.module.parameters(), *self.module.buffers()]
        return sum(value.numel() * value.element_size() for value in values)

    def _check_cache(self) -> None:
        """Caption one image with and without the cache, and compare the logits."""
        batch = self._probe_batch(2)
        with inference(self, fork_rng=True):
            encoded, whole = self._read_probe(batch)
            words = batch.inputs[:, 1:]
            try:
                found = [teacher_forced(self.adapter, encoded, words, use_cache=True).logits]
                found.append(self._word_by_word(encoded, words))
                reason = _difference(whole, found)
            except Exception as error:  # models fail in many ways
                reason = f"it fails with {type(error).__name__}: {error}"
        self.use_cache, self.rereads_prefix = reason is None, reason is not None
        if reason:
            warnings.warn(
                f"{self.name}: the cache of {type(self.module).__name__} does not give the logits "
                f"of whole captions with this version of transformers ({reason}). It is not used: "
                "captions are right, and take longer. A newer version may have a working one.",
                stacklevel=4,
            )

    def _read_probe(self, batch: Batch) -> tuple[Encoded, Tensor]:
        """The encoded images of a made-up batch, and the logits of its captions.

        Raises:
            ConfigError: the model cannot read what the processor makes.
        """
        try:
            encoded = self.adapter.encode(batch.images)
            whole = teacher_forced(self.adapter, encoded, batch.inputs[:, 1:], use_cache=False)
            return encoded, whole.logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models fail in many ways
            processor, side = type(self.adapter.processor).__name__, batch.images.shape[-1]
            raise ConfigError(
                f"'{self.name}' cannot read what its processor ({processor}) makes of an image of "
                f"{side} x {side} pixels ({type(error).__name__}: {error}). Give the processor "
                "that was saved beside the model: "
                "image_processor=AutoProcessor.from_pretrained(...)."
            ) from error

    def _word_by_word(self, encoded: Encoded, words: Tensor) -> Tensor:
        decoder = CachedDecoder(self.adapter, len(self.tokenizer.vocabulary), use_cache=True)
        decoder.ends = decoder.ends[:1]  # the model's own logits
        state = decoder.start(encoded).expand(len(words) // len(encoded))
        ids = torch.cat([words[:, :1], words], 1)  # what stands for the start is not read
        logits = []
        for tokens in ids.unbind(1):
            step, state = decoder.step(tokens, state)
            logits.append(step)
        return torch.stack(logits, 1)

    def _probe_batch(self, captions: int) -> Batch:
        """One image of noise with captions of five ids, spread over the vocabulary."""
        generator = torch.Generator().manual_seed(0)
        side, words = self.image_size or USUAL_SIZE, len(self.tokenizer.vocabulary)
        ids = torch.randint(words // 2, (captions, 6), generator=generator)
        image = torch.randint(256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
        batch = Batch(image, ids, torch.ones_like(ids).bool(), ("",) * captions, ("probe",))
        return batch.to(device_of(self.module))


def _difference(whole: Tensor, others: list[Tensor]) -> str | None:
    """How far other logits are from those of whole captions, if that is too far."""
    spread = whole.float().std()
    largest = max(float((other.float() - whole.float()).abs().max() / spread) for other in others)
    limit = TOLERANCE.get(whole.dtype, 0.1)
    return None if largest <= limit else f"they differ by {largest:.2g} of their spread"


def end_token(adapter: Adapter, name: str) -> int:
    """The id with which the model ends a caption.

    Raises:
        ConfigError: its configuration names none.
    """
    ends = adapter.end_ids()
    if not ends or ends[0] is None:
        raise ConfigError(
            f"{name}: neither its generation configuration nor its configuration names an "
            "eos_token_id. Set module.generation_config.eos_token_id."
        )
    return int(ends[0])
