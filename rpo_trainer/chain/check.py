"""Everything that can be known before training: arguments, data, tokenizer and template, disk."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from rpo_trainer.chain.inputs import Inputs, check_inputs
from rpo_trainer.chain.state import ChainState, check_run_dir, plain
from rpo_trainer.data import Audit, load_rows, tokenize_rows
from rpo_trainer.data.template_variables import check_kwargs
from rpo_trainer.data.tokenize import audit_prompts
from rpo_trainer.errors import DataError, ModelError, Problems, RPOTrainerError
from rpo_trainer.models.adapter_files import base_of, is_adapter, require_weights
from rpo_trainer.models.adapters import check_unread as check_adapter
from rpo_trainer.models.from_config import auto_class
from rpo_trainer.models.loading import load_config, load_tokenizer, saved_config
from rpo_trainer.models.multimodal import random_model
from rpo_trainer.models.preload_checks import (
    check_context,
    check_same_tokenizer,
    check_same_vocabulary,
    check_scorer,
    check_towers,
    check_unread,
    check_written,
)
from rpo_trainer.models.weight_files import local_folder
from rpo_trainer.plan.disk import check_disk
from rpo_trainer.recipe import (
    GenerateSpec,
    LoadedRecipe,
    PreferenceStage,
    RewardStage,
    Stage,
    expand_stages,
    resolve_path,
)
from rpo_trainer.recipe.rules.chain import looks_like_path
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.report.audits import read_audit
from rpo_trainer.rewards.sample import check_room
from rpo_trainer.rewards.scorers import make_scorer
from rpo_trainer.stages.data import (
    at_most,
    build_evaluation,
    build_rows,
    check_overlap,
    evaluation_prompts,
    needs_policy,
    rows_by_stage,
    set_aside,
    stage_seed,
    tokenize_stage,
)
from rpo_trainer.stages.harness import check_tasks
from rpo_trainer.stages.made import load_given, load_prompts, prompt_ids, sampling
from rpo_trainer.stages.places import each, locate, name_part
from rpo_trainer.stages.record import AuditRecord
from rpo_trainer.stages.settings import check_warmup, lora_config, steps_of, training_config
from rpo_trainer.trainers.noise import noise_of

WARNING = "WARNING: "  # begins, behind its indentation, each line that deserves attention

if TYPE_CHECKING:
    from rpo_trainer.recipe import EvalSpec, ScoreSpec, SourceSpec
    from rpo_trainer.recipe.where import Origins


def check_recipe(
    loaded: LoadedRecipe, run_dir: Path, *, only: Collection[str] | None = None
) -> list[str]:
    """Reads and tokenises the data of every stage, without a model.

    Args:
        only: names of the stages to check; None: all.

    Returns:
        Lines to show: what each stage will train on.

    Raises:
        Problems: all errors that were found.
    """
    check = _Check(loaded, run_dir)
    for stage in check.stages:
        if only is None or stage.name in only:
            check.stage(stage)
    check.disk(only)
    if only is None:  # else a run asks, which has the directory
        check.run()
    if check.problems:
        raise Problems(_distinct(check.problems, loaded.origins))
    return check.lines


def count_warnings(lines: Sequence[str]) -> int:
    """How many lines of `check_recipe` are warnings."""
    return sum(line.lstrip().startswith(WARNING) for line in lines)


class _Check:
    def __init__(self, loaded: LoadedRecipe, run_dir: Path) -> None:
        self.recipe = loaded.recipe
        self.base_dir = loaded.base_dir
        self.run_dir = run_dir
        self.stages = expand_stages(loaded.recipe)
        self.earlier_rows = rows_by_stage(self.stages, self.recipe, self.base_dir)
        self.problems: list[RPOTrainerError] = []
        self.found: set[str] = set()
        self.lines: list[str] = []
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.config: Any = None
        self.responses: dict[str, int] = {}
        self.rows: dict[str, int] = {}  # of the embeddings, by stage
        self.configs: dict[str, Any] = {}  # of models, by source
        self.evaluated: set[str] = set()  # parts of the recipe whose rows have been looked at
        with self._collected():
            self.tokenizer = load_tokenizer(loaded.recipe.model, loaded.base_dir)
            self.config = load_config(
                loaded.recipe.model, loaded.base_dir, None, len(self.tokenizer)
            )
            self.configs["model"] = self.config
        for key, source in loaded.recipe.sources():
            with self._collected():
                if self.tokenizer is not None:
                    check_kwargs(source.chat_template_kwargs, self.tokenizer, f"{key}.{COLUMN}")

    def stage(self, stage: Stage) -> None:
        """Its arguments, its start, its data and its evaluation, each for itself."""
        self.lines.append(f"{stage.name} ({stage.kind})")
        seed = stage_seed(stage, self.recipe)
        with self._collected():
            training_config(
                stage, self.recipe.model, seed=seed, folder=self.run_dir / stage.name,
                run_dir=self.run_dir,
            )  # fmt: skip
        with self._collected():
            lora_config(stage)
        self._dropout(stage)
        rows = {"init": 0, "reference": 0}
        for key, source in _sources(stage):
            with self._collected():
                reward = isinstance(stage, RewardStage)
                rows[key] = self._start(f"stages.{stage.name}.{key}", source, reward=reward)
        for source in dict(_sources(stage)).values():
            with self._collected():
                self._context(source, stage.max_length, f"stages.{stage.name}.max_length")
        with self._collected():
            if all(rows.values()):
                where = f"stages.{stage.name}.reference"
                check_same_vocabulary(rows["init"], rows["reference"], where)
        self.rows[stage.name] = rows["init"]
        spec = stage.eval or self.recipe.eval
        # Before the data, which is compared with it: a fault of it is said of it.
        if spec is not None and not isinstance(stage, RewardStage):
            self._evaluation(spec, "eval" if stage.eval is None else f"stages.{stage.name}.eval")
        with self._collected(f"stages.{stage.name}"):
            if needs_policy(stage.data):
                self._prompts(stage, seed)
            else:
                self._examples(stage, seed)

    @contextmanager
    def _collected(self, part: str | None = None) -> Iterator[None]:
        """Errors raised inside are kept, those of data with their place in the recipe.

        The rounds of a repeated stage find the same faults, and replay those of the stage before.
        """
        try:
            yield
        except RPOTrainerError as error:
            for one in each(error):
                if (text := str(one)) in self.found:
                    continue
                self.found.add(text)
                if part is not None:
                    name_part(one, part)
                self.problems.append(one)

    def disk(self, only: Collection[str] | None) -> None:
        """Room for what the stages will write."""
        wanted = [stage for stage in self.stages if only is None or stage.name in only]
        if any(not isinstance(problem, DataError) for problem in self.problems):
            return  # the size of the model is not known, or what is kept of it
        with self._collected():
            check_disk(
                self.recipe, self.base_dir, self.run_dir, wanted, self.stages,
                len(self.tokenizer), self.responses,  # type: ignore[arg-type]
            )  # fmt: skip

    def run(self) -> None:
        """What is in the run directory already: whether a run of this recipe can go on there."""
        with self._collected():
            check_run_dir(self.run_dir)
            if self.run_dir.is_dir():
                state = ChainState(self.run_dir)
                state.adopt(*plain(self.recipe, self.stages, self.base_dir))
                inputs = Inputs(self.recipe, self.stages, self.base_dir)
                check_inputs(self.stages, state, inputs, self.run_dir)

    def _dropout(self, stage: Stage) -> None:
        if self.config is None or not isinstance(stage, PreferenceStage):
            return
        found = noise_of(self.config)
        if found and stage.disable_dropout:
            self.lines.append(
                f"  {WARNING}the model's config has noise in training ({found}): it is set to 0 in this "
                "stage, since the reference has none"
            )

    def _start(self, key: str, source: str, *, reward: bool = False) -> int:
        """Looks at the model that a source is or extends; the rows of its embeddings, 0 where not known."""
        if source in self.rows:
            return self.rows[source]
        if any(source == stage.name for stage in self.stages):
            return 0  # finished: its output has been looked at
        cached = None  # where the hub keeps its files
        if source == "model":
            name = self.recipe.model.name_or_path
            cached = local_folder(name, self.recipe.model.revision) if name else None
            folder = resolve_path(self.base_dir, name or "")
            where = f"model: {name}" if name else "model"
            config = self.config
            if config is None:  # that has been said
                return 0
            local = folder if name and folder.is_dir() else None
        else:
            folder = local = resolve_path(self.base_dir, source)
            where = f"{key}: {folder}"
            config = None
            if not is_adapter(folder):
                trusted = self.recipe.model.trust_remote_code
                config = saved_config(folder, where, trust_remote_code=trusted)
        if local is not None and is_adapter(local):
            require_weights(local, where)
            base = base_of(local)
            where = f"{where}, an adapter of {base}"
            try:
                config = load_config(self.recipe.model, self.base_dir, base, 0)
            except ModelError as error:
                raise error.at(where) from None
            local, cached = (Path(base) if Path(base).is_dir() else None), local_folder(base)
        self.configs[source] = config
        tokens = 0 if self.tokenizer is None else len(self.tokenizer)
        if source != "model" and self.tokenizer is not None:
            check_same_tokenizer(self.tokenizer, folder, where)
        rows = check_unread(
            config, local, tokens=tokens, reward=reward, where=where,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )  # fmt: skip
        frozen = check_towers(
            config, reward=reward, where=where,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )  # fmt: skip
        if frozen is not None and key.endswith(".init"):
            self.lines.append(f"  {frozen}")
        if folder is not None and is_adapter(folder):
            self._adapter(folder, config, where, reward=reward)
        if key.endswith(".init"):
            warning = check_written(config, local or cached, self.tokenizer, where)
            if warning is not None and (line := f"  {WARNING}{warning}") not in self.lines:
                self.lines.append(line)
        return rows

    def _adapter(self, folder: Path, config: Any, where: str, *, reward: bool) -> None:
        """The adapter's file has the tensors that its configuration and its base ask for."""
        factory = auto_class(config, reward=reward, where=where)
        try:
            with torch.device("meta"):
                base = random_model(
                    factory, config, trust_remote_code=self.recipe.model.trust_remote_code
                )
        except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError):
            return  # no model can be made of the configuration: said where one is made
        check_adapter(folder, base, where)

    def _context(self, source: str, length: int, where: str) -> None:
        """The longest examples have places in the model that a source is made of."""
        stages = {stage.name: stage for stage in self.stages}
        while source in stages:
            source = stages[source].init
        config = self.configs.get(source)
        if config is not None:
            whose = "the model's" if source == "model" else f"{source}'s"
            check_context(config, length, where, whose=whose)

    def _examples(self, stage: Stage, seed: int) -> None:
        audit = Audit()
        if stage.data.score is not None:
            self._scorer(stage, load_given(stage.data, self.base_dir, seed=seed, audit=Audit()))
        rows = build_rows(stage, self.base_dir, seed=seed, audit=audit, earlier=self.earlier_rows)
        rows, held = set_aside(stage, rows, seed=seed, audit=audit)
        if self.tokenizer is not None:
            examples = tokenize_stage(stage, rows, self.tokenizer, audit)
            self._length(stage, len(examples))
            self.responses[stage.name] = sum(map(len, examples["response_ids"]))
        self._held_out(stage, rows, held, audit, seed)

    def _told(self, audit: Audit, what: str, *, sampled: bool = False, label: str = "") -> None:
        """What an audit counts, and a warning about each thing that deserves attention."""
        record = AuditRecord.from_json(audit.as_dict())
        found = read_audit(record).concerns(what, sampled=sampled)
        concerns = [concern for concern in found if not concern.minor]
        said = {concern.text for concern in concerns}
        texts = [text for _, text in audit.messages(what) if text not in said]
        self.lines += [f"  {label}{text}" for text in texts]
        for concern in concerns:
            advice = f" {concern.advice}" if concern.advice else ""
            self.lines.append(f"  {WARNING}{label}{concern.text}.{advice}")

    def _held_out(
        self,
        stage: Stage,
        rows: list[dict[str, Any]],
        held: list[dict[str, Any]] | None,
        audit: Audit,
        seed: int,
    ) -> None:
        """The rows the stage is measured with, and none of them among those it learns from."""
        found = None
        if self.tokenizer is not None:
            found = build_evaluation(stage, self.base_dir, self.tokenizer, seed=seed, rows=held)
        if found is not None:
            self.lines.append(f"  {len(found[0])} held-out examples")
            self._told(found[2], f"the held-out rows of {stage.name}", label="held out: ")
        check_overlap(stage, self.recipe, self.base_dir, rows, found and found[1], audit)
        what = f"the {'prompts' if needs_policy(stage.data) else 'rows'} of {stage.name}"
        self._told(audit, what, sampled=needs_policy(stage.data))

    def _length(self, stage: Stage, examples: int) -> None:
        self.lines.append(f"  {examples} examples, {steps_of(stage, examples)} steps")
        with self._collected():
            check_warmup(stage, examples)

    def _prompts(self, stage: Stage, seed: int) -> None:
        data, audit = sampling(stage.data, self.stages), Audit()
        rows = load_prompts(data, self.base_dir, seed=seed, audit=audit)
        if stage.data.responses_from is not None:
            self.lines.append(f"  the responses of stage {stage.data.responses_from}")
            self._held_out(stage, rows, None, audit, seed)
            return
        self._scorer(stage, [{**row, "responses": ["", ""]} for row in rows])
        assert data.generate is not None  # the schema
        for policy in sorted({*data.generate.policies} - {"init"}):  # which has been looked at
            with self._collected():
                self._start(f"stages.{stage.name}.data.generate.policies", policy)
        policies = [stage.init if p == "init" else p for p in data.generate.policies]
        self._sampled(rows, data.generate, f"stages.{stage.name}.data.generate", audit)
        policies += [endpoint.model for endpoint in data.generate.endpoints]
        self.lines.append(f"  {len(rows)} prompts; the responses come from {', '.join(policies)}")
        self._held_out(stage, rows, None, audit, seed)

    def _sampled(
        self, rows: list[dict[str, Any]], spec: GenerateSpec, where: str, audit: Audit
    ) -> None:
        """The prompts as tokens, with room for a response in the context of the recipe's model."""
        if self.tokenizer is None:
            return
        encoded = prompt_ids(rows, self.tokenizer)
        audit_prompts(rows, self.tokenizer, audit, refuse_special_text=True)
        if self.config is not None and spec.policies:
            with self._collected():
                where = f"{where}.max_new_tokens"
                check_room(self.config, encoded, spec.max_new_tokens, where=where)

    def _scorer(self, stage: Stage, rows: list[dict[str, Any]]) -> None:
        """What can be known of the scorer of a stage; a reward model of the run is not there yet."""
        if stage.data.score is not None:
            self._scorable(stage.data.score, rows, f"stages.{stage.name}.data.score")

    def _scorable(self, score: ScoreSpec, rows: list[dict[str, Any]], where: str) -> None:
        if score.model is not None and any(score.model == other.name for other in self.stages):
            return

        def model(name: str) -> tuple[str, str]:
            folder = resolve_path(self.base_dir, name)
            there = (folder / "config.json").is_file()
            if looks_like_path(name) and not there:
                raise ModelError(
                    "there is no reward model here",
                    code="model.no-reward-model",
                    where=f"{where}.model: {folder}",
                    why="the responses could not be scored",
                    fix="give a directory with config.json and weights in safetensors, or a stage",
                )
            if there:
                check_scorer(folder, f"{where}.model: {folder}")
            return name, name

        make_scorer(score, base_dir=self.base_dir, model=model).check(rows)

    def _evaluation(self, spec: EvalSpec, part: str) -> None:
        options: dict[str, Any] = {"base_dir": self.base_dir, "seed": self.recipe.seed}
        with self._collected(part):
            audit = Audit()
            rows = evaluation_prompts(spec, audit=audit, **options) if spec.data else []
            if spec.generate is not None:
                self._sampled(rows, spec.generate, f"{part}.generate", audit)
            if rows and part not in self.evaluated:
                self._told(audit, f"the prompts of {part}", sampled=True, label=f"{part}.data: ")
            if spec.score is not None and rows:
                scored = [{**row, "responses": ["", ""]} for row in rows]
                self._scorable(spec.score, scored, f"{part}.score")
        measured: tuple[tuple[list[SourceSpec], Literal["sft", "pair"], str], ...] = (
            (spec.preferences, "pair", "preferences"),
            (spec.nll, "sft", "nll"),
        )
        for sources, kind, name in measured:
            with self._collected(part):
                if sources and part not in self.evaluated:
                    self._measured(sources, kind, spec.max_rows, f"{part}.{name}")
        self.evaluated.add(part)
        with self._collected(part):
            if spec.baseline is not None:
                self._start(f"{part}.baseline", spec.baseline)
        with self._collected(part):
            if spec.lm_eval is not None:
                check_tasks(spec.lm_eval, self.base_dir)

    def _measured(
        self, sources: list[SourceSpec], kind: Literal["sft", "pair"], limit: int | None, part: str
    ) -> None:
        """Rows that a policy is measured with after a stage, tokenised as they will be."""
        audit, seed = Audit(), self.recipe.seed
        rows = load_rows(sources, kind=kind, base_dir=self.base_dir, audit=audit, seed=seed)
        if self.tokenizer is not None:
            tokenize_rows(
                at_most(rows, limit, audit), self.tokenizer, kind=kind, truncation="drop", audit=audit,
                refuse_special_text=True, max_length=max(stage.max_length for stage in self.stages),
            )  # fmt: skip
        self._told(audit, f"the rows of {part}", label=f"{part}: ")


def _sources(stage: Stage) -> Iterator[tuple[str, str]]:
    yield "init", stage.init
    if isinstance(stage, PreferenceStage) and stage.reference != stage.init:
        yield "reference", stage.reference


def _distinct(problems: list[RPOTrainerError], origins: Origins) -> list[RPOTrainerError]:
    """Each with its line, and in their order; the rounds of a repeated stage find the same faults."""
    for problem in problems:
        locate(problem, origins)
    return sorted({str(problem): problem for problem in problems}.values(), key=_line)


def _line(problem: RPOTrainerError) -> float:
    found = re.match(r".*?:(\d+) \(", problem.where or "")
    return int(found[1]) if found else math.inf
