"""Reports: the results of runs, evaluations and studies as one HTML page, and the same as Markdown.

    files -> load -> results -> compose (sections) -> document -> html | markdown

Reads JSON and TOML files. Knows nothing of models, and runs nothing.
"""

from __future__ import annotations

from prefixtune.report.compose import compose
from prefixtune.report.html import to_html
from prefixtune.report.load import read_results
from prefixtune.report.markdown import to_markdown
from prefixtune.report.sections.losses import loss_plot, smooth

__all__ = ["compose", "loss_plot", "read_results", "smooth", "to_html", "to_markdown"]
