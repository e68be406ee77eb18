"""Tokenize one batch of rows, and count the rows and fields that are not trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import unread_key, unread_variable
from rpo_trainer.data.encode import Encoded, Encoder
from rpo_trainer.data.rendered import Rendered, render_plain
from rpo_trainer.data.rows import (
    Message,
    Row,
    RowError,
    RowProblems,
    Truncation,
    is_blank,
    is_truncated,
    response_key,
    response_message,
    row_texts,
    with_responses,
)
from rpo_trainer.data.template_coverage import left_out
from rpo_trainer.data.template_variables import variables
from rpo_trainer.data.trained_spans import ChatRenderer, trained_turns
from rpo_trainer.recipe.template_kwargs import COLUMN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Dropped(Exception):
    """The row cannot be trained on; the text is the reason for the audit."""


def schema(kind: str) -> Any:
    """Return the Arrow schema of tokenized examples: token ids are int32, masks int8."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    ids = pa.list_(pa.int32())
    numbers = pa.list_(pa.float64())
    columns = {
        "id": pa.string(),
        "source": pa.string(),
        "prompt_ids": ids,
        "response_ids": pa.list_(ids),
        "response_mask": pa.list_(pa.list_(pa.int8())),
        "rewards": numbers,
    }
    return pa.schema({**columns, "attributes": numbers} if kind == "rating" else columns)


@dataclass
class TokenizedBatch:
    """Result of one batch: examples (an Arrow table), counts, and faults of rows."""

    table: Any
    audit: Audit
    problems: RowProblems
    rows: int


class BatchTokenizer:
    """Tokenizes batches of rows for `tokenize_rows`; batches are independent."""

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

    def __call__(self, batch: Sequence[Row]) -> TokenizedBatch:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        self.audit, self.problems = Audit(), RowProblems()
        table = pa.Table.from_pylist(self._examples(batch), schema=schema(self.kind))
        return TokenizedBatch(table, self.audit, self.problems, len(batch))

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
            return []  # the result is an error: only collect further faults
        # All responses to a prompt are tokenized in the same way, so that they share its tokens.
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
                render_plain(
                    row["prompt"], answer, parsed=parsed, truncated=is_truncated(row, number)
                )
                for number, answer in enumerate(responses)
            ]
            unread = {"tools"} if tools else set()
        else:
            conversations = _conversations(row)
            last_only = "messages" not in row
            renderer = self.renderer.using(row.get(COLUMN), parsed=parsed)
            texts = [
                renderer.conversation(
                    messages,
                    tools,
                    last_only=last_only,
                    parsed=parsed,
                    truncated=is_truncated(row, number),
                )
                for number, messages in enumerate(conversations)
            ]
            unread = self._unread(row, zip(conversations, texts, strict=True))
            differs = next((text.differs for text in texts if text.differs), None)
            self.audit.add_generation(row["source"], row["id"], differs)
        self._count(row, unread)
        return texts

    def count_prompt(self, row: Row) -> None:
        """Count the parts of a prompt that are not rendered."""
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
        assistant_texts = _assistant_texts(row)
        for text in row_texts(row):
            found |= self.renderer.special_texts_in(text, assistant=text in assistant_texts)
        if found:
            self.audit.warn("special_token_text", row["id"])
        self.audit.add_special_text(row["source"], found & self.renderer.control_tokens)

    def _unread(self, row: Row, texts: Iterable[tuple[list[Message], Rendered]]) -> set[str]:
        """Return the message keys of a row that are not rendered; count the row once for each warning."""
        keys: set[str] = set()
        warnings: set[str] = set()
        for messages, rendered in texts:
            renderer = self.renderer.using(row.get(COLUMN), parsed=rendered.parsed)
            missing = left_out(renderer, messages, row.get("tools"), rendered)
            keys |= missing.keys
            warnings |= missing.warnings
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
        """Return the row without blank and repeated responses."""
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
        untruncated = [_trimmed(*text) for text in encoded]
        try:
            texts = [self._fitted(*text) for text in untruncated]
        except _Dropped:
            self.audit.add_too_long(max(len(ids) for ids, _ in untruncated))
            raise
        if any(
            len(ids) < len(all_ids)
            for (ids, _), (all_ids, _) in zip(texts, untruncated, strict=True)
        ):
            self.audit.warn("truncated", row["id"])
        if self.kind == "pair":
            row, texts = self._distinct(row, texts)
        prompt = _shared_prompt(texts)
        if not all(any(mask[prompt:]) for _, mask in texts):
            raise _Dropped("no_trained_tokens")
        self.audit.keep(row["source"])
        if row.get("finished"):
            self.audit.add_truncated(row["source"], row["finished"])
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
        """Remove responses that are equal after tokenization or truncation."""
        first: dict[tuple[int, ...], int] = {}
        for i, (ids, _) in enumerate(texts):
            first.setdefault(tuple(ids), i)
        if len(first) < 2:
            raise _Dropped("identical_after_truncation")
        if len(first) < len(texts):
            self.audit.warn("duplicate_responses_removed", row["id"])
        indices = list(first.values())
        return with_responses(row, indices), [texts[i] for i in indices]


def _conversations(row: Row) -> list[list[Message]]:
    """Return the conversation of an SFT row, or the prompt with each of the responses."""
    if "messages" in row:
        return [row["messages"]]
    count = len(row["responses"])
    return [[*row["prompt"], response_message(row, number)] for number in range(count)]


def _assistant_texts(row: Row) -> set[str]:
    """Return the assistant's texts of a row."""
    messages = row.get("messages") or (
        row["prompt"] if not isinstance(row.get("prompt"), str) else ()
    )
    turns = {message["content"] for message in messages if message["role"] == "assistant"}
    answers = [row["response"]] if "response" in row else row.get("responses", ())
    return {*turns, *answers}


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
    """Remove the tokens after the last trained one."""
    if 1 not in mask:
        raise _Dropped("no_trained_tokens")
    end = len(mask) - mask[::-1].index(1)
    return ids[:end], mask[:end]


def _shared_prompt(texts: Sequence[Encoded]) -> int:
    """Return the length of the common token prefix, up to the first trained token of any text."""
    limit = min(mask.index(1) for _, mask in texts)
    first = texts[0][0]
    for ids, _ in texts[1:]:
        limit = next((i for i in range(limit) if ids[i] != first[i]), limit)
    if limit:
        return limit
    # No token precedes the first trained one, so it cannot be predicted: it becomes the prompt if all texts
    # begin with it.
    if any(ids[0] != first[0] for ids, _ in texts):
        raise _Dropped("no_prompt_tokens")
    return 1
