"""The top level of a recipe, and the JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe.rules import chain
from rpo_trainer.recipe.schema.data import SourceSpec
from rpo_trainer.recipe.schema.evaluation import EvalSpec
from rpo_trainer.recipe.schema.model import ModelSpec
from rpo_trainer.recipe.schema.spec import Spec, Text, details_of
from rpo_trainer.recipe.schema.stages import LENGTH_FIELDS, STAGE_KINDS, Stage, StageBase

NOT_DEFAULTS = ("name", "kind")  # fields that identify a stage


def with_defaults(stage: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a raw stage with the defaults of its kind; its own fields, null included, take precedence."""
    kind = STAGE_KINDS.get(str(stage.get("kind")))
    if kind is None:
        return stage
    skipped = set(NOT_DEFAULTS)
    if any(stage.get(field) is not None for field in LENGTH_FIELDS):
        skipped |= set(LENGTH_FIELDS)
    taken = {k: v for k, v in defaults.items() if k in kind.model_fields and k not in skipped}
    return {**taken, **stage}


def defaults_are_fields(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Each default is a field of at least one kind of stage, with a valid value for one of them."""
    defaults = raw.get("defaults")
    if not isinstance(defaults, dict):
        return
    for key, value in defaults.items():
        kinds = [kind for kind in STAGE_KINDS.values() if key in kind.model_fields]
        if key in NOT_DEFAULTS or not kinds:
            yield {"type": "extra_forbidden", "loc": ("defaults", key), "input": value}
            continue
        per_kind = [list(_default_errors(kind, key, defaults)) for kind in kinds]
        if all(per_kind):
            yield from per_kind[0]


def _default_errors(
    kind: type[Stage], key: str, defaults: Mapping[str, Any]
) -> Iterator[InitErrorDetails]:
    """Yield the errors of one default in a stage of this kind, validated with the other defaults."""
    try:
        kind.model_validate({k: v for k, v in defaults.items() if k in kind.model_fields})
    except ValidationError as error:
        for detail in details_of(error):
            if detail["loc"][:1] == (key,):
                yield {**detail, "loc": ("defaults", *detail["loc"])}


class Recipe(Spec):
    """A chain of training stages; by default each starts from the output of the previous one."""

    rules = (
        defaults_are_fields,
        chain.names_are_unique,
        chain.arithmetic_of_the_model,
        chain.references_are_earlier,
        chain.evaluations_are_possible,
        chain.adapters_continue,
    )

    model: ModelSpec = Field(description="model that the first stage starts from")
    seed: int = Field(0, ge=0, lt=2**32, description="random seed of the run")
    run_dir: Text | None = Field(
        None, description="run directory; `--run-dir` on the command line takes precedence"
    )
    defaults: dict[str, Any] = Field(
        {},
        description="values of stage fields for every stage that has the field and does not set it; a "
        "field is taken as it is, not merged",
    )
    eval: EvalSpec | None = Field(None, description="evaluation after every stage")
    stages: list[Annotated[Stage, Field(discriminator="kind")]] = Field(
        min_length=1, description="stages, in the order in which they run"
    )

    def model_post_init(self, _: Any) -> None:
        """Pass `model.chat_template_kwargs` to the sources."""
        for _, source in self.sources():
            source.inherit(self.model.chat_template_kwargs)

    def sources(self) -> Iterator[tuple[str, SourceSpec]]:
        """Yield all sources of data, each with its key in the recipe."""
        parts: list[tuple[str, EvalSpec | None]] = [("eval", self.eval)]
        for stage in self.stages:
            own = f"stages.{stage.name}"
            for field in ("train", "eval"):
                yield from _numbered(f"{own}.data.{field}", getattr(stage.data, field))
            parts.append((f"{own}.eval", stage.eval))
        for key, spec in parts:
            for field in ("data", "preferences", "nll") if spec is not None else ():
                yield from _numbered(f"{key}.{field}", getattr(spec, field))

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Return stages as mappings, each with the defaults of its kind."""
        stages, defaults = raw.get("stages"), raw.get("defaults")
        if not isinstance(stages, list):
            return raw
        plain = [s.model_dump() if isinstance(s, StageBase) else s for s in stages]
        if isinstance(defaults, dict):
            plain = [with_defaults(s, defaults) if isinstance(s, dict) else s for s in plain]
        return {**raw, "stages": plain}


def _numbered(key: str, sources: list[SourceSpec]) -> Iterator[tuple[str, SourceSpec]]:
    yield from ((f"{key}.{number}", source) for number, source in enumerate(sources))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a recipe file.

    A stage requires only `name` and `kind` here, because `defaults` may set the rest; `defaults` has the
    fields of all kinds of stage.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    defaults: dict[str, Any] = {}
    for kind in STAGE_KINDS.values():
        stage = schema["$defs"][kind.__name__]
        stage["required"] = list(NOT_DEFAULTS)
        for name, field in stage["properties"].items():
            if name not in NOT_DEFAULTS and field not in defaults.setdefault(name, []):
                defaults[name].append(field)
    properties = schema["properties"]
    properties["defaults"] |= {
        "additionalProperties": False,
        "properties": {name: _any_of(fields) for name, fields in defaults.items()},
    }
    return schema


def _any_of(fields: list[dict[str, Any]]) -> dict[str, Any]:
    if len(fields) == 1:
        return fields[0]
    return {"description": fields[0]["description"], "anyOf": fields}
