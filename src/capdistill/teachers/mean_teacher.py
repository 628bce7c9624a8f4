"""A student as its own teacher: the exponential moving average of its weights."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from capdistill.averaging import WeightAverage
from capdistill.captioner import Captioner
from capdistill.errors import ConfigError


class MeanTeacher(Captioner):
    """The average of a student's weights over the steps so far, as its teacher.

    It begins as a copy of the student. After every optimizer step, `Distiller` moves it towards the
    student: `d * teacher + (1 - d) * student`, d = min(decay, (1 + n) / (10 + n)) for step n. No
    gradient reaches it. Its state is part of the run's, so a resumed run is exact. It shares frozen
    parameters with the student; running statistics of batch norms are averaged like weights.

    At first the teacher knows no more than the student. Raise the weight of its losses from 0.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> teacher = cd.teachers.MeanTeacher(student, decay=0.99)
        >>> distiller = cd.Distiller(teacher, student, losses={"token": "token"},
        ...                          weights={"ce": 1.0, "token": (0.0, 1.0)}, progress=False)
        >>> _ = distiller.fit(data.train.subset(8), epochs=1, batch_size=4)
        >>> teacher.average.updates
        2

    Args:
        student: The captioner that will be trained, with its weights and what is frozen in it.
        decay: Share of the teacher that a step keeps, from 0 to below 1. 0.999 averages over the
            last 1,000 steps or so.

    Attributes:
        average: The average and its number of updates. A trainer updates and saves the attribute
            `average` of every part of its teachers that is a `WeightAverage`.

    Raises:
        ConfigError: not a captioner of encoder and decoder, a decay out of range, nothing is
            trained, or weights of half precision, in which an average would not move.

    Source:
        Tarvainen and Valpola (2017), Mean teachers are better role models, section 2.
    """

    def __init__(self, student: Captioner, decay: float = 0.999) -> None:
        if not isinstance(student, Captioner):
            raise ConfigError(
                f"MeanTeacher: {type(student).__name__} was given as the student. Give the "
                "capdistill.Captioner that will be trained."
            )
        shared: dict[int, Any] = {id(p): p for p in student.parameters() if not p.requires_grad}
        encoder, decoder = copy.deepcopy((student.encoder, student.decoder), shared)
        super().__init__(encoder, decoder, student.tokenizer, name=f"mean of {student.name}")
        _require_like(self, student)
        self.average = WeightAverage(student, decay, into=self)
        self.eval()

    @classmethod
    def load(cls, *args: Any, **options: Any) -> NoReturn:
        """Not possible without a student; a saved mean teacher is read by `Captioner.load`."""
        raise ConfigError(
            "A mean teacher is made of the student that it follows: MeanTeacher(student). What "
            "save() wrote is a captioner: read it with capdistill.Captioner.load(directory)."
        )

    create = load


def _require_like(teacher: Captioner, student: Captioner) -> None:
    if type(student).forward is not Captioner.forward or (
        teacher.state_dict().keys() != student.state_dict().keys()
    ):
        raise ConfigError(
            f"MeanTeacher: '{student.name}' is a {type(student).__name__} whose forward or weights "
            "are more than those of encoder and decoder. Put them into the encoder or the decoder."
        )
    halves = {p.dtype for p in student.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if halves:
        raise ConfigError(
            f"MeanTeacher: '{student.name}' has trained weights of {', '.join(map(str, halves))}, "
            "in which an average would not move. Keep them in torch.float32 (student.float()); "
            "precision='bf16' or 'fp16' computes in half precision anyway."
        )
