"""Internal rows → tokenised examples, in memory as Arrow.

One example: prompt ids once, and behind them K responses with their masks (SFT: K = 1). The prompt
is the longest common token prefix of the K tokenised texts, up to the first trained token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.chat import ChatRenderer, Rendered, render_plain, trained_turns
from rpo_trainer.data.counts import ALIKE, unread_key, unread_variable
from rpo_trainer.data.encode import Encoded, Encoder
from rpo_trainer.data.processes import map_batches, processes_for
from rpo_trainer.data.rows import (
    Message,
    Row,
    RowError,
    RowProblems,
    is_blank,
    is_cut,
    response_key,
    response_message,
    row_texts,
    with_responses,
)
from rpo_trainer.data.template_variables import variables
from rpo_trainer.data.written import left_out
from rpo_trainer.errors import DataError
from rpo_trainer.recipe.template_kwargs import COLUMN

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOKENISED = ("prompt_ids", "response_ids", "response_mask")
BATCH = 500  # rows tokenised at once: the ids of one batch are all that lives as Python integers

Truncation = Literal["drop", "cut"]


class _Dropped(Exception):
    """The row cannot be trained on; the text is the audit's reason."""


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
    """Tokenised examples of the rows that can be trained on; the others are counted in `audit`.

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

    work = _Tokenizer(tokenizer, kind, max_length, truncation, all_end)
    batches = list(_batched(rows, BATCH))
    count = processes_for(len(batches)) if processes is None else processes
    tables, problems = [_schema(kind).empty_table()], RowProblems()
    for done in map_batches(work, batches, count):
        tables.append(done.table)
        audit.add_tokenised(done.audit)
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
    work = _Tokenizer(tokenizer, "pair", 0, "drop")
    work.audit = audit
    for row in rows:
        try:
            work.look_at_prompt(row)
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


def _schema(kind: str) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    ids = pa.list_(pa.int32())
    numbers = pa.list_(pa.float64())
    columns = {
        "id": pa.string(),
        "source": pa.string(),
        "prompt_ids": ids,
        "response_ids": pa.list_(ids),
        "response_mask": pa.list_(ids),
        "rewards": numbers,
    }
    return pa.schema({**columns, "attributes": numbers} if kind == "rating" else columns)


@dataclass
class _Tokenised:
    """What became of one batch: examples (an Arrow table), and the counts of the others."""

    table: Any
    audit: Audit
    problems: RowProblems


class _Tokenizer:
    """The work of `tokenize_rows`, batch by batch; one batch does not change the next."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: Literal["sft", "pair", "rating"],
        max_length: int,
        truncation: Truncation,
        all_end: bool = False,
    ) -> None:
        self.renderer = ChatRenderer(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.variables = variables(tokenizer)
        self.kind = kind
        self.max_length = max_length
        self.truncation = truncation
        self.all_end = all_end
        self.audit, self.problems = Audit(), RowProblems()

    def __call__(self, batch: Sequence[Row]) -> _Tokenised:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        self.audit, self.problems = Audit(), RowProblems()
        table = pa.Table.from_pylist(self._examples(batch), schema=_schema(self.kind))
        return _Tokenised(table, self.audit, self.problems)

    def _examples(self, batch: Sequence[Row]) -> list[Row]:
        rendered: list[tuple[Row, list[Rendered]]] = []
        for row in batch:
            if self.all_end:
                row = {**row, "finished": None}
            try:
                used = self._usable(row)
                rendered.append((used, self._render(used)))
            except _Dropped as reason:
                self.audit.drop(str(reason), row["id"])
            except RowError as error:
                self.problems.add(error, row["id"])
        if self.problems:
            return []  # the end is an error: only more of its kind are of interest
        # The responses to one prompt are tokenised in one way, so that they share its tokens.
        apart = [any(text.literal for text in texts) for _, texts in rendered for _ in texts]
        encoded = iter(self.encoder.encode([t for _, texts in rendered for t in texts], apart))
        examples = []
        for row, texts in rendered:
            try:
                examples.append(self._example(row, [next(encoded) for _ in texts]))
            except _Dropped as reason:
                self.audit.drop(str(reason), row["id"])
        return examples

    def _render(self, row: Row) -> list[Rendered]:
        parsed = row.get("special_tokens") == "parse"
        tools = row.get("tools")
        if "messages" not in row and isinstance(row["prompt"], str):
            responses = [row["response"]] if self.kind == "sft" else row["responses"]
            texts = [
                render_plain(row["prompt"], answer, parsed=parsed, cut=is_cut(row, number))
                for number, answer in enumerate(responses)
            ]
            unread = {"tools"} if tools else set()
        else:
            talks = _conversations(row)
            last_only = "messages" not in row
            renderer = self.renderer.using(row.get(COLUMN), parsed=parsed)
            texts = [
                renderer.conversation(
                    talk, tools, last_only=last_only, parsed=parsed, cut=is_cut(row, number)
                )
                for number, talk in enumerate(talks)
            ]
            unread = self._unread(row, zip(talks, texts, strict=True))
            differs = next((text.differs for text in texts if text.differs), None)
            self.audit.add_generation(row["source"], row["id"], differs)
        self._count(row, unread)
        return texts

    def look_at_prompt(self, row: Row) -> None:
        """Counts what a prompt to sample from has that does not reach its tokens."""
        prompt, tools = row["prompt"], row.get("tools")
        if isinstance(prompt, str):
            self._count(row, {"tools"} if tools else set())
        else:
            parsed = row.get("special_tokens") == "parse"
            renderer = self.renderer.using(row.get(COLUMN), parsed=parsed)
            rendered = renderer.prompt(prompt, tools, parsed=parsed)
            self._count(row, self._unread(row, [(prompt, rendered)]))

    def _count(self, row: Row, unread: set[str]) -> None:
        for key in sorted(unread):
            self.audit.warn("tools_not_rendered" if key == "tools" else unread_key(key), row["id"])
        plain = "messages" not in row and isinstance(row["prompt"], str)
        read = frozenset() if plain else self.variables
        for name in sorted(set(row.get(COLUMN) or ()) - read):
            self.audit.warn(unread_variable(name), row["id"])
        if row.get("special_tokens") is not None:
            return
        found: set[str] = set()
        said = _said(row)
        for text in row_texts(row):
            found |= self.renderer.special_texts_in(text, said=text in said)
        if found:
            self.audit.warn("special_token_text", row["id"])
        self.audit.add_special_text(row["source"], found & self.renderer.control_tokens)

    def _unread(self, row: Row, texts: Iterable[tuple[list[Message], Rendered]]) -> set[str]:
        """The keys of a row's conversations that do not reach the tokens; counts the row once for each
        reason to warn."""
        keys: set[str] = set()
        warnings: set[str] = set()
        for talk, rendered in texts:
            renderer = self.renderer.using(row.get(COLUMN), parsed=rendered.parsed)
            found = left_out(renderer, talk, row.get("tools"), rendered)
            keys |= found.keys
            warnings |= found.warnings
        for reason in sorted(warnings):
            self.audit.warn(reason, row["id"])
        return keys

    def _usable(self, row: Row) -> Row:
        if self.kind == "pair":
            return self._usable_pair(row)
        if self.kind == "rating" and is_blank(row["responses"][0]):
            raise _Dropped("empty_response")
        return _usable_sft(row) if self.kind == "sft" else row

    def _usable_pair(self, row: Row) -> Row:
        """The row with its blank and repeated responses left out."""
        texts = row["responses"]
        filled = [i for i, text in enumerate(texts) if not is_blank(text)]
        if len(filled) < 2:
            raise _Dropped("empty_response")
        first: dict[str, int] = {}
        for i in filled:
            first.setdefault(response_key(row, i), i)
        if len(first) < 2:
            raise _Dropped("identical_responses")
        if len(filled) < len(texts):
            self.audit.warn("blank_responses_removed", row["id"])
        if len(first) < len(filled):
            self.audit.warn("duplicate_responses_removed", row["id"])
        return with_responses(row, list(first.values()))

    def _example(self, row: Row, encoded: list[Encoded]) -> Row:
        whole = [_trimmed(*text) for text in encoded]
        try:
            texts = [self._fitted(*text) for text in whole]
        except _Dropped:
            self.audit.add_too_long(max(len(ids) for ids, _ in whole))
            raise
        if any(
            len(ids) < len(all_ids) for (ids, _), (all_ids, _) in zip(texts, whole, strict=True)
        ):
            self.audit.warn("truncated", row["id"])
        if self.kind == "pair":
            row, texts = self._distinct(row, texts)
        prompt = _shared_prompt(texts)
        if not all(any(mask[prompt:]) for _, mask in texts):
            raise _Dropped("no_trained_tokens")
        self.audit.keep(row["source"])
        if row.get("finished"):
            self.audit.add_cut(row["source"], row["finished"])
        self.audit.add_lengths(prompt, (len(ids) - prompt for ids, _ in texts))
        return {
            "id": row["id"],
            "source": row["source"],
            "prompt_ids": texts[0][0][:prompt],
            "response_ids": [ids[prompt:] for ids, _ in texts],
            "response_mask": [mask[prompt:] for _, mask in texts],
            "rewards": row.get("rewards"),
            **({"attributes": row["attributes"]} if self.kind == "rating" else {}),
        }

    def _fitted(self, ids: list[int], mask: list[int]) -> Encoded:
        if len(ids) <= self.max_length:
            return ids, mask
        if mask.index(1) >= self.max_length:
            raise _Dropped("prompt_too_long")
        if self.truncation == "drop":
            raise _Dropped("too_long")
        return _trimmed(ids[: self.max_length], mask[: self.max_length])

    def _distinct(self, row: Row, texts: list[Encoded]) -> tuple[Row, list[Encoded]]:
        """What became equal by tokenising or cutting is kept once."""
        first: dict[tuple[int, ...], int] = {}
        for i, (ids, _) in enumerate(texts):
            first.setdefault(tuple(ids), i)
        if len(first) < 2:
            raise _Dropped("identical_after_truncation")
        if len(first) < len(texts):
            self.audit.warn("duplicate_responses_removed", row["id"])
        kept = list(first.values())
        return with_responses(row, kept), [texts[i] for i in kept]


def _conversations(row: Row) -> list[list[Message]]:
    """The conversation of an SFT row, or the prompt with each of the responses."""
    if "messages" in row:
        return [row["messages"]]
    count = len(row["responses"])
    return [[*row["prompt"], response_message(row, number)] for number in range(count)]


def _said(row: Row) -> set[str]:
    """The texts of a row that are the assistant's."""
    talk = row.get("messages") or (row["prompt"] if not isinstance(row.get("prompt"), str) else ())
    turns = {message["content"] for message in talk if message["role"] == "assistant"}
    answers = [row["response"]] if "response" in row else row.get("responses", ())
    return {*turns, *answers}


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _usable_sft(row: Row) -> Row:
    if "messages" in row:
        turns = [row["messages"][i] for i in trained_turns(row["messages"])]
        blank = any(is_blank(m["content"]) and not m.get("tool_calls") for m in turns)
    else:
        blank = is_blank(row["response"])
    if blank:
        raise _Dropped("empty_response")
    return row


def _trimmed(ids: list[int], mask: list[int]) -> Encoded:
    """Without what follows the last trained token: nothing is predicted there."""
    if 1 not in mask:
        raise _Dropped("no_trained_tokens")
    end = len(mask) - mask[::-1].index(1)
    return ids[:end], mask[:end]


def _shared_prompt(texts: Sequence[Encoded]) -> int:
    """Length of the token prefix that all texts share, up to the first trained token of any."""
    limit = min(mask.index(1) for _, mask in texts)
    first = texts[0][0]
    for ids, _ in texts[1:]:
        limit = next((i for i in range(limit) if ids[i] != first[i]), limit)
    if limit:
        return limit
    # Nothing stands in front of the first trained token, so nothing predicts it: it becomes the
    # prompt, where all texts begin with it.
    if any(ids[0] != first[0] for ids, _ in texts):
        raise _Dropped("no_prompt_tokens")
    return 1
