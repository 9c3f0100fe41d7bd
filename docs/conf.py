"""How Sphinx builds these pages: `make site`. Nothing is fetched; fonts and scripts are furo's own."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import prefixtune  # noqa: E402
from tools.site import reference  # noqa: E402

project = "prefixtune"
version = release = prefixtune.__version__
project_copyright = ""
html_show_copyright = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "tools.site.docstrings",
    "tools.site.equations",
    "tools.site.repository",
]
root_doc = "index"
source_suffix = {".md": "markdown"}

# Pages that are made from the code.
reference.write(ROOT / "docs")

# Pages that stand for files outside this folder.
site_root = str(ROOT)
site_repository_pages = {
    "readme": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "retrieval": "examples/retrieval/README.md",
    "results": "research/RESULTS.md",
    "LOG": "research/LOG.md",
}

myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
myst_heading_anchors = 4
smartquotes = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
# A type in a signature is a link where it is documented here, and plain text where it is not: many are of other
# packages, whose pages are not fetched. Links that people write are in Markdown, and myst checks every one.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"prefixtune {version}"
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = False
