"""Reports: the results of runs and evaluations as one HTML page, and figures as files.

    files -> results -> compose (systems, charts, details) -> pages' document, page (template) and figures

Reads JSON and TOML files. Knows nothing of models, and runs nothing.
"""

from __future__ import annotations

from prefixtune.pages.page import save_figures, to_html
from prefixtune.report.charts import loss_plot, smooth
from prefixtune.report.compose import compose
from prefixtune.report.results import read_results

__all__ = ["compose", "loss_plot", "read_results", "save_figures", "smooth", "to_html"]
