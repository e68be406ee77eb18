"""A new recipe: values, comments and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rpo_trainer.recipe.yaml_document import Key, dump, parse, value_at


@dataclass
class Draft:
    """A recipe of one or more stages as plain values, with comments.

    Attributes:
        values: the content of the recipe.
        comments: comment of each key.
        sources: first word of each comment, usually the key of the other tool.
    """

    values: dict[str, Any] = field(default_factory=lambda: {"model": {}, "stages": []})
    comments: dict[Key, str] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)

    def put(self, key: Key, value: Any, comment: str = "") -> None:
        """Set the value at a key, such as `("stages", 0, "beta")`; create the mappings above it."""
        here: Any = self.values
        for part in key[:-1]:
            if isinstance(here, list):
                while len(here) <= int(part):
                    here.append({})
                here = here[int(part)]
            else:
                here = here.setdefault(part, {})
        here[key[-1]] = value
        self.sources[key] = comment.split(" ")[0]
        if comment and comment != key[-1]:  # no comment if the key keeps its name
            self.comments[key] = comment

    def get(self, key: Key) -> Any:
        """Return the value at a key, or None."""
        return value_at(self.values, key)

    def remove(self, key: Key) -> None:
        """Remove a key, and mappings above it that become empty."""
        above = self.get(key[:-1])
        if isinstance(above, dict) and key[-1] in above:
            del above[key[-1]]
            self.comments.pop(key, None)
            if not above and len(key) > 1:
                self.remove(key[:-1])

    def text(self, header: list[str]) -> str:
        """Return commented YAML, with `header` at the top and a blank line before each part."""
        order = ("model", "seed", "run_dir", "defaults", "eval", "stages")
        values = {key: self.values[key] for key in order if key in self.values}
        plain = dump(values)
        document = parse(plain)
        lines = plain.splitlines()
        for key, comment in self.comments.items():
            if (number := document.lines.get(key)) is not None:
                lines[number - 1] += f"  # {comment}"
        out = [f"# {line}".rstrip() for line in header]
        for number, line in enumerate(lines, start=1):
            starts_part = any(document.lines[(key,)] == number for key in ("model", "stages"))
            starts_stage = any(
                document.lines[("stages", i)] == number for i in range(1, len(values["stages"]))
            )
            if starts_part or starts_stage:
                out.append("")
            out.append(line)
        return "\n".join(out) + "\n"
