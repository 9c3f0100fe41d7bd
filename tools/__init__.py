"""Programs for this repository: they write the generated pages of docs/ and print measures of the code.

Run them from the root of the repository: `python -m tools.models_page`, ...
"""

import sys
from pathlib import Path

# The tiny models of docs/models.md are made by the tests' helpers.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
