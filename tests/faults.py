"""Runs commands and uploads again and again, each time with another write, fsync or rename failing.

Started by `unit/test_faults.py` as a program of its own, with the library of `faults.c` preloaded:

    LD_PRELOAD=faults.so python faults.py FOLDER

Prints a line of JSON for every operation: how many failures it was tried with, and what was wrong afterwards.
"""

import asyncio
import contextlib
import ctypes
import errno
import io
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

from asgi_client import bearer, keys, send
from live_server import make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.cli.main import App, main
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.server.app import make_app
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import ServeConfig
from prefixtune.server.state import ServerState
from prefixtune.training.checkpoint import load_state

FAULTS = ctypes.CDLL(None)
PARSE, PARSED = App.parse_args, {}


def snapshot(folder):
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ordered(files):
    """The same, with the tables of safetensors files in order: the library writes their metadata in any."""
    made = dict(files)
    for name, content in files.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(content[:8], "little")
            made[name] = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
    return made


def command(*words):
    """Run a command here; returns its exit code, and what it printed on stderr."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        code = main([*map(str, words), "--quiet"])
    return code, printed.getvalue()


@contextlib.contextmanager
def failing(folder, nth, error):
    FAULTS.faults_arm(str(folder).encode(), ctypes.c_long(nth), error)
    try:
        yield
    finally:
        FAULTS.faults_arm(b"", ctypes.c_long(0), 0)


def is_one_line_of_error(code, printed):
    lines = printed.splitlines()
    return code == 2 and len(lines) <= 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")


class Operation:
    """Something that is done to a folder, over what an earlier time left there.

    Args:
        folder: Where it writes.
        act: Does it; returns None, or what is wrong with how it ended.
        after: Looks at the folder after a failure; returns what is wrong with it.
    """

    def __init__(self, folder, act, after):
        self.folder, self.act, self.after = folder, act, after

    def run(self, name):
        before, wrong, tried = snapshot(self.folder), [], 0
        for nth in range(1, 1000):
            error = (errno.ENOSPC, errno.EIO)[nth % 2]
            with failing(self.folder, nth, error):
                reported = self.act()
                if FAULTS.faults_left() > 0:
                    # Nothing failed: there are no more.
                    break
            tried += 1
            found = snapshot(self.folder)
            hidden = [path for path in found if "/." in f"/{path}"]
            reported = reported or self.after(found) or (f"left {hidden}" if hidden else None)
            if reported:
                wrong.append(f"{errno.errorcode[error]} at {nth}: {reported}")
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            for path, content in before.items():
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / path).write_bytes(content)
        print(json.dumps({"operation": name, "failures": tried, "wrong": wrong}), flush=True)


FAULTS.faults_left.restype = ctypes.c_long


def of_command(*words):
    def act():
        code, printed = command(*words)
        # What is not needed may fail, such as bringing a folder's names to disk.
        return None if code == 0 or is_one_line_of_error(code, printed) else f"exit code {code}, {printed!r}"

    return act


def all_or_nothing(old, new):
    def after(found):
        if ordered(found) in (ordered(old), ordered(new)):
            return None
        changed = [name for name in old.keys() | new.keys() | found.keys() if found.get(name) != old.get(name)]
        return f"{sorted(changed)} of {sorted(new)} are new"

    return after


def writes_all_or_nothing(folder, output, old, new):
    """A command that replaces what another call of it wrote."""
    for words in (new, old):
        assert command(*words)[0] == 0
        if words is new:
            made = snapshot(folder)
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    assert ordered(snapshot(folder)).keys() == made.keys()
    return Operation(folder, of_command(*new), all_or_nothing(snapshot(folder), made))


def training(folder, backbone, data):
    run = folder / "run"
    words = ["train", "--backbone", backbone, "--train", data, "--dev", data, "--source", "s", "--target", "t"]
    words += ["--output", run, "--max-steps", 2, "--save-every", 1, "--eval-every", 1, "--prefix-length", 2]
    words += ["--init-text", "ab", "--device", "cpu", "--dtype", "float32"]
    assert command(*words)[0] == 0
    wanted = load_prefix(run / "prefix.safetensors")
    shutil.rmtree(run)

    def after(found):
        prefix, state = run / "prefix.safetensors", run / "state.safetensors"
        if prefix.exists():
            load_prefix(prefix)
        if state.exists():
            load_state(state)
        # The next run goes on, or begins anew.
        code, printed = command(*words, *(["--resume"] if state.exists() else []))
        if code != 0:
            return f"the next run ended with {code}: {printed}"
        return None if load_prefix(prefix).equal(wanted) else "the next run came to something else"

    return Operation(folder, of_command(*words), after)


def upload(folder, model, one, other):
    folder.mkdir()
    shutil.copyfile(one, folder / "p.safetensors")
    backbone = load_backbone(model, device="cpu", dtype="float32")
    config = ServeConfig(backbone="tiny", prefixes=str(folder), num_slots=1, keys=keys(boss={"admin": True}))
    store = PrefixFolder(folder, backbone)
    state = ServerState(config, backbone, store, TorchEngine(backbone, EngineConfig(num_slots=1)))
    app, body = make_app(state), other.read_bytes()

    def act():
        answer = asyncio.run(send(app, "PUT", "/v1/models/p", body, headers=bearer("boss")))
        good = answer.status in (200, 201) or (answer.status == 507 and answer.json["error"]["message"])
        return None if good else f"{answer.status}, {answer.body!r}"

    def after(found):
        if found not in ({"p.safetensors": one.read_bytes()}, {"p.safetensors": body}):
            return f"the folder holds {sorted(found)}"
        file = load_prefix(folder / "p.safetensors", backbone)
        return None if store.get("p").equal(file) else "another prefix is served than the file's"

    return Operation(folder, act, after)


def parse_once(app, words, **options):
    """The words of a command: to read them takes two thirds of a short run, and writes nothing."""
    return PARSED.get(tuple(words)) or PARSED.setdefault(tuple(words), PARSE(app, words, **options))


def run(work):
    model = make_model(work / "model")
    backbone = load_backbone(model, device="cpu")
    one, other = (make_prefix(backbone, work / f"{n}.safetensors", n, task="records") for n in (1, 2))
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps({"s": f"n : {c}", "t": f"{c}{c} it is"}) + "\n" for c in "abcd"))
    # The same tiny model each time.
    with (
        mock.patch("prefixtune.training.prepare.load_backbone", return_value=backbone),
        mock.patch("prefixtune.cli.loading.load", return_value=backbone),
        mock.patch.object(App, "parse_args", parse_once),
    ):
        (work / "train").mkdir()
        training(work / "train", model, data).run("train")
        upload(work / "served", model, one, other).run("upload")
        for to, name in (("prefixtune", "out.safetensors"), ("peft", "adapter")):
            folder = work / f"convert-{to}"
            words = [("convert", given, folder / name, "--to", to) for given in (one, other)]
            writes_all_or_nothing(folder, folder / name, *words).run(f"convert --to {to}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
