"""Teachers that are not captioners of ours: `wrap` an existing model and distil from it."""

from __future__ import annotations

from capdistill.teachers.wrap import ForeignTeacher, normalised, wrap

__all__ = ["ForeignTeacher", "normalised", "wrap"]
