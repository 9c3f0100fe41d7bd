"""`prefixtune env`: what it says of a machine, and that it gives no secret away."""

import json

import prefixtune
from command_line import run


def test_it_names_versions_devices_and_folders_and_no_secret(monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_HOME", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PREFIXTUNE_SERVE_ADMIN_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "hf_secretsecret")
    out, err = run("env", "--json")
    assert err == ""
    shown = json.loads(out)
    assert shown["versions"]["prefixtune"] == prefixtune.__version__
    assert (shown["folders"]["cache"], shown["variables"]["OMP_NUM_THREADS"]) == ("/somewhere", "1")
    text, _ = run("env")
    assert "  cache: /somewhere\n" in text
    assert "secretsecret" not in out + text
