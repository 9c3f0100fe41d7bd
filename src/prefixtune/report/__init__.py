"""Reports: the results of runs and evaluations as one HTML page, and figures as files.

    files -> run -> compose (systems, charts, details) -> pages' document, page (template) and figures

Reads JSON and TOML files. Knows nothing of models, and runs nothing.
"""

from __future__ import annotations

from prefixtune.pages.page import save_figures, to_html
from prefixtune.report.compose import compose
from prefixtune.report.run import read_results

__all__ = ["compose", "read_results", "save_figures", "to_html"]
