"""Word dropout and scheduled sampling: noise in the words that a student reads in training.

Under teacher forcing a student reads reference words only; in decoding it reads its own. These two
options lie in between. Targets and the teacher's input stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError
from capdistill.outputs import Batch
from capdistill.runtime import evaluating, generator
from capdistill.tokenizer import Tokenizer
from capdistill.training.config import TrainConfig

_BELOW_ONE = 1 - 2.0**-20


class NoisyInputs:
    """`noisy(batch, features)` gives the ids that the student's decoder reads.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> ids = torch.tensor([[1, 4, 5, 6, 2]])
        >>> batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ids, ids > 0, ("",), ("0",))
        >>> noisy = NoisyInputs(student, token_noise(batch, 0, 0), dropped=0.99)
        >>> noisy(batch, student.encode(batch)).tolist()   # start stays, words are unknown
        [[1, 3, 3, 3]]

    Args:
        student: The captioner that reads.
        draws: (3, B, T - 1) random numbers, from `token_noise`.
        dropped: Probability that a word is read as the unknown word.
        sampled: Probability that a word is replaced by a sample from the student's own
            distribution, given the references so far. One extra pass of the decoder, in evaluation
            mode and without gradients, gives the samples of all positions.

    Source:
        Bowman et al. (2016), Generating Sentences from a Continuous Space, section 3.1; Bengio et
        al. (2015), Scheduled Sampling, section 2.4; in two passes: Mihaylova, Martins (2019),
        Scheduled Sampling for Transformers, section 3.
    """

    def __init__(
        self, student: Captioner, draws: Tensor, *, dropped: float = 0.0, sampled: float = 0.0
    ) -> None:
        self.student, self.draws = student, draws
        self.dropped, self.sampled = dropped, sampled

    def __call__(self, batch: Batch, features: Tensor) -> Tensor:
        """(B, T - 1) ids; start, end and padding tokens never change."""
        inputs, words = batch.inputs, word_mask(batch, self.student.tokenizer)
        take, draw, drop = self.draws.to(inputs.device)
        if self.sampled:
            generated = self._generated(inputs, features, draw)
            inputs = torch.where(words & (take < self.sampled), generated, inputs)
        if self.dropped:
            tokenizer: Any = self.student.tokenizer  # with an unk_id: `require_unknown_word`
            inputs = inputs.masked_fill(words & (drop < self.dropped), tokenizer.unk_id)
        return inputs

    def _generated(self, inputs: Tensor, features: Tensor, draws: Tensor) -> Tensor:
        """(B, T - 1) the student's own sample at each position."""
        with evaluating(self.student.decoder), torch.no_grad(), _without_cast_cache(inputs.device):
            logits = self.student.decoder(inputs, features).logits[:, :-1]  # (B, T - 2, V)
            special = _special(self.student.tokenizer).to(logits.device)
            generated = sample(logits.index_fill(-1, special, -torch.inf), draws[:, 1:])
        return torch.cat([inputs[:, :1], generated], dim=1)


def noisy_inputs(
    student: Captioner, batch: Batch, config: TrainConfig, epoch: int, progress: float
) -> NoisyInputs | None:
    """The noise of a training batch by the options of a run; None where there is none.

    Args:
        student: The captioner that reads.
        batch: Its image ids, with seed and epoch, determine the noise.
        config: `word_dropout`, `scheduled_sampling` and `seed` are used.
        epoch: The current epoch.
        progress: Share of the run that is done, 0 to 1; sampling grows with it from 0.
    """
    dropped, sampled = config.word_dropout, config.scheduled_sampling * progress
    if not dropped and not sampled:
        return None
    draws = token_noise(batch, config.seed, epoch)
    return NoisyInputs(student, draws, dropped=dropped, sampled=sampled)


def token_noise(batch: Batch, seed: int, epoch: int) -> Tensor:
    """(3, B, T - 1) random numbers in [0, 1) that depend on seed, epoch, image and caption (law 7).

    Padding gets 1, so that the amount of padding changes nothing.
    """
    rows, columns = batch.inputs.shape
    draws = torch.ones(3, rows, columns)
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        image, caption = divmod(row, batch.captions_per_image)
        rng = generator(seed, "words", epoch, batch.image_ids[image], caption)
        draws[:, row, :length] = torch.rand(3, length, generator=rng)[:, :columns]
    return draws


def word_mask(batch: Batch, tokenizer: Tokenizer) -> Tensor:
    """(B, T - 1) True where the decoder reads a reference's word: no start, no end, no padding.

    Captions that were sampled from the student are read as they were sampled.
    """
    inputs, real = batch.inputs, batch.mask[:, :-1]
    if batch.sampled is not None:
        real = real & ~batch.sampled[:, None]
    words = real & (inputs != tokenizer.start_id) & (inputs != tokenizer.end_id)
    words[:, :1] = False
    return words


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """One id from each distribution by inversion, so that a draw from [0, 1) decides it.

    Example:
        >>> shares = torch.tensor([0.5, 0.0, 0.25, 0.25]).expand(4, -1)
        >>> sample(shares.log(), torch.tensor([0.0, 0.49, 0.5, 0.99]))
        tensor([0, 0, 2, 3])
    """
    edges = logits.float().softmax(-1).cumsum(-1)  # (..., V)
    places = draws.clamp(max=_BELOW_ONE)[..., None] * edges[..., -1:]
    return torch.searchsorted(edges, places, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def require_unknown_word(config: TrainConfig, tokenizer: Any) -> None:
    """Word dropout needs a token to put in the place of a word.

    Raises:
        ConfigError: the tokenizer has none, or it is also its start, end or padding.
    """
    if not config.word_dropout:
        return
    unknown = getattr(tokenizer, "unk_id", None)
    if unknown in (None, tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id):
        lacks = "no unk_id" if unknown is None else f"no unk_id of its own (it is {unknown})"
        raise ConfigError(
            f"word_dropout={config.word_dropout} reads words as the unknown one, but the tokenizer "
            f"{type(tokenizer).__name__} has {lacks}. Set word_dropout=0, or give it one."
        )


def _special(tokenizer: Tokenizer) -> Tensor:
    """The ids that no caption is made of, as in decoding."""
    ids = {getattr(tokenizer, f"{name}_id", None) for name in ("pad", "start", "end", "unk")}
    ids |= {*getattr(tokenizer, "special_ids", ())}
    return torch.tensor(sorted(each for each in ids if each is not None))


def _without_cast_cache(device: torch.device) -> torch.autocast:
    """Autocast as it is, but casts made without gradients are not kept for the pass with them.

    Older versions of torch (2.6 among them) would use them there, and train no decoder.
    """
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)
