"""Writes `docs/training-arguments.md`: `python -m rpo_trainer.trainers.argument_page`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rpo_trainer.trainers.argument_status import Setting, defaults_of
from rpo_trainer.trainers.argument_table import ACCELERATOR, ACCUMULATION, FSDP, TRAINING
from rpo_trainer.trainers.config import DPOConfig, RewardConfig, RPOConfig, SFTConfig
from rpo_trainer.trainers.trl_table import ALL, PREFERENCE, REWARD, SFT

_HEAD = """# Training arguments

The configs of the trainers have all fields of `transformers.TrainingArguments`, and `training_args` of a
recipe's stage takes them too. A value that would have no effect is refused when the config is created
(`rpo-trainer check` reports it before training). All problems are reported at once.

- **read**: the setting takes effect, as the right column says.
- **refused**: only values that change nothing are accepted.
- **harmless**: no result depends on the setting.

This page is generated: `python -m rpo_trainer.trainers.argument_page > docs/training-arguments.md`.
"""


def page() -> str:
    """Return the full page."""
    return "\n".join(
        [
            _HEAD,
            *_section("`TrainingArguments`", TRAINING),
            *_section("`accelerator_config`", ACCELERATOR),
            *_section("`accelerator_config.gradient_accumulation_kwargs`", ACCUMULATION),
            *_section("`fsdp_config`", FSDP, "Other keys are refused."),
            *_section(
                "Arguments of TRL",
                ALL,
                "In Python, the configs also take the arguments that TRL's configs have (1.16), so "
                "that scripts written for TRL run. Those that request the existing behavior are "
                "listed in one warning. This table is for all configs, the next ones for one each.",
            ),
            *_section("Arguments of TRL's `SFTConfig`", SFT[len(ALL) :]),
            *_section(
                "Arguments of TRL's `DPOConfig`",
                PREFERENCE[len(ALL) :],
                "`RPOConfig` takes them too.",
            ),
            *_section("Arguments of TRL's `RewardConfig`", REWARD[len(ALL) :]),
            *_defaults(),
        ]
    )


def _section(title: str, table: Iterable[Setting], more: str = "") -> list[str]:
    lines = [f"## {title}", ""]
    if more:
        lines += [more, ""]
    lines += ["| setting | status | effect, or reason |", "|---|---|---|"]
    for row in table:
        names = ", ".join(f"`{name}`" for name in row.names)
        text = row.text
        if row.taken:
            shown = [value for value in row.taken if value is not None] or row.taken
            text += f". Accepted: {_values(shown)}"
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
        "All other fields that TRL also has have TRL's default. Recipes set their own values and do not "
        "depend on these.",
        "",
        "| field | default | TRL | reason |",
        "|---|---|---|---|",
    ]
    seen = set()
    for config in (SFTConfig, DPOConfig, RPOConfig, RewardConfig):
        own = defaults_of(config)
        for name in (name for name in own if name in config.trl_defaults and name not in seen):
            seen.add(name)
            trl, reason = config.trl_defaults[name]
            lines.append(f"| `{name}` | `{own[name]}` | {trl or 'the same effect'} | {reason} |")
        lines += [f"| {config.__name__} | | {text} | |" for text in config.unlike_trl]
    return [*lines, ""]


if __name__ == "__main__":
    sys.stdout.write(page())
