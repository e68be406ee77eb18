"""Every recipe of the documentation runs, and every recipe fragment in the text is valid.

Fragments may be incomplete: `...`, a word in capitals and a key without a value are placeholders.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from pydantic import BaseModel, ValidationError

from rpo_trainer.cli.commands import main
from rpo_trainer.recipe import PeftSpec, load_recipe, schema, yaml_document
from rpo_trainer.recipe.schema import Spec
from rpo_trainer.trainers.base_config import BaseConfig
from tests.chain.tiny import records
from tests.documents import TOLD, blocks, code, name_of, page, spans
from tests.documents_data import rows, save_base_model, write
from tests.test_docs import RECIPES

# ---------------------------------------------------------------- pieces of recipes

SPECS: tuple[type[BaseModel], ...] = tuple(
    {
        value
        for value in vars(schema).values()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.model_fields
    }
)
# Spans that look like a recipe fragment but are not.
NOT_OURS = {
    "User: ...": "what the template `plain` writes",
    "Assistant: ...": "what the template `plain` writes",
    "{prompt}": "a field of a judge's template",
    "{first}": "a field of a judge's template",
    "{second}": "a field of a judge's template",
}


def pieces(path: Path) -> Iterator[str]:
    """Spans with a key, or in braces, and blocks that are not complete recipes."""
    for span in spans(path):
        if re.match(r"\w+:( |$)|\{(?![%'])", span) and span not in NOT_OURS:
            yield span
    for block in code(path):
        whole = re.search(r"^stages:", block.text, flags=re.MULTILINE)
        piece = block.kind == "indented" and re.match(r"\w+: [\[{]", block.text)
        if piece or (block.kind == "yaml" and not whole):
            yield block.text


def alternatives(piece: str) -> list[str]:
    """`a: b | c` means `a: b` and `a: c`."""
    key, _, values = piece.partition(": ")
    return [f"{key}: {v}" for v in values.split(" | ")] if re.match(r"\w+ \| ", values) else [piece]


def open_ended(value: object) -> bool:
    """Whether it is a placeholder."""
    return value is None or (
        isinstance(value, str) and re.fullmatch(r"\.\.\.|[A-Z]+", value) is not None
    )


def said(value: Any) -> Any:
    """Return the value without its placeholders."""
    if isinstance(value, dict):
        return {key: said(inner) for key, inner in value.items() if key != "..."}
    if isinstance(value, list):
        return [said(inner) for inner in value if not open_ended(inner)]
    return None if open_ended(value) else value


def parts(value: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mappings in a value, each with its key."""
    if isinstance(value, dict):
        yield key, value
        for name, inner in value.items():
            yield from parts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from parts(inner, key)


def wrong(piece: dict[str, Any]) -> list[str]:
    """Return the keys that no part of a recipe accepts; [] if one part accepts all."""
    unknown = [
        f"{key}.{name}"
        for key, part in parts(piece)
        for names in [NAMES.get(key)]
        if names is not None
        for name in part
        if name not in names and name != "..."
    ]
    found = [errors(spec, said(piece)) for spec in SPECS if set(piece) <= names_of(spec)]
    if not found and set(piece) <= NAMES["training_args"]:  # documented next to `training_args`
        return unknown
    return unknown + (min(found, key=len) if found else [f"no part has all of {sorted(piece)}"])


def errors(spec: type[BaseModel], piece: dict[str, Any]) -> list[str]:
    """Return the faults of the given fields, without missing fields."""
    try:
        spec.model_validate(piece)
    except ValidationError as error:
        return [
            f"{spec.__name__}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
            for detail in error.errors()
            if detail["loc"] and detail["loc"][0] in piece and detail["type"] != "missing"
            if detail["input"] is not None or detail["type"] == "extra_forbidden"
        ]
    return []


def names_of(spec: type[BaseModel]) -> set[str]:
    own = set(spec.model_fields)
    return own | NAMES["peft"] if spec is PeftSpec else own


