"""Build preference rows from scored responses: pairs for DPO, K responses for RPO."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rpo_trainer.data.rows import MOST_REWARD, is_truncated, response_key
from rpo_trainer.errors import DataError

if TYPE_CHECKING:
    from rpo_trainer.data.audit import Audit
    from rpo_trainer.recipe import PairsSpec

Select = Literal["best_worst", "best_random", "all_pairs", "all_responses"]


class Scored(NamedTuple):
    """A response, its reward, and its index in the row; in ranked rows the reward is only an order."""

    text: str
    reward: float
    number: int


def make_preference_rows(
    rows: Sequence[dict[str, Any]],
    *,
    select: Select = "best_worst",
    chosen: Literal["best", "ground_truth"] = "best",
    ties: Literal["drop", "keep"] = "drop",
    min_gap: float = 0.0,
    seed: int = 0,
    audit: Audit,
) -> list[dict[str, Any]]:
    """Build preference rows, chosen response first, from rows with K scored responses.

    Duplicate and blank responses are removed, so that K may differ between rows. A row is dropped, and
    counted in `audit` by reason, if fewer than two responses remain, all rewards are equal, the chosen
    response has the lowest reward, or the reward gap is not above `min_gap` (with `all_pairs`: in every
    pair). Of equal rewards the earlier response comes first.

    Rows without rewards are ranked: their responses are in order, best first (format `ranked`), and the
    rows created from them have no rewards either. Responses without a consistent verdict of a judge have no
    reward and are removed.

    Args:
        rows: with `id`, `source`, `prompt`, `responses` (K texts), `rewards` (K numbers), and optionally
            `ground_truth`, `tools`, `finished` (K flags; by default all are finished).
        select: the rejected response: the worst, a random worse one, or each in turn; `all_responses` keeps
            all K.
        chosen: the best response, or the one that equals the row's ground truth, if any.
        ties: whether rows with equal rewards are kept; useful for RPO only.
        min_gap: in units of the rewards; ignored for ranked rows.
        seed: of `best_random`; the draw depends on it and on the row's id.
        audit: counts what is removed and dropped.

    Raises:
        DataError: only some rows have rewards, or not one finite number per response.
    """
    ranked = bool(rows) and all(_is_ranked(row) for row in rows)
    if not ranked:
        _check_rewards(rows)
    preferences: list[dict[str, Any]] = []
    for row in rows:
        responses, truth_first = _in_order(_distinct(row, ranked, audit), row, chosen)
        if chosen == "ground_truth" and row.get("ground_truth") and not truth_first:
            audit.warn("truth_not_chosen", str(row["id"]))
        if len(responses) < 2:
            audit.drop(_too_few(row), str(row["id"]))
            continue
        margin = 0.0 if ranked else min_gap
        reasons: dict[str, None] = {}
        selected = []
        for candidate in _candidates(responses, select, row, seed):
            reason = _reason_to_drop(candidate, margin, ties)
            if reason is None:
                selected.append(candidate)
            reasons[reason or ""] = None
        if select != "all_pairs" or not selected:
            for reason in [r for r in reasons if r][:1]:
                audit.drop(reason, str(row["id"]))
        for number, candidate in enumerate(selected, start=1):
            new_id = f"{row['id']}/{number}" if select == "all_pairs" else row["id"]
            preferences.append(_preference_row(row, new_id, candidate, ranked, truth_first))
    return preferences


def pairs_arguments(spec: PairsSpec | None) -> dict[str, Any]:
    """Return the arguments of `make_preference_rows` for `pairs` of a recipe."""
    return {} if spec is None else spec.model_dump()


def _distinct(row: dict[str, Any], ranked: bool, audit: Audit) -> list[Scored]:
    """Return the responses that are not blank and have a reward, each once, in order."""
    texts = row["responses"]
    rewards = [-float(i) for i in range(len(texts))] if ranked else row["rewards"]
    decided = [
        Scored(text, float(reward), number)
        for number, (text, reward) in enumerate(zip(texts, rewards, strict=True))
        if reward is not None
    ]
    nonblank = [scored for scored in decided if scored.text.strip()]
    distinct: dict[str, Scored] = {}
    # Responses that differ in thinking are distinct, and so are a truncated and a complete one.
    for scored in nonblank:
        distinct.setdefault(response_key(row, scored.number), scored)
    for left, before, warning in (
        (decided, texts, "undecided_responses_removed"),
        (nonblank, decided, "blank_responses_removed"),
        (distinct, nonblank, "duplicate_responses_removed"),
    ):
        if len(left) < len(before):
            audit.warn(warning, str(row["id"]))
    return list(distinct.values())


def _in_order(
    responses: list[Scored], row: dict[str, Any], chosen: str
) -> tuple[list[Scored], bool]:
    """Sort best first, or ground truth first; also return whether the ground truth is first."""
    ordered = sorted(responses, key=lambda scored: -scored.reward)  # stable
    truth = str(row.get("ground_truth") or "").strip()
    found = [scored for scored in ordered if truth and scored.text.strip() == truth]
    found.sort(key=lambda scored: is_truncated(row, scored.number))  # complete ones first
    if chosen == "ground_truth" and found:
        ordered = [found[0], *(scored for scored in ordered if scored is not found[0])]
    return ordered, bool(found) and ordered[0] is found[0]


def _candidates(
    ordered: list[Scored], select: Select, row: dict[str, Any], seed: int
) -> Iterator[list[Scored]]:
    best, others = ordered[0], ordered[1:]
    if select == "all_responses":
        yield ordered
    elif select == "all_pairs":
        for i, first in enumerate(ordered):
            yield from ([first, second] for second in ordered[i + 1 :])
    elif select == "best_random":
        worse = [scored for scored in others if scored.reward < best.reward] or others
        yield [best, random.Random(f"{seed}:rejected:{row['id']}").choice(worse)]
    else:
        worst = min(scored.reward for scored in others)
        yield [best, next(scored for scored in others if scored.reward == worst)]


def _reason_to_drop(candidate: list[Scored], min_gap: float, ties: str) -> str | None:
    gap = candidate[0].reward - min(scored.reward for scored in candidate[1:])
    if gap < 0:
        return "reversed"
    if gap == 0 and ties == "drop":
        return "tie"
    return "small_gap" if gap <= min_gap and gap > 0 else None


def _too_few(row: dict[str, Any]) -> str:
    undecided = row.get("rewards") is not None and None in row["rewards"]
    return "no_verdict" if undecided else "fewer_than_two_responses"


def _preference_row(
    row: dict[str, Any], new_id: str, kept: list[Scored], ranked: bool, truth_first: bool
) -> dict[str, Any]:
    return {
        "id": new_id,
        "source": row["source"],
        "prompt": row["prompt"],
        **({"tools": row["tools"]} if row.get("tools") else {}),
        **{name: row[name] for name in ("special_tokens", "chat_template_kwargs") if row.get(name)},
        "responses": [scored.text for scored in kept],
        **{
            name: [row[name][scored.number] for scored in kept]
            for name in ("response_fields", "finished")
            if row.get(name)
        },
        "rewards": None if ranked else [scored.reward for scored in kept],
        "ground_truth": row.get("ground_truth"),
        "truth_chosen": truth_first and _is_truth(kept[0].text, row),
    }


def _is_truth(text: str, row: dict[str, Any]) -> bool:
    return text.strip() == str(row.get("ground_truth") or "").strip()


def _is_ranked(row: dict[str, Any]) -> bool:
    return "judge" not in row and row.get("rewards") is None


def _check_rewards(rows: Sequence[dict[str, Any]]) -> None:
    bad = [row["id"] for row in rows if not _has_rewards(row)]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} rows do not have one finite reward for each response",
            code="rewards.incomplete",
            where=f"rows {', '.join(map(str, bad[:3]))}",
            why="the rewards decide which response is chosen",
            fix="score the responses first, or remove these rows",
        )


def _has_rewards(row: dict[str, Any]) -> bool:
    rewards = row.get("rewards")
    return (
        isinstance(rewards, list)
        and len(rewards) == len(row["responses"])
        and all(_is_reward(reward, "judge" in row) for reward in rewards)
    )


def _is_reward(value: object, may_be_absent: bool) -> bool:
    if value is None:
        return may_be_absent
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= MOST_REWARD
