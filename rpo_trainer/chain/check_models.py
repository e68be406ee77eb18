"""Checks of a recipe's models without their weights: configs, adapters, tokenizers, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rpo_trainer.chain.findings import WARNING, Findings
from rpo_trainer.data.template_variables import check_kwargs
from rpo_trainer.errors import ModelError
from rpo_trainer.models.adapter_files import base_of, is_adapter, require_weights
from rpo_trainer.models.adapters import check_unread as check_adapter
from rpo_trainer.models.from_config import auto_class
from rpo_trainer.models.loading import saved_config
from rpo_trainer.models.multimodal import random_model
from rpo_trainer.models.preload_checks import (
    check_context,
    check_same_tokenizer,
    check_same_vocabulary,
    check_towers,
    check_unread,
    check_written,
)
from rpo_trainer.models.weight_files import local_folder
from rpo_trainer.recipe import PreferenceStage, Stage
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.trainers.noise import noise_of


class ModelChecks:
    """Checks the tokenizer, and the initial policies and reference models of the stages.

    Attributes:
        tokenizer, config: of the recipe's model; None if they cannot be read (reported as a finding).
    """

    def __init__(self, preparer: StagePreparer, findings: Findings) -> None:
        self.preparer = preparer
        self.recipe = preparer.recipe
        self.findings = findings
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.config: Any = None
        self._rows: dict[str, int] = {}  # embedding rows by stage
        self._configs: dict[str, Any] = {}  # by source
        with findings.collected():
            self.tokenizer = preparer.tokenizer
            self.config = preparer.model_config()
            self._configs["model"] = self.config
        for key, source in self.recipe.sources():
            with findings.collected():
                if self.tokenizer is not None:
                    check_kwargs(source.chat_template_kwargs, self.tokenizer, f"{key}.{COLUMN}")

    def check_stage(self, stage: Stage) -> None:
        """Check that the initial policy and the reference model of a stage exist and are compatible."""
        self._check_dropout(stage)
        rows = {"init": 0, "reference": 0}
        sources = {"init": stage.init}
        if stage.own_reference is not None:
            sources["reference"] = stage.own_reference
        for key, source in sources.items():
            with self.findings.collected():
                reward = stage.trains_reward_model
                rows[key] = self.check_source(f"stages.{stage.name}.{key}", source, reward=reward)
        for source in sources.values():
            with self.findings.collected():
                self._check_context(source, stage.max_length, f"stages.{stage.name}.max_length")
        with self.findings.collected():
            if all(rows.values()):
                where = f"stages.{stage.name}.reference"
                check_same_vocabulary(rows["init"], rows["reference"], where)
        self._rows[stage.name] = rows["init"]

    def check_source(self, key: str, source: str, *, reward: bool = False) -> int:
        """Check the model at a source, or the base model of an adapter.

        Args:
            key: key of the recipe that names the source.

        Returns:
            The number of embedding rows; 0 if unknown.

        Raises:
            ModelError: the model cannot be trained or used as a reference model.
        """
        if source in self._rows:
            return self._rows[source]
        if any(source == stage.name for stage in self.preparer.stages):
            return 0  # the output of an earlier stage
        trusted = self.recipe.model.trust_remote_code
        cached = None  # directory in the hub cache
        if source == "model":
            name = self.recipe.model.name_or_path
            cached = local_folder(name, self.recipe.model.revision) if name else None
            folder = self.preparer.path(name or "")
            where = f"model: {name}" if name else "model"
            config = self.config
            if config is None:  # already reported
                return 0
            local = folder if name and folder.is_dir() else None
        else:
            folder = local = self.preparer.path(source)
            where = f"{key}: {folder}"
            config = None
            if not is_adapter(folder):
                config = saved_config(folder, where, trust_remote_code=trusted)
        if local is not None and is_adapter(local):
            require_weights(local, where)
            base = base_of(local)
            where = f"{where}, an adapter of {base}"
            try:
                config = self.preparer.model_config(base, vocabulary=0)
            except ModelError as error:
                raise error.at(where) from None
            local, cached = (Path(base) if Path(base).is_dir() else None), local_folder(base)
        self._configs[source] = config
        tokens = 0 if self.tokenizer is None else len(self.tokenizer)
        if source != "model" and self.tokenizer is not None:
            check_same_tokenizer(self.tokenizer, folder, where)
        rows = check_unread(
            config, local, tokens=tokens, reward=reward, where=where, trust_remote_code=trusted
        )
        frozen = check_towers(config, reward=reward, where=where, trust_remote_code=trusted)
        if frozen is not None and key.endswith(".init"):
            self.findings.add(frozen)
        if folder is not None and is_adapter(folder):
            self._check_adapter(folder, config, where, reward=reward)
        if key.endswith(".init"):
            warning = check_written(config, local or cached, self.tokenizer, where)
            if warning is not None and f"  {WARNING}{warning}" not in self.findings.lines:
                self.findings.warn(warning)
        return rows

    def _check_adapter(self, folder: Path, config: Any, where: str, *, reward: bool) -> None:
        """Check that the adapter's file has the tensors that its config and base model require."""
        factory = auto_class(config, reward=reward, where=where)
        try:
            with torch.device("meta"):
                base = random_model(
                    factory, config, trust_remote_code=self.recipe.model.trust_remote_code
                )
        except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError):
            return  # no model can be created from the config: reported when it is loaded
        check_adapter(folder, base, where)

    def _check_context(self, source: str, length: int, where: str) -> None:
        """Check that examples of this length fit in the model's context."""
        stages = {stage.name: stage for stage in self.preparer.stages}
        while source in stages:
            source = stages[source].init
        config = self._configs.get(source)
        if config is not None:
            whose = "the model's" if source == "model" else f"{source}'s"
            check_context(config, length, where, whose=whose)

    def _check_dropout(self, stage: Stage) -> None:
        if self.config is None or not isinstance(stage, PreferenceStage):
            return
        found = noise_of(self.config)
        if found and stage.disable_dropout:
            self.findings.warn(
                f"the model's config has dropout or other noise in training ({found}): it is set to 0 in "
                "this stage, because the reference log-probs are computed without it"
            )
