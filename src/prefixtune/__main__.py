"""`python -m prefixtune` is `prefixtune`."""

from __future__ import annotations

import sys

from prefixtune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
