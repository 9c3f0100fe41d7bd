"""Write what a golden test computes today: `python -m tests.golden.write PART ...`."""

import importlib
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main():
    """Write `PART.json` for each part, from `test_PART.compute()`."""
    sys.path[:0] = [str(FOLDER.parent)]
    for part in sys.argv[1:]:
        result = importlib.import_module(f"tests.golden.test_{part}").compute()
        # A row of numbers a line: small, and a change shows where it is.
        rows = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in sorted(result.items())
        )
        path = FOLDER / f"{part}.json"
        path.write_text("{\n" + rows + "\n}\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
