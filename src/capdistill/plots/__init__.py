"""Pictures of where a model looked and of how it learnt. They need the extra `ui`.

>>> from capdistill import plots
>>> plots.__all__
['attention', 'history', 'require_matplotlib']
"""

from capdistill.plots.curves import history
from capdistill.plots.figures import require_matplotlib
from capdistill.plots.maps import attention

__all__ = ["attention", "history", "require_matplotlib"]
