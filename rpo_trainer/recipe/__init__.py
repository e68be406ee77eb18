"""Recipes: the typed schema, loading with errors for people, overrides, and the stages that run."""

from __future__ import annotations

from rpo_trainer.recipe.environment import fill_from_environment
from rpo_trainer.recipe.json_schema import json_schema
from rpo_trainer.recipe.load import LoadedRecipe, load_recipe, resolve_path
from rpo_trainer.recipe.schema import (
    DataSpec,
    DPOStage,
    EvalSpec,
    FilterSpec,
    GenerateSpec,
    ModelSpec,
    PairsSpec,
    PreferenceStage,
    Recipe,
    ReplaySpec,
    RPOStage,
    ScoreSpec,
    SFTStage,
    SourceSpec,
    Stage,
)
from rpo_trainer.recipe.stages import dump_resolved, expand_stages

__all__ = [
    "DPOStage",
    "DataSpec",
    "EvalSpec",
    "FilterSpec",
    "GenerateSpec",
    "LoadedRecipe",
    "ModelSpec",
    "PairsSpec",
    "PreferenceStage",
    "RPOStage",
    "Recipe",
    "ReplaySpec",
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
