"""The snippets of docs/python.md, one after the other, with a hub that is a folder.

Slow: the embedded model trains and answers.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from prefixtune.backbone.packaged import pretrained_folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    if pretrained_folder("smollm2-135m") is None:
        pytest.skip("the embedded backbone is not prepared here (`prefixtune prepare`)")
    hub = tmp_path / "hub"

    def create_repo(self, repo_id, *, private, exist_ok):
        assert private
        (hub / repo_id).mkdir(parents=True)

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                (hub / repo_id / operation.path_in_repo).write_bytes(file.read())
        return SimpleNamespace(commit_url=str(hub / repo_id))

    # The hub checks a card before there is a repository.
    monkeypatch.setattr(ModelCard, "validate", lambda card: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name, **_: str(hub / repo_id / name))
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"(?<!not run -->\n)^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 8
    shorter = {"rows, max_steps=20": "rows, max_steps=1, batch_size=1", "max_steps=20": "max_steps=1"}
    shorter |= {"max_new_tokens=24": "max_new_tokens=2", 'metrics=["bleu"]': 'metrics=["bleu"], max_new_tokens=2'}
    shorter |= {'name Costa")': 'name Costa", max_new_tokens=2)'}
    for block in blocks:
        for long, short in shorter.items():
            block = block.replace(long, short)
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["theirs"].equal(names["model"].prefix)
    card = ModelCard.load(hub / "me" / "bookings-prefix" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.eval_results[0].metric_type == "bleu"
    assert (tmp_path / "runs" / "trainer" / "prefix.safetensors").exists()
    out = capsys.readouterr().out
    assert "Prediction(label=" in out
