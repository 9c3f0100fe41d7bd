"""Write docs/deploy.md: the programs that can use a prefix, with which models, and the test that shows it.

    python -m tools.deploy_page            # write it
    python -m tools.deploy_page --check    # exit 1 if it is out of date

The table's rows are the tests marked `deploys`; each compares with `generate`.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tools.pages import DOCS, ROOT, page_parser, write_or_check

PAGE = DOCS / "deploy.md"

TARGETS = {
    "vLLM": "[vllm.md](vllm.md)",
    "llama.cpp": "[export.md](export.md#llamacpp)",
    "ONNX Runtime": "[export.md](export.md#onnx-runtime)",
    "OpenVINO": "[export.md](export.md#openvino)",
    "PEFT": "[convert.md](convert.md#peft)",
}
"""Programs that prefixes go to or come from, in the page's order, and their documentation."""

INTRODUCTION = """# Where a prefix goes

A prefix is the keys and values of P positions. A program that can start with them in its cache can use a prefix. The
table is written by `python -m tools.deploy_page` from this project's tests: each row is a test that compares with
`generate` or the forward pass of this project on the same prefix. Models in lower case are tiny models of that type
with random weights, made by the test. `make test-integrations` installs the programs and runs the tests, and
`make test-vllm` runs those with vLLM. All ran on CPUs; nothing here was tried on a GPU.
"""

CLOSING = """
For all other models of [models.md](models.md), this project itself trains and serves.

**Which one?** For many tasks on one machine, `prefixtune serve`. For a model larger than a device, or traffic beyond
one, vLLM with tensor parallelism and replicas behind its router. For a laptop or a phone, llama.cpp. For a program
without Python, ONNX Runtime or OpenVINO. For code that uses PEFT, PEFT's format. If the weights are quantized
after training (int4, Q4), score the prefix again on the target before you rely on it.
"""


@dataclass(frozen=True)
class Row:
    """What a test shows.

    Attributes:
        model: The model.
        how: What is compared.
        refused: Whether it shows that such a model is refused.
        test: The file of the test.
    """

    model: str
    how: str
    refused: bool
    test: str


class Collector:
    """A pytest plugin that collects the marked tests; none runs."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Collect the rows; pytest calls this with all tests."""
        for item in session.items:
            for mark in item.iter_markers("deploys"):
                target, how = mark.args
                row = Row(_model_of(item, mark), how, mark.kwargs.get("refused", False), item.nodeid.partition("::")[0])
                if row not in self.rows[target]:
                    self.rows[target].append(row)


def _model_of(item: Any, mark: pytest.Mark) -> str:
    if "model" in mark.kwargs:
        return str(mark.kwargs["model"])
    name, dash, kind = str(item.callspec.params[mark.kwargs["by"]]).partition("-")
    return f"{name} ({kind})" if dash else name


def collect() -> dict[str, list[Row]]:
    """The rows by target.

    Raises:
        SystemExit: Tests cannot be collected, or name an unknown target.
    """
    collector = Collector()
    # Importing all of the tests takes long.
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.deploys" in path.read_text("utf-8")]
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *sorted(files)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main(arguments, plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(output.getvalue())
    unknown = collector.rows.keys() - TARGETS.keys()
    if unknown:
        raise SystemExit(f"tests name targets that the page does not have: {', '.join(sorted(unknown))}")
    return collector.rows


def page(rows: dict[str, list[Row]]) -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for refused, title, head in (
        (False, "Verified", "| target | models | equal in | test |"),
        (True, "Refused, with the reason", "| target | models | what | test |"),
    ):
        parts += [f"## {title}\n", head, "|---|---|---|---|"]
        for target, documentation in TARGETS.items():
            models: dict[tuple[str, str], list[str]] = defaultdict(list)
            for row in rows.get(target, []):
                if row.refused == refused:
                    models[row.how, row.test].append(row.model)
            for (how, test), names in models.items():
                link = f"[{Path(test).name}](../{test})"
                parts.append(f"| {target} ({documentation}) | {', '.join(names)} | {how} | {link} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n" + CLOSING


if __name__ == "__main__":
    options = page_parser(__doc__).parse_args()
    sys.exit(write_or_check(PAGE, page(collect()), check=options.check))
