"""OpenAI-compatible endpoints: requests that are repeated until their answer can be read.

The `openai` client sends them, waits between tries (longer each time, or as long as `Retry-After`
says) and gives up one whose whole answer is not there after `timeout` seconds, see `http_client`.
An answer that cannot be read is requested again as often, and so is one that the server puts off
for longer than the client waits. What fails after that fails its row, with the reason, and no other
row. The key, where an answer repeats it, is replaced by `[redacted]`.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urljoin, urlsplit, urlunsplit

from rpo_trainer.data.resumable_rows import RowFailed
from rpo_trainer.data.rows import Message
from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.redact import hide, redact, redact_logs_of, register, register_url

if TYPE_CHECKING:
    from openai import OpenAI

    from rpo_trainer.recipe import EndpointSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SHOWN = 200  # characters of an unreadable answer
_CLIENT_WAITS = 120.0  # seconds: beyond that the client gives up at once
_LONGEST_WAIT = 3600.0  # a limit by the day is left to whoever runs the command again


class Unreadable(Exception):
    """An answer that is not what was asked for; `code` is that of the row that finally fails by it."""

    def __init__(self, reason: str, *, code: str = "endpoint.unreadable") -> None:
        super().__init__(reason)
        self.code = code


class Endpoint:
    """One model at one endpoint.

    Raises:
        RecipeError: the library `openai` is not installed, or a key that cannot be sent.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        key = os.environ.get(spec.api_key_env) or None
        register(key)
        # All secrets that this server gets, and so all that it can repeat.
        self._sent = [each for each in (key,) if each and len(each) >= 8] + register_url(spec.url)
        self._told = False
        self.client = _client(spec, key, self._clean)

    def ask(self, send: Callable[[OpenAI], Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer to `send`.

        Raises:
            RowFailed: no answer, a refusal of this request, or none that could be read.
            RunError: the endpoint refuses every request (no such model, no permission, a redirect).
        """
        import openai

        from rpo_trainer.rewards.http_client import TooLarge

        unreadable = ""
        for tries_left in range(self.spec.retries, -1, -1):
            code = "endpoint.unreadable"
            try:
                answer = send(self.client)
            except (
                openai.AuthenticationError,
                openai.PermissionDeniedError,
                openai.NotFoundError,
            ) as error:
                raise RunError(
                    f"the endpoint refuses: {_reason(error)}",
                    code="endpoint.refused",
                    where=self.spec.url,
                    why="it would refuse every further request too",
                    fix=f"check the url, the model's name, and the key in {self.spec.api_key_env}",
                ) from None
            except openai.APIStatusError as error:
                if 300 <= error.status_code < 400:
                    raise _redirected(self.spec.url, error) from None
                served = error.status_code >= 500 or error.status_code in (408, 409, 429)
                wait = _asked_wait(error.response.headers)
                if served and tries_left and _CLIENT_WAITS < wait <= _LONGEST_WAIT:
                    logger.info("%s asks to wait %.0f s", self.spec.url, wait)
                    time.sleep(wait)
                    unreadable = _reason(error)
                    continue
                raise RowFailed(
                    f"the endpoint refuses: {_reason(error)}",
                    code="endpoint.refused",
                    service=served,
                ) from None
            except openai.APITimeoutError:
                raise RowFailed(
                    f"no complete answer within {self.spec.timeout:g} s",
                    code="endpoint.timeout",
                    service=True,
                ) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                if isinstance(cause, TooLarge):  # openai 2 wraps it
                    unreadable = str(cause)
                    continue
                raise RowFailed(
                    f"the endpoint cannot be reached ({_short(str(cause))})",
                    code="endpoint.unreachable",
                    service=True,
                ) from None
            except RecursionError:
                unreadable = "JSON that is nested too deeply"
                continue
            except (openai.OpenAIError, ValueError) as error:  # too large, or not JSON
                unreadable = _short(str(error))
                continue
            if isinstance(answer, str):  # what the client makes of another content type
                unreadable = f"not JSON: {_short(answer)!r}"
                continue
            try:
                return self._without_key(read(answer))
            except Unreadable as error:
                unreadable, code = _short(str(error)), error.code
            except RecursionError:
                unreadable = "JSON that is nested too deeply"
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                TypeError,
                ValueError,
            ) as error:
                unreadable = f"not a completion ({_short(str(error))})"
        raise RowFailed(f"the answer cannot be read: {unreadable}", code=code)

    def _clean(self, content: bytes) -> bytes:
        """The bytes of an answer without the key."""
        clean = hide(content.decode("latin-1"), self._sent).encode("latin-1")
        if clean != content:
            self._tell()
        return clean

    def _without_key(self, found: T) -> T:
        """The same for what was read: in JSON, a key can be written so that its bytes are others."""
        clean = _hide_in(found, self._sent) if self._sent else found
        if clean != found:
            self._tell()
        return clean

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "%s repeats the key in its answers; [redacted] replaces it in the rows",
                self.spec.url,
            )

    def post(self, address: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """The same for a request that the client has no method for; `read` gets the parsed JSON."""
        return self.ask(lambda client: client.post(address, body=dict(body), cast_to=object), read)

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


def _client(spec: EndpointSpec, key: str | None, clean: Callable[[bytes], bytes]) -> OpenAI:
    try:
        import openai
    except ImportError:
        raise RecipeError(
            "endpoints need the library openai",
            code="recipe.missing-library",
            where=spec.url,
            why="it is needed for remote endpoints only",
            fix="pip install 'rpo-trainer[endpoint]'",
        ) from None
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise RecipeError(
            f"the key in {spec.api_key_env} has a line break, a space at an end, or "
            "non-ASCII characters",
            code="endpoint.invalid-key",
            where=spec.url,
            why="an HTTP header cannot carry it",
            fix=f"set {spec.api_key_env} to the key only",
        )
    from rpo_trainer.rewards.http_client import BoundedClient

    redact_logs_of("openai", "httpx", "httpcore", "httpx2", "httpcore2")
    parts = urlsplit(spec.url)
    return openai.OpenAI(
        # The client appends paths to its base url, and would do so after a query.
        base_url=urlunsplit(parts._replace(query="", fragment="")),
        default_query=dict(parse_qsl(parts.query)),
        # A server without keys does not read it, and the client needs some text.
        api_key=key or "none",
        timeout=spec.timeout,
        max_retries=spec.retries,
        http_client=BoundedClient(spec.timeout, clean),
    )


def _redirected(url: str, error: Any) -> RunError:
    target = urljoin(str(error.response.request.url), error.response.headers.get("location", ""))
    # Its query may hold a token that the server has issued for this request.
    target = _short(redact(target.partition("?")[0]))
    return RunError(
        f"the endpoint redirects ({error.status_code}) to {target}",
        code="endpoint.redirect",
        where=url,
        why="prompts and the key are sent only to the host that is named",
        fix="if that is the right address, set it as `url`",
    )


def _hide_in(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return hide(value, secrets)
    if isinstance(value, tuple):
        return tuple(_hide_in(each, secrets) for each in value)
    if isinstance(value, dict):
        return {hide(key, secrets): _hide_in(each, secrets) for key, each in value.items()}
    return value


def _asked_wait(headers: Mapping[str, str]) -> float:
    """The seconds of `Retry-After`; 0 without any, or where it is a date."""
    try:
        wait = float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return wait if math.isfinite(wait) else 0.0


def _reason(error: Any) -> str:
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return f"{error.status_code} {_short(str(message or error.message))}"


def _short(text: str) -> str:
    """For messages: one line, without secrets (before it is cut, or a part would be left)."""
    text = " ".join(redact(text).split())
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
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
    raise Unreadable("a completion without text", code="endpoint.no-text")


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
        raise Unreadable(f"no scores by attribute in {_short(text)!r}", code="endpoint.no-scores")
    if not all(map(math.isfinite, scores.values())):
        raise Unreadable(
            f"a score that is not finite in {_short(text)!r}", code="endpoint.non-finite-scores"
        )
    return scores, text
