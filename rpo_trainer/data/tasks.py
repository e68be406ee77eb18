"""Built-in tasks: generated rows, selected by name in a recipe (`task:`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpo_trainer.data.quickstart import CODE, GENERAL, code_rows, general_rows, require_known

# (split, number of rows, seed) → rows. To add a task, write a function and an entry.
TASKS: dict[str, Callable[[str, int, int], list[dict[str, Any]]]] = {
    CODE: code_rows,
    GENERAL: general_rows,
}


def load_task(name: str, split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Generate rows of a built-in task; the same arguments yield the same rows on every machine.

    Prompts do not repeat within one call. A prompt belongs to one split for all seeds, so that `heldout` and
    `preference` share no prompt with `train`.

    Args:
        name: one of `TASKS`.
        split: `train` (rows for SFT; those of `general` are by the weak teacher), `preference` (prompts for
            sampling responses) or `heldout` (`response` is the correct answer).
        size: number of rows, at least 1.
        seed: another seed yields other questions of the same split.

    Returns:
        Rows with `id`, `prompt`, `ground_truth` and, except for `preference`, `response`. The prompt ends
        with a separator; prompt and response are concatenated.

    Raises:
        RecipeError: unknown task or split, or a size below 1 or above the number of different prompts.
    """
    require_known("task", name, tuple(TASKS), code="data.unknown-task")
    return TASKS[name](split, size, seed)
