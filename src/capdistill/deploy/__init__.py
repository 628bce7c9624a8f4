"""Captioners without torch: `export` writes a directory of ONNX graphs.

>>> from capdistill import deploy
>>> "export" in dir(deploy)
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdistill.registry import lazy_exports

if TYPE_CHECKING:
    from capdistill.deploy.exporting import export as export
    from capdistill.deploy.manifest import Manifest as Manifest
    from capdistill.deploy.onnx_captioner import OnnxCaptioner as OnnxCaptioner
    from capdistill.deploy.web import write_page as write_page
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "Manifest": "manifest",
            "OnnxCaptioner": "onnx_captioner",
            "export": "exporting",
            "write_page": "web",
        },
    )
