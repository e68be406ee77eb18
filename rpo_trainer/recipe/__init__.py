"""Recipes: the typed schema, loading with located errors, overrides, and the expanded stages.

schema/           the fields, as pydantic models
rules/            rules on more than one field
load              a recipe file → `Recipe`; all mistakes at once, each with its place
  yaml_document     YAML 1.2 → plain values and the line of each key
  overrides         `stages.dpo.beta=0.005` from the command line
  messages          pydantic's errors as `RecipeError`s
  foreign_names     names of TRL, transformers and others → the names here
  where             the file and line, or the override, of a key
convert/          config files of other trainers → recipes
environment       `${NAME}` and secrets
template_kwargs   variables of a chat template
expand            the stages that run, with rounds expanded and references resolved; a recipe as YAML
shipped           recipes and launch configurations of the package
"""

from __future__ import annotations

from rpo_trainer.recipe.environment import fill_from_environment
from rpo_trainer.recipe.expand import dump_resolved, expand_stages
from rpo_trainer.recipe.load import LoadedRecipe, is_local, load_recipe, resolve_path
from rpo_trainer.recipe.schema import (
    DataSpec,
    DPOStage,
    EndpointSpec,
    EvalSpec,
    FilterSpec,
    GenerateSpec,
    JudgeSpec,
    LmEvalSpec,
    ModelSpec,
    PairsSpec,
    PeftSpec,
    PreferenceStage,
    Recipe,
    ReplaySpec,
    RewardEndpointSpec,
    RewardStage,
    RPOStage,
    ScoreSpec,
    SFTStage,
    SourceSpec,
    Stage,
    json_schema,
)

__all__ = [
    "DPOStage",
    "DataSpec",
    "EndpointSpec",
    "EvalSpec",
    "FilterSpec",
    "GenerateSpec",
    "JudgeSpec",
    "LmEvalSpec",
    "LoadedRecipe",
    "ModelSpec",
    "PairsSpec",
    "PeftSpec",
    "PreferenceStage",
    "RPOStage",
    "Recipe",
    "ReplaySpec",
    "RewardEndpointSpec",
    "RewardStage",
    "SFTStage",
    "ScoreSpec",
    "SourceSpec",
    "Stage",
    "dump_resolved",
    "expand_stages",
    "fill_from_environment",
    "is_local",
    "json_schema",
    "load_recipe",
    "resolve_path",
]
