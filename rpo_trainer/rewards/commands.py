"""What the commands `score`, `generate`, `pairs` and `calibrate` do, apart from their arguments.

`score` and `generate` also run as several processes of a launcher: these share the rows, and the first writes
the file.
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

REPORT = ".report.json"  # added to the name of the output: how it was made


@contextmanager
def _processes() -> Iterator[Ranks]:
    """Those that a launcher has started for this command."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    from rpo_trainer.runtime import distributed

    distributed.start()
    yield distributed.ALL_RANKS


@contextmanager
def _locked_by_ranks(out: Path, ranks: Ranks) -> Iterator[None]:
    """The output belongs to these processes until the end."""
    with ExitStack() as held:
        with ranks.raise_on_all_ranks():
            if ranks.rank() == 0:
                held.enter_context(_locked(out))
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    made: list[Path] = []
    try:
        made = make_folder(out.parent)
        lock = FileLock(out.with_name(f".{out.name}.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            "another process is writing this file",
            code="output.locked",
            where=str(out),
            why="the rows of two processes would be mixed in it",
            fix="wait for it, or stop it",
        ) from None
    except OSError as error:
        remove_empty(made)
        raise RunError(
            f"the output cannot be written: {error.strerror or error}",
            code="output.not-writable",
            where=str(out),
            why="the rows could not be kept",
            fix="name another output with -o, or check the path and its permissions",
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        remove_empty(made)  # where nothing was written


def _finished(out: Path, key: str, *, overwrite: bool) -> bool:
    """Whether the output is there, made of the same rows with the same settings.

    Args:
        overwrite: it is made again, and replaced once the new one is complete. Unfinished work of other
            rows or settings is deleted.

    Raises:
        RunError: another file is there.
    """
    if overwrite and not out.is_dir():
        discard_partials(out, key)
        return False
    if not out.exists() or partial_paths(out):  # the latter are removed last of all
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
        "the output exists, and was not made by this command",
        code="output.exists",
        where=str(out),
        why="other rows or settings have made it, and nothing of yours is written over",
        fix="name another output with -o, or add --overwrite",
    )


def _report(out: Path, key: str, rows: int, settings: dict[str, Any]) -> None:
    """What the output was made with; written after it, and what makes it finished."""
    content = {
        "key": key, "xxh3_128": file_digest(out), "rows": rows, "settings": redact_values(settings),
    }  # fmt: skip
    atomic_write(out.with_name(out.name + REPORT), json.dumps(content, indent=1))


def score_file(
    source: SourceSpec, out: Path, spec: ScoreSpec, *, overwrite: bool = False
) -> list[str]:
    """Rewards for every row of a file; resumed where it was interrupted.

    Args:
        overwrite: replace an output of other rows or settings, and their unfinished work.

    Returns:
        A summary, line by line; of several processes, the first one's alone.

    Raises:
        DataError, Problems: rows that cannot be read or scored.
        RunError: the output is another file, or unfinished work of other settings lies there.
    """
    from rpo_trainer.data.judge_bias import bias_lines, biases
    from rpo_trainer.rewards.scorers import make_scorer, weights_key

    def model(path: str) -> tuple[str, str]:
        return path, weights_key(Path(path)) if Path(path).is_dir() else path

    settings: dict[str, Any] = {"score": spec.model_dump(exclude_none=True)}
    rewards: list[float | None] = []  # of all responses; None: a judge has not decided
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
    lines = bias_lines(settings["judge"]) if spec.judge is not None else []
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
    return f"{out} is finished already: nothing to do"


def _on_first_rank(ranks: Ranks, lines: list[str]) -> list[str]:
    """The lines on the first process, none on the others, which would only repeat them."""
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
    """Responses for every prompt of a file, from all policies; resumed where it was interrupted.

    Args:
        overwrite: as for `score_file`.

    Returns:
        A summary, as `score_file`.

    Raises:
        DataError, Problems: prompts that cannot be read, or finally have no response.
        ModelError: a policy that cannot be loaded.
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
            made = sample_rows(
                out, rows, policies, spec, seed=seed, ranks=ranks,
                then=lambda made: _report(out, key, len(made), settings),
            )  # fmt: skip
    count = sum(len(row["responses"]) for row in made)
    cut = sum(not flag for row in made for flag in row["finished"])
    line = f"{count} responses to {len(made)} prompts, {cut} cut by max_new_tokens: {out}"
    return _on_first_rank(ranks, [line])


def _model_spec(name: str, chat_template: str | None) -> ModelSpec:
    from rpo_trainer.recipe import ModelSpec

    return ModelSpec.model_validate({"name_or_path": name, "chat_template": chat_template})


def _audit_template(
    rows: Sequence[Row], name: str, chat_template: str | None, source: SourceSpec
) -> None:
    """Logs what the chat template of a policy leaves out of the prompts.

    Raises:
        DataError, Problems: as `audit_prompts`.
        RecipeError: `--kwargs` that the chat template does not read.
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

        cuda = torch.cuda.is_available()
        spec = _model_spec(name, chat_template)
        tokenizer = load_tokenizer(spec, Path())
        model: Any = load_model(spec, Path(), seed=0, vocabulary=len(tokenizer))
        model = model.to(device="cuda", dtype=torch.bfloat16) if cuda else model
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
    """Preference rows of a file of scored or ranked responses, as a stage reads them.

    Args:
        overwrite: replace an existing output.

    Returns:
        A summary, line by line.

    Raises:
        DataError, Problems: rows that cannot be read, without rewards, or of which none is left.
    """
    if out.exists() and (out.is_dir() or not overwrite):
        raise RunError(
            "the output is a directory" if out.is_dir() else "the output exists",
            code="output.exists",
            where=str(out),
            why="existing files are not replaced by default",
            fix="name another output with -o"
            + ("" if out.is_dir() else ", or replace this one with --overwrite"),
        )
    rows, audit = read_pairs(source, keep_all=True)
    made = make_preference_rows(rows, **pairs_arguments(spec), seed=seed, audit=audit)
    made = filter_rows(made, filter, audit) if made else made
    audit.observe_pairs(made)
    if not made:
        raise DataError(
            "no row is left",
            code="data.no-rows-left",
            where=str(source.path),
            why="; ".join(audit.summary_lines()),
            fix="lower --min-gap and the thresholds, or take other rows",
        )
    write_rows(out, written_pairs(made))
    lines = audit.summary_lines()
    if gaps := sorted(row["rewards"][0] - row["rewards"][-1] for row in made if row["rewards"]):
        lines.append(f"reward gaps: {len(gaps)} rows{_spread(gaps)}")
    return [*lines, f"{len(made)} rows: {out}"]


def calibrate_file(
    sources: Sequence[SourceSpec], reward_scale: float | None
) -> dict[str, Calibration]:
    """Calibrations of the rows of some files, by source and for all.

    Raises:
        DataError, Problems: rows that cannot be read, or have no rewards.
    """
    from rpo_trainer.rewards.calibrate import by_source

    rows: list[Row] = []
    for source in sources:
        found, audit = read_pairs(source)
        audit.log(logger, "the rows")
        rows += found
    return by_source(rows, reward_scale)
