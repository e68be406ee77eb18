"""Checks a chat template on seven sample conversations: which tokens are trained, and after what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.rows import Message, RowError
from rpo_trainer.data.sample_conversations import SAMPLES, Sample
from rpo_trainer.data.template_variables import check_kwargs
from rpo_trainer.data.token_view import (
    PROMPT,
    TRAINED,
    TokenView,
    different,
    trained_styles,
    visible,
    warnings_of,
)
from rpo_trainer.data.tokenize import tokenize_rows
from rpo_trainer.data.trained_spans import ChatRenderer
from rpo_trainer.errors import DataError, ModelError, Problems, RPOTrainerError, TemplateError
from rpo_trainer.models.loading import load_tokenizer
from rpo_trainer.recipe import ModelSpec
from rpo_trainer.recipe.template_kwargs import COLUMN

_LONG = 2**30  # tokens: longer than any sample

Status = Literal["right", "wrong", "not supported"]


@dataclass(frozen=True)
class Checked:
    """One sample conversation rendered by a chat template.

    Attributes:
        status: `right`; `not supported`: the template refuses it, or omits its tool calls; `wrong`: its
            trained turns cannot be located, or one does not follow its generation prompt.
        reasons: why the status is not `right`.
        warnings: for example, text that the template omits.
        ids, mask: token ids of the conversation, and 1 for each trained token; [] if not available.
        follows: whether every trained turn follows its generation prompt; None if the turns cannot be
            located.
    """

    name: str
    status: Status
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    follows: bool | None = None


def load_checked(
    tokenizer: str, chat_template: str | None, kwargs: Mapping[str, Any] | None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the chat template to check.

    Args:
        tokenizer: directory or hub name.
        chat_template: `chatml`, `plain`, or the path of a Jinja file; None: the tokenizer's own.
        kwargs: variables of the template.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has no chat template that can be rendered.
        RecipeError: variables that the template does not read.
    """
    spec = ModelSpec.model_validate({"name_or_path": tokenizer, "chat_template": chat_template})
    loaded = load_tokenizer(spec, Path())
    if not loaded.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            code="template.missing",
            where=tokenizer,
            fix="add --chat-template: chatml | plain | the path of a Jinja file",
        )
    check_kwargs(kwargs, loaded, "--kwargs")
    return loaded


def check_samples(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None
) -> list[Checked]:
    """Check each of the seven conversations as it would be trained."""
    renderer = ChatRenderer(tokenizer).using(kwargs)
    return [_checked(sample, tokenizer, renderer, kwargs) for sample in SAMPLES]


def _checked(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    renderer: ChatRenderer,
    kwargs: Mapping[str, Any] | None,
) -> Checked:
    row = sample.row()
    row |= {COLUMN: dict(kwargs)} if kwargs else {}
    tools = row.get("tools")
    try:
        text = renderer.text(renderer.as_read(row["messages"], tools), tools)
    except RowError as error:
        return Checked(sample.name, "not supported", [str(error)])
    audit = Audit()
    try:
        (example,) = tokenize_rows(
            [row], tokenizer, kind="sft", max_length=_LONG, truncation="drop", audit=audit,
            processes=1,
        )  # fmt: skip
    except (DataError, Problems) as error:
        parted = "template.text-after-tool-results" in [one.code for one in _problems(error)]
        supported = _writes_calls(text, row["messages"]) and not parted
        status: Status = "wrong" if supported else "not supported"
        return Checked(sample.name, status, _reasons(error))
    prompt = example["prompt_ids"]
    ids = [*prompt, *example["response_ids"][0]]
    mask = [*[0] * len(prompt), *example["response_mask"][0]]
    differs = audit.generation.pop(row["source"]).example
    return Checked(
        sample.name, "wrong" if differs else "right", [different(*differs)] if differs else [],
        warnings_of(audit), ids, mask, follows=differs is None,
    )  # fmt: skip


def _writes_calls(text: str, messages: Sequence[Message]) -> bool:
    """Whether the text contains the arguments of all calls, not counting the content of the turns."""
    content = "".join(message["content"] for message in messages)
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    values = {value for call in calls for value in call["arguments"].values()}
    return all(text.count(value) > content.count(value) for value in values)


def _problems(error: RPOTrainerError) -> Sequence[RPOTrainerError]:
    return error.problems if isinstance(error, Problems) else [error]


def _reasons(error: RPOTrainerError) -> list[str]:
    return [one.what.partition(": 1 of 1 rows")[0] for one in _problems(error)]


def shown(
    results: list[Checked], tokenizer: PreTrainedTokenizerBase, *, colors: bool
) -> Iterator[Text]:
    """Yield the conversations as text, in the format of `preview`.

    Args:
        colors: False: mark trained tokens in the text instead: `[trained]`.
    """
    view = TokenView(tokenizer, colors)
    yield view.legend((("not trained", PROMPT), ("trained", TRAINED[0])))
    for one in results:
        style = {"right": "bold green", "wrong": "bold red"}.get(one.status, "bold yellow")
        trained = f", {sum(one.mask):,} of {len(one.ids):,} tokens trained" if one.ids else ""
        yield Text(f"\n{one.name}: {one.status}{trained}", style)
        yield from (Text(visible(reason)) for reason in one.reasons)
        yield from (Text(f"warning: {text}", "yellow") for text in one.warnings)
        if one.follows:
            yield Text("every trained turn follows its generation prompt")
        if one.ids:
            yield view.tokens(one.ids, trained_styles(one.mask, PROMPT), most=len(one.ids))


def as_dict(one: Checked, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a conversation as JSON-compatible data, with the text of each trained span."""
    runs: list[list[int]] = []
    for place, (token, trained) in enumerate(zip(one.ids, one.mask, strict=True)):
        if trained and not (place and one.mask[place - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return {
        "name": one.name,
        "status": one.status,
        "reasons": one.reasons,
        "warnings": one.warnings,
        "follows_generation_prompt": one.follows,
        "tokens": len(one.ids),
        "trained_tokens": sum(one.mask),
        "trained": [tokenizer.decode(run, skip_special_tokens=False) for run in runs],
    }


def raise_if_wrong(results: list[Checked]) -> None:
    """Raise TemplateError if a conversation is rendered wrongly."""
    wrong = [one.name for one in results if one.status == "wrong"]
    if not wrong:
        return
    raise TemplateError(
        f"{len(wrong)} of {len(results)} conversations are rendered wrongly: {', '.join(wrong)}",
        code="template.wrong-conversations",
        why="training and generation would use different text",
        fix="choose another template (--chat-template) or other variables (--kwargs), or drop such rows",
    )
