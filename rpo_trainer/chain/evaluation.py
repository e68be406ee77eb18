"""Evaluation of a stage's output: held-out responses, pairs and rows, and lm-eval tasks.

Expensive results are cached by content in `evaluation/` of the run directory: the baseline's responses and
log-probs are computed once for all stages, and an interrupted evaluation resumes.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rpo_trainer.chain.response_figures import response_examples
from rpo_trainer.data import Audit
from rpo_trainer.data.judge_bias import bias_lines, biases
from rpo_trainer.data.resumable_rows import content_key, is_intact, map_rows_resumable, read_rows
from rpo_trainer.models.sharding import loading_unsharded
from rpo_trainer.recipe import Stage
from rpo_trainer.rewards import evaluate
from rpo_trainer.rewards.policies import sampling_settings
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.devices import empty_cache
from rpo_trainer.runtime.files import write_with_digest
from rpo_trainer.stages.inputs import evaluation_of
from rpo_trainer.stages.lm_eval_tasks import run_tasks
from rpo_trainer.stages.record import EvaluationRecord
from rpo_trainer.stages.settings import arithmetic
from rpo_trainer.step.forward import install, uninstall
from rpo_trainer.step.layout_probe import probe_on_all_ranks
from rpo_trainer.step.reference import cached_logprobs, dataset_logprobs
from rpo_trainer.step.reference_cache import ReferenceCache

if TYPE_CHECKING:
    from rpo_trainer.chain.models import Models
    from rpo_trainer.data.rows import Row
    from rpo_trainer.recipe import EvalSpec, ScoreSpec
    from rpo_trainer.rewards.scorers import Scorer
    from rpo_trainer.stages.prepare import StagePreparer
    from rpo_trainer.stages.scored_rows import ScoredRows
    from rpo_trainer.step.batch import Layout
    from rpo_trainer.step.head import Head

logger = logging.getLogger(__name__)

FOLDER = "evaluation"


def baseline_of(spec: EvalSpec, stages: Sequence[Stage]) -> str | None:
    """Return the policy that the outputs of the stages are compared with, if any."""
    if spec.baseline is not None:
        return spec.baseline
    return next((stage.init for stage in stages if stage.needs_reference), None)


def _name(score: ScoreSpec) -> str:
    """Describe the source of the rewards."""
    if score.judge is not None:
        return f"judge {score.judge.model}"
    if score.endpoint is not None:
        return f"reward model {score.endpoint.model}"
    return (
        f"reward model {score.model}" if score.model is not None else f"verifier {score.verifier}"
    )


class Evaluation:
    """Evaluates the outputs of one run.

    Args:
        models: loads policies by source (a stage, `model`, a path).
        scored_rows: creates the scorer of a recipe's `score`.
    """

    def __init__(
        self, preparer: StagePreparer, run_dir: Path, models: Models, scored_rows: ScoredRows
    ) -> None:
        self.preparer = preparer
        self.recipe = preparer.recipe
        self.run_dir = run_dir
        self.stages = preparer.stages
        self.tokenizer: Any = preparer.tokenizer
        self.models = models
        self.scored_rows = scored_rows
        # Log-probs are computed in the dtype of training.
        self.dtype: torch.dtype = getattr(torch, arithmetic(self.recipe.model))
        self.autocast = self.dtype if self.dtype in (torch.bfloat16, torch.float16) else None
        self._policies: dict[str, Any] = {}
        self._layouts: dict[str, tuple[Layout, Head]] = {}  # by policy
        self._longest = 0  # tokens of the longest held-out pair or row of the stage
        self._logged: set[str] = set()  # data whose audit is logged

    def measure(self, stage: Stage, label: str) -> EvaluationRecord:
        """Compute the metrics that the stage's `eval` names.

        Also writes `samples.jsonl` into the stage's directory, and `baseline-samples.jsonl` if no stage of
        the run produced the baseline.
        """
        measured = evaluation_of(stage, self.recipe)
        if measured is None:
            return EvaluationRecord()
        _, spec = measured
        baseline = self._baseline(spec, stage)
        figures: dict[str, Any] = {} if baseline is None else {"baseline": baseline}
        # A baseline that is not the output of a stage has no record, so it is evaluated here.
        before = None if baseline in [other.name for other in self.stages] else baseline
        of_before: dict[str, Any] = {}
        try:
            # Tokenized first: the step layout of a policy depends on the longest of all texts.
            examples = {
                field: self._examples(spec, field, f"{label} held-out {what}")
                for field, what in (("preferences", "pairs"), ("nll", "rows"))
                if getattr(spec, field)
            }
            self._longest = _longest([one for part in examples.values() for one in part])
            if spec.generate is not None:
                logger.info("%s sampling held-out responses", label)
                figures |= self._responses_of(stage, spec, baseline, before, label)
                baseline_figures = {**figures.pop("of_baseline", {}), "measure": figures["measure"]}
                if before is not None:
                    self._keep_samples(stage, "baseline-samples", baseline_figures.pop("samples"))
                    of_before |= baseline_figures
            if spec.preferences:
                pairs = examples["preferences"]
                figures["preferences"] = self._preferences(stage.name, pairs, baseline)
                if before is not None:
                    of_before["preferences"] = self._preferences(before, pairs, None)
            if spec.nll:
                figures["nll_by_source"] = self._nll(stage.name, examples["nll"])
                if before is not None:
                    of_before["nll_by_source"] = self._nll(before, examples["nll"])
            if spec.lm_eval is not None:
                tasks = spec.lm_eval
                logger.info("%s lm-eval: %s", label, ", ".join(tasks.tasks))
                policy = self._policy(stage.name)
                figures["lm_eval"] = distributed.on_main(
                    lambda: run_tasks(
                        policy,
                        self.tokenizer,
                        tasks,
                        self.preparer.loaded.base_dir,
                        seed=self.recipe.seed,
                        template_kwargs=self.recipe.model.chat_template_kwargs,
                    ),
                    timeout=distributed.LONG_TIMEOUT,
                )
        finally:
            self._policies.clear()
            self._layouts.clear()
            gc.collect()
            empty_cache()
        return EvaluationRecord.from_json(
            figures | ({"of_baseline": of_before} if of_before else {})
        )

    def _baseline(self, spec: EvalSpec, stage: Stage) -> str | None:
        """Return the stage's baseline if it is another policy that exists already."""
        baseline = baseline_of(spec, self.stages)
        names = [other.name for other in self.stages]
        later = names[names.index(stage.name) :]
        return None if baseline in later else baseline

    def _policy(self, source: str) -> Any:
        if source not in self._policies:
            with loading_unsharded():
                self._policies[source] = self.models.output(source, delivered=True).to(
                    distributed.device()
                )
        return self._policies[source]

    # --- sampled responses ---

    def _responses_of(
        self,
        stage: Stage,
        spec: EvalSpec,
        baseline: str | None,
        before: str | None,
        label: str,
    ) -> dict[str, Any]:
        """Return the figures of the sampled responses, with those of the baseline.

        Args:
            before: the baseline if its samples are kept, because it is not a stage; otherwise None.
        """
        assert spec.score is not None  # the schema
        rows = self.preparer.evaluation_rows(spec, "data")
        scorer = self.scored_rows.scorer(spec.score)
        answers = self._answers(stage.name, rows, spec)
        baseline_answers = None if baseline is None else self._answers(baseline, rows, spec)
        if spec.score.judge is not None:
            figures = self._judged(rows, scorer, answers, baseline_answers, label)
        else:
            figures = self._scored(rows, scorer, answers, baseline_answers, label)
        figures["scorer"] = _name(spec.score)
        self._add_figures(figures["samples"], rows, answers, stage.name, baseline)
        # The samples of a baseline that is a stage are those of its own evaluation.
        if baseline_answers is not None and before is not None:
            self._add_figures(
                figures["of_baseline"]["samples"], rows, baseline_answers, before, None
            )
        # Metrics are comparable if this is equal: prompts, sampling settings and scorer.
        assert spec.generate is not None  # the schema
        settings = [sampling_settings(spec.generate), spec.greedy, self.recipe.seed]
        figures["measure"] = content_key("measure", scorer.key, rows, settings)
        self._keep_samples(stage, "samples", figures.pop("samples"))
        return figures

    def _add_figures(
        self,
        samples: Sequence[dict[str, Any]],
        rows: list[Row],
        answers: list[dict[str, Any]],
        source: str,
        baseline: str | None,
    ) -> None:
        """Add `tokens` of the sampled responses, and their `log_ratios` to a policy of the baseline."""
        examples = response_examples(rows, answers, self.tokenizer)
        flat = [one for row in examples for one in row if one is not None]
        ratios: Iterator[float] | None = None
        if baseline is not None and flat:
            own, other = self._logps(source, flat), self._logps(baseline, flat)
            ratios = iter([a[0] - b[0] for a, b in zip(own, other, strict=True)])
        for sample, row in zip(samples, examples, strict=True):
            sample["tokens"] = [
                None if one is None else sum(one["response_mask"][0]) for one in row
            ]
            if ratios is not None:
                sample["log_ratios"] = [None if one is None else next(ratios) for one in row]

    def _keep_samples(self, stage: Stage, name: str, samples: Sequence[dict[str, Any]]) -> None:
        """Write some responses for people to read."""
        if samples and distributed.is_main():
            text = "".join(json.dumps(sample) + "\n" for sample in samples)
            write_with_digest(self.run_dir / stage.name / f"{name}.jsonl", text)

    def _answers(self, source: str, rows: list[Row], spec: EvalSpec) -> list[dict[str, Any]]:
        """Sample a policy's responses to the prompts; cached on disk."""
        assert spec.generate is not None
        seed = self.recipe.seed
        settings = [sampling_settings(spec.generate), spec.greedy, seed]
        key = content_key(
            "answers", self.models.weights_key(source, delivered=True), rows, settings
        )
        path = self.run_dir / FOLDER / f"responses-{key}.jsonl"
        if distributed.on_main(lambda: is_intact(path)):
            return read_rows(path)
        answers = evaluate.respond(
            self._policy(source), self.tokenizer, rows, generate=spec.generate, greedy=spec.greedy,
            seed=seed, ranks=distributed.ALL_RANKS,
        )  # fmt: skip
        text = "".join(json.dumps(answer) + "\n" for answer in answers)
        distributed.on_main(lambda: write_with_digest(path, text))
        return answers

    def _rewarded(self, rows: list[Row], scorer: Scorer, label: str) -> list[Row]:
        """Return the rows with `rewards` and the scorer's other fields; cached on disk."""
        key = content_key(scorer.key, rows)
        path = self.run_dir / FOLDER / f"rewards-{key}.jsonl"
        if distributed.on_main(lambda: is_intact(path)):
            return read_rows(path)
        return map_rows_resumable(
            path, rows, scorer.work(rows), key=key, what="scored", label=label, with_digest=True,
            ranks=distributed.ALL_RANKS,
        )  # fmt: skip

    def _rewards(self, rows: list[Row], scorer: Scorer, label: str) -> list[Any]:
        return [row["rewards"] for row in self._rewarded(rows, scorer, label)]

    def _scored(
        self,
        rows: list[Row],
        scorer: Scorer,
        answers: list[dict[str, Any]],
        baseline_answers: list[dict[str, Any]] | None,
        label: str,
    ) -> dict[str, Any]:
        verifier = getattr(scorer, "verifier", None)
        maximum = None if verifier is None else verifier.maximum

        def summary(answers: list[dict[str, Any]], rewards: list[Any]) -> dict[str, Any]:
            result = evaluate.summarize(
                rows, answers, rewards, maximum=maximum, seed=self.recipe.seed
            )
            return result.as_dict()

        rewards = self._rewards(evaluate.to_score(rows, answers), scorer, label)
        figures = summary(answers, rewards)
        if baseline_answers is not None:
            baseline_rewards = self._rewards(
                evaluate.to_score(rows, baseline_answers), scorer, label
            )
            figures["of_baseline"] = summary(baseline_answers, baseline_rewards)
            k = len(answers[0]["responses"])
            wins = evaluate.win_rate(
                [row[:k] for row in rewards],
                [row[:k] for row in baseline_rewards],
                self.recipe.seed,
            )
            figures["win_rate"] = asdict(wins)
        return figures

    def _judged(
        self,
        rows: list[Row],
        scorer: Scorer,
        answers: list[dict[str, Any]],
        baseline_answers: list[dict[str, Any]] | None,
        label: str,
    ) -> dict[str, Any]:
        """Compare responses by a judge, which names a winner per prompt; equal ones are not judged."""

        def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                "prompts": len(rows),
                "responses": sum(len(answer["responses"]) for answer in answers),
                "unfinished": evaluate.unfinished(answers),
                "samples": [asdict(sample) for sample in evaluate.samples_of(rows, answers)],
            }

        figures = summary(answers)
        if baseline_answers is None:
            return figures
        figures["of_baseline"] = summary(baseline_answers)
        pairs = [
            {**row, "responses": [own["responses"][0], other["responses"][0]]}
            for row, own, other in zip(rows, answers, baseline_answers, strict=True)
        ]
        differ = [row for row in pairs if row["responses"][0] != row["responses"][1]]
        judged = self._rewarded(differ, scorer, label) if differ else []
        figures["judge"] = biases(judged)
        for line in bias_lines(figures["judge"]) if judged else ():
            logger.info("%s", line)
        verdicts = [row["rewards"][0] for row in judged]
        decided = [0.5] * (len(pairs) - len(differ)) + [v for v in verdicts if v is not None]
        figures["undecided"] = len(pairs) - len(decided)
        if decided:
            figures["win_rate"] = asdict(evaluate.estimate(decided, self.recipe.seed))
        return figures

    # --- held-out responses ---

    def _preferences(
        self, source: str, examples: list[Mapping[str, Any]], baseline: str | None
    ) -> dict[str, Any]:
        own = self._logps(source, examples)
        other = None if baseline is None else self._logps(baseline, examples)
        return evaluate.preference_figures(own, other, self.recipe.seed)

    def _nll(self, source: str, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        logps = [row[0] for row in self._logps(source, examples)]
        tokens = [sum(example["response_mask"][0]) for example in examples]
        sources = [example["source"] for example in examples]
        return evaluate.nll_figures(logps, tokens, sources, self.recipe.seed)

    def _examples(self, spec: EvalSpec, field: str, what: str) -> list[Mapping[str, Any]]:
        audit = Audit()
        with distributed.raise_on_all_ranks():
            examples = self.preparer.evaluation_examples(spec, field, audit)
        data = f"{field}: {spec.model_dump_json()}"
        if data not in self._logged:  # all stages share the recipe's `eval`
            self._logged.add(data)
            audit.log(logger, f"the rows of {what}", f"{what}: ")
        return examples

    def _logps(self, source: str, examples: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Return Σ log π over the trained tokens of each response, computed as in training."""
        key = content_key("logps", self.models.weights_key(source, delivered=True), str(self.dtype))
        cache = distributed.on_main(lambda: ReferenceCache(self.run_dir / FOLDER / f"logps-{key}"))
        known = cached_logprobs(examples, cache)
        if known is not None:
            return list(known)
        policy = self._policy(source)
        layout = self._install(source, policy, max(self._longest, _longest(examples)))
        half = self.autocast is not None
        precision = torch.autocast(distributed.device().type, self.dtype) if half else nullcontext()
        try:
            with precision:
                return list(dataset_logprobs(
                    policy, examples, layout=layout, cache=cache,
                    shard=(distributed.rank(), distributed.world_size()), gather=distributed.all_gather_dict,
                    pad_token_id=self.tokenizer.pad_token_id or 0, tolerance=0.1 if half else 1e-3,
                ))  # fmt: skip
        finally:
            uninstall(policy)

    def _install(self, source: str, policy: Any, longest: int) -> Layout:
        """Install the policy's step layout, which is probed at its first examples only.

        Args:
            longest: of the first examples, tokens of the longest text of all examples.
        """
        if source in self._layouts:
            layout, head = self._layouts[source]
            install(policy, layout=layout, head=head)
            return layout
        self._layouts[source] = probe_on_all_ranks(policy, longest=longest, autocast=self.autocast)
        return self._layouts[source][0]


def _longest(examples: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of tokens of the longest text: a prompt and one response."""
    return max(
        (len(e["prompt_ids"]) + max(map(len, e["response_ids"])) for e in examples), default=0
    )
