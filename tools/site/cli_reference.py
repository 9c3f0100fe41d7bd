"""The reference of the command line, from the program's own help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from prefixtune.cli.main import COMMANDS, build_app, command_options
from prefixtune.cli.options import CommandOptions
from prefixtune.utils.config import allowed_range

ERRORS = """\
## Results, errors and exit codes

Results go to stdout, progress and messages to stderr. `prefixtune` alone prints the list of commands. A mistake is one
line, `error: ...`, and usually a second one with the next step, `hint: ...`; nothing was changed. The exit codes:

| code | meaning |
|---|---|
| 0 | good |
| 1 | a check (`doctor`, `inspect`), a job or an upload failed; or a bug, with its traceback |
| 2 | a mistake: an option, a file, the data, the backbone |
| 130 | interrupted; where a run was in progress, the hint tells how to go on |

With `--json` stderr holds no progress and no warnings. A mistake or an interruption is one JSON object on it, also when
the arguments themselves are wrong:

```json
{"error": "there is no task 'e2ee'.", "hint": "did you mean 'e2e'?", "kind": "ConfigError", "exit_code": 2}
```

`kind` is the class of the error: `ConfigError`, `BackboneError`, `CheckpointError`, `DataError`, `TrainingError`,
`RequestError`, `PrefixError` where none of these fits, or `Interrupted`.
"""


SHELL = """\
## Completion, conversations, bug reports

`prefixtune --install-completion` writes a script for the Tab key: bash finds it in
`~/.local/share/bash-completion/completions` where the package bash-completion is installed, fish in its own folder,
and for zsh the command prints the two lines that `.zshrc` needs. No start-up file is changed, and the script runs
without Python, so it is quick. Run the command again after an update. A wheel brings the three scripts too, in the
environment's `share` folder; bash-completion finds its one there by itself from version 2.12 on.

In `prefixtune chat` a model with a chat template reads the whole conversation; a prefix that was trained on single
texts reads the last message only, in its own text format, and the program says so once. `/prefix NAME` switches
(`/prefix none`: the bare model), `/reset` forgets the messages, `/save FILE` writes them as JSON lines with `role`
and `content`, `/help` lists the commands. Ctrl-C stops an answer; what it wrote so far is kept. With `--json` each
answer is one object with `text`, `output`, `prefix` and `stopped`, or `text`, `error` and `hint`.

`prefixtune env` prints what a bug report needs. It shows no keys and no tokens, and what cannot be read is `unknown`
with the reason.
"""


def page() -> str:
    """The reference of the command line, in Markdown."""
    app = build_app()
    parts = ["# Command line", "Made from the program's own options.", ERRORS, SHELL]
    parts += ["## prefixtune", str(app.help), "\n".join(_commands()), str(app.help_epilogue)]
    for name, options in command_options().items():
        parts += [f"## prefixtune {name}", _description(str(build_app(name)[name].help)), *_tables(name, options)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _commands() -> Iterator[str]:
    yield "| | command | |\n|---|---|---|"
    for title, commands in COMMANDS.items():
        for index, (name, text) in enumerate(commands.items()):
            yield f"| {'' if index else title} | [`{name}`](#prefixtune-{name}) | {text} |"


def _description(text: str) -> str:
    """A command's help; its indented lines are commands."""
    blocks = re.sub(r"\n((?:\n?  +\S.*)+)", lambda lines: f"\n\n```bash\n{inspect.cleandoc(lines[1])}\n```", text)
    return blocks.replace("\n\n\n", "\n\n")


def _tables(name: str, options: type[CommandOptions]) -> Iterator[str]:
    """The options of a command: one table per group."""
    groups: dict[str, list[str]] = {}
    for argument in build_app(name)[name].assemble_argument_collection():
        field = options.model_fields[argument.field_info.name]
        parameter, bounds = argument.parameter, allowed_range(field)
        value = ", ".join(f"`{choice}`" for choice in argument.get_choices() or ()) or parameter.metavar or ""
        default = f"`{argument.field_info.default}`" if parameter.show_default else "required" * field.is_required()
        cells = ["`, `".join(argument.names).join("``"), f"{value} {bounds}".strip(), default, field.description or ""]
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        title = parameter.group[0].name  # type: ignore[index]
        groups.setdefault(title, []).append(f"| {row} |")
    for title, rows in groups.items():
        yield "\n".join([f"| {title.lower()} | value | default | |", "|---|---|---|---|", *rows])
