"""Implementation of the commands `score`, `generate`, `pairs` and `calibrate`.

`score` and `generate` also run under a launcher: its processes share the rows, and the first one writes the
file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import quantiles
from rpo_trainer.data.filters import filter_rows
from rpo_trainer.data.partial_file import discard_partials, partial_paths
from rpo_trainer.data.resumable_rows import content_key, write_rows, write_rows_resumable
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import DataError, RunError
from rpo_trainer.redact import redact_values
from rpo_trainer.rewards.pairs import make_preference_rows, pairs_arguments
from rpo_trainer.rewards.row_files import read_pairs, read_prompts, read_responses, written_pairs
from rpo_trainer.runtime.files import atomic_write, file_digest, make_folder, remove_empty
from rpo_trainer.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rpo_trainer.recipe import (
        FilterSpec,
        GenerateSpec,
        ModelSpec,
        PairsSpec,
        ScoreSpec,
        SourceSpec,
    )
    from rpo_trainer.rewards.calibrate import Calibration

logger = logging.getLogger(__name__)

REPORT = ".report.json"  # suffix of the file with the settings of an output


@contextmanager
def _processes() -> Iterator[Ranks]:
    """Yield the processes that a launcher started for this command."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    from rpo_trainer.runtime import distributed

    distributed.start()
    yield distributed.ALL_RANKS


