"""The demo teaches two skills, and replaces an earlier demo alone."""

from prefixtune.cli.main import main


def test_a_run_that_no_demo_made_is_kept(tmp_path):
    (tmp_path / "prefix.safetensors").write_bytes(b"precious")
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    assert (tmp_path / "prefix.safetensors").read_bytes() == b"precious"
