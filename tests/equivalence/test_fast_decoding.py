"""Static cache, compiled steps, assisted decoding and prompt look-up with a prefix give what plain decoding gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids

Make = Callable[..., Any]
PLAIN = GenerateConfig(max_new_tokens=12)


def ways(backbone: Any, random_ids: Make, random_prefix: Make) -> tuple[list[list[int]], list[Any]]:
    prompts = [random_ids(7, 1), random_ids(4, 2), random_ids(11, 3)]
    return prompts, [random_prefix(backbone, 4, 5), None, random_prefix(backbone, 6, 6)]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache(backbone: Any, random_ids: Make, random_prefix: Make, beams: int) -> None:
    prompts, prefixes = ways(backbone, random_ids, random_prefix)
    plain = generate_ids(backbone, prompts, prefixes, config=GenerateConfig(max_new_tokens=12, num_beams=beams))
    static = GenerateConfig(max_new_tokens=12, num_beams=beams, cache="static")
    assert generate_ids(backbone, prompts, prefixes, config=static) == plain


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_one_text_without_padding_in_a_static_cache(
    name: str, tiny_models: Make, tiny_tokenizer: Any, random_ids: Make, random_prefix: Make
) -> None:
    """Then transformers makes no mask, and a layer gets the slots that are not written yet too."""
    backbone = Backbone.from_model(tiny_models(name), tiny_tokenizer, name)
    for prefix in (random_prefix(backbone, 4, 5), None):
        plain = generate_ids(backbone, [random_ids(7)], [prefix], config=PLAIN)
        static = PLAIN.replace(cache="static")
        assert generate_ids(backbone, [random_ids(7)], [prefix], config=static) == plain


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler, and there is none here")
def test_a_compiled_step() -> None:
    program = Path(__file__).parents[1] / "compiled_step.py"
    # Compiled within the process: each process of inductor's pool would import torch first.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_compiler_it_is_said(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "compiled_step.py"
    # Torch keeps what it compiled: an empty folder makes it compile again.
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("prefixtune.errors.")]
    assert said.startswith(
        "prefixtune.errors.ConfigError: the decoding step cannot be compiled here: InvalidCxxCompiler"
    )
    assert "or leave compile out" in said


def test_prompt_look_up(backbone: Any, random_ids: Make, random_prefix: Make) -> None:
    prompts, prefixes = ways(backbone, random_ids, random_prefix)
    # A text that repeats itself, so that there is something to look up.
    prompts[2] = random_ids(5, 4) * 3
    plain = generate_ids(backbone, prompts, prefixes, config=PLAIN)
    assert generate_ids(backbone, prompts, prefixes, config=GenerateConfig(max_new_tokens=12, prompt_lookup=3)) == plain


def test_shared_keys_are_met_by_the_last_queries(
    tiny_models: Make, tiny_tokenizer: Any, random_ids: Make, random_prefix: Make
) -> None:
    """Gemma 4's last layers compute the positions alone whose logits are asked for: with guesses, several."""
    backbone = Backbone.from_model(tiny_models("gemma4_text"), tiny_tokenizer, "tiny-gemma4")
    guessing = GenerateConfig(max_new_tokens=12, prompt_lookup=3)
    static = GenerateConfig(max_new_tokens=12, cache="static")
    for seed in range(8):
        for prefix in (random_prefix(backbone, 5, seed), None):
            # With something to look up.
            prompt = [random_ids(5, seed) * 3]
            plain = generate_ids(backbone, prompt, [prefix], config=PLAIN)
            assert generate_ids(backbone, prompt, [prefix], config=guessing) == plain
            assert generate_ids(backbone, prompt, [prefix], config=static) == plain


def test_an_assistant(backbone: Any, family: str, tiny_backbone: Make, random_ids: Make, random_prefix: Make) -> None:
    prompts, prefixes = ways(backbone, random_ids, random_prefix)
    plain = generate_ids(backbone, prompts, prefixes, config=PLAIN)
    for seed in (0, 1):  # The same model guesses right where there is no prefix; another one guesses wrong.
        assistant = tiny_backbone(family, seed=seed)
        assert generate_ids(backbone, prompts, prefixes, config=PLAIN, assistant=assistant) == plain


@pytest.mark.parametrize(
    "options",
    [{"compile": True}, {"cache": "sliding"}, {"prompt_lookup": -1}, {"prompt_lookup": 2, "num_beams": 2}],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        GenerateConfig(**options)
    assert error.value.hint


def test_an_assistant_whose_vocabulary_has_another_padding_is_refused(tiny_backbone: Make) -> None:
    backbone, assistant = tiny_backbone("llama"), tiny_backbone("llama", vocab_size=128)
    with pytest.raises(ConfigError, match=f"is padded to 128 tokens, not {backbone.vocab_size}"):
        generate_ids(backbone, [[5, 6]], [None], config=PLAIN, assistant=assistant)
