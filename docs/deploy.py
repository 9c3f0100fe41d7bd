"""Write docs/deploy.md: where a prefix goes, which models were tried there, and which test says so.

python docs/deploy.py            write it
python docs/deploy.py --check    exit 1 if it is not what the tests say

The table's rows are the tests marked `deploys`; each is a test of the suite that compares with `generate`.
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

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGE = DOCS / "deploy.md"

TARGETS = {
    "vLLM": "[serving.md](serving.md#vllm)",
    "llama.cpp": "[export.md](export.md#llamacpp)",
    "ONNX Runtime": "[export.md](export.md#onnx-runtime)",
    "OpenVINO": "[export.md](export.md#openvino)",
    "PEFT": "[convert.md](convert.md#peft)",
    "the authors' checkpoints, read": "[convert.md](convert.md#the-authors-checkpoints)",
}
"""Where prefixes go or come from, in the page's order, and where it is told how."""

INTRODUCTION = """# Where a prefix goes

A prefix is keys and values of P positions. Whatever lets them stand in its cache can use it. The table is made by
`python docs/deploy.py` from the suite's own tests: each row is a test that compares with this project's `generate` or
forward pass on the same prefix. Models in small letters are tiny ones of that type with random weights, made by the
test. They run by `make test-integrations`, which installs the programs, and vLLM's by `make test-vllm`.
All ran on CPUs; nothing here was seen on a GPU.
"""

CLOSING = """
What else carries prefixes stays in this project's own hands: training and serving, for the models of
[models.md](models.md).

**Which one?** For many tasks on one machine, `prefixtune serve`. For a model larger than a device, or traffic beyond
one, vLLM with tensor parallelism and replicas behind its router. For a laptop or a phone, llama.cpp. For a program that
cannot have Python at all, ONNX Runtime or OpenVINO. For code that speaks PEFT, its own format. A prefix for weights
that were rounded afterwards (int4, Q4) is to be scored again on the target before it is trusted.
"""


@dataclass(frozen=True)
class Row:
    """What a test proves.

    Attributes:
        model: Of which model.
        how: By what it compares.
        refused: Whether it is that such a model is refused.
        test: The file that it stands in.
    """

    model: str
    how: str
    refused: bool
    test: str


class Collector:
    """A pytest plugin that notes marked tests, and runs none."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Called with all tests that were found."""
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
    """The rows by target."""
    found = Collector()
    arguments = [
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
        "--rootdir",
        str(ROOT),
        str(ROOT / "tests"),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(arguments, plugins=[found])
    if status != pytest.ExitCode.OK:
        raise SystemExit(said.getvalue())
    unknown = found.rows.keys() - TARGETS.keys()
    if unknown:
        raise SystemExit(f"tests name targets that the page does not: {', '.join(sorted(unknown))}")
    return found.rows


def page(rows: dict[str, list[Row]]) -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for refused, title, head in (
        (False, "Verified", "| target | models | equal in | test |"),
        (True, "Refused, with the reason", "| target | models | what | test |"),
    ):
        parts += [f"## {title}\n", head, "|---|---|---|---|"]
        for target, told in TARGETS.items():
            models: dict[tuple[str, str], list[str]] = defaultdict(list)
            for row in rows.get(target, []):
                if row.refused == refused:
                    models[row.how, row.test].append(row.model)
            for (how, test), names in models.items():
                link = f"[{Path(test).name}](../{test})"
                parts.append(f"| {target} ({told}) | {', '.join(names)} | {how} | {link} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n" + CLOSING


def main() -> int:
    """Write the page, or check it."""
    text = page(collect())
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("docs/deploy.md is current" if current else "docs/deploy.md is out of date: run `make docs`")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
