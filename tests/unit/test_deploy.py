"""The files of deploy/: their commands have options that there are, and what they name elsewhere is there."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from prefixtune.cli.main import command_options
from prefixtune.server.settings import ServeConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
UNITS = sorted(DEPLOY.glob("*.service"))


def check(command):
    """The options of a command line, without its file."""
    name, *words = command
    options = command_options()[name]
    fields = {options.flag(field): field for field in options.model_fields}
    pairs = [pair for word in words for pair in word.split("=", 1)]
    given = {fields[flag]: value for flag, value in zip(pairs[::2], pairs[1::2], strict=True)}
    if given.pop("config", None):
        # Its keys allow any address.
        given.pop("host", None)
    return options.read(given)


def unit_commands(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ExecStart=(.*)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_there_is(path):
    (command,) = unit_commands(path)
    program = command.index("/opt/prefixtune/bin/prefixtune")
    if program:
        # Its password is no argument of the program; systemd reads $$ as $.
        assert command[:2] == ["/bin/sh", "-c"]
        assert command[2].endswith('exec "$$@"')
        assert "$" not in command[2].replace("$$", "")
    check(command[program + 1 :])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_a_unit(path):
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
    faults = [line for line in done.stderr.splitlines() if path.name in line and "is not executable" not in line]
    assert faults == []


def test_every_setting_of_the_configuration_is_one(tmp_path):
    text = (DEPLOY / "serve.toml").read_text(encoding="utf-8")
    # What is commented out, too: a line with a key, or a table.
    whole = re.sub(r"^# (?=\w+ = |\[keys)", "", text, flags=re.MULTILINE)
    for digit in "01":
        whole = whole.replace("sha256:...", f"sha256:{digit * 64}", 1)
    path = tmp_path / "serve.toml"
    path.write_text(whole)
    config = ServeConfig.from_file(path)
    assert (config.train_workers, config.keys["acme"].max_jobs, config.keys["prometheus"].metrics) == (0, 10, True)


def test_the_image_starts_a_server():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (entry,), (command,) = (
        re.findall(rf"^{word} (\[.*\])$", text, flags=re.MULTILINE) for word in ("ENTRYPOINT", "CMD")
    )
    options = check([*json.loads(entry)[1:], *json.loads(command)])
    assert {options.prefixes, options.data_folder} <= set(
        re.findall(r"/\w+", re.findall(r"^VOLUME (.*)$", text, re.M)[0])
    )


def test_the_image_is_built_of_pinned_versions_and_can_write_its_cache():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (copied,) = re.findall(r"^COPY (.* constraints\.txt .*) /src/$", text, re.M)
    ignored = (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").split()
    assert {f"!{name}" for name in copied.split()} <= set(ignored)
    assert "--constraints /src/constraints.txt" in text
    (extras,) = re.findall(r"/src\[(.*)\]", text)
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"serve", "llama"} <= set(extras.split(",")) <= project["optional-dependencies"].keys()
    (home,) = set(re.findall(r"PREFIXTUNE_HOME=(\S+)", text))
    (user,) = re.findall(r"^USER (.*)$", text, re.M)
    assert f"COPY --from=build --chown={user} {home} {home}" in text


def test_server_and_workers_share_folders_and_a_database():
    services = COMPOSE["services"]
    server, worker = (check(services[name]["command"]) for name in ("server", "worker"))
    assert server.train_workers == 0
    for name in ("prefixes", "data_folder", "database_url"):
        assert getattr(server, name) == getattr(worker, name)
    assert server.database_url.startswith("postgresql://prefixtune@postgres/")
    volumes = {volume.split(":")[1]: volume.split(":")[0] for volume in services["worker"]["volumes"]}
    assert {volumes[server.prefixes], volumes[server.data_folder]} <= COMPOSE["volumes"].keys()


def test_the_password_is_in_no_command():
    for service in ("server", "worker"):
        (shell, flag, script, name) = COMPOSE["services"][service]["entrypoint"]
        assert (shell, flag, name) == ("/bin/sh", "-c", "prefixtune")
        assert "/run/secrets/postgres_password" in script
        # Compose reads $$ as $.
        assert "$" not in script.replace("$$", "")
    assert not re.search(r"postgresql://[^@\s]*:", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
