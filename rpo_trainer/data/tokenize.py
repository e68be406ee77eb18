"""Internal rows → tokenized examples, as an Arrow table in memory or in a directory.

An example has the prompt ids once, followed by K responses with their masks (SFT: K = 1). The prompt is the
longest common token prefix of the K tokenized texts, up to the first trained token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import ALIKE
from rpo_trainer.data.parallel_map import Batch, Result, map_batches, processes_for
from rpo_trainer.data.rows import (
    Row,
    RowError,
    RowProblems,
    Truncation,
)
from rpo_trainer.data.tokenize_batch import BatchTokenizer, schema
from rpo_trainer.data.tokenized_shards import (
    Shard,
    ShardWriter,
    complete,
    mapped,
    read_shard,
    writing,
)
from rpo_trainer.errors import DataError
from rpo_trainer.runtime.row_progress import RowProgress

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOKENIZED = ("prompt_ids", "response_ids", "response_mask")
BATCH = 500  # rows tokenized at once; only the ids of one batch exist as Python integers
SHARD = 10_000  # rows of a shard, a multiple of BATCH


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Literal["sft", "pair", "rating"],
    max_length: int,
    truncation: Truncation,
    audit: Audit,
    processes: int | None = None,
    refuse_special_text: bool = False,
    all_end: bool = False,
    folder: Path | None = None,
    label: str = "",
) -> datasets.Dataset:
    """Tokenize rows; rows that cannot be trained on are dropped and counted in `audit`.

    Columns: `id`, `source`, `prompt_ids` [p] (p ≥ 1) and `response_ids` [K][r], both int32, `response_mask`
    [K][r] (1 = trained; at least one in each response), and `rewards` [K] float64 or null. Rating rows have
    one response, and `attributes`, a list of float64 with null for missing ratings.

    SFT trains every assistant turn including its end marker. The other kinds train the response including its
    end marker, or up to its last word if `finished` marks it as truncated. Blank and repeated responses are
    removed; a preference row with fewer than two remaining responses is dropped.

    Args:
        rows: read once; see `released` for rows that are not needed afterwards.
        max_length: maximum number of tokens of the prompt and one response.
        truncation: `drop` rows with a longer text, or `truncate` all texts at this length. A truncated
            response has no end token.
        processes: number of processes; None selects it by the number of rows, and uses one if `rows` is an
            iterator without a length hint. The result does not depend on it.
        refuse_special_text: raise an error if most rows of a source contain the text of control tokens and
            `special_tokens` is not set; otherwise add a remark to the audit.
        all_end: give every response its end marker, regardless of `finished`. Reward models need this, since
            they score complete texts.
        folder: directory for the examples, which are then memory-mapped; None: keep them in memory. Shards
            that it contains from an interrupted call with the same arguments are not tokenized again. See
            also `tokenized_shards.open_tokenized`.
        label: names the work in the progress bar, such as "tokenizing train data".

    Raises:
        DataError: rows are messages and there is no chat template; the template refuses rows, or the turns
            cannot be found in its output; no rows are left; `folder` cannot be written.
        ModelError: the tokenizer has no EOS token or no offsets.
    """
    work = BatchTokenizer(tokenizer, kind, max_length, truncation, all_end)
    total = length_hint(rows)
    if processes is None:
        processes = processes_for(total, alone=folder is not None)
    problems = RowProblems()
    with RowProgress(total or None, label or "tokenizing") as progress:
        if folder is None:
            tables = [schema(kind).empty_table()]
            with closing(_mapped(work, _batched(rows, BATCH), processes, tokenizer)) as batches:
                for done in batches:
                    tables.append(done.table)
                    audit.add_tokenized(done.audit)
                    problems.add_all(done.problems)
                    progress.advance(done.rows)
            shards, examples = [], sum(table.num_rows for table in tables)
        else:
            with writing(folder):
                shards = _written(rows, work, folder, processes, progress, tokenizer)
            for shard in shards:
                audit.add_tokenized(shard.audit)
                problems.add_all(shard.problems)
            tables, examples = [], sum(shard.examples for shard in shards)
    problems.raise_if_any(
        progress.done,
        fix="correct the rows, or set `chat_template` to chatml, plain or the path of another template",
    )
    check_special_text(audit, refuse=refuse_special_text)
    audit.max_length = max_length
    if not examples:
        raise _no_rows_left(audit, max_length)
    if folder is None:
        return _in_memory(tables)
    with writing(folder):
        complete(folder, len(shards))
        return mapped(folder, shards)


def released(rows: list[Row]) -> Iterator[Row]:
    """Yield the rows of a list and remove them from it, so that their memory is freed.

    It has a length hint, from which `tokenize_rows` selects the number of processes.
    """
    return _Released(rows)


class _Released(Iterator[Row]):
    def __init__(self, rows: list[Row]) -> None:
        rows.reverse()
        self.rows = rows

    def __next__(self) -> Row:
        if not self.rows:
            raise StopIteration
        return self.rows.pop()

    def __length_hint__(self) -> int:
        return len(self.rows)


def _written(
    rows: Iterable[Row],
    work: BatchTokenizer,
    folder: Path,
    processes: int,
    progress: RowProgress,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Shard]:
    """Write the shards that `folder` does not contain, and return all of them."""
    shards: dict[int, Shard] = {}

    def missing() -> Iterator[tuple[int, list[Row]]]:
        for number, part in enumerate(_batched(rows, SHARD)):
            shard = read_shard(folder, number)
            if shard is None or shard.rows != len(part):
                yield number, part
            else:
                shards[number] = shard
                progress.advance(shard.rows)

    writer = ShardWriter(work, folder, BATCH, progress.advance)
    with closing(_mapped(writer, missing(), processes, tokenizer)) as written:
        for shard in written:
            shards[shard.number] = shard
            if not shard.shown:
                progress.advance(shard.rows)
    return [shards[number] for number in sorted(shards)]


def _mapped(
    work: Callable[[Batch], Result],
    batches: Iterable[Batch],
    processes: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Generator[Result, None, None]:
    own_class = type(tokenizer).__module__.startswith("transformers.")  # others may import torch
    return map_batches(work, batches, processes, torch=not own_class)


def _in_memory(tables: list[Any]) -> datasets.Dataset:
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    # A fingerprint of the content would need a pickled copy of it.
    return datasets.Dataset(
        datasets.table.InMemoryTable(pa.concat_tables(tables)),
        fingerprint=datasets.fingerprint.generate_random_fingerprint(),
    )


def _no_rows_left(audit: Audit, max_length: int) -> DataError:
    fix = "correct the dropped rows, or change the setting that drops them (max_length, filter)"
    if {"too_long", "prompt_too_long"} & {*audit.dropped}:
        fix += f"; max_length ({max_length}) is the number of tokens of prompt and response"
    if audit.dropped and {*audit.dropped} <= ALIKE:
        fix += "; sample more responses per prompt, or increase the temperature"
    return DataError(
        "no rows are left to train on",
        code="data.no-rows-left",
        why="; ".join(audit.summary_lines()) or "there were no rows",
        fix=fix,
    )


def audit_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
    *,
    refuse_special_text: bool,
) -> None:
    """Count the parts of prompts that the chat template omits, as `tokenize_rows` does, before sampling.

    Raises:
        DataError, or Problems: the template refuses prompts, or does not render their tool calls; see also
            `check_special_text`.
    """
    work = BatchTokenizer(tokenizer, "pair", 0, "drop")
    work.audit = audit
    for row in rows:
        try:
            work.count_prompt(row)
        except RowError as error:
            work.problems.add(error, row["id"])
    work.problems.raise_if_any(
        len(rows),
        fix="correct the rows, or set `chat_template` to chatml, plain or the path of another template",
    )
    check_special_text(audit, refuse=refuse_special_text)


def check_special_text(audit: Audit, *, refuse: bool) -> None:
    """Warn, or raise DataError (`refuse`), if most rows of a source contain the text of control tokens."""
    for source, found in audit.special_text.items():
        if 2 * found.rows <= found.of:
            continue
        names = ", ".join(sorted(found.tokens)[:4])
        what = (
            f"{found.rows / found.of:.0%} of the rows of {source} ({found.rows} of {found.of}) contain "
            f"special tokens as text ({names})"
        )
        why = (
            "rows that were rendered by a chat template before must be parsed, or the model is trained on "
            "the characters instead of the tokens"
        )
        if refuse:
            raise DataError(
                what,
                code="data.special-token-text",
                where=source,
                why=why,
                fix="set `special_tokens: parse` in the source to read them as tokens, or `special_tokens: "
                "text` to read them as text; better, use rows of messages, before any chat template",
            )
        audit.remark(
            f'{what}: {why}. Set special_tokens="parse" to read them as tokens, "text" as text'
        )


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
