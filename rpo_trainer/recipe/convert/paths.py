"""Convert paths of a foreign file to paths relative to the recipe."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Paths:
    """The starting points of relative paths.

    These tools resolve paths from their working directory, which the file does not name. The current
    working directory, the file's directory and the directories above it are tried in this order.

    Attributes:
        config: the foreign file.
        recipe: the new recipe.
    """

    config: Path
    recipe: Path

    def find(self, path: str) -> Path | None:
        """Return the file or directory at a path, or None."""
        named = Path(path).expanduser()
        starts = [Path.cwd(), *self.config.absolute().parents]
        for start in [Path()] if named.is_absolute() else starts:
            if os.path.exists(start / named):
                return start / named
        return None

    def of_recipe(self, path: Path) -> str:
        """Return a path for the recipe: relative to its directory if they are close, else absolute."""
        target, folder = path.absolute(), self.recipe.absolute().parent
        relative = os.path.relpath(target, folder)
        return str(target) if relative.startswith(f"..{os.sep}..{os.sep}..") else relative

    def converted(self, path: str) -> tuple[str, bool]:
        """Return a path for the recipe, and whether it exists locally or is a hub name."""
        if (found := self.find(path)) is not None:
            text = self.of_recipe(found)
            return (text if os.sep in text or "." in text else f".{os.sep}{text}"), True
        return path, _HUB_NAME.fullmatch(path) is not None and not path.startswith(".")
