"""The help at 80 columns, and shell completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rpo_trainer.cli.commands import cli

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 80


def help_of(command: click.Command) -> str:
    context = click.Context(
        command, info_name=command.name, terminal_width=WIDTH, max_content_width=WIDTH
    )
    return command.get_help(context)


def test_every_summary_in_the_list_is_complete() -> None:
    text = help_of(cli)
    listed = text.partition("Commands:\n")[2].splitlines()
    assert len(listed) == len(cli.commands)
    for line in listed:
        assert "..." not in line and line.endswith("."), line


@pytest.mark.parametrize("name", [None, *sorted(cli.commands)])
def test_every_option_is_explained_and_every_line_fits(name: str | None) -> None:
    command = cli if name is None else cli.commands[name]
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help and param.help.rstrip("]").endswith((".", "")), param.name
            assert param.help[0].isupper() or "," in param.help, (param.name, param.help)
    for line in help_of(command).splitlines():
        # click cannot wrap a choice, so it is on a separate line.
        assert len(line) <= WIDTH or line.lstrip().startswith("--"), line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = complete(shell, f"{shell}_source")
    assert done.returncode == 0, done.stderr
    assert "_RPO_TRAINER_COMPLETE" in done.stdout and "rpo-trainer" in done.stdout


def test_completion_of_a_command() -> None:
    done = complete("bash", "bash_complete", COMP_WORDS="rpo-trainer sta", COMP_CWORD="1")
    assert done.stdout.split() == ["plain,status"]


def complete(shell: str, instruction: str, **more: str) -> subprocess.CompletedProcess[str]:
    if shell == "bash" and not Path("/bin/bash").exists():
        pytest.skip("no bash")
    code = "import sys; sys.argv = ['rpo-trainer']; from rpo_trainer.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "_RPO_TRAINER_COMPLETE": instruction, **more},
    )  # fmt: skip
