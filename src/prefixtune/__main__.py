"""`python -m prefixtune` is `prefixtune`."""

import sys

from prefixtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
