"""Scored responses made into preference rows: pairs for DPO, K responses for RPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rpo_trainer.errors import DataError

if TYPE_CHECKING:
    from rpo_trainer.data.audit import Audit


def make_preference_rows(
    rows: Sequence[dict[str, Any]],
    *,
    select: Literal["best_worst", "all_responses"],
    min_gap: float,
    audit: Audit,
) -> list[dict[str, Any]]:
    """Preference rows, best response first, from rows with K scored responses.

    Of responses with the same text the first is kept, and blank ones are left out, so that K may
    differ between rows. A row is dropped, and counted in `audit` by reason, where fewer than two
    responses are left, all rewards are equal, or best minus worst is not above `min_gap`. Of equal
    rewards the earlier response goes first.

    Args:
        rows: with `id`, `source`, `prompt`, `responses` (K texts), `rewards` (K numbers) and
            perhaps `ground_truth`.
        select: `best_worst` keeps two responses, `all_responses` every one.
        min_gap: in units of the rewards.

    Raises:
        DataError: rewards that are absent, not one a response, or not finite.
    """
    _check_rewards(rows)
    made = []
    for row in rows:
        ranked = sorted(_distinct(row, audit), key=lambda pair: -pair[1])
        reason = _reason_to_drop(ranked, min_gap)
        if reason is not None:
            audit.drop(reason, str(row["id"]))
            continue
        made.append(_preference_row(row, ranked if select == "all_responses" else _ends(ranked)))
    return made


Scored = list[tuple[str, float]]


def _distinct(row: dict[str, Any], audit: Audit) -> Scored:
    """Responses that say something, each once, in their order."""
    said = [
        (response, float(reward))
        for response, reward in zip(row["responses"], row["rewards"], strict=True)
        if response.strip()
    ]
    found: dict[str, float] = {}
    for response, reward in said:
        found.setdefault(response, reward)
    if len(said) < len(row["responses"]):
        audit.warn("blank_responses_removed", str(row["id"]))
    if len(found) < len(said):
        audit.warn("duplicate_responses_removed", str(row["id"]))
    return list(found.items())


def _ends(ranked: Scored) -> Scored:
    """The best, and the first of the worst."""
    worst = ranked[-1][1]
    return [ranked[0], next(pair for pair in ranked if pair[1] == worst)]


def _reason_to_drop(ranked: Scored, min_gap: float) -> str | None:
    if len(ranked) < 2:
        return "fewer_than_two_responses"
    gap = ranked[0][1] - ranked[-1][1]
    if gap == 0:
        return "tie"
    return None if gap > min_gap else "small_gap"


def _preference_row(row: dict[str, Any], ranked: Scored) -> dict[str, Any]:
    truth = row.get("ground_truth")
    return {
        "id": row["id"],
        "source": row["source"],
        "prompt": row["prompt"],
        "responses": [response for response, _ in ranked],
        "rewards": [reward for _, reward in ranked],
        "ground_truth": truth,
        "truth_chosen": truth is not None and ranked[0][0].strip() == truth.strip(),
    }


def _check_rewards(rows: Sequence[dict[str, Any]]) -> None:
    bad = [row["id"] for row in rows if not _has_rewards(row)]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} rows do not have one finite reward for each response",
            where=f"rows {', '.join(map(str, bad[:3]))}",
            fix="score the responses first, or leave these rows out",
        )


def _has_rewards(row: dict[str, Any]) -> bool:
    rewards = row.get("rewards")
    return (
        isinstance(rewards, list)
        and len(rewards) == len(row["responses"])
        and all(
            isinstance(reward, (int, float))
            and not isinstance(reward, bool)
            and math.isfinite(reward)
            for reward in rewards
        )
    )
