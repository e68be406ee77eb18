"""`check --template`: a chat template on sample conversations."""

from __future__ import annotations

from collections.abc import Sequence

from rpo_trainer.cli.json_output import collecting
from rpo_trainer.cli.options import parse_kwargs


def check_template(
    tokenizer: str, chat_template: str | None, kwargs: Sequence[str], as_json: bool
) -> None:
    """Check and show the chat template of a tokenizer.

    Args:
        tokenizer: directory or hub name.
        chat_template: `chatml`, `plain` or a Jinja file in place of the tokenizer's own.
        kwargs: variables of the template, each `name=value`.

    Raises:
        TemplateError: training and sampling render a conversation differently.
    """
    with collecting(as_json, tokenizer=tokenizer) as content:
        variables = parse_kwargs(kwargs)
        from rich.console import Console

        from rpo_trainer.stages.template_check import (
            as_dict,
            check_samples,
            load_checked,
            raise_if_wrong,
            shown,
        )

        loaded = load_checked(tokenizer, chat_template, variables)
        results = check_samples(loaded, variables)
        content["conversations"] = [as_dict(one, loaded) for one in results]
        if not as_json:
            console = Console()
            for text in shown(results, loaded, colors=console.color_system is not None):
                console.print(text, soft_wrap=True)
        raise_if_wrong(results)
