"""Internal rows → tokenized examples, in memory as Arrow.

One example: prompt ids once, and behind them K responses with their masks (SFT: K = 1). The prompt
is the longest common token prefix of the K tokenized texts, up to the first trained token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import ALIKE
from rpo_trainer.data.parallel_map import map_batches, processes_for
from rpo_trainer.data.rows import (
    Row,
    RowError,
    RowProblems,
    Truncation,
)
from rpo_trainer.data.tokenize_batch import BatchTokenizer, schema
from rpo_trainer.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOKENIZED = ("prompt_ids", "response_ids", "response_mask")
BATCH = 500  # rows tokenized at once: the ids of one batch are all that lives as Python integers


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
) -> datasets.Dataset:
    """Tokenized examples of the rows that can be trained on; the others are counted in `audit`.

    Columns: `id`, `source`, `prompt_ids` [p] (p ≥ 1), `response_ids` [K][r], `response_mask` [K][r]
    (1 = trained; at least one in each response), all int32, and `rewards` [K] float64 or null. Rows
    of ratings have one response, and `attributes` float64, a list with null for what is not rated.

    SFT trains every assistant turn with its end marker, the others their last response only: with its
    end marker, but where `finished` says that it was cut before it ended, up to its last word.
    Blank responses and, of equal ones, all but the first leave the row; a preference row of which
    fewer than two are left is dropped.

    Args:
        max_length: tokens of prompt and one response together.
        truncation: `drop` a row with a longer text, or `cut` all its texts at this length; a cut
            response has no end token.
        processes: None: as many as it pays for; the result is the same.
        refuse_special_text: most rows of a source with the text of control tokens, and not said how it
            is to be read (`special_tokens`), are an error; else a remark of the audit.
        all_end: give every response its end marker, whatever `finished` says: a reward model is trained on
            what it will score, and scorers read texts.

    Raises:
        DataError: no chat template where rows are messages; a template that refuses rows, or in
            which the turns cannot be found; no row left.
        ModelError: no end token, or a tokenizer without offsets.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    work = BatchTokenizer(tokenizer, kind, max_length, truncation, all_end)
    batches = list(_batched(rows, BATCH))
    count = processes_for(len(batches)) if processes is None else processes
    tables, problems = [schema(kind).empty_table()], RowProblems()
    for done in map_batches(work, batches, count):
        tables.append(done.table)
        audit.add_tokenized(done.audit)
        problems.add_all(done.problems)
    problems.raise_if_any(
        sum(map(len, batches)),
        why="the loss is on what the assistant says, so its tokens must be known",
        fix="correct the rows, or choose another chat_template: chatml | plain | a path",
    )
    check_special_text(audit, refuse=refuse_special_text)
    audit.max_length = max_length
    table = pa.concat_tables(tables)
    if not table.num_rows:
        fix = "correct the rows that were dropped, or change what drops them (max_length, filter)"
        if {"too_long", "prompt_too_long"} & {*audit.dropped}:
            fix += f"; max_length is {max_length} tokens for prompt and response together"
        if audit.dropped and {*audit.dropped} <= ALIKE:
            fix += "; of sampled responses take more a prompt, or a higher temperature"
        raise DataError(
            "no row is left to train on",
            code="data.no-rows-left",
            why="; ".join(audit.summary_lines()) or "there were no rows",
            fix=fix,
        )
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def audit_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
    *,
    refuse_special_text: bool,
) -> None:
    """Counts what the chat template leaves out of prompts to sample from, as `tokenize_rows` does.

    Raises:
        DataError, or Problems: prompts that the template refuses, or whose tool calls it does not write;
            see also `check_special_text`.
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
        why="no response can be sampled to them",
        fix="correct the rows, or choose another chat_template: chatml | plain | a path",
    )
    check_special_text(audit, refuse=refuse_special_text)


def check_special_text(audit: Audit, *, refuse: bool) -> None:
    """Says where most rows of a source carry the text of control tokens.

    Raises DataError: they do, and `refuse` is set.
    """
    for source, found in audit.special_text.items():
        if 2 * found.rows <= found.of:
            continue
        names = ", ".join(sorted(found.tokens)[:4])
        what = (
            f"{found.rows / found.of:.0%} of the rows of {source} ({found.rows} of {found.of}) hold "
            f"special tokens as text ({names})"
        )
        why = "as text they are letters: rows that went through a chat template before train other tokens"
        if refuse:
            raise DataError(
                what,
                code="data.special-token-text",
                where=source,
                why=why,
                fix="`special_tokens: parse` of the source makes tokens of them, `special_tokens: text` "
                "keeps the letters; best are rows as messages, before any chat template",
            )
        audit.remark(
            f'{what}; {why}. special_tokens="parse" makes tokens of them, "text" keeps the letters'
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
