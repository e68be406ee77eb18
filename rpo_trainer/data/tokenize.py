"""Internal rows → tokenized examples, as an in-memory Arrow table.

An example has the prompt ids once, followed by K responses with their masks (SFT: K = 1). The prompt is the
longest common token prefix of the K tokenized texts, up to the first trained token.
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
BATCH = 500  # rows tokenized at once; only the ids of one batch exist as Python integers


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
    """Tokenize rows; rows that cannot be trained on are dropped and counted in `audit`.

    Columns: `id`, `source`, `prompt_ids` [p] (p ≥ 1), `response_ids` [K][r], `response_mask` [K][r]
    (1 = trained; at least one in each response), all int32, and `rewards` [K] float64 or null. Rating rows
    have one response, and `attributes`, a list of float64 with null for missing ratings.

    SFT trains every assistant turn including its end marker. The other kinds train the response including its
    end marker, or up to its last word if `finished` marks it as truncated. Blank and repeated responses are
    removed; a preference row with fewer than two remaining responses is dropped.

    Args:
        max_length: maximum number of tokens of the prompt and one response.
        truncation: `drop` rows with a longer text, or `truncate` all texts at this length. A truncated
            response has no end token.
        processes: number of processes; None selects it automatically. The result does not depend on it.
        refuse_special_text: raise an error if most rows of a source contain the text of control tokens and
            `special_tokens` is not set; otherwise add a remark to the audit.
        all_end: give every response its end marker, regardless of `finished`. Reward models need this, since
            they score complete texts.

    Raises:
        DataError: rows are messages and there is no chat template; the template refuses rows, or the turns
            cannot be found in its output; no rows are left.
        ModelError: the tokenizer has no EOS token or no offsets.
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
        fix="correct the rows, or set `chat_template` to chatml, plain or the path of another template",
    )
    check_special_text(audit, refuse=refuse_special_text)
    audit.max_length = max_length
    table = pa.concat_tables(tables)
    if not table.num_rows:
        fix = "correct the dropped rows, or change the setting that drops them (max_length, filter)"
        if {"too_long", "prompt_too_long"} & {*audit.dropped}:
            fix += f"; max_length ({max_length}) is the number of tokens of prompt and response"
        if audit.dropped and {*audit.dropped} <= ALIKE:
            fix += "; sample more responses per prompt, or increase the temperature"
        raise DataError(
            "no rows are left to train on",
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
