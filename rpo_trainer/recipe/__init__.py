"""Recipes: the typed schema, loading with errors for people, overrides, and the stages that run."""

from __future__ import annotations

from rpo_trainer.recipe.environment import fill_from_environment
from rpo_trainer.recipe.expand import dump_resolved, expand_stages
from rpo_trainer.recipe.load import LoadedRecipe, load_recipe, resolve_path
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
    "RewardStage",
    "SFTStage",
    "ScoreSpec",
    "SourceSpec",
    "Stage",
    "dump_resolved",
    "expand_stages",
    "fill_from_environment",
    "json_schema",
    "load_recipe",
    "resolve_path",
]
