"""OpenAI-compatible endpoints: requests that are repeated until their answer can be read.

The `openai` client sends them, waits between tries (longer each time, or as long as `Retry-After`
says) and gives up a stalled one after `timeout` seconds. An answer that comes but makes no sense is
asked for again as often, and so is one that is put off for longer than the client waits. What fails
after that fails its row, with the reason, and no other row.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rpo_trainer.data.rows import Message
from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.rewards.rowfile import RowFailed

if TYPE_CHECKING:
    from openai import OpenAI

    from rpo_trainer.recipe import EndpointSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SHOWN = 200  # characters of an unreadable answer
_CLIENT_WAITS = 120.0  # seconds: beyond that the client gives up at once
_LONGEST_WAIT = 3600.0  # a limit by the day is left to whoever runs the command again


class Unreadable(Exception):
    """An answer that is not what was asked for."""


class Endpoint:
    """One model at one endpoint.

    Raises:
        RecipeError: the library `openai` is not installed.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self.client = _client(spec)

    def ask(self, send: Callable[[OpenAI], Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer to `send`.

        Raises:
            RowFailed: no answer, a refusal of this request, or none that could be read.
            RunError: the endpoint refuses every request (no such model, no permission).
        """
        import openai

        unreadable = ""
        for tries_left in range(self.spec.retries, -1, -1):
            try:
                answer = send(self.client)
            except (
                openai.AuthenticationError,
                openai.PermissionDeniedError,
                openai.NotFoundError,
            ) as error:
                raise RunError(
                    f"the endpoint refuses: {_reason(error)}",
                    where=self.spec.url,
                    why="it would refuse every further request too",
                    fix=f"check the url, the model's name, and the key in {self.spec.api_key_env}",
                ) from None
            except openai.APIStatusError as error:
                served = error.status_code >= 500 or error.status_code in (408, 409, 429)
                wait = _asked_wait(error.response.headers)
                if served and tries_left and _CLIENT_WAITS < wait <= _LONGEST_WAIT:
                    logger.info("%s asks to wait %.0f s", self.spec.url, wait)
                    time.sleep(wait)
                    unreadable = _reason(error)
                    continue
                raise RowFailed(f"the endpoint refuses: {_reason(error)}", service=served) from None
            except openai.APITimeoutError:
                raise RowFailed(f"no answer within {self.spec.timeout:g} s", service=True) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                raise RowFailed(f"the endpoint is not reached ({cause})", service=True) from None
            except (openai.OpenAIError, ValueError) as error:  # an answer that is no JSON
                unreadable = _short(str(error))
                continue
            try:
                return read(answer)
            except Unreadable as error:
                unreadable = str(error)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                unreadable = f"not a chat completion ({_short(str(error))})"
        raise RowFailed(f"the answer cannot be read: {unreadable}")

    def chat(self, messages: Sequence[Message], read: Callable[[Any], T], **options: Any) -> T:
        """The same for one chat completion."""
        given: Any = list(messages)
        return self.ask(
            lambda client: client.chat.completions.create(
                model=self.spec.model,
                messages=given,
                **options,
            ),
            read,
        )


def _client(spec: EndpointSpec) -> OpenAI:
    try:
        import openai
    except ImportError:
        raise RecipeError(
            "endpoints need the library openai",
            where=spec.url,
            why="it speaks with the server; who samples and scores at home goes without",
            fix="pip install 'rpo-trainer[endpoint]'",
        ) from None
    return openai.OpenAI(
        base_url=spec.url,
        # A server of one's own asks for no key, and the client for some text.
        api_key=os.environ.get(spec.api_key_env) or "none",
        timeout=spec.timeout,
        max_retries=spec.retries,
    )


def _asked_wait(headers: Mapping[str, str]) -> float:
    """The seconds of `Retry-After`; 0 without any, or where it is a date."""
    try:
        return float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0


def _reason(error: Any) -> str:
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return f"{error.status_code} {_short(str(message or error.message))}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# ---------------------------------------------------------------- reading answers


def message_of(answer: Any) -> str:
    """The text of a chat completion. Raises Unreadable where there is none."""
    message = answer.choices[0].message
    if isinstance(message, list):  # as some reward endpoints have it
        message = message[0]
    content = message.get("content") if isinstance(message, Mapping) else message.content
    if isinstance(content, str) and content.strip():
        return encodable(content)
    raise Unreadable("a completion without text")


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which UTF-8 files cannot hold."""
    text, count = _LONE_SURROGATE.subn("\ufffd", text)
    if count:
        logger.warning("an answer holds %d lone surrogates: each is replaced by U+FFFD", count)
    return text


_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NAME = re.compile(r"[A-Za-z][\w -]*")
_SCORE = re.compile(_NUMBER)


def _pair(text: str) -> tuple[str, float] | None:
    """`name: number`, or `name = number`. Split before it is matched: one pattern for both would
    take a time that is quadratic in the length of a run of blanks."""
    name, *value = (part.strip() for part in re.split("[:=]", text, maxsplit=1))
    if not value or not _NAME.fullmatch(name) or not _SCORE.fullmatch(value[0]):
        return None
    return name, float(value[0])


def attribute_scores(answer: Any) -> tuple[dict[str, float], str]:
    """The scores by attribute that a reward endpoint answers with, and the answer as it came.

    Two forms are in use: `helpfulness:1.6,correctness:1.7` as the text of the message (NIM), and
    the attributes as the tokens of `logprobs`, each with its score as the log-prob (the hosted
    Nemotron reward models).

    Raises:
        Unreadable: neither is there, or a score is not finite.
    """
    tokens = getattr(getattr(answer.choices[0], "logprobs", None), "content", None)
    try:
        text = message_of(answer)
    except Unreadable:
        text = ""
    pairs = [_pair(part) for part in re.split(r"[,\n;]", text) if part.strip()]
    if pairs and all(pairs):
        scores = dict(pair for pair in pairs if pair)
    elif tokens:
        scores = {encodable(str(token.token)): float(token.logprob) for token in tokens}
        text = ",".join(f"{name}:{score}" for name, score in scores.items())
    else:
        raise Unreadable(f"no scores by attribute in {_short(text)!r}")
    if not all(map(math.isfinite, scores.values())):
        raise Unreadable(f"a score that is not finite in {_short(text)!r}")
    return scores, text
