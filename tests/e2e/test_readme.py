"""What the README and the guides show is run, or at least understood by the program."""

import re
import shlex
from pathlib import Path

import pytest

import prefixtune as pt
from prefixtune.cli.main import build_app, command_options

ROOT = Path(__file__).resolve().parents[2]
MADE = ("cli.md", "configuration.md", "examples.md", "http.md")
"""Pages that only the site has."""
PAGES = [
    ROOT / "README.md",
    *sorted(
        page
        for page in (ROOT / "docs").glob("**/*.md")
        if page.name not in ("LOG.md", *MADE) and page.parent.name != "api"
    ),
]
RUN = [page for page in PAGES if page.stem in ("README", "labels", "evaluation", "metrics")]
"""What their Python needs is there: other pages name files of the reader's own."""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page):
    """The words after `prefixtune` of every command that a page shows, also within a pipe."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if "prefixtune " not in line or line.startswith("{"):  # A row of data that a command makes.
            continue
        line = re.sub(r"\$\w+|\$\(.*?\)", "1", line)
        lexer = shlex.shlex(re.sub(r"\s\d?[<>]+ *\S+", "", line), posix=True, punctuation_chars="|;&")
        lexer.whitespace_split = True
        parts = [[]]
        for word in lexer:
            parts.append([]) if set(word) <= set("|;&") else parts[-1].append(word)
        found += [part[1:] for part in parts if part and part[0] == "prefixtune"]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_parses(page):
    shown = commands(page)
    assert shown or page.stem not in ("README", "training", "evaluation")
    for words in shown:
        line = shlex.join(words)
        function, bound, unknown, _ = build_app(words[0]).parse_known_args(words)
        assert not unknown, f"{line}: {unknown}"
        assert function.options is command_options()[words[0]]
        # The others name files that are not here.
        if not bound.arguments.keys() & {"config", "resume", "together"}:
            function.options.read(bound.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_python_blocks_run(page, tmp_path, monkeypatch, default_backbone, capsys):
    monkeypatch.chdir(tmp_path)
    generate = pt.generate
    monkeypatch.setattr(pt, "load_backbone", lambda *_, **__: default_backbone)
    monkeypatch.setattr(pt, "generate", lambda *given, **named: generate(*given, **{**named, "max_new_tokens": 4}))
    for block in blocks(page, "python"):
        if "lm_eval" in block:
            continue  # An extra: tests/integrations/test_lm_eval.py.
        short = block.replace("max_steps=20", "max_steps=1, batch_size=1")
        exec(compile(short, str(page), "exec"), {})
        if "runs/trains" in block:
            assert (tmp_path / "runs" / "trains" / "prefix.safetensors").stat().st_size < 600_000
    assert capsys.readouterr().out.strip()


def test_links_lead_somewhere():
    for page in [*PAGES, *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            found = link.startswith("https://") or (page.parent / link).exists() or Path(link).name in MADE
            assert found, f"{page.name} links to {link}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "choosing.md"], ids=lambda page: page.stem)
def test_the_figures_shown_are_those_of_the_results_that_are_linked(page):
    results = (ROOT / "research" / "RESULTS.md").read_text(encoding="utf-8")
    headings = re.split(r"^#+ (.*)$", results, flags=re.M)
    sections = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): text
        for title, text in zip(headings[1::2], headings[2::2], strict=True)
    }
    text = page.read_text(encoding="utf-8")
    checked = 0
    for row in re.split(r"\n\n|\n(?=[|-])", text):
        linked = re.findall(r"RESULTS\.md#([\w-]+)", row)
        for figure in re.findall(r"\d+\.\d+", row) if linked else ():
            assert any(figure in sections[name] for name in linked), (figure, row)
            checked += 1
    assert checked > 5
