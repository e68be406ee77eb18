"""Scorers: a verifier, a local reward model, a reward endpoint, or an LLM judge.

Every scorer first checks all rows, and then yields for each row the fields `rewards` (one per response) and,
depending on the scorer, `scores`, `answers` or `judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rpo_trainer.attributes import PRESETS, resolve_weights
from rpo_trainer.data.resumable_rows import Done, RowFailed, Shard, Work, content_key, one_by_one
from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.rewards.endpoint import Endpoint, Unreadable, attribute_scores
from rpo_trainer.rewards.endpoint_messages import scored_conversation, template_options, warn_unsent
from rpo_trainer.rewards.judge import judge_row, read_template
from rpo_trainer.rewards.verifiers import FailedChecks, Verifier, check_rows, get_verifier
from rpo_trainer.rewards.vllm_scores import (
    address,
    api_of,
    classify_request,
    read_heads,
    read_scores,
    score_request,
)
from rpo_trainer.runtime.cores import usable_cores
from rpo_trainer.runtime.files import file_digest

if TYPE_CHECKING:
    from rpo_trainer.recipe import JudgeSpec, RewardEndpointSpec, ScoreSpec

BATCH_TOKENS = 16384


class Scorer(Protocol):
    """Scores the responses of rows.

    Attributes:
        columns: the columns it reads besides prompt and responses.
        key: identifies everything but the rows that the rewards depend on.
    """

    columns: tuple[str, ...]
    key: str

    def check(self, rows: Sequence[Row]) -> None:
        """Raise DataError or Problems if rows cannot be scored; called before any row is scored."""

    def work(self, rows: Sequence[Row]) -> Work:
        """Return the work for `map_rows_resumable`."""


def make_scorer(
    spec: ScoreSpec,
    *,
    base_dir: Path | None = None,
    model: Callable[[str], tuple[str, str]] | None = None,
) -> Scorer:
    """Create the scorer of a recipe's `score`.

    Args:
        spec: which scorer, and its settings.
        base_dir: the directory of relative paths.
        model: maps the name of a reward model to its directory or hub name and a key of its weights.

    Raises:
        RecipeError: a library is not installed, a template lacks placeholders, code may not be executed, or
            weights do not exist.
    """
    if spec.verifier is not None:
        return _ByVerifier(
            get_verifier(spec.verifier, allow_code_execution=spec.allow_code_execution)
        )
    if spec.model is not None:
        path, weights_key = model(spec.model) if model is not None else (spec.model, "")
        return _ByModel(spec, path, weights_key)
    if spec.endpoint is not None:
        return _ByEndpoint(spec.endpoint, spec.weights)
    assert spec.judge is not None  # the schema
    return _ByJudge(spec.judge, base_dir)


class _ByVerifier:
    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.columns = verifier.columns
        self.key = content_key("verifier", verifier.name)

    def check(self, rows: Sequence[Row]) -> None:
        check_rows(rows, self.verifier)

    def work(self, rows: Sequence[Row]) -> Work:
        failed = FailedChecks()

        def make(index: int) -> dict[str, Any]:
            try:
                check = self.verifier.prepare(rows[index], failed)
                return {"rewards": [check(response) for response in rows[index]["responses"]]}
            except RowError as error:
                raise RowFailed(str(error), code=error.code) from None

        # Code runs in another process; the other verifiers are faster without threads.
        each = one_by_one(make, workers=usable_cores() if self.verifier.runs_code else 1)

        def run(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
            try:
                yield from each(pending, shard)
            finally:
                failed.warn(self.verifier.name)

        return run


class _ByModel:
    columns: tuple[str, ...] = ()

    def __init__(self, spec: ScoreSpec, path: str, weights_key: str) -> None:
        self.spec = spec
        self.path = path
        self.batch_tokens = spec.batch_tokens or BATCH_TOKENS
        self.key = content_key("model", weights_key or path, spec.weights)

    def check(self, rows: Sequence[Row]) -> None:
        if isinstance(self.spec.weights, str) and self.spec.weights not in PRESETS:
            resolve_weights(self.spec.weights, ())

    def work(self, rows: Sequence[Row]) -> Work:
        def run(pending: Sequence[int], shard: Shard) -> Iterator[Done]:
            from rpo_trainer.rewards.reward_model import RewardModel, check_template

            model = RewardModel(self.path, self.spec.weights)
            check_template(model, rows)
            yield from model.score(rows, pending, self.batch_tokens, shard)

        return run


class _ByEndpoint:
    """A reward endpoint. Without `weights` its answers must have one attribute named `reward`."""

    columns: tuple[str, ...] = ()

    def __init__(self, spec: RewardEndpointSpec, weights: dict[str, float] | str | None) -> None:
        by_name = PRESETS.get(weights, {}) if isinstance(weights, str) else weights
        names = list(by_name) if by_name is not None else ["reward"]
        self.weights = resolve_weights(weights, names)
        self.api = api_of(spec)
        if self.api == "vllm_score" and len(self.weights) != 1:
            raise RecipeError(
                f"`weights` names {len(self.weights)} attributes; `/score` returns one score per response",
                code="recipe.too-many-attributes",
                where=spec.url,
                fix="remove `weights`, or use `/classify`, which returns a score for each label",
            )
        self.endpoint = Endpoint(spec)
        own: tuple[Any, ...] = () if self.api == "rewards" else (self.api,)
        own += () if spec.chat_template_kwargs is None else (spec.chat_template_kwargs,)
        self.key = content_key("endpoint", spec.url, spec.model, self.weights, *own)

    def check(self, rows: Sequence[Row]) -> None:
        own = self.endpoint.spec.chat_template_kwargs is not None
        scored = self.api == "vllm_score"
        warn_unsent(
            rows, self.endpoint.spec.url, documents=not own or scored,
            tools=self.api != "vllm_classify", variables=not scored,
        )  # fmt: skip

    def work(self, rows: Sequence[Row]) -> Work:
        ask = {"vllm_score": self._score, "vllm_classify": self._classify}.get(self.api, self._chat)

        def make(index: int) -> dict[str, Any]:
            found = ask(rows[index])
            rewards = [
                sum(w * each[name] for name, w in self.weights.items()) for each in found["scores"]
            ]
            return {"rewards": rewards, **found}

        return one_by_one(make, workers=self.endpoint.spec.concurrency)

    def _chat(self, row: Row) -> dict[str, Any]:
        """Return `scores` by attribute and `answers`, one for each response."""
        found, variables = [], template_options(self.endpoint.spec, row)
        for number in range(len(row["responses"])):
            messages, tools = scored_conversation(row, number)
            found.append(self.endpoint.chat(messages, self._read, **tools, **variables))
        return {"scores": [scores for scores, _ in found], "answers": [text for _, text in found]}

    def _score(self, row: Row) -> dict[str, Any]:
        """Return `scores` from `/score`: one request for all responses."""
        (name,) = self.weights
        count, spec = len(row["responses"]), self.endpoint.spec
        found = self.endpoint.post(
            address(spec.url, self.api),
            score_request(spec.model, row),
            lambda answer: read_scores(answer, count),
        )
        return {"scores": [{name: score} for score in found]}

    def _classify(self, row: Row) -> dict[str, Any]:
        """Return `scores` from `/classify`: one request per response."""
        spec, names = self.endpoint.spec, list(self.weights)
        variables = template_options(spec, row).get("extra_body", {}).get(COLUMN)
        url = address(spec.url, self.api)
        return {
            "scores": [
                self.endpoint.post(
                    url,
                    classify_request(spec.model, row, number, variables),
                    lambda answer: read_heads(answer, names),
                )
                for number in range(len(row["responses"]))
            ]
        }

    def _read(self, answer: Any) -> tuple[dict[str, float], str]:
        scores, text = attribute_scores(answer)
        if missing := [name for name in self.weights if name not in scores]:
            raise Unreadable(
                f"no score for {', '.join(missing)}, only for {', '.join(scores)}; "
                "`weights` selects the attributes of the reward",
                code="endpoint.missing-scores",
            )
        return scores, text


class _ByJudge:
    columns: tuple[str, ...] = ()

    def __init__(self, spec: JudgeSpec, base_dir: Path | None) -> None:
        path = None
        if spec.template is not None:
            path = (base_dir or Path()) / Path(spec.template).expanduser()
        self.template = read_template(path)
        self.endpoint = Endpoint(spec)
        self.options: dict[str, Any] = {
            "max_tokens": spec.max_tokens,
            "temperature": spec.temperature,
            **template_options(spec, None),
        }
        self.key = content_key("judge", spec.url, spec.model, self.template, self.options)

    def check(self, rows: Sequence[Row]) -> None:
        warn_unsent(rows, self.endpoint.spec.url, documents=False)
        single = [str(row["id"]) for row in rows if len(row["responses"]) < 2]
        if single:
            raise DataError(
                f"{len(single)} of {len(rows)} rows have one response",
                code="judge.single-response",
                where=f"rows {', '.join(single[:3])}",
                why="the judge compares pairs of responses",
                fix="use a verifier, a reward model or a reward endpoint for single responses",
            )

    def work(self, rows: Sequence[Row]) -> Work:
        return one_by_one(
            lambda index: judge_row(self.endpoint, self.template, rows[index], **self.options),
            workers=self.endpoint.spec.concurrency,
        )


def weights_key(path: Path) -> str:
    """Return a key of the weights in a directory, from the names and hashes of the files.

    Raises:
        RecipeError: the directory has no weights.
    """
    files = sorted(p for p in path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise RecipeError(
            "the directory has no weights (safetensors)",
            code="model.no-weights",
            where=str(path),
            why="results are stored under a hash of the model's weights",
            fix="give the directory of a model; in a run directory, that is RUN/STAGE/final",
        )
    return content_key([(file.name, file_digest(file)) for file in files])
