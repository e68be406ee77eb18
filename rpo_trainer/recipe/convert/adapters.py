"""LoRA and QLoRA settings → `peft` of a stage."""

from __future__ import annotations

from typing import Any, NamedTuple

from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig
from rpo_trainer.recipe.yaml_document import Key

_ALL = ("all", "all-linear")


class LoraNames(NamedTuple):
    """A tool's names for the fields of `peft.LoraConfig`, and its defaults."""

    rank: str
    alpha: str
    dropout: str
    target: str
    saved: str
    rslora: str
    dora: str
    default_rank: int | None
    alpha_of_rank: int  # the default of alpha is this times the rank; 0: `default_alpha`
    default_alpha: int = 16


def put_lora(
    config: ForeignConfig, draft: Draft, stage: Key, names: LoraNames, *, all_linear: str = ""
) -> None:
    """Set `peft` of the stage.

    Args:
        config: the file, whose method is LoRA or QLoRA.
        draft: the new recipe.
        stage: the stage's key.
        names: names of the tool.
        all_linear: key of the switch that adapts all linear layers.
    """

    def put(field: str, value: Any, comment: str) -> None:
        draft.put((*stage, "peft", field), value, comment)

    def source(key: str) -> str:
        return key if config.has(key) else f"default of {config.tool}"

    rank = config.number(names.rank, names.default_rank)
    if rank is not None:
        put("r", int(rank), source(names.rank))
    default_alpha = int(rank or 0) * names.alpha_of_rank or names.default_alpha
    put("lora_alpha", int(config.number(names.alpha, default_alpha)), source(names.alpha))
    if config.has(names.dropout):
        put("lora_dropout", float(config.number(names.dropout)), names.dropout)
    targets = config.names(names.target)
    switch = bool(all_linear) and config.take(all_linear) is True
    if switch or not targets or (len(targets) == 1 and targets[0] in _ALL):
        put("target_modules", "all-linear", all_linear if switch else source(names.target))
    else:
        put("target_modules", targets, names.target)
    if config.has(names.saved) and (saved := config.names(names.saved)):
        put("modules_to_save", saved, names.saved)
    for key, field in ((names.rslora, "use_rslora"), (names.dora, "use_dora")):
        if config.take(key) is True:
            put(field, True, key)
