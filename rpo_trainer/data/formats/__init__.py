"""Known formats. To add one, write a function and an entry in the table of its kind."""

from __future__ import annotations

from rpo_trainer.data.formats.preferences import PREFERENCE_FORMATS
from rpo_trainer.data.formats.prompts import PROMPT_FORMATS
from rpo_trainer.data.formats.ratings import RATING_FORMATS
from rpo_trainer.data.formats.sft import SFT_FORMATS
from rpo_trainer.data.formats.spec import COLUMN_TYPES, COMMON, Format, Raw

__all__ = ["COMMON", "FORMATS", "NUMBERS", "PROMPT_FORMATS", "Format", "Raw"]

# By name, in the order of detection. Prompt formats have a separate table, since they share names with
# formats of other kinds.
FORMATS: dict[str, Format] = {**PREFERENCE_FORMATS, **RATING_FORMATS, **SFT_FORMATS}

# Columns that hold numbers in some format, converted when read from CSV.
NUMBERS = frozenset(
    column
    for types in (COLUMN_TYPES, *(f.types for t in (FORMATS, PROMPT_FORMATS) for f in t.values()))
    for column, kind in types.items()
    if kind == "number"
)
