"""Variables that a tokenizer's chat template reads, and check of a recipe's variables against them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.template_kwargs import RESERVED, Kwargs, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the variables that the chat template, or any of several, reads; empty without a template."""
    given = tokenizer.chat_template
    texts = given.values() if isinstance(given, Mapping) else [given] if given else []
    return frozenset(name for text in texts for name in _variables(str(text)))


@cache
def _variables(template: str) -> frozenset[str]:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from rpo_trainer.data.jinja_variables import outer_reads

    try:
        environment = _compile_jinja_template(template).environment
        return frozenset(outer_reads(environment.parse(template)) - set(environment.globals))
    except jinja2.TemplateError:
        return frozenset()  # reported when the template is rendered


def unread(kwargs: Kwargs | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names in `kwargs` that the chat template does not read."""
    return sorted(set(kwargs or ()) - variables(tokenizer))


def check_kwargs(kwargs: Kwargs | None, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise RecipeError for a name that is not a variable, or that the chat template does not read."""
    for problem in problems(kwargs, where):
        raise problem
    names = unread(kwargs, tokenizer)
    if not names:
        return
    if not tokenizer.chat_template:
        raise RecipeError(
            "variables of the chat template are set, but the tokenizer has no chat template",
            code="template.missing",
            where=f"{where}.{names[0]}",
            fix="remove them, or set `chat_template`",
        )
    own = _listed(sorted(variables(tokenizer) - set(RESERVED))) or "no other variables"
    raise RecipeError(
        f"the chat template does not read {_listed(names)}",
        code="template.unread-variable",
        where=f"{where}.{names[0]}",
        fix=f"remove it; the template reads {own}",
    )


def _listed(names: Collection[str] | Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
