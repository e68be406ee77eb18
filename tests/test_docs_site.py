"""The documentation site: its navigation, the generated pages, the hardware table, the cluster examples."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from ruamel.yaml import YAML

import rpo_trainer
from rpo_trainer.cli.commands import cli
from rpo_trainer.recipe import json_schema
from tests.documents import ROOT, page

TOOLS = ROOT / "docs" / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of docs/tools by name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


# ---------------------------------------------------------------- the site


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for inner in (entry.values() if isinstance(entry, dict) else entry)
                for file in files(inner)]  # fmt: skip

    nav = files(YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(nav) == len(set(nav))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(nav)
    for uri in set(nav) - {"index.md"}:
        generated = uri.startswith("reference/")
        assert generated or (ROOT / uri).is_file() or (ROOT / "docs" / uri).is_file(), uri


def test_the_reference_has_every_field_of_a_recipe(tool: Any) -> None:
    schema = json_schema()
    sections = re.split(r"^## (\w+) ", tool("reference").field_page(schema), flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    objects = {name: part for name, part in schema["$defs"].items() if "properties" in part}
    assert set(found) == {"Recipe", *objects}
    for name, part in {"Recipe": schema, **objects}.items():
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.*) \|$", found[name], re.MULTILINE)
        assert [row[0] for row in rows] == list(part["properties"]), name
        for field, kind, default, _ in rows:
            assert kind not in ("", "any"), (name, field)
            assert (default == "required") == (field in part.get("required", ())), (name, field)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_all_of_the_reference(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_click"):
        pytest.importorskip(name, reason="the extra `docs` is not installed")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)], cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = {name: (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
            for name in ("cli", "python", "recipe-fields")}  # fmt: skip
    for name, command in cli.commands.items():
        assert f"rpo-trainer {name}" in text["cli"]
        options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
        assert [o for o in options if o.opts[-1] not in text["cli"]] == []
    public = set(rpo_trainer.__all__) - {"__version__"}
    assert [name for name in public if not re.search(rf'id="[\w.]+\.{name}"', text["python"])] == []
    index = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="getting-started.html"' in index
    assert (site / "recipes" / "nemotron4" / "chain.yaml").is_file()
    outside = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css))"', index)
    assert outside == []  # nothing is loaded from other hosts


# ---------------------------------------------------------------- the hardware table


def test_the_hardware_page_is_the_generated_one(tool: Any) -> None:
    hardware = tool("hardware")
    rows = re.findall(r"^\| \d.*\|$", page("hardware"), flags=re.MULTILINE)
    assert hardware.page(rows) == page("hardware")
    assert [row.split("|")[1].strip() for row in rows] == list(hardware.SHAPES)
    assert all(len(row.split("|")) == len(hardware.COLUMNS) + 3 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("column", ["LoRA, 1 GPU", "all weights, FSDP2 on 8"])
def test_a_figure_of_the_hardware_table_is_what_plan_computes(
    column: str, tool: Any, tmp_path: Path
) -> None:
    hardware = tool("hardware")
    name = next(iter(hardware.SHAPES))
    (row,) = [line for line in page("hardware").splitlines() if line.startswith(f"| {name} |")]
    shown = float(row.split("|")[2 + list(hardware.COLUMNS).index(column)])
    found = hardware.peak(hardware.SHAPES[name], *hardware.COLUMNS[column], tmp_path)
    assert round(found, 1) == shown


# ---------------------------------------------------------------- Slurm and Docker

SBATCH = ROOT / "recipes" / "slurm" / "train.sbatch"
# Stubs of Slurm's programs: `srun` starts one of four tasks, and ends with $SRUN_STATUS.
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=3 SLURM_LOCALID=1 "$@"
exit "$SRUN_STATUS"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> scontrol.log; fi
"""
TRAINER = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" > trainer.log
printf '%s\\n' "$@" >> trainer.log
"""


def submitted(folder: Path, status: int, *arguments: str) -> int:
    """Run the script as a job would, in a directory with stubs; its exit code."""
    for name, text in {
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
        "env/bin/rpo-trainer": TRAINER,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ENVIRONMENT": "env", "RECIPE": "my recipe.yaml",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40007", "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2", "SRUN_STATUS": str(status),
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SBATCH), *arguments], cwd=folder, env=environment, check=False
    ).returncode


def test_the_slurm_script_starts_each_task_with_its_rank(tmp_path: Path) -> None:
    assert submitted(tmp_path, 0, "stages.dpo.beta=0.2", "stages.dpo.data={train: [a b]}") == 0
    ranks, *words = (tmp_path / "trainer.log").read_text(encoding="utf-8").splitlines()
    assert ranks == "3 1 4 2 node7 20007"
    assert words == [
        "run",
        "my recipe.yaml",
        "stages.dpo.beta=0.2",
        "stages.dpo.data={train: [a b]}",
    ]
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (2, False)])
def test_the_slurm_script_requeues_a_run_that_was_stopped(
    status: int, requeued: bool, tmp_path: Path
) -> None:
    assert submitted(tmp_path, status) == status
    log = tmp_path / "scontrol.log"
    assert log.exists() == requeued
    assert not requeued or log.read_text(encoding="utf-8") == "requeue 40007\n"


def test_shell_scripts_pass_shellcheck() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    scripts = [SBATCH, *(ROOT / "recipes").rglob("*.sh")]
    done = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_files_that_exist_and_installs_known_extras() -> None:
    text = (ROOT / "recipes" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    sources = [source for line in copied for source in line]
    assert {"pyproject.toml", "constraints.txt", "rpo_trainer"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [extra for extra in extras.split(",") if f"\n{extra} = [" not in project] == []
