"""A tutorial's blocks run in order, in an empty folder with an empty home; what fails, or is not printed, is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.tutorials import WrongPageError, follow, read_blocks

ROOT = Path(__file__).resolve().parents[3]
PAGE = """```bash
echo one > here
python -c 'import prefixtune, os; print(prefixtune.__version__, os.listdir(), os.environ["HOME"])'
```
<!-- not run -->
```bash
exit 5
```
```python
print(open("here").read().upper())
```
<!-- right -->
```text
ONE
```
```bash
false
```
```bash
echo after
```
"""


def test_blocks_run_in_order_until_one_fails(tmp_path):
    page, home = tmp_path / "page.md", tmp_path / "home"
    page.write_text(PAGE)
    command = [sys.executable, "-m", "tools.tutorials", str(page), "--home", str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert {f"0.1.0 ['here'] {home}", "ONE"} <= {*done.stdout.splitlines()}
    assert "after" not in done.stdout
    assert "exit code 1" in done.stderr


def test_a_line_that_was_not_printed_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\necho Athens; echo Oslo\n```\n\n<!-- right -->\n```text\nAthens\nRome\n```\n")
    with pytest.raises(WrongPageError) as error:
        follow(page, tmp_path, dict(os.environ))
    assert str(error.value).splitlines()[1:] == ["Rome"]


def test_a_replacement_that_finds_nothing_is_wrong():
    with pytest.raises(WrongPageError):
        list(read_blocks("<!-- short: --steps 9 => --steps 1 -->\n```bash\ntrain --steps 8\n```\n", short=True))
