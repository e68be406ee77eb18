"""Prompts to sample responses to, and their tokens."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.encode import PromptEncoder
from rpo_trainer.data.rows import RowError
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.sampled_text import PromptTokens
from rpo_trainer.runtime.row_progress import RowProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[dict[str, Any]]
Tools = Sequence[list[dict[str, Any]] | None]  # of each prompt
TemplateKwargs = Sequence[Mapping[str, Any]]  # of each prompt


class EncodedPrompts:
    """Token ids of prompts by index, each encoded once as long as the tokenizer is the same object.

    Policies that share a tokenizer, and several calls for the same prompts, can share it.
    """

    def __init__(self) -> None:
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._ids: dict[int, array[int]] = {}  # a list of integers takes nine times the memory

    def add(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        indices: Collection[int],
        *,
        show: bool,
    ) -> None:
        """Encode the prompts with these indices that are not known.

        Args:
            show: show the progress.

        Raises:
            DataError: a prompt has no tokens, or the chat template refuses it or is missing.
        """
        if tokenizer is not self._tokenizer:
            self._tokenizer = tokenizer
            self._ids.clear()
        missing = [index for index in indices if index not in self._ids]
        encoder = PromptEncoder(tokenizer)
        with RowProgress(len(missing), "encoding prompts", unit="prompts", show=show) as progress:
            for index in missing:
                self._ids[index] = array("i", prompts.encoded(index, encoder))
                progress.advance()

    def __getitem__(self, index: int) -> list[int]:
        return self._ids[index].tolist()

    def length(self, index: int) -> int:
        """Return the number of tokens of a prompt."""
        return len(self._ids[index])


@dataclass(frozen=True)
class Prompts:
    """Prompts, and what a chat template reads besides them; None: nothing.

    Args:
        prompts: texts, or lists of messages.
        tools, parsed, template_kwargs: as in `iter_responses`.
    """

    prompts: Sequence[Prompt]
    tools: Tools | None
    parsed: Sequence[bool] | None
    template_kwargs: TemplateKwargs | None

    def __len__(self) -> int:
        return len(self.prompts)

    def size(self, index: int) -> int:
        """Return the size of a prompt and its tools in bytes, roughly proportional to its tokens."""
        text = json.dumps(
            [self.prompts[index], self._tools(index)], ensure_ascii=False, default=str
        )
        return len(text.encode(errors="surrogatepass"))

    def encoded(self, index: int, encoder: PromptEncoder) -> list[int]:
        """Return the token ids of a prompt. Raises DataError, see `EncodedPrompts.add`."""
        try:
            ids = encoder.ids(
                self.prompts[index], self._tools(index), parsed=self._parsed(index),
                template_kwargs=self._template_kwargs(index),
            )  # fmt: skip
        except RowError as error:
            raise DataError(
                str(error),
                code=error.code,
                where=f"prompt {index}",
                why="no response to it can be sampled",
                fix="correct the row, or set another chat template",
            ) from error
        if not ids:
            raise DataError(
                "the prompt has no tokens",
                code="data.empty-prompt",
                where=f"prompt {index}",
                why="the first token of a response is predicted from the last token of the prompt",
                fix="remove the row, or add text to its prompt",
            )
        return ids

    def tokens(self, index: int, ids: list[int]) -> PromptTokens:
        """Return the prompt with its token ids."""
        prompt = self.prompts[index]
        copied = prompt if isinstance(prompt, str) else list(prompt)
        return PromptTokens(
            copied, ids, self._tools(index), self._parsed(index), self._template_kwargs(index)
        )

    def _tools(self, index: int) -> list[dict[str, Any]] | None:
        return None if self.tools is None else self.tools[index]

    def _parsed(self, index: int) -> bool:
        return self.parsed is not None and self.parsed[index]

    def _template_kwargs(self, index: int) -> Mapping[str, Any] | None:
        return None if self.template_kwargs is None else self.template_kwargs[index]
