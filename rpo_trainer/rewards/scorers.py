"""Where rewards come from: a verifier, a reward model here, one behind an endpoint, or an LLM judge.

Every scorer works alike: it looks at all rows before time is spent, and then gives each row, one by
one, the fields `rewards` (one a response) and, where there is more to tell, `scores`, `answers` or `judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rpo_trainer.attributes import PRESETS, resolve_weights
from rpo_trainer.data.resumable_rows import Done, RowFailed, Shard, Work, content_key, one_by_one
from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.rewards.endpoint import Endpoint, Unreadable, attribute_scores
from rpo_trainer.rewards.endpoint_messages import scored_conversation, template_options, warn_unsent
from rpo_trainer.rewards.judge import judge_row, read_template
from rpo_trainer.rewards.verifiers import FailedChecks, Verifier, check_rows, get_verifier
from rpo_trainer.runtime.cores import usable_cores
from rpo_trainer.runtime.files import file_digest

if TYPE_CHECKING:
    from rpo_trainer.recipe import EndpointSpec, JudgeSpec, ScoreSpec

BATCH_TOKENS = 16384


class Scorer(Protocol):
    """Gives rewards to the responses of rows.

    Attributes:
        columns: what it reads of a row beside its prompt and responses.
        key: of all that the rewards depend on, beside the rows.
    """

    columns: tuple[str, ...]
    key: str

    def check(self, rows: Sequence[Row]) -> None:
        """Raises DataError, or Problems, where rows cannot be scored, before any is."""

    def work(self, rows: Sequence[Row]) -> Work:
        """What `map_rows_resumable` needs."""


def make_scorer(
    spec: ScoreSpec,
    *,
    base_dir: Path | None = None,
    model: Callable[[str], tuple[str, str]] | None = None,
) -> Scorer:
    """The scorer that a recipe's `score` describes.

    Args:
        base_dir: where relative paths start.
        model: from what the spec calls a reward model to its directory or hub name, and a key of its
            weights.

    Raises:
        RecipeError: a library that is not installed, a template without its places, code that may
            not be run, no such weights.
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

        # Code waits for another process; the rest is faster without threads.
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
    """Without weights, the endpoint must answer with one attribute called `reward`."""

    columns: tuple[str, ...] = ()

    def __init__(self, spec: EndpointSpec, weights: dict[str, float] | str | None) -> None:
        by_name = PRESETS.get(weights, {}) if isinstance(weights, str) else weights
        names = list(by_name) if by_name is not None else ["reward"]
        self.weights = resolve_weights(weights, names)
        self.endpoint = Endpoint(spec)
        own = () if spec.chat_template_kwargs is None else (spec.chat_template_kwargs,)
        self.key = content_key("endpoint", spec.url, spec.model, self.weights, *own)

    def check(self, rows: Sequence[Row]) -> None:
        own = self.endpoint.spec.chat_template_kwargs is not None
        warn_unsent(rows, self.endpoint.spec.url, documents=not own)

    def work(self, rows: Sequence[Row]) -> Work:
        def make(index: int) -> dict[str, Any]:
            row = rows[index]
            found, variables = [], template_options(self.endpoint.spec, row)
            for number in range(len(row["responses"])):
                messages, tools = scored_conversation(row, number)
                found.append(self.endpoint.chat(messages, self._read, **tools, **variables))
            scores = [by_name for by_name, _ in found]
            rewards = [sum(w * each[name] for name, w in self.weights.items()) for each in scores]
            return {"rewards": rewards, "scores": scores, "answers": [text for _, text in found]}

        return one_by_one(make, workers=self.endpoint.spec.concurrency)

    def _read(self, answer: Any) -> tuple[dict[str, float], str]:
        scores, text = attribute_scores(answer)
        if missing := [name for name in self.weights if name not in scores]:
            raise Unreadable(
                f"no score for {', '.join(missing)}, but for {', '.join(scores)}; "
                "`weights` says which attributes make the reward",
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
                why="the judge compares responses in pairs",
                fix="score single responses with a verifier, a reward model or a reward endpoint",
            )

    def work(self, rows: Sequence[Row]) -> Work:
        return one_by_one(
            lambda index: judge_row(self.endpoint, self.template, rows[index], **self.options),
            workers=self.endpoint.spec.concurrency,
        )


def weights_key(path: Path) -> str:
    """A key of the model files in a directory: of their hashes, by name.

    Raises:
        RecipeError: there are none.
    """
    files = sorted(p for p in path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise RecipeError(
            "there are no weights (safetensors) here",
            code="model.no-weights",
            where=str(path),
            why="what a model has made is kept under a hash of its weights, to be found again",
            fix="name the directory of a model; of a run that is RUN/STAGE/final",
        )
    return content_key([(file.name, file_digest(file)) for file in files])
