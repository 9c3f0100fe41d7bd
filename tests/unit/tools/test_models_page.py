"""docs/models.md holds the result of `prefixtune doctor` for every model type, on a tiny random model of it."""

import re
from functools import partial
from pathlib import Path

import pytest
import transformers

from prefixtune.doctor.selfcheck import SWITCH
from tiny_config import model_types
from tools.models_page import COMMAND, table
from tools.models_sweep import FAULTS, examine_one
from zoo import ZOO, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")

MADE_WITH = re.search(r"with transformers (\S+) and torch ", PAGE)
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")]
HERE = pytest.mark.skipif(
    MADE_WITH is None or transformers.__version__ != MADE_WITH[1], reason="made with another transformers"
)

# Those whose attention, positions, masks or cache differ from each other's; `make models-page` examines all types.
EXAMINED = [
    *("gpt2", "gpt_neo", "bloom", "falcon-alibi", "qwen3_moe", "gemma2", "gemma4_text", "deepseek_v3", "llama4_text"),
    *("gpt_oss", "ctrl", "mamba", "jamba", "qwen3_next", "minimax", "falcon_h1", "recurrent_gemma"),
    *("bart", "longt5-global", "led", "prophetnet", "whisper", "t5gemma", "deberta-v2", "modernbert", "funnel"),
    # Outside the zoo; they once gave wrong results or tracebacks, or the self-check refuses them.
    *("afmoe", "jetmoe", "doge", "bert-generation", "deepseek_v4", "mobilebert", "voxtral", "xmod"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# Slow: each model is made and compared four times.
@HERE
@pytest.mark.parametrize("name", EXAMINED)
def test_the_verdict_on_a_model_is_current(name, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path))
    # The doctor's comparisons are the same four: what passes them need not be checked when it is loaded, too.
    if any(row[0] == f"`{name}`" and row[3].startswith("works") for row in ROWS):
        monkeypatch.setenv(SWITCH, "0")
    else:
        monkeypatch.delenv(SWITCH, raising=False)
    row = table([examine_one(name, tokenizer)])[-1]
    # How far apart numbers are that should be equal depends on the machine.
    apart = partial(re.sub, r"\S+ apart", "apart")
    assert apart(row) in map(apart, PAGE.splitlines()), f"run `{COMMAND}`: {row}"


def test_no_model_gives_wrong_results_or_a_traceback():
    assert len(ROWS) > len(ZOO)
    assert not [row[0] for row in ROWS if row[3] in FAULTS]


@HERE
def test_every_type_of_transformers_is_on_the_page():
    assert model_types().keys() <= {row[0].split("`")[1] for row in ROWS}
