"""Reports: the results of runs, evaluations and studies as one HTML page, the same as Markdown, and figures as files.

    files -> load -> results -> compose (sections) -> pages' document, page (templates) and figures

Reads JSON and TOML files. Knows nothing of models, and runs nothing.
"""

from __future__ import annotations

from prefixtune.pages.page import is_own_markdown, save_figures, to_html, to_markdown
from prefixtune.report.compose import compose
from prefixtune.report.load import read_results
from prefixtune.report.losses import loss_plot
from prefixtune.report.sections.charts import smooth

__all__ = [
    "compose",
    "is_own_markdown",
    "loss_plot",
    "read_results",
    "save_figures",
    "smooth",
    "to_html",
    "to_markdown",
]