# For parts that accept the fields of another library.
NAMES = {
    "training_args": {field.name for field in dataclasses.fields(BaseConfig)},
    "peft": {field.name for field in dataclasses.fields(LoraConfig)} | set(PeftSpec.model_fields),
}
PIECES = sorted({(name_of(path), piece) for path in TOLD for piece in pieces(path)})


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that need other fields do not apply to a fragment."""
    for spec in SPECS:
        if issubclass(spec, Spec):
            monkeypatch.setattr(spec, "cross_checks", classmethod(lambda cls, raw: iter(())))


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize(("where", "piece"), PIECES)
def test_a_piece_of_a_recipe_is_one(where: str, piece: str) -> None:
    for chosen in alternatives(piece):
        parsed = yaml_document.parse(chosen).data
        assert isinstance(parsed, dict)
        assert wrong(parsed) == []


def test_what_is_taken_for_no_piece_is_there() -> None:
    there = {span for path in TOLD for span in spans(path)}
    assert there >= set(NOT_OURS)


@pytest.mark.usefixtures("by_itself")
def test_a_wrong_piece_is_found() -> None:
    for piece in (
        "bata: 0.1", "filter: {tie: drop}", "resample: always", "{modell: PATH}", "tf23: false",
        "training_args: {torch_compiled: true}", "peft: {rank: 16}", "dedup: exactly",
        "generate: {responses: four}", "eval: {data: ..., generate: {top: ...}}",
    ):  # fmt: skip
        assert wrong(yaml_document.parse(piece).data), piece


OVERRIDES = sorted(
    {
        (name_of(path), span.removeprefix("--"))
        for path in TOLD
        for span in spans(path)
        if re.match(r"(--)?(seed|model|defaults|eval|stages)[.\w-]*[= ]\S+$", span)
    }
)


@pytest.mark.parametrize(("where", "override"), OVERRIDES)
def test_an_override_in_the_text_is_one(where: str, override: str, tmp_path: Path) -> None:
    recipe = blocks(page("recipes"), "yaml")[0]
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    key, value = re.split("[= ]", override)
    assert load_recipe(tmp_path / "recipe.yaml", [f"{key}={value}"]).recipe.stages


# ---------------------------------------------------------------- complete recipes

# Contents of the files that the recipes name.
FILES = {
    "sft.jsonl": "sft", "code.jsonl": "sft", "code_heldout.jsonl": "sft", "general.jsonl": "sft",
    "heldout_sft.jsonl": "sft", "pairs.jsonl": "pairs", "heldout_pairs.jsonl": "pairs",
    "heldout_prompts.jsonl": "prompts",
}  # fmt: skip
# What makes them small enough for a test.
SMALL = {
    "docs/evaluation.md": ["eval.generate.max_new_tokens=4"],
    "docs/clusters.md": ["defaults.report_to=none"],  # needs a W&B account
}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base-model"
    save_base_model(folder)
    return folder


def test_every_recipe_of_a_document_is_run() -> None:
    pages = {name_of(param.values[1]) for param in RECIPES}
    # The recipe of the first page runs unchanged, with its own data: test_docs_run.py.
    assert pages - {"docs/getting-started.md"} == {name_of(param.values[1]) for param in RUN}


RUN = [param for param in RECIPES if param.values[1].name != "getting-started.md"]


@pytest.mark.slow
@pytest.mark.parametrize(("block", "path"), RUN)
def test_a_recipe_in_a_document_runs(
    block: str, path: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base-model").symlink_to(base_model)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    for name in re.findall(r"path: (\w+\.jsonl)", block):
        write(tmp_path / name, rows(FILES[name], messages=True))
    with pytest.raises(SystemExit) as ended:
        main(["run", "recipe.yaml", *SMALL.get(name_of(path), [])])
    assert ended.value.code == 0
    (chain,) = tmp_path.glob("runs/*/chain.json")
    assert (chain.parent / "report.html").is_file()
    stages = load_recipe("recipe.yaml").recipe.stages
    finished = records(chain.parent)
    assert len(finished) == sum(stage.repeat for stage in stages)
    for name, record in finished.items():
        assert record["state"] == "done"
        assert (chain.parent / name / "final" / "model.safetensors").is_file()
