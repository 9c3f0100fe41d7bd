"""The packaged backbone, without its download: a tiny GGUF file in a tiny wheel stands for the real one."""

import hashlib
import json
import socket
import subprocess
import sys
import zipfile

import pytest

from prefixtune.backbone import packaged
from prefixtune.backbone.packaged import Pretrained, prepare, pretrained_folder
from prefixtune.errors import BackboneError, PrefixError

MEMBER = "tiny_model/tiny.gguf"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder, content=b"not really a model"):
    """Write a wheel with one member, and the description with its right checksums."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, content)
    item = Pretrained(
        wheel="tiny-model==1.0",
        wheel_sha256=sha256(wheel),
        member=MEMBER,
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        about="1 MB",
    )
    return wheel, item


def write_files(name, gguf, target):
    """Stand for the conversion."""
    (target / "model.safetensors").write_bytes(gguf.read_bytes() * 2)
    (target / "config.json").write_text("{}")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path, home, monkeypatch):
    """A known model "tiny" whose conversion is instant and whose download is refused."""
    wheel, item = make_wheel(tmp_path)

    def refuse(item, folder, report):
        raise AssertionError("no download was asked for")

    monkeypatch.setitem(packaged.PRETRAINED, "tiny", item)
    monkeypatch.setattr(packaged, "convert_gguf", write_files)
    monkeypatch.setattr(packaged, "fetch_gguf", refuse)
    return wheel


def visible(home):
    """What lies in the cache besides the lock file."""
    folder = home / "pretrained"
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_prepare_once_then_only_look(home, wheel, monkeypatch):
    lines = []
    assert pretrained_folder("tiny") is None
    folder = prepare("tiny", wheel=wheel, report=lines.append)
    assert folder == home / "pretrained" / "tiny" == pretrained_folder("tiny")
    assert len(lines) == 1
    assert visible(home) == ["tiny"]

    before = (folder / "model.safetensors").stat()
    monkeypatch.setattr(packaged, "convert_gguf", None)
    assert prepare("tiny") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "prepared.json").write_text('{"format": 1, "gguf_sha256": "0"}'),
    ],
)
def test_a_damaged_folder_counts_as_missing_and_is_replaced(wheel, spoil):
    folder = prepare("tiny", wheel=wheel)
    spoil(folder)
    assert pretrained_folder("tiny") is None
    prepare("tiny", wheel=wheel)
    assert pretrained_folder("tiny") == folder
    assert json.loads((folder / "prepared.json").read_text())["name"] == "tiny"


def test_a_changed_wheel_is_refused(home, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(BackboneError, match=r"tiny_model.* has SHA-256"):
        prepare("tiny", wheel=wheel)
    assert visible(home) == []


def test_a_missing_wheel_and_an_unknown_name(wheel):
    with pytest.raises(BackboneError, match="no wheel file"):
        prepare("tiny", wheel=wheel.with_name("missing.whl"))
    with pytest.raises(BackboneError, match="no packaged model 'smollm2-135n'"):
        prepare("smollm2-135n")


def test_an_interrupted_preparation_leaves_nothing(home, wheel, monkeypatch):
    def fail(name, gguf, target):
        write_files(name, gguf, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "convert_gguf", fail)
    with pytest.raises(PrefixError, match="No space left on device"):
        prepare("tiny", wheel=wheel)
    assert visible(home) == []
    assert pretrained_folder("tiny") is None


def test_looking_uses_no_network_and_no_transformers(wheel, monkeypatch):
    prepare("tiny", wheel=wheel)

    def refuse(*args, **kwargs):
        raise AssertionError("network or process used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert pretrained_folder("tiny") is not None
    assert pretrained_folder("smollm2-135m") is None
    assert prepare("tiny") == pretrained_folder("tiny")


FAKE = """#!{python}
import json, os, shutil, sys, time
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, sys.argv[1:], os.environ.get("PIP_INDEX_URL"), os.environ.get("PIP_RETRIES")]))
    log.write(chr(10))
{does}
"""
"""A program that writes down how it was called and then does one thing."""

GIVES_THE_MODEL = """shutil.unpack_archive({wheel!r}, sys.argv[sys.argv.index("--target") + 1], "zip")
asked = open(sys.argv[sys.argv.index("-r") + 1]).read()
assert asked == "tiny-model==1.0 --hash=sha256:{sha256}" + chr(10), asked
"""


class Programs:
    """A fake pip of this Python and a fake uv, in place of the real ones."""

    def __init__(self, folder, wheel, monkeypatch):
        self.folder, self.wheel, self.monkeypatch = folder, wheel, monkeypatch
        self.log = folder / "log"
        monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))
        monkeypatch.setenv("PATH", str(folder / "path"))
        monkeypatch.delenv("UV", raising=False)

    def _write(self, path, name, does):
        path.parent.mkdir(parents=True, exist_ok=True)
        does = does.format(wheel=str(self.wheel), sha256=sha256(self.wheel)) if "{" in does else does
        path.write_text(FAKE.format(python=sys.executable, log=str(self.log), name=name, does=does))
        path.chmod(0o755)
        return path

    def pip(self, does=GIVES_THE_MODEL):
        main = self._write(self.folder / "packages" / "pip" / "__main__.py", "pip", does)
        (main.parent / "__init__.py").touch()

    def uv(self, does=GIVES_THE_MODEL):
        self.monkeypatch.setenv("UV", str(self._write(self.folder / "path" / "uv", "uv", does)))

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.mark.skipif(sys.platform == "win32", reason="the fake programs are scripts")
class TestFetch:
    """The download, with fakes of pip and uv."""

    @pytest.fixture
    def programs(self, tmp_path, home, monkeypatch):
        wheel, item = make_wheel(tmp_path)
        monkeypatch.setitem(packaged.PRETRAINED, "tiny", item)
        monkeypatch.setattr(packaged, "convert_gguf", write_files)
        return Programs(tmp_path, wheel, monkeypatch)

    @pytest.mark.parametrize("program", ["pip", "uv"])
    def test_one_exact_wheel_is_asked_for_with_the_users_settings(self, home, programs, monkeypatch, program):
        getattr(programs, program)()
        monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
        folder = prepare("tiny")
        assert folder == pretrained_folder("tiny")
        assert (folder / "model.safetensors").read_bytes() == b"not really a model" * 2
        ((name, arguments, index, retries),) = programs.calls()
        assert (name, index, retries) == (program, "https://mirror.example/simple", "2")
        assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(arguments)
        assert not {"--index-url", "--retries", "--no-config", "--isolated"} & set(arguments)
        assert visible(home) == ["tiny"]

    @pytest.mark.parametrize(("program", "does"), [("pip", "sys.exit(3)"), ("uv", "time.sleep(60)")])
    def test_failure_is_an_error_with_a_way_out(self, home, programs, monkeypatch, program, does):
        getattr(programs, program)(does)
        monkeypatch.setattr(packaged, "MAX_SECONDS", 0.5)
        with pytest.raises(BackboneError, match=program) as caught:
            prepare("tiny")
        assert "prefixtune prepare --wheel FILE" in caught.value.hint
        assert visible(home) == []
