"""The fields of a recipe: one pydantic model for each level of the YAML file.

Values are strict (a number in quotes is text) and unknown keys are errors. Every model reports the errors of
its rules (`rules`) together with those of its fields, so that all mistakes of a recipe are shown at once.
Paths are kept as written; they are relative to the recipe file (`resolve_path`).
"""

from __future__ import annotations

from rpo_trainer.recipe.schema.data import DataSpec, FilterSpec, ReplaySpec, SourceSpec
from rpo_trainer.recipe.schema.evaluation import EvalSpec, LmEvalSpec
from rpo_trainer.recipe.schema.model import ModelSpec, PeftSpec
from rpo_trainer.recipe.schema.recipe import NOT_DEFAULTS, Recipe, json_schema
from rpo_trainer.recipe.schema.rewards import (
    EndpointSpec,
    GenerateSpec,
    JudgeSpec,
    PairsSpec,
    RewardEndpointSpec,
    ScoreSpec,
)
from rpo_trainer.recipe.schema.spec import Spec, Text
from rpo_trainer.recipe.schema.stages import (
    STAGE_KINDS,
    DPOStage,
    PreferenceStage,
    RewardStage,
    RPOStage,
    SFTStage,
    Stage,
    StageBase,
)

__all__ = [
    "NOT_DEFAULTS",
    "STAGE_KINDS",
    "DPOStage",
    "DataSpec",
    "EndpointSpec",
    "EvalSpec",
    "FilterSpec",
    "GenerateSpec",
    "JudgeSpec",
    "LmEvalSpec",
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
    "Spec",
    "Stage",
    "StageBase",
    "Text",
    "json_schema",
]
