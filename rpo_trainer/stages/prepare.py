"""`StagePreparer`: the inputs of a recipe's stages, tokenized once and kept on disk.

`run`, `check`, `plan` and `preview` share it, so that they all use the same data. An entry of the store is
found again by everything that it depends on: by later rounds of a stage, on resume, and by the other
processes of a run, which map it into memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rpo_trainer.data import Audit, tokenize_rows
from rpo_trainer.data.audit_json import audit_from_json, audit_to_json
from rpo_trainer.data.encode import PromptEncoder
from rpo_trainer.data.resumable_rows import content_key
from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.data.sources import FirstRows
from rpo_trainer.data.tokenize import released
from rpo_trainer.data.tokenized_shards import require_tokenized
from rpo_trainer.data.tokenizer_digest import tokenizer_digest
from rpo_trainer.errors import DataError
from rpo_trainer.models.loading import load_config, load_tokenizer
from rpo_trainer.recipe import EvalSpec, LoadedRecipe, Stage
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.runtime.memory import return_freed_memory
from rpo_trainer.stages.data_keys import stage_settings
from rpo_trainer.stages.inputs import (
    HeldOut,
    ScoredData,
    StageInputs,
    dataset_fingerprint,
    fitted_stage,
    held_out_prompts,
    needs_policy,
    set_aside,
    tokenize_stage,
)
from rpo_trainer.stages.settings import StageConfig, steps_of, training_config
from rpo_trainer.stages.stage_rows import EVAL_KINDS, StageRows

DATA_FOLDER = ".data"  # in the run directory
_TRAIN, _HELD_OUT, _INPUTS = "train", "held_out", "inputs.json"


class StagePreparer(StageRows):
    """Prepares the inputs of a recipe's stages.

    Args:
        run_dir: the run directory, which keeps prepared data; None: keep them for this process only.
        first: read only the first rows of each source, and keep nothing; None: read all.

    Attributes:
        stages: all stages, in order; repeated ones expanded.
        steps: optimizer steps of the stages prepared so far, by name; for prompts whose responses are still
            to be sampled, an upper bound.
    """

    def __init__(
        self, loaded: LoadedRecipe, run_dir: Path | None = None, *, first: FirstRows | None = None
    ) -> None:
        super().__init__(loaded, None if run_dir is None else run_dir / DATA_FOLDER, first=first)
        self.steps: dict[str, int] = {}
        self._evaluated: dict[str, tuple[list[Mapping[str, Any]], Audit]] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The recipe's tokenizer, with its chat template.

        Raises:
            ModelError: it cannot be loaded.
        """
        return load_tokenizer(self.recipe.model, self.loaded.base_dir)

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def model_config(self, source: str | None = None, *, vocabulary: int | None = None) -> Any:
        """Load the config of the recipe's model, or of another source, see `load_config`.

        Args:
            vocabulary: minimum size of the vocabulary; None: that of the tokenizer.
        """
        tokens = len(self.tokenizer) if vocabulary is None else vocabulary
        return load_config(self.recipe.model, self.loaded.base_dir, source, tokens)

    def settings(self, stage: Stage, run_dir: Path) -> StageConfig:
        """Return the config of the stage's trainer, see `training_config`."""
        return training_config(
            stage, self.recipe.model, seed=self.seed(stage), folder=run_dir / stage.name,
            run_dir=run_dir,
        )  # fmt: skip

    # --- training data ---

    def prepare(self, stage: Stage, scored: ScoredData | None = None) -> StageInputs:
        """Return the training and held-out examples of a stage, tokenized unless the store has them.

        For a stage whose responses are still to be sampled, the prompts are returned. Prompts that are both
        trained and evaluated on are counted in the audit.

        Args:
            scored: rows sampled or scored by a run; None: before a run, when only verifiers score rows.

        Raises:
            DataError, Problems: data that cannot be read or trained on; prompts that are both trained and
                evaluated on, if `data.eval_overlap` is `error`.
            ModelError: the tokenizer cannot be loaded.
        """
        if scored is None and needs_policy(stage.data):
            return self._prepare_prompts(stage)
        return self.open(stage, self.build(stage, scored), scored)

    def build(self, stage: Stage, scored: ScoredData | None = None) -> str:
        """Tokenize the examples of a stage unless the store has them, and return their key; see `prepare`."""
        key = content_key(
            "examples", stage_settings(stage, scored=scored is not None), self.seed(stage),
            self.sources_of(stage) if scored is None else self.digests.of(stage.data.eval),
            self._evaluation_key(stage), self._tokenizer_digest, None if scored is None else scored.digest,
        )  # fmt: skip
        self.store.entry(key, lambda folder: self._build(stage, scored, folder), _what(stage))
        return key

    def open(self, stage: Stage, key: str, scored: ScoredData | None = None) -> StageInputs:
        """Return the inputs of a stage from the store.

        Args:
            key: the result of `build`, possibly in another process. If this host does not see the entry, it
                is built here.
        """
        folder = self.store.entry(key, lambda f: self._build(stage, scored, f), _what(stage))
        kept = json.loads((folder / _INPUTS).read_text(encoding="utf-8"))
        audit = audit_from_json(kept["audit"])
        train, held_out = require_tokenized(folder / _TRAIN), None
        if kept["held_out"] is not None:
            held_out = HeldOut(
                require_tokenized(folder / _HELD_OUT), audit_from_json(kept["held_out"])
            )
        self.steps[stage.name] = steps_of(stage, len(train))
        return StageInputs(
            fitted_stage(stage, audit), audit, train=train, held_out=held_out,
            fingerprint=kept["fingerprint"],
        )  # fmt: skip

    def _build(self, stage: Stage, scored: ScoredData | None, folder: Path) -> None:
        self._write_inputs(stage, scored, folder)
        return_freed_memory()  # of the rows as Python objects

    def _write_inputs(self, stage: Stage, scored: ScoredData | None, folder: Path) -> None:
        audit = Audit() if scored is None else copy.deepcopy(scored.audit)
        rows, held = self.training_rows(stage, audit, None if scored is None else scored.rows)
        held_audit = Audit()
        if held is None and stage.data.eval:
            held = self.held_out_rows(stage, held_audit)
        self._check_overlap(stage, rows, held, audit)
        label = self.label(stage)
        if held is not None:
            tokenize_stage(
                stage,
                held,
                self.tokenizer,
                held_audit,
                folder / _HELD_OUT,
                f"{label} tokenizing held-out data",
            )
        train = tokenize_stage(
            stage,
            released(rows) if isinstance(rows, list) else rows,
            self.tokenizer,
            audit,
            folder / _TRAIN,
            f"{label} tokenizing training data",
        )
        kept = {
            "audit": audit_to_json(audit),
            "held_out": None if held is None else audit_to_json(held_audit),
            "fingerprint": dataset_fingerprint(train),
        }
        (folder / _INPUTS).write_text(json.dumps(kept), encoding="utf-8")

    def rows_of(self, stage: Stage) -> StageInputs:
        """Read the rows of a stage without tokenizing them: where its tokenizer cannot be loaded."""
        audit = Audit()
        rows, held = self.training_rows(stage, audit)
        self.steps[stage.name] = steps_of(stage, len(rows))
        self._check_overlap(stage, rows, held, audit)
        return StageInputs(fitted_stage(stage, audit), audit)

    def _prepare_prompts(self, stage: Stage) -> StageInputs:
        audit = Audit()
        prompts = self.prompts(stage, audit)
        held_out = held_out_prompts(stage, prompts, seed=self.seed(stage))
        rows, held = set_aside(prompts, held_out, audit)
        self.steps[stage.name] = steps_of(stage, len(rows))
        evaluated, held_audit, examples = held, Audit(), None
        if held is None and stage.data.eval:
            evaluated = self.held_out_rows(stage, held_audit)
        self._check_overlap(stage, rows, evaluated, audit)
        if held is None and evaluated is not None:
            examples = HeldOut(
                tokenize_stage(stage, evaluated, self.tokenizer, held_audit), held_audit
            )
        return StageInputs(stage, audit, rows, held, held_out=examples)

    def _check_overlap(
        self, stage: Stage, rows: Sequence[Row], held: list[Row] | None, audit: Audit
    ) -> None:
        on_overlap = stage.data.eval_overlap
        if held is not None:
            audit.check_overlap(rows, held, on_overlap=on_overlap)
        for name, spec in self._evaluations(stage):
            found = self.evaluation_rows(spec, name)
            audit.check_overlap(rows, found, on_overlap=on_overlap, where=f"eval.{name}")

    def _evaluations(self, stage: Stage) -> list[tuple[str, EvalSpec]]:
        """Return the evaluation data whose prompts should not be trained on, by field."""
        # Not `evaluation_of`: a reward model may score the responses of an evaluation.
        spec = stage.eval or self.recipe.eval
        return [] if spec is None else [(name, spec) for name in EVAL_KINDS if getattr(spec, name)]

    def _evaluation_key(self, stage: Stage) -> list[Any]:
        return [
            [name, spec.max_rows, self.digests.of(getattr(spec, name))]
            for name, spec in self._evaluations(stage)
        ]

    # --- tokenized text of other rows ---

    def prompt_ids(self, rows: list[Row]) -> list[list[int]]:
        """Return the token ids of each prompt, as a policy gets them.

        Raises:
            DataError: the chat template cannot render a prompt.
        """
        found = []
        encoder = PromptEncoder(self.tokenizer)
        for row in rows:
            try:
                parsed = row.get("special_tokens") == "parse"
                ids = encoder.ids(
                    row["prompt"], row.get("tools"), parsed=parsed, template_kwargs=row.get(COLUMN)
                )
                found.append(ids)
            except RowError as error:
                raise DataError(
                    str(error),
                    code=error.code,
                    where=f"row {row['id']}",
                    why="no response to it can be sampled",
                    fix="correct the rows, or choose another chat_template: chatml | plain | a path",
                ) from error
        return found

    def evaluation_examples(
        self, spec: EvalSpec, field: str, audit: Audit
    ) -> list[Mapping[str, Any]]:
        """Return the examples of `preferences` or `nll`, tokenized once per process.

        The longest `max_length` of all stages applies, so that all are evaluated on the same examples.
        """
        key = f"{field} {spec.model_dump_json()}"
        if key not in self._evaluated:
            found = Audit()
            examples = tokenize_rows(
                self.evaluation_rows(spec, field, found), self.tokenizer,
                kind="pair" if EVAL_KINDS[field] == "pair" else "sft", truncation="drop", audit=found,
                refuse_special_text=True, max_length=max(stage.max_length for stage in self.stages),
            )  # fmt: skip
            self._evaluated[key] = list(examples), found
        examples_, counts = self._evaluated[key]
        audit.adopt(counts)
        return examples_


def _what(stage: Stage) -> str:
    return f"the examples of stage {stage.name}"
