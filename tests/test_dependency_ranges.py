"""The ranges of pyproject.toml and the pins of constraints.txt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CALENDAR = {"pyarrow", "regex"}  # a major version of these says nothing about what breaks

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11")


def ranges() -> list[Requirement]:
    import tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for names in project["project"]["optional-dependencies"].values():
        found += names
    return [one for text in found if (one := Requirement(text)).name != "rpo-trainer"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name: next(iter(one.specifier)).version for one in found}


def test_each_range_has_the_pinned_version_and_ends_before_the_next_major() -> None:
    pinned = pins()
    for one in ranges():
        version = pinned.get(one.name)
        ends = {spec.version for spec in one.specifier if spec.operator == "<"}
        if version is None:
            continue
        assert one.specifier.contains(version), f"{one} leaves out {version} of constraints.txt"
        following = str(int(version.split(".")[0]) + 1)
        assert ends == (set() if one.name in CALENDAR else {following}), str(one)
