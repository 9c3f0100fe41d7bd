"""A resumed run takes its start from its state: the files that it began from may change or be gone."""

import pytest

from prefixtune.prefix.prefix import save_prefix


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("delete", {"initialization": "text", "prefix_length": 3, "compaction": "match"}),
        ("rewrite", {"initialization": "prefix", "prefix_length": 0}),
    ],
)
def test_the_files_of_the_start_are_not_read_again(
    train, train_until, backbone, random_prefix, tmp_path, options, change
):
    words, prefix = tmp_path / "words.txt", tmp_path / "start.safetensors"
    start = {"init_prefix": str(prefix)} if options["initialization"] == "prefix" else {"init_text": f"@{words}"}
    options = {**options, **start, "save_every": 1, "max_steps": 4}

    def write():
        words.write_text("hello there", encoding="utf-8")
        save_prefix(prefix, random_prefix(backbone, 2))

    write()
    whole = train(4, output=str(tmp_path / "whole"), **options)
    train_until(2, 4, output=str(tmp_path / "half"), **options)
    if change == "delete":
        words.unlink()
        prefix.unlink()
    else:
        words.write_text("quite another text, with more words", encoding="utf-8")
        save_prefix(prefix, random_prefix(backbone, 5))
    resumed = train(4, output=str(tmp_path / "half"), resume=True, **options)
    assert resumed.prefix.equal(whole.prefix)
    assert resumed.prefix.header["initialization"] == whole.prefix.header["initialization"]
