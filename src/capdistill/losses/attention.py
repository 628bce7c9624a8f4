"""Attention transfer: where the decoder looks at each word."""

from __future__ import annotations

from torch import Tensor

from capdistill.errors import IncompatibleModels
from capdistill.losses.base import DistillationLoss, given, not_built, require_specs
from capdistill.losses.distances import attention_divergence
from capdistill.losses.divergence import valid_rows
from capdistill.losses.feature import grid_cells, require_grid, smaller_grid
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec


class AttentionKD(DistillationLoss):
    """Let the student's decoder look where the teacher's looks, word by word.

    KL(teacher || student) of the attention over the visual tokens (last layer, mean over heads).
    Prefix tokens such as CLS are dropped, both grids are averaged down to the smaller height and
    width, and the weights are made to add up to 1 again, after 1e-4 is added to each. Gradients
    reach the student's decoder and, through its keys, its encoder; there is no projection.

    Example:
        >>> spec = dict(hidden_dims=(), vocabulary=("a",), has_attention=True)
        >>> loss = AttentionKD()
        >>> loss.build(ModelSpec(8, tokens=16, prefix_tokens=0, grid=(4, 4), **spec),
        ...            ModelSpec(16, tokens=197, prefix_tokens=1, grid=(14, 14), **spec))
        >>> loss.size
        (4, 4)

    Attributes:
        size: (h, w) of the common grid.

    Raises:
        IncompatibleModels: (in `build`) a model returns no attention, or has no grid.

    Source:
        Zagoruyko, Komodakis (2017), Paying More Attention to Attention, for the idea; Jiao et al.
        (2020), TinyBERT, section 3.1, for the attention of Transformers.
    """

    needs = frozenset({"attention"})
    per = "token"

    def __init__(self) -> None:
        super().__init__()
        self.size: tuple[int, int] | None = None
        self.specs: dict[str, ModelSpec] = {}

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Choose the common grid.

        Raises:
            IncompatibleModels: a model returns no attention, or has no grid.
        """
        specs = {"student": student, "teacher": teacher}
        require_specs("AttentionKD", **specs)
        for role, spec in specs.items():
            if not spec.has_attention:
                raise IncompatibleModels(
                    f"AttentionKD: the {role} '{spec.name}' returns no attention over visual "
                    "tokens.\nUse a decoder that has it, or remove this loss."
                )
            require_grid("AttentionKD", spec, role, spec.tokens)
        self.specs, self.size = specs, smaller_grid(student, teacher)

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """Sum over valid tokens of the KL divergence of the cells of the grid."""
        if self.size is None:
            raise not_built("AttentionKD")
        mine = self._cells(student, "student", batch)
        theirs = self._cells(teacher, "teacher", batch)
        return attention_divergence(mine, theirs).sum()

    def _cells(self, output: CaptionerOutput, role: str, batch: Batch) -> Tensor:
        """(n, h * w) the weight of each cell, for the valid tokens."""
        attention = given("AttentionKD", "attention", role, output.attention)  # (B, T, N)
        rows = valid_rows(attention, batch.target_mask)[..., None]  # (n, N, 1)
        spec, size = self.specs[role], self.size or (1, 1)
        cells = grid_cells("AttentionKD", rows, spec, role, size).squeeze(-1)
        return cells * ((rows.shape[1] - spec.prefix_tokens) / cells.shape[1])  # means to sums
