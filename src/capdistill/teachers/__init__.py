"""Teachers other than capdistill captioners: `wrap` an existing model and distil from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.teachers.foreign import ForeignTeacher as ForeignTeacher
    from capdistill.teachers.foreign import normalised as normalised
    from capdistill.teachers.foreign import wrap as wrap
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "ForeignTeacher": "foreign",
            "normalised": "foreign",
            "wrap": "foreign",
        },
    )
