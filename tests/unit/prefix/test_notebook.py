"""What a notebook shows of a prefix, of a model with one, and of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import prefixtune as pt
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.prefix import Prefix

SVG = "{http://www.w3.org/2000/svg}"


def facts(value: Any) -> dict[str | None, str]:
    """The rows of a value's table."""
    cells = ["".join(cell.itertext()) for cell in ElementTree.fromstring(value._repr_html_()).iter("td")]
    return dict(zip(cells[::2], cells[1::2], strict=True))


def test_a_prefix(tiny_backbone: Callable[..., Any], random_prefix: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama")
    training = {"num_targets": 1200, "steps": 90, "dev_loss": 0.51234, "dataset": "GEM/e2e_nlg"}
    header = make_header(
        backbone, task="e2e", training=training, initialization={"kind": "text", "text": "<b>words</b>"}
    )
    prefix = Prefix(random_prefix(backbone, 4).layers, header)
    shown = facts(prefix)
    assert shown["backbone"] == "tiny-llama"
    assert shown["positions"] == "4"
    assert shown["start"] == "<b>words</b>", "escaped, so that the text is what it is"
    assert shown["trained on"] == "1,200 targets of GEM/e2e_nlg in 90 steps"
    assert shown["development loss"] == "0.5123"
    assert f"{prefix.num_parameters:,} numbers, {prefix.num_bytes:,} bytes" in shown["size"]
    assert len(prefix._repr_html_()) < 4000


def test_a_header_of_anybody(tiny_backbone: Callable[..., Any], random_prefix: Callable[..., Any]) -> None:
    layers = random_prefix(tiny_backbone("llama"), 2).layers
    strange = {"training": {"steps": "many", "dev_loss": None}, "composition": {"parts": 3}, "labels": {"names": [1]}}
    strange |= {"backbone": "x", "task": {"<i>": 1}, "initialization": {"kind": ["a"]}, "text_format": {"prompt": 3}}
    assert facts(Prefix(layers, strange))["task"] == "{'<i>': 1}"
    assert facts(Prefix(layers))["positions"] == "2"
    huge = {"training": {"dev_loss": 10**400, "num_targets": 10**400, "steps": 10**400}}
    assert facts(Prefix(layers, huge))["development loss"].startswith("10,000,")


def test_a_model(tiny_backbone: Callable[..., Any], random_prefix: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama")
    shown = facts(pt.load(backbone, random_prefix(backbone, 2).detach()))
    assert shown["model"] == "tiny-llama"
    assert shown["positions"] == "2"
    assert "no prefix" in pt.load(backbone)._repr_html_()


def test_a_run(tiny_backbone: Callable[..., Any], tmp_path: Path) -> None:
    examples = [pt.Example(f"item {number}", (f"a b {number}",)) for number in range(4)]
    result = pt.train(
        {"output": str(tmp_path / "run"), "max_steps": 4, "eval_every": 2, "prefix_length": 2},
        backbone=tiny_backbone("llama"),
        examples=examples,
        dev_examples=examples[:2],
        progress=False,
    )
    shown = facts(result)
    assert shown["steps"].startswith("4 in 0:0")
    assert shown["artifact"] == str(result.path)
    assert "prefix.safetensors" in shown["files beside it"]
    assert shown["development loss"] == f"{result.best_loss:.4g} at best"
    lines = list(ElementTree.fromstring(result._repr_html_()).iter(f"{SVG}polyline"))
    assert [len(line.attrib["points"].split()) for line in lines] == [4, 2]
    assert len(result._repr_html_()) < 8000
    # A terminal shows one line, without the log.
    assert "events" not in repr(result)
    assert len(repr(result)) < 400
