"""The distributed files: the wheel, the version, and project files that name versions or commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import rpo_trainer
from tests.test_dependency_ranges import pins

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text())


def test_the_version_is_in_one_place() -> None:
    version = re.escape(rpo_trainer.__version__)
    pattern = re.compile(rf'^\s*(?:__version__|version)\s*[:=]\s*"?{version}"?\s*$', re.MULTILINE)
    files = [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "rpo_trainer/__init__.py")]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["__init__.py"]


def test_hooks_use_the_pinned_tools() -> None:
    revisions = {
        hook["id"].removesuffix("-check").removesuffix("-format"): repo["rev"].removeprefix("v")
        for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
        for hook in repo["hooks"]
    }
    pinned = pins()
    assert revisions == {"ruff": pinned["ruff"], "mypy": pinned["mypy"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_targets_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = re.findall(r"\bmake ([a-z][a-z-]*)", path.read_text())
    assert read_yaml(path)["jobs"]
    assert set(used) <= targets


def test_the_oldest_and_newest_python_are_tested() -> None:
    matrix = read_yaml(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert matrix["python-version"][0] == oldest.group(1)
    assert len(matrix["python-version"]) == 4


@pytest.mark.slow
@pytest.mark.extras("build", "hatchling")
def test_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    """`python -m build`, then an installation without the checkout, with the packages of this environment."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert (tmp_path / "dist" / f"rpo_trainer-{rpo_trainer.__version__}.tar.gz").is_file()
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    here = [path for path in sys.path if path.endswith("site-packages")]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", wheel],
        check=True,
    )
    # Entries of PYTHONPATH do not process .pth files, so that an editable install is not visible.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([site, *here])}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "rpo-trainer", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import rpo_trainer; print(rpo_trainer.__file__)"
    loaded = subprocess.run(
        [python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert loaded.stdout.startswith(site)
    assert rpo_trainer.__version__ in command("--version")
    assert "$defs" in json.loads(command("schema"))
    assert "quickstart/chain" in command("recipes")
    command("recipes", "--copy", "copied")
    recipe = tmp_path / "copied" / "quickstart" / "chain.yaml"
    assert recipe.read_text() == (ROOT / "recipes/quickstart/chain.yaml").read_text()
    command("check", str(recipe))
