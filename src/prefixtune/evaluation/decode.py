"""One output per example; a file of the outputs so far lets a stopped evaluation continue.

Lines of JSON are appended, and each says by a digest what its output depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.identity import sample
from prefixtune.data.examples import Example
from prefixtune.engine.base import Engine
from prefixtune.errors import ConfigError, DataError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import backbone_of, complete
from prefixtune.inference.prompts import prepare_prompts
from prefixtune.prefix.prefix import Prefix, content_hash
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.files import append_line, check_writable, reporting_write_errors

DECODED_FILE = "decoded.jsonl"


def decode(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None,
    *,
    text_format: TextFormat | None,
    config: GenerateConfig,
    engine: Engine | None = None,
    resume_file: Path | None,
    on_batch: Callable[[int], None] | None,
    on_cut: Callable[[Sequence[int]], None],
) -> tuple[list[str], float, int]:
    """One output per example; those of a stopped evaluation are kept.

    Returns:
        The outputs, the seconds that decoding took, and how many outputs took all tokens they may have and did not end.
    """
    sources = [example.messages or example.source for example in examples]
    rows, digest = dict[int, dict[str, Any]](), ""
    if resume_file is not None:
        check_writable(resume_file)
        with reporting_write_errors(resume_file):
            resume_file.parent.mkdir(parents=True, exist_ok=True)
        # How many texts run at once changes no output that is not sampled.
        same = {name: config.default(name) for name in ("batch_size", "seed") if config.temperature == 0}
        facts = [
            backbone.fingerprint,
            # As they compute, so also after training, or rounding to 8 or 4 bits; another engine has its own.
            engine.name if engine else sample(backbone.model),
            backbone.dtype_name,
            text_format and text_format.to_dict(),
            sources,
            config.replace(**same).to_dict(),
            prefix and [content_hash(prefix), prefix.header.get("text_format")],
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        rows = _stored_rows(resume_file, digest)
    # Every length is checked, and every truncated source counted, before any of them is computed.
    backbone = backbone_of(engine, backbone)
    prompts = prepare_prompts(backbone, sources, [prefix] * len(sources), config, text_format, on_cut=on_cut)
    missing = [number for number in range(len(prompts)) if number not in rows]
    start = time.perf_counter()
    for number, output in complete(backbone, prompts, config, missing, engine):
        text, end = prompts[number].text_format.extract_target(output.text), time.perf_counter()
        rows[number] = {
            "number": number,
            "output": text,
            "ended": output.finish_reason != "length",
            "digest": digest,
            "seconds": round(end - start, 6),
        }
        start = end
        if resume_file is not None:
            append_line(resume_file, json.dumps(rows[number]))
        if on_batch is not None:
            on_batch(len(rows))
    ordered = [rows[number] for number in range(len(prompts))]
    seconds, unended = sum(row["seconds"] for row in ordered), sum(not row["ended"] for row in ordered)
    return [row["output"] for row in ordered], seconds, unended


def _stored_rows(path: Path, digest: str) -> dict[int, dict[str, Any]]:
    """What a stopped evaluation wrote, by the examples' numbers; a line that was cut off is ignored."""
    rows, hint = dict[int, dict[str, Any]](), "choose another output folder, or delete the file."
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint=hint) from error
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["digest"] != digest:
                what = "outputs of another evaluation (another prefix, model, data or settings)"
                raise ConfigError(f"{str(path)!r} holds {what}.", hint=hint)
            rows[row["number"]] = row
    return rows
