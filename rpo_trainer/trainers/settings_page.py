"""Writes `docs/training-arguments.md`: `python -m rpo_trainer.trainers.settings_page`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields

from rpo_trainer.trainers.config import DPOConfig, RewardConfig, RPOConfig, SFTConfig
from rpo_trainer.trainers.settings import Setting
from rpo_trainer.trainers.settings_table import ACCELERATOR, ACCUMULATION, FSDP, TRAINING

_HEAD = """# Training arguments

The configs of the trainers have all fields of `transformers.TrainingArguments`, and `training_args` of a
recipe's stage takes them too. A setting either acts, or a value that could not act is refused when the config
is made (`rpo-trainer check` says so before anything is trained). All that does not fit is reported at once.

- **read**: it acts, as the right column says.
- **refused**: only the value that changes nothing is accepted.
- **harmless**: no result depends on it.

This page is generated: `python -m rpo_trainer.trainers.settings_page > docs/training-arguments.md`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            _HEAD,
            *_section("`TrainingArguments`", TRAINING),
            *_section("`accelerator_config`", ACCELERATOR),
            *_section("`accelerator_config.gradient_accumulation_kwargs`", ACCUMULATION),
            *_section("`fsdp_config`", FSDP, " Other keys are refused."),
            *_defaults(),
        ]
    )


def _section(title: str, table: Iterable[Setting], more: str = "") -> list[str]:
    lines = [f"## {title}", ""]
    if more:
        lines += [more.strip(), ""]
    lines += ["| setting | | what becomes of it |", "|---|---|---|"]
    for row in table:
        names = ", ".join(f"`{name}`" for name in row.names)
        text = row.text
        if row.taken:
            text += f". Accepted: {_values(row.taken)}"
        if row.not_taken:
            text += f". Refused: {_values(row.not_taken)}"
        if row.instead:
            text += f". Instead: {row.instead}"
        if row.recipe:
            text += f". Not in a recipe: {row.recipe}"
        if row.some_versions:
            text += ". Not in every supported version of transformers"
        lines.append(f"| {names} | {row.status} | {text} |")
    return [*lines, ""]


def _values(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _defaults() -> list[str]:
    lines = [
        "## Defaults that differ from TRL's",
        "",
        "All other fields that TRL has too have its default. A recipe sets its own values and does not "
        "depend on these.",
        "",
        "| field | default | TRL | reason |",
        "|---|---|---|---|",
    ]
    seen = set()
    for config in (SFTConfig, DPOConfig, RPOConfig, RewardConfig):
        for own in fields(config):
            reason = own.metadata.get("reason")
            if reason and own.name not in seen:
                seen.add(own.name)
                trl = own.metadata["trl"] or "the same effect"
                lines.append(f"| `{own.name}` | `{own.default}` | {trl} | {reason} |")
        lines += [f"| {config.__name__} | | {text} | |" for text in config.unlike_trl]
    return [*lines, ""]


if __name__ == "__main__":
    sys.stdout.write(page())
