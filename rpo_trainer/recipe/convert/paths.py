"""Paths of a foreign file → paths relative to the recipe."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Paths:
    """Where relative paths start.

    These tools resolve paths from the directory they are started in, which the file does not name. The
    working directory, the file's directory and the directories above it are tried in this order.

    Attributes:
        config: the foreign file.
        recipe: the recipe that is written.
    """

    config: Path
    recipe: Path

    def find(self, path: str) -> Path | None:
        """The file or directory that a path names; None: there is none."""
        named = Path(path).expanduser()
        starts = [Path.cwd(), *self.config.absolute().parents]
        for start in [Path()] if named.is_absolute() else starts:
            if os.path.exists(start / named):
                return start / named
        return None

    def of_recipe(self, path: Path) -> str:
        """A path as the recipe has it: relative to its directory where the two are near, else absolute."""
        target, folder = path.absolute(), self.recipe.absolute().parent
        relative = os.path.relpath(target, folder)
        return str(target) if relative.startswith(f"..{os.sep}..{os.sep}..") else relative

    def converted(self, path: str) -> tuple[str, bool]:
        """The path for the recipe, and whether it is known: a local path that exists, or a hub name."""
        if (found := self.find(path)) is not None:
            text = self.of_recipe(found)
            return (text if os.sep in text or "." in text else f".{os.sep}{text}"), True
        return path, _HUB_NAME.fullmatch(path) is not None and not path.startswith(".")
