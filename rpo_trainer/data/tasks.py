"""Built-in tasks: rows that the package makes itself, by the name that a recipe gives (`task:`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rpo_trainer.data.quickstart import CODE, GENERAL, code_rows, general_rows, require_known

# (split, number of rows, seed) → rows. A new task is a function and an entry.
TASKS: dict[str, Callable[[str, int, int], list[dict[str, Any]]]] = {
    CODE: code_rows,
    GENERAL: general_rows,
}


def load_task(name: str, split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a built-in task, the same for the same arguments on every machine.

    Prompts do not repeat within one call, and a prompt belongs to one split whatever the seed, so
    that `heldout` and `preference` share no prompt with any `train`.

    Args:
        name: one of `TASKS`.
        split: `train` (rows for SFT; general ones by the weak teacher), `preference` (prompts to
            sample responses for) or `heldout` (`response` is the right answer).
        size: number of rows, at least 1.
        seed: which rows; another seed gives other questions of the same split.

    Returns:
        Rows with `id`, `prompt`, `ground_truth` and, but for `preference`, `response`. The prompt
        ends in a separator and is joined with its response as it is.

    Raises:
        RecipeError: unknown task or split, a size below 1 or beyond what there is.
    """
    require_known("task", name, tuple(TASKS), code="data.unknown-task")
    return TASKS[name](split, size, seed)
