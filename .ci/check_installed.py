"""The wheel as a user has it: the right copy is imported, and it works without the checkout."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import capdistill as cd

site = Path(sys.argv[1]).resolve()
found = Path(cd.__file__).resolve()
if site not in found.parents:
    sys.exit(f"check_installed: {found} was imported, not the wheel in {site}")
if importlib.metadata.version("capdistill") != cd.__version__:
    sys.exit("check_installed: the version of the metadata is not that of the package")

for name in cd.__all__:
    getattr(cd, name)  # every public name can be had
for registry in (cd.encoders, cd.decoders, cd.losses):
    for name in registry.names():
        print(str(registry.describe(name)).splitlines()[0])
print(f"sample: {len(cd.data.sample().train)} photos to train on")
