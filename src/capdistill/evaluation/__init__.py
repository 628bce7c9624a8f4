"""Evaluate captioners and compare a student with its teacher: scores, size, time, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.evaluation.bench_table import Bench as Bench
    from capdistill.evaluation.benchmark import bench as bench
    from capdistill.evaluation.comparison import Comparison as Comparison
    from capdistill.evaluation.comparison import compare as compare
    from capdistill.evaluation.evaluation import Evaluation as Evaluation
    from capdistill.evaluation.evaluation import evaluate as evaluate
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "Bench": "bench_table",
            "Comparison": "comparison",
            "Evaluation": "evaluation",
            "bench": "benchmark",
            "compare": "comparison",
            "evaluate": "evaluation",
        },
    )
