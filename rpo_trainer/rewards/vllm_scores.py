"""Reward models served by vLLM: requests to `/score` and `/classify`, and the scores in the answers.

`use_activation: false` returns raw scores: vLLM's default for a model with one label is a sigmoid.
docs/rewards.md shows requests and answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from rpo_trainer.data.rows import Row
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.rewards.endpoint import Unreadable
from rpo_trainer.rewards.endpoint_messages import prompt_text, response_text, scored_conversation

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema.rewards import RewardEndpointSpec

PATHS = {"vllm_score": "/score", "vllm_classify": "/classify"}


def api_of(spec: RewardEndpointSpec) -> str:
    """Return the wire format of a reward endpoint: the given one, else the one of the url path."""
    if spec.api is not None:
        return spec.api
    path = urlsplit(spec.url).path.rstrip("/")
    return next((api for api, end in PATHS.items() if path.endswith(end)), "rewards")


def address(url: str, api: str) -> str:
    """Return the address that requests go to.

    A url that ends with the path of the format is taken as it is. vLLM serves the path at its root, so that
    the `/v1` of a base url is replaced.
    """
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if not path.endswith(PATHS[api]):
        path = path.removesuffix("/v1") + PATHS[api]
    return urlunsplit(parts._replace(path=path, query="", fragment=""))


def score_request(model: str, row: Row) -> dict[str, Any]:
    """Return the body of a request to `/score`: the prompt of a row against all of its responses."""
    responses = [response_text(row, number) for number in range(len(row["responses"]))]
    return {
        "model": model,
        "text_1": _query(row),
        "text_2": responses,
        "use_activation": False,
    }


def _query(row: Row) -> str:
    """Return a single question unchanged, or a longer prompt with its roles."""
    prompt = row["prompt"]
    single = not isinstance(prompt, str) and len(prompt) == 1 and not row.get("tools")
    return str(prompt[0]["content"]) if single else prompt_text(row)


def classify_request(
    model: str, row: Row, number: int, variables: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the body of a request to `/classify`: prompt and one response as messages.

    Args:
        model: its name at the server.
        row: with `prompt` and `responses`.
        number: of the response.
        variables: of the chat template; None or {}: none are sent.
    """
    messages, _ = scored_conversation(row, number)
    sent = {COLUMN: dict(variables)} if variables else {}
    return {"model": model, "messages": messages, "use_activation": False, **sent}


def read_scores(answer: Any, count: int) -> list[float]:
    """Return the scores of a `/score` response, in the order of the responses.

    Raises:
        Unreadable: not one finite score for each of the `count` responses.
    """
    entries = sorted(_data(answer), key=lambda entry: entry["index"])
    if [entry["index"] for entry in entries] != list(range(count)):
        raise Unreadable(
            f"the answer has {len(entries)} scores for {count} responses",
            code="endpoint.missing-scores",
        )
    return [_finite(entry["score"]) for entry in entries]


def read_heads(answer: Any, names: Sequence[str]) -> dict[str, float]:
    """Return the scores of a `/classify` response, by attribute.

    Args:
        answer: the parsed JSON.
        names: of the attributes, in the order of the model's labels.

    Raises:
        Unreadable: not one finite score for each attribute.
    """
    (entry,) = _data(answer)
    scores = [_finite(score) for score in entry["probs"]]
    if len(scores) != len(names):
        raise Unreadable(
            f"the answer has {len(scores)} scores for the attributes {', '.join(names)}; `weights` must "
            "list them in the order of the model's labels",
            code="endpoint.missing-scores",
        )
    return dict(zip(names, scores, strict=True))


def _data(answer: Any) -> list[dict[str, Any]]:
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not data or not all(isinstance(e, dict) for e in data):
        raise Unreadable("the answer has no `data` with scores", code="endpoint.no-scores")
    return data


def _finite(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise Unreadable(
            "the answer has a score that is not finite", code="endpoint.non-finite-scores"
        )
    return float(score)
