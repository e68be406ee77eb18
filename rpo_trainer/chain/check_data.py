"""Checks of a recipe's data, prepared as for training: rows, prompts, scorers, evaluation data."""

from __future__ import annotations

from typing import Any

from rpo_trainer.chain.check_models import ModelChecks
from rpo_trainer.chain.findings import Findings
from rpo_trainer.data import Audit
from rpo_trainer.data.tokenize import audit_prompts
from rpo_trainer.errors import ModelError
from rpo_trainer.models.preload_checks import check_scorer
from rpo_trainer.recipe import EvalSpec, GenerateSpec, ScoreSpec, Stage
from rpo_trainer.recipe.rules.chain import looks_like_path
from rpo_trainer.report.formatting import counted
from rpo_trainer.rewards.sample import check_room
from rpo_trainer.stages.inputs import StageInputs, evaluation_of, needs_policy, sampling_spec
from rpo_trainer.stages.lm_eval_tasks import check_tasks
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.settings import check_warmup, steps_of
from rpo_trainer.trainers.examples import Examples

Row = dict[str, Any]


class DataChecks:
    """Checks the training data of the stages and the data that their outputs are evaluated on.

    Attributes:
        responses: number of tokenized responses by stage name; absent if they are sampled later.
    """

    def __init__(self, preparer: StagePreparer, findings: Findings, models: ModelChecks) -> None:
        self.preparer = preparer
        self.findings = findings
        self.models = models
        self.tokenize = models.tokenizer is not None
        self.responses: dict[str, int] = {}
        self._evaluated: set[str] = set()  # parts of the recipe whose rows are already checked

    def check_stage(self, stage: Stage) -> None:
        """Check the evaluation data of a stage, then its training data, which must not overlap."""
        if (measured := evaluation_of(stage, self.preparer.recipe)) is not None:
            self._check_evaluation(*measured)
        with self.findings.collected(f"stages.{stage.name}"):
            if needs_policy(stage.data):
                self._check_prompts(stage)
            else:
                self._check_rows(stage)

    # --- training data ---

    def _check_rows(self, stage: Stage) -> None:
        if stage.data.score is not None:
            self._check_stage_scorer(stage, self.preparer.given_rows(stage, Audit()))
        inputs = self.preparer.prepare(stage) if self.tokenize else self.preparer.rows_of(stage)
        if inputs.train is not None:
            examples = len(inputs.train)
            self.findings.add(
                f"{counted(examples, 'example')}, {counted(steps_of(stage, examples), 'step')}"
            )
            with self.findings.collected():
                check_warmup(stage, examples)
            self.responses[stage.name] = int(Examples(inputs.train).response_counts().sum())
        self._add_audits(inputs)

    def _check_prompts(self, stage: Stage) -> None:
        inputs = self.preparer.prepare(stage)
        if stage.data.responses_from is not None:
            self.findings.add(f"uses the responses of stage {stage.data.responses_from}")
        else:
            self._check_sampling(stage, inputs)
        self._add_audits(inputs)

    def _check_sampling(self, stage: Stage, inputs: StageInputs) -> None:
        """Check the scorer, the policies, and that prompt and response fit the context."""
        held = inputs.held_out_prompts or []  # they are sampled and scored like the others
        rows, spec = inputs.prompts + held, sampling_spec(stage.data, self.preparer.stages).generate
        self._check_stage_scorer(stage, [{**row, "responses": ["", ""]} for row in rows])
        assert spec is not None  # the schema
        where = f"stages.{stage.name}.data.generate"
        for policy in sorted({*spec.policies} - {"init"}):  # checked already
            with self.findings.collected():
                self.models.check_source(f"{where}.policies", policy)
        self._check_room(rows, spec, where, inputs.audit)
        policies = [stage.init if p == "init" else p for p in spec.policies]
        policies += [endpoint.model for endpoint in spec.endpoints]
        counted = f"{len(rows)} prompts" + (f" ({len(held)} held out)" if held else "")
        self.findings.add(f"{counted}; responses are sampled from {', '.join(policies)}")

    def _add_audits(self, inputs: StageInputs) -> None:
        stage = inputs.stage
        if (held_out := inputs.held_out) is not None:
            self.findings.add(counted(len(held_out.examples), "held-out example"))
            what = f"the held-out rows of {stage.name}"
            self.findings.add_audit(held_out.audit, what, label="held out: ")
        sampled = needs_policy(stage.data)
        what = f"the {'prompts' if sampled else 'rows'} of {stage.name}"
        self.findings.add_audit(inputs.audit, what, sampled=sampled)

    def _check_room(self, rows: list[Row], spec: GenerateSpec, where: str, audit: Audit) -> None:
        """Tokenize the prompts, and check that a response fits in the model's context after each."""
        if self.models.tokenizer is None:
            return
        encoded = self.preparer.prompt_ids(rows)
        audit_prompts(rows, self.models.tokenizer, audit, refuse_special_text=True)
        if self.models.config is not None and spec.policies:
            with self.findings.collected():
                where = f"{where}.max_new_tokens"
                check_room(self.models.config, map(len, encoded), spec.max_new_tokens, where=where)

    # --- scorers ---

    def _check_stage_scorer(self, stage: Stage, rows: list[Row]) -> None:
        if stage.data.score is not None:
            self._check_scorer(stage.data.score, rows, f"stages.{stage.name}.data.score")

    def _check_scorer(self, score: ScoreSpec, rows: list[Row], where: str) -> None:
        """Check a scorer; a reward model that the run itself trains does not exist yet."""
        if any(score.model == stage.name for stage in self.preparer.stages):
            return

        def model(name: str) -> tuple[str, str]:
            folder = self.preparer.path(name)
            there = (folder / "config.json").is_file()
            if looks_like_path(name) and not there:
                raise ModelError(
                    "no reward model was found here",
                    code="model.no-reward-model",
                    where=f"{where}.model: {folder}",
                    fix="give a directory with config.json and safetensors weights, or a reward stage",
                )
            if there:
                check_scorer(folder, f"{where}.model: {folder}")
            return name, name

        self.preparer.scorer(score, model).check(rows)

    # --- evaluations ---

    def _check_evaluation(self, part: str, spec: EvalSpec) -> None:
        new = part not in self._evaluated
        with self.findings.collected(part):
            audit = Audit()
            rows = self.preparer.evaluation_rows(spec, "data", audit) if spec.data else []
            if spec.generate is not None:
                self._check_room(rows, spec.generate, f"{part}.generate", audit)
            if rows and new:
                what = f"the prompts of {part}"
                self.findings.add_audit(audit, what, sampled=True, label=f"{part}.data: ")
            if spec.score is not None and rows:
                scored = [{**row, "responses": ["", ""]} for row in rows]
                self._check_scorer(spec.score, scored, f"{part}.score")
        for field in ("preferences", "nll"):
            with self.findings.collected(part):
                if getattr(spec, field) and new:
                    audit, what = Audit(), f"{part}.{field}"
                    if self.tokenize:
                        self.preparer.evaluation_examples(spec, field, audit)
                    else:
                        self.preparer.evaluation_rows(spec, field, audit)
                    self.findings.add_audit(audit, f"the rows of {what}", label=f"{what}: ")
        self._evaluated.add(part)
        with self.findings.collected(part):
            if spec.baseline is not None:
                self.models.check_source(f"{part}.baseline", spec.baseline)
        with self.findings.collected(part):
            if spec.lm_eval is not None:
                check_tasks(spec.lm_eval, self.preparer.loaded.base_dir)
