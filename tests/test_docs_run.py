"""Commands and names in the documentation exist, and the first page runs unchanged.

The commands of the other pages are run by test_docs_commands.py, the recipes by test_docs_yaml.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from rpo_trainer.cli.commands import cli
from rpo_trainer.recipe import load_recipe, schema
from tests.documents import ROOT, SHIPPED, TOLD, blocks, code, commands, name_of, page


def without_launcher(command: str) -> str:
    """The environment for one process."""
    return re.sub(
        r"^(accelerate launch|torchrun|deepspeed)\b.*?rpo_trainer ", "rpo-trainer ", command
    )


COMMANDS = sorted(
    {
        (name_of(path), without_launcher(command))
        for path in [*TOLD, *SHIPPED]
        for block in code(path)
        for command in commands(block)
        if without_launcher(command).startswith("rpo-trainer ")
    }
)


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_a_command_of_a_document_is_one(where: str, command: str) -> None:
    _, name, *words = shlex.split(command)
    known = cli.commands[name]
    context = known.make_context(name, [w for w in words if w != "..."])
    assert context.params
    recipe = context.params.get("recipe")
    if recipe is not None and (ROOT / recipe).is_file():
        overrides = [word for word in context.params["overrides"] if "=" in word or "--" in word]
        if not any(word.endswith("=...") for word in overrides):
            assert load_recipe(ROOT / recipe, overrides).recipe.stages


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) > 20
    assert {"docs/getting-started.md", "docs/rewards.md"} <= {where for where, _ in COMMANDS}


def fields() -> set[str]:
    """Return every name that a recipe can contain."""
    found = {"kind", "peft"}
    for value in vars(schema).values():
        if isinstance(value, type) and issubclass(value, BaseModel):
            found |= set(value.model_fields)
    return found


def rows(table_page: str) -> Iterator[list[str]]:
    for line in page(table_page).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not set(line) <= set("|- ") and len(cells) == 3:
            yield cells


def test_names_given_for_those_of_other_tools_are_fields_here() -> None:
    import rpo_trainer

    checked = 0
    for theirs, ours, _ in rows("coming-from"):
        for name in re.findall(r"`(\w+)[`:(]", ours):
            if ours == "here" or name in rpo_trainer.__all__ or name.endswith("Config"):
                continue
            assert name in fields(), (theirs, name)
            checked += 1
    assert checked > 25


def test_every_early_warning_is_explained() -> None:
    from rpo_trainer.trainers import early_warnings

    table = page("reports").split("| warning | means")[1]
    explained = set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))
    source = Path(early_warnings.__file__).read_text(encoding="utf-8")
    assert explained == set(re.findall(r"EarlyWarning\(\n\s+\"(\w+)\"", source))


@pytest.mark.slow
def test_getting_started_runs_as_it_stands(tmp_path: Path) -> None:
    text = page("getting-started")
    (recipe,) = blocks(text, "yaml")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    script = "set -e\n" + "".join(blocks(text, "sh"))
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": programs},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "mine.yaml: OK" in done.stdout
    run = tmp_path / "runs" / "mine"
    assert (run / "rpo-2" / "final" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()
