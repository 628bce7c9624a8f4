"""Teachers other than a capdistill captioner: any existing model, and several models as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.teachers.cached import CachedTeacher as CachedTeacher
    from capdistill.teachers.cached_targets import cache as cache
    from capdistill.teachers.caption_file import TeacherCaptions as TeacherCaptions
    from capdistill.teachers.caption_file import read_captions as read_captions
    from capdistill.teachers.captions import caption as caption
    from capdistill.teachers.ensemble import Ensemble as Ensemble
    from capdistill.teachers.ensemble import load as load
    from capdistill.teachers.foreign import ForeignTeacher as ForeignTeacher
    from capdistill.teachers.foreign import normalised as normalised
    from capdistill.teachers.foreign import wrap as wrap
    from capdistill.teachers.huggingface.loading import from_pretrained as from_pretrained
    from capdistill.teachers.huggingface.teacher import HuggingFaceTeacher as HuggingFaceTeacher
    from capdistill.teachers.mean_teacher import MeanTeacher as MeanTeacher
    from capdistill.teachers.vocabularies import RetokenizingTeacher as RetokenizingTeacher
    from capdistill.teachers.vocabularies import TrimmedTeacher as TrimmedTeacher
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "CachedTeacher": "cached",
            "Ensemble": "ensemble",
            "ForeignTeacher": "foreign",
            "HuggingFaceTeacher": "huggingface.teacher",
            "MeanTeacher": "mean_teacher",
            "RetokenizingTeacher": "vocabularies",
            "TeacherCaptions": "caption_file",
            "TrimmedTeacher": "vocabularies",
            "cache": "cached_targets",
            "caption": "captions",
            "from_pretrained": "huggingface.loading",
            "load": "ensemble",
            "normalised": "foreign",
            "read_captions": "caption_file",
            "wrap": "foreign",
        },
    )