@contextmanager
def _locked_by_ranks(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of the output for all processes."""
    with ExitStack() as held:
        with ranks.raise_on_all_ranks():
            if ranks.rank() == 0:
                held.enter_context(_locked(out))
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    created: list[Path] = []
    try:
        created = make_folder(out.parent)
        lock = FileLock(out.with_name(f".{out.name}.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            "another process is writing this file",
            code="output.locked",
            where=str(out),
            why="the rows of both would be mixed",
            fix="wait until it ends, or stop it",
        ) from None
    except OSError as error:
        remove_empty(created)
        raise RunError(
            f"the output cannot be written: {error.strerror or error}",
            code="output.not-writable",
            where=str(out),
            why="the rows could not be saved",
            fix="check the path and its permissions, or give another output with -o",
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        remove_empty(created)  # if nothing was written


def _finished(out: Path, key: str, *, overwrite: bool) -> bool:
    """Whether the output exists, created from the same rows with the same settings.

    Args:
        overwrite: it is created again, and replaced once the new one is complete. Unfinished work of other
            rows or settings is deleted.

    Raises:
        RunError: it exists and was not.
    """
    if overwrite and not out.is_dir():
        discard_partials(out, key)
        return False
    if not out.exists() or partial_paths(out):  # partial files are removed last
        return False
    report = out.with_name(out.name + REPORT)
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    if (
        isinstance(found, dict)
        and found.get("key") == key
        and found.get("xxh3_128") == file_digest(out)
    ):
        return True
    raise RunError(
        "the output exists, and was created from other rows or with other settings",
        code="output.exists",
        where=str(out),
        why="existing files are not overwritten",
        fix="give another output with -o, or add --overwrite",
    )


def _report(out: Path, key: str, rows: int, settings: dict[str, Any]) -> None:
    """Write the settings of an output; an output without this file is not finished."""
    content = {
        "key": key, "xxh3_128": file_digest(out), "rows": rows, "settings": redact_values(settings),
    }  # fmt: skip
    atomic_write(out.with_name(out.name + REPORT), json.dumps(content, indent=1))


def score_file(
    source: SourceSpec, out: Path, spec: ScoreSpec, *, overwrite: bool = False
) -> list[str]:
    """Score every row of a file; resumes after an interruption.

    Args:
        overwrite: replace an output of other rows or settings, and their unfinished work.

    Returns:
        The lines of a summary; empty on all processes but the first.

    Raises:
        DataError, Problems: rows cannot be read or scored.
        RunError: the output is another file, or unfinished with other settings.
    """
    from rpo_trainer.data.judge_bias import bias_lines, biases
    from rpo_trainer.rewards.scorers import make_scorer, weights_key

    def model(path: str) -> tuple[str, str]:
        return path, weights_key(Path(path)) if Path(path).is_dir() else path

    settings: dict[str, Any] = {"score": spec.model_dump(exclude_none=True)}
    rewards: list[float | None] = []  # of all responses; None: the judge gave no consistent verdict
    with _processes() as ranks:
        with ranks.raise_on_all_ranks():
            found = read_responses(source)
            found.audit.log(logger, "the rows")
            scorer = make_scorer(spec, model=model)
            key = content_key(scorer.key, found.rows)
        with _locked_by_ranks(out, ranks):
            if ranks.on_main(lambda: _finished(out, key, overwrite=overwrite)):
                return _on_first_rank(ranks, [_nothing_to_do(out)])
            with ranks.raise_on_all_ranks():
                scorer.check(found.rows)

            def assemble(fields: Sequence[dict[str, Any]]) -> list[Row]:
                rows = [{**row, **new} for row, new in zip(found.rows, fields, strict=True)]
                rewards.extend(reward for row in rows for reward in row["rewards"])
                if spec.judge is not None:
                    settings["judge"] = biases(rows)
                return found.written(rows)

            written = write_rows_resumable(
                out, [row["id"] for row in found.rows], scorer.work(found.rows), assemble, key=key,
                what="scored", then=lambda rows: _report(out, key, len(rows), settings), ranks=ranks,
            )  # fmt: skip
    lines = bias_lines(settings["judge"]) if "judge" in settings else []
    lines = [*lines, _rewards_line(rewards), f"{len(written)} rows scored: {out}"]
    return _on_first_rank(ranks, lines)


def _rewards_line(rewards: Sequence[float | None]) -> str:
    found = sorted(reward for reward in rewards if reward is not None)
    lacking = f", {len(rewards) - len(found)} without one" if len(found) < len(rewards) else ""
    return f"rewards: {len(found)} responses{lacking}{_spread(found)}"


def _spread(ordered: Sequence[float]) -> str:
    if not ordered:
        return ""
    q = quantiles(ordered)
    return f", mean {q['mean']:.4g}, from {q['min']:.4g} to {q['max']:.4g}"


def _nothing_to_do(out: Path) -> str:
    return f"{out} is already finished: nothing to do"


def _on_first_rank(ranks: Ranks, lines: list[str]) -> list[str]:
    """Return the lines on the first process, and none on the others."""
    return [] if ranks.rank() else lines


def generate_file(
    source: SourceSpec,
    out: Path,
    spec: GenerateSpec,
    *,
    seed: int,
    chat_template: str | None,
    overwrite: bool = False,
) -> list[str]:
    """Sample responses from all policies for every prompt of a file; resumes after an interruption.

    Args:
        overwrite: as for `score_file`.

    Returns:
        The lines of a summary, as `score_file`.

    Raises:
        DataError, Problems: prompts cannot be read, or got no response after all retries.
        ModelError: a policy cannot be loaded.
        RunError: as `score_file`.
    """
    from rpo_trainer.rewards.policies import (
        EndpointPolicy,
        LocalPolicy,
        Policy,
        check_truths,
        sample_rows,
    )
    from rpo_trainer.rewards.scorers import weights_key

    settings = {"generate": spec.model_dump(exclude_none=True), "seed": seed}
    with _processes() as ranks:
        with ranks.raise_on_all_ranks():
            rows, audit = read_prompts(source)
            audit.log(logger, "the rows")
            check_truths(rows, spec)
            policies: list[Policy] = []
            for name in spec.policies:
                weights = weights_key(Path(name)) if Path(name).is_dir() else name
                load = _loader(name, chat_template)
                policies.append(
                    LocalPolicy(name, load, spec, weights=f"{weights}:{chat_template}", seed=seed)
                )
            policies += [EndpointPolicy(endpoint, spec, seed=seed) for endpoint in spec.endpoints]
            key = content_key([policy.key for policy in policies], rows, seed)
        with _locked_by_ranks(out, ranks):
            if ranks.on_main(lambda: _finished(out, key, overwrite=overwrite)):
                return _on_first_rank(ranks, [_nothing_to_do(out)])
            with ranks.raise_on_all_ranks():
                if ranks.rank() == 0:
                    for name in spec.policies:
                        _audit_template(rows, name, chat_template, source)
            sampled = sample_rows(
                out, rows, policies, spec, seed=seed, ranks=ranks,
                then=lambda sampled: _report(out, key, len(sampled), settings),
            )  # fmt: skip
    count = sum(len(row["responses"]) for row in sampled)
    truncated = sum(not flag for row in sampled for flag in row["finished"])
    line = f"{count} responses to {len(sampled)} prompts, {truncated} truncated by max_new_tokens: {out}"
    return _on_first_rank(ranks, [line])


def _model_spec(name: str, chat_template: str | None) -> ModelSpec:
    from rpo_trainer.recipe import ModelSpec

    return ModelSpec.model_validate({"name_or_path": name, "chat_template": chat_template})


def _audit_template(
    rows: Sequence[Row], name: str, chat_template: str | None, source: SourceSpec
) -> None:
    """Log what the chat template of a policy omits from the prompts.

    Raises:
        DataError, Problems: as `audit_prompts`.
        RecipeError: the chat template does not read a variable of `--kwargs`.
    """
    from rpo_trainer.data.template_variables import check_kwargs
    from rpo_trainer.data.tokenize import audit_prompts
    from rpo_trainer.models.loading import load_tokenizer

    audit = Audit()
    tokenizer = load_tokenizer(_model_spec(name, chat_template), Path())
    check_kwargs(source.chat_template_kwargs, tokenizer, "--kwargs")
    audit_prompts(rows, tokenizer, audit, refuse_special_text=True)
    audit.log(logger, "the rows", f"{name}: ")


def _loader(name: str, chat_template: str | None) -> Callable[[], Any]:
    def load() -> Any:
        import torch

        from rpo_trainer.models.loading import load_model, load_tokenizer
        from rpo_trainer.runtime.devices import best_device, bfloat16_supported

        spec = _model_spec(name, chat_template)
        tokenizer = load_tokenizer(spec, Path())
        model: Any = load_model(spec, Path(), seed=0, vocabulary=len(tokenizer))
        half = torch.bfloat16 if bfloat16_supported() else None
        model = model.to(device=best_device(), dtype=half)
        return model, tokenizer

    return load


def pairs_file(
    source: SourceSpec,
    out: Path,
    spec: PairsSpec,
    filter: FilterSpec | None,
    *,
    seed: int,
    overwrite: bool = False,
) -> list[str]:
    """Build preference rows from a file of scored or ranked responses, as a stage does.

    Args:
        overwrite: replace an existing output.

    Returns:
        The lines of a summary.

    Raises:
        DataError, Problems: rows cannot be read, have no rewards, or were all dropped.
        RunError: the output exists.
    """
    if out.exists() and (out.is_dir() or not overwrite):
        raise RunError(
            "the output is a directory" if out.is_dir() else "the output exists",
            code="output.exists",
            where=str(out),
            why="existing files are not overwritten",
            fix="name another output with -o"
            + ("" if out.is_dir() else ", or replace this one with --overwrite"),
        )
    rows, audit = read_pairs(source, keep_all=True)
    preferences = make_preference_rows(rows, **pairs_arguments(spec), seed=seed, audit=audit)
    preferences = filter_rows(preferences, filter, audit) if preferences else preferences
    audit.observe_pairs(preferences)
    if not preferences:
        raise DataError(
            "no rows are left",
            code="data.no-rows-left",
            where=str(source.path),
            why="; ".join(audit.summary_lines()),
            fix="lower --min-gap and the thresholds, or use other rows",
        )
    write_rows(out, written_pairs(preferences))
    lines = audit.summary_lines()
    if gaps := sorted(
        row["rewards"][0] - row["rewards"][-1] for row in preferences if row["rewards"]
    ):
        lines.append(f"reward gaps: {len(gaps)} rows{_spread(gaps)}")
    return [*lines, f"{len(preferences)} rows: {out}"]


def calibrate_file(
    sources: Sequence[SourceSpec], reward_scale: float | None
) -> dict[str, Calibration]:
    """Calibrate the rows of several files, by source and for all.

    Raises:
        DataError, Problems: rows cannot be read, or have no rewards.
    """
    from rpo_trainer.rewards.calibrate import by_source

    rows: list[Row] = []
    for source in sources:
        found, audit = read_pairs(source)
        audit.log(logger, "the rows")
        rows += found
    return by_source(rows, reward_scale)
