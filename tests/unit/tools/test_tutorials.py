"""A tutorial's commands run in order, in an empty folder with an empty home, and stop at the first that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = """# Page

```bash
echo one > here
python -c 'import prefixtune, os; print(prefixtune.__version__, os.listdir(), os.environ["HOME"])'
```

<!-- not run -->
```bash
exit 5
```

```bash
cat here | tr a-z A-Z
false
echo never
```

```bash
echo after
```
"""


def test_blocks_run_in_order_until_one_fails(tmp_path: Path) -> None:
    page, home = tmp_path / "page.md", tmp_path / "home"
    page.write_text(PAGE)
    command = [sys.executable, "-m", "tools.tutorials", str(page), "--home", str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    printed = [line for line in done.stdout.split("\n") if line and not line.startswith("---")]
    assert done.returncode == 1
    assert f"0.1.0 ['here'] {home}" in printed
    assert "ONE" in printed
    assert "after" not in printed
