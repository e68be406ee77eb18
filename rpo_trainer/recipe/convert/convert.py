"""Convert a config file of another tool to the text of a valid recipe, and list what was not converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rpo_trainer.errors import Problems, RecipeError
from rpo_trainer.recipe.convert.axolotl import convert_axolotl
from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig, Note
from rpo_trainer.recipe.convert.llama_factory import convert_llama_factory
from rpo_trainer.recipe.convert.paths import Paths
from rpo_trainer.recipe.convert.recognize import AXOLOTL, LLAMA_FACTORY, TRL, foreign_tool
from rpo_trainer.recipe.convert.trl import convert_trl
from rpo_trainer.recipe.messages import recipe_errors
from rpo_trainer.recipe.schema import Recipe
from rpo_trainer.recipe.where import Origins
from rpo_trainer.recipe.yaml_document import YamlProblem, parse
from rpo_trainer.runtime.files import read_text

MAX_BYTES = 2**20
_CONVERTED = f"{LLAMA_FACTORY}, {AXOLOTL} and {TRL}"


@dataclass(frozen=True)
class Converted:
    """A recipe converted from a file of another tool.

    Attributes:
        text: the recipe.
        tool: name of the tool.
        left_out: keys of the file without a counterpart, with the reason.
        not_needed: keys for behavior that is built in.
        differences: keys whose conversion should be checked before training.
    """

    text: str
    tool: str
    left_out: list[Note]
    not_needed: list[Note]
    differences: list[Note]


def convert_file(
    path: Path, recipe: Path, *, devices: int | None = None, kind: str | None = None
) -> Converted:
    """Convert a LLaMA-Factory, Axolotl or TRL config to a recipe that the schema accepts.

    Args:
        path: the config.
        recipe: path of the new recipe; its paths are relative to the directory of this file.
        devices: the number of GPUs that the config was used with, for the global batch size.
        kind: the kind of stage of a TRL config, if its keys do not determine it.

    Raises:
        RecipeError: the file cannot be read, its tool is unknown, or its method has no counterpart.
        Problems: the recipe is not valid, because values of the file are not.
    """
    config = _read(path)
    draft, paths = Draft(), Paths(path, recipe)
    if config.tool == LLAMA_FACTORY:
        convert_llama_factory(config, paths, draft, devices)
    elif config.tool == AXOLOTL:
        convert_axolotl(config, paths, draft, devices)
    else:
        convert_trl(config, paths, draft, devices, kind)
    _validate(config, draft)
    header = [
        f"Converted from {path.name} ({config.tool}) by `rpo-trainer convert`. Comments name the original "
        "keys, where the names differ.",
    ]
    for title, notes in (
        ("Not converted:", config.left_out), ("Check before training:", config.differences)
    ):  # fmt: skip
        if notes:
            header += ["", title, *(f"  {note}" for note in notes)]
    text = draft.text(header)
    Recipe.model_validate(parse(text).data)  # the text must be valid too
    return Converted(text, config.tool, config.left_out, config.not_needed, config.differences)


def _read(path: Path) -> ForeignConfig:
    where = str(path)
    try:
        document = parse(read_text(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the file cannot be read: {getattr(error, 'strerror', None) or error}",
            code="convert.unreadable-file",
            where=where,
            fix=f"give the YAML file of {_CONVERTED}",
        ) from None
    except YamlProblem as problem:
        raise RecipeError(
            problem.what,
            code="convert.invalid-yaml",
            where=f"{where}:{problem.line}",
            fix=f"give the YAML file of {_CONVERTED}, without anchors, tags and tabs",
        ) from None
    tool = foreign_tool(document.data)
    if tool not in (LLAMA_FACTORY, AXOLOTL, TRL):
        what = f"this is a config of {tool}" if tool else "not a recognized training config"
        what += f"; only those of {_CONVERTED} can be converted"
        fix = "write a recipe with `rpo-trainer init`, from a model and data files"
        if isinstance(document.data, dict) and "stages" in document.data:
            what, fix = "this is already a recipe", f"check it with `rpo-trainer check {path}`"
        raise RecipeError(what, code="convert.unknown-file", where=where, fix=fix)
    return ForeignConfig(tool, path, document.data, document.lines)


def _validate(config: ForeignConfig, draft: Draft) -> None:
    """Move optional values that the schema refuses to what was left out.

    Raises:
        Problems: it refuses something that cannot be removed.
    """
    while True:
        try:
            Recipe.model_validate(draft.values)
            return
        except ValidationError as error:
            errors = [e for _, e in recipe_errors(error, Origins(str(config.path), draft.values))]
            removed = False
            for item in error.errors(include_url=False):
                key = tuple(part for part in item["loc"] if part not in ("sft", "dpo", "reward"))
                source = draft.sources.get(key)
                if source is None or draft.get(key) is None:
                    continue
                draft.remove(key)
                steps = (*key[:2], "eval_steps")
                if key[-1] == "eval_fraction" and draft.get(steps) is not None:
                    of_steps = draft.sources[steps]
                    draft.remove(steps)
                    if of_steps in config.data:
                        config.leave_out(of_steps, "the stage has no held-out data")
                what = str(item.get("ctx", {}).get("what") or item["msg"])
                config.leave_out(source if source in config.data else str(key[-1]), what)
                removed = True
            if not removed:
                raise Problems(errors) from None
