"""`prefixtune --install-completion`: commands, options and choices by the Tab key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefixtune.cli.options import CommandOptions, command
from prefixtune.errors import ConfigError
from prefixtune.utils.folders import expand_home

__all__ = ["install_completion"]


class CompletionOptions(CommandOptions):
    """The options of `prefixtune --install-completion`."""

    shell: Literal["bash", "zsh", "fish", "powershell", ""] = Field(
        "", description="(default: the one that runs this command)"
    )
    output: str = Field("", description="file to write (default: where the shell looks for it, in the home folder)")


@command
def install_completion(options: CompletionOptions) -> int:
    """Write a script by which the shell completes commands, options and choices; print how to load it.

    The shell runs the script alone, so completion is quick. Write it again after an update of prefixtune. Start-up
    files such as .bashrc are not changed.

    For example:
        prefixtune --install-completion
        prefixtune --install-completion --shell zsh --output ~/.zfunc/_prefixtune
    """
    from cyclopts.completion.detect import ShellDetectionError, detect_shell
    from cyclopts.completion.install import create_install_completion_command

    from prefixtune.cli.main import build_app

    output = expand_home(options.output) if options.output else None
    install = create_install_completion_command(build_app().install_completion, add_to_startup=False)
    try:
        install(shell=options.shell or detect_shell(), output=output)
    except ShellDetectionError as error:
        raise ConfigError("cannot tell which shell runs this command.", hint="name it: --shell bash.") from error
    return 0


CompletionOptions.hint = "`prefixtune --install-completion --help` explains the options."
