"""Every tutorial, followed word for word in an empty folder with an empty home, ends in the answers that it shows.

The pages are run in their short form: with fewer steps, and without what takes more than a minute, such as training on
chats and documents. `make tutorials` runs them whole. Programs are forked from one that has imported the libraries
already; only that differs from a reader's shell.

Slow: the embedded model trains and answers.
"""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from forked_command import forking_python
from prefixtune.backbone.packaged import pretrained_folder
from tools.tutorials import follow, make_environment, read_blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
RUN = [page for page in PAGES if list(read_blocks(page.read_text(encoding="utf-8")))]


def test_pages_that_are_not_run_are_few():
    assert {page.stem for page in PAGES} - {page.stem for page in RUN} == {"index", "vllm"}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_it_ends_in_the_answers_that_it_shows(page, tmp_path):
    backbone = pretrained_folder("smollm2-135m")
    if backbone is None:
        pytest.skip("the embedded backbone is not prepared here (`prefixtune prepare`)")
    home, programs, folder = (tmp_path / name for name in ("home", "programs", "empty"))
    cache = home / ".cache" / "prefixtune"
    for path in (programs, folder, cache):
        path.mkdir(parents=True)
    (cache / "pretrained").symlink_to(backbone.parent)
    python = f'exec env PYTHONPATH="{ROOT / "src"}" "{sys.executable}"'
    scripts = {"prefixtune": f'exec "{forking_python()}" -m prefixtune "$@"', "python": f'{python} "$@"'}
    # The check of a type of model at its first load has tests of its own.
    environment = {**make_environment(home, programs, scripts), "PREFIXTUNE_SELF_CHECK": "0"}
    # Tests of another checkout may have a server at the page's own port.
    with socket.create_server(("127.0.0.1", 0)) as free:
        text = re.sub(r"\b812\d\b", str(free.getsockname()[1]), page.read_text(encoding="utf-8"))
    copy = tmp_path / page.name
    copy.write_text(text, encoding="utf-8")
    assert follow(copy, folder, environment, short=True) > 0
