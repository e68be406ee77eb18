"""Load a recipe file as a `Recipe`; all mistakes are reported at once, each with its place."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpo_trainer.errors import Problems, RecipeError
from rpo_trainer.recipe.convert.recognize import TORCHTUNE, foreign_tool
from rpo_trainer.recipe.environment import is_secret
from rpo_trainer.recipe.foreign_names import FOREIGN_NAMES
from rpo_trainer.recipe.messages import Located, recipe_errors
from rpo_trainer.recipe.overrides import (
    Override,
    apply_override,
    drop_other_length,
    parse_overrides,
)
from rpo_trainer.recipe.schema import Recipe
from rpo_trainer.recipe.where import Origins
from rpo_trainer.recipe.yaml_document import Document, Key, YamlProblem, parse
from rpo_trainer.runtime.files import kind_of_file

_HIDDEN = "..."  # replaces a secret, so that no other error shows it
_DATA_SUFFIXES = (".jsonl", ".csv", ".parquet", ".gz")
MAX_BYTES = 2**20  # far above any recipe, so that a data file given by mistake is not parsed


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and its origin; relative paths in it start at `base_dir`."""

    recipe: Recipe
    path: Path
    base_dir: Path
    source_text: str
    origins: Origins = field(repr=False, compare=False)  # file and line of each value


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, apply overrides and validate it.

    Args:
        path: the YAML file.
        overrides: command-line words, `key=value`, or `--key` followed by its value.

    Raises:
        Problems: all errors, those of the file in its order, then those of the overrides.
    """
    path = Path(path)
    parsed, errors = parse_overrides(overrides)
    try:
        text = _read(path)
        document = _parse(text, path)
    except RecipeError as error:
        raise Problems([error, *errors]) from error
    origins = Origins(str(path), document.data, document.lines)
    located = [_repeated(entry, origins) for entry in document.repeated]
    located += [(10**9, error) for error in errors]
    located += _apply_all(document.data, parsed, origins)
    located += _take_out_forbidden(document.data, (), origins)
    recipe = None
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        located += recipe_errors(error, origins)
    if recipe is None or located:
        raise Problems([error for _, error in sorted(located, key=lambda entry: entry[0])])
    return LoadedRecipe(recipe, path, path.absolute().parent, text, origins)


def resolve_path(base_dir: str | Path, path: str | Path) -> Path:
    """Resolve a path of a recipe: relative paths start at the directory of the recipe."""
    return Path(base_dir) / Path(path).expanduser()


def is_local(name: str, path: Path) -> bool:
    """Whether a model or data set is a file or directory, also a missing one, and not on the hub.

    Args:
        name: as it is in the recipe.
        path: the path that it would have, see `resolve_path`.
    """
    return path.exists() or name.startswith((".", "/", "~"))


def _read(path: Path) -> str:
    """Return the text of the file, without a byte-order mark."""
    where = str(path)
    if (kind := kind_of_file(path)) is not None:
        raise RecipeError(
            f"this is {kind}, not a file",
            code="recipe.not-a-file",
            where=where,
            why="a run reads the recipe again when it resumes",
            fix="give the path of a recipe (YAML)",
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        near = _near_files(path)
        hint = f"; did you mean `{near}`?" if near else ""
        raise RecipeError(
            f"no such file{hint}",
            code="recipe.no-such-file",
            where=where,
            why="relative paths start at the working directory",
            fix="give the path of a recipe (YAML); `rpo-trainer recipes` lists those of the package",
        ) from error
    except IsADirectoryError as error:
        raise RecipeError(
            "this is a directory, not a recipe file",
            code="recipe.not-a-file",
            where=where,
            why="a command reads one recipe",
            fix=_inside(path),
        ) from error
    except OSError as error:
        raise RecipeError(
            f"the file cannot be read: {error.strerror or error}",
            code="recipe.unreadable-file",
            where=where,
            why="the operating system denies access",
            fix="check the path and its permissions",
        ) from error
    if _has_rows(path, raw):
        raise RecipeError(
            "this is a data file, not a recipe",
            code="recipe.data-file",
            where=where,
            fix=f"write a recipe for it: rpo-trainer init recipe.yaml --model MODEL --data {path}",
        )
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            "the file is larger than 1 MiB, too large for a recipe",
            code="recipe.too-large",
            where=where,
            why="it is probably a data file",
            fix="give the path of a recipe (YAML); the recipe names the data files",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"byte {error.start} of the file is not UTF-8",
            code="recipe.not-utf8",
            where=f"{where}:{line}",
            why="recipes are UTF-8 text",
            fix="save the file as UTF-8",
        ) from error


def _near_files(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return None
    same = [name for name in sorted(names) if Path(name).stem == path.name]
    near = same or difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return str(path.parent / near[0]) if near else None


def _has_rows(path: Path, raw: bytes) -> bool:
    """Whether this is a data file: by its suffix, or by JSON objects in the first two lines."""
    if path.suffix.lower() in _DATA_SUFFIXES:
        return True
    lines = [line for line in raw.split(b"\n", 3) if line.strip()][:2]
    try:
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    return len(rows) == 2 and all(isinstance(row, dict) for row in rows)


def _inside(path: Path) -> str:
    names = sorted(str(entry) for entry in path.glob("*.y*ml"))
    return (
        f"give one of its files: {', '.join(names[:5])}"
        if names
        else "give the path of a YAML file"
    )


def _parse(text: str, path: Path) -> Document:
    try:
        document = parse(text)
    except YamlProblem as problem:
        where = f"{path}:{problem.line}"
        raise RecipeError(
            problem.what,
            code="recipe.invalid-yaml",
            where=where,
            why=problem.why,
            fix=problem.fix,
        ) from problem
    if (tool := foreign_tool(document.data)) is not None:
        raise RecipeError(
            f"this is a config of {tool}, not a recipe",
            code="recipe.foreign-file",
            where=str(path),
            fix="write a recipe with `rpo-trainer init`, from a model and data files"
            if tool == TORCHTUNE
            else f"convert it to a recipe: rpo-trainer convert {path}",
        )
    if isinstance(document.data, dict):
        return document
    kind = "a list" if isinstance(document.data, list) else "a single value"
    raise RecipeError(
        f"a recipe must be a mapping, got {kind}",
        code="recipe.not-a-mapping",
        where=f"{path}:1",
        why="the top level of a recipe consists of fields",
        fix="start with `model:` and `stages:`, without indentation",
    )


def _repeated(entry: tuple[Key, int, int], origins: Origins) -> Located:
    key, line, first = entry
    error = RecipeError(
        f"the key `{key[-1]}` is repeated; it is first set on line {first}",
        code="recipe.repeated-key",
        where=f"{origins.file}:{line} ({origins.dotted(key)})",
        why="the keys of a mapping must be unique",
        fix="keep one of the two",
    )
    return line, error


def _apply_all(
    data: dict[str, Any], overrides: Sequence[Override], origins: Origins
) -> list[Located]:
    """Apply the overrides in order; the last one of a key counts."""
    errors: list[Located] = []
    done: set[Key] = set()
    for override in overrides:
        try:
            key = apply_override(data, override)
        except RecipeError as error:
            errors.append((10**9, error))
            continue
        origins.override(key, override.where)
        done.add(key)
    for key in done:
        drop_other_length(data, key, done)
    return errors


def _take_out_forbidden(data: Any, key: Key, origins: Origins) -> list[Located]:
    """Return the errors of keys that are forbidden everywhere, and remove these keys from `data`."""
    if isinstance(data, list):
        items = list(enumerate(data))
        found = [e for i, item in items for e in _take_out_forbidden(item, (*key, i), origins)]
        for i, item in items:
            place, where = origins.find((*key, i))
            if (error := _forbidden(f"{key[-1]}.{i}", item, where)) is not None:
                found.append((place, error))
                data[i] = _HIDDEN
        return found
    if not isinstance(data, dict):
        return []
    errors: list[Located] = []
    for name, value in list(data.items()):
        here = (*key, name)
        error = _forbidden(name, value, origins.find(here)[1])
        if error is None:
            errors += _take_out_forbidden(value, here, origins)
        else:
            errors.append((origins.find(here)[0], error))
            if _forbidden(name, _HIDDEN, "") is None:
                data[name] = _HIDDEN  # the field is valid here, with another value
            else:
                del data[name]
    return errors


def _forbidden(name: str, value: Any, where: str) -> RecipeError | None:
    if name == "rpo_alpha":
        return RecipeError(
            "unknown field `rpo_alpha`",
            code="recipe.unknown-key",
            where=where,
            why="in TRL it is the weight of an NLL term in DPO, which is not Reward-aware Preference "
            "Optimization",
            fix=FOREIGN_NAMES[name].recipe,
        )
    if is_secret(name, value):
        return RecipeError(
            f"`{name}` looks like a secret",
            code="recipe.secret",
            where=where,
            why="the recipe is copied into every run directory",
            fix=f"set it as an environment variable (HF_TOKEN, WANDB_API_KEY, ...); under "
            f"`training_args`, `{name}: ${{NAME}}` reads the variable NAME",
        )
    return None
