"""OpenAI-compatible endpoints: requests with retries until the answer can be read.

The `openai` client sends requests, waits between retries (with increasing delays, or as long as `Retry-After`
requires) and aborts a request whose complete answer has not arrived after `timeout` seconds, see
`http_client`. Answers that cannot be read, and delays longer than the client waits, are retried as often. A
request that fails after all retries fails its row only, with the reason. If an answer contains the API key,
`[redacted]` replaces it.
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
_CLIENT_WAITS = 120.0  # seconds: the client does not wait longer
_LONGEST_WAIT = 3600.0  # for longer limits (per day), the command must be run again


class Unreadable(Exception):
    """An answer that cannot be read; `code` is the error code of a row that fails because of it."""

    def __init__(self, reason: str, *, code: str = "endpoint.unreadable") -> None:
        super().__init__(reason)
        self.code = code


class Endpoint:
    """One model at one endpoint.

    Raises:
        RecipeError: the library `openai` is not installed, or the key cannot be sent.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        key = os.environ.get(spec.api_key_env) or None
        register(key)
        # All secrets that this server receives, which its answers may contain.
        self._sent = [each for each in (key,) if each and len(each) >= 8] + register_url(spec.url)
        self._key_warned = False
        self.client = _client(spec, key, self._clean)

    def ask(self, send: Callable[[OpenAI], Any], read: Callable[[Any], T]) -> T:
        """Send a request, and return the result of `read` on the answer.

        Args:
            send: sends the request with the client it gets.
            read: converts the answer; raises Unreadable to retry.

        Raises:
            RowFailed: there is no answer, the request is refused, or no answer could be read.
            RunError: the endpoint refuses every request (unknown model, no permission, a redirect).
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
                    f"the endpoint rejects the request: {_reason(error)}",
                    code="endpoint.refused",
                    where=self.spec.url,
                    why="it would reject all other requests too",
                    fix=f"check the url, the name of the model, and the key in {self.spec.api_key_env}",
                ) from None
            except openai.APIStatusError as error:
                if 300 <= error.status_code < 400:
                    raise _redirected(self.spec.url, error) from None
                served = error.status_code >= 500 or error.status_code in (408, 409, 429)
                wait = _asked_wait(error.response.headers)
                if served and tries_left and _CLIENT_WAITS < wait <= _LONGEST_WAIT:
                    logger.info("%s requested a wait of %.0f s", self.spec.url, wait)
                    time.sleep(wait)
                    unreadable = _reason(error)
                    continue
                raise RowFailed(
                    f"the endpoint rejects the request: {_reason(error)}",
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
                unreadable = "the JSON is nested too deeply"
                continue
            except (openai.OpenAIError, ValueError) as error:  # too large, or not JSON
                unreadable = _short(str(error))
                continue
            if isinstance(answer, str):  # the client returns text for other content types
                unreadable = f"not JSON: {_short(answer)!r}"
                continue
            try:
                return self._without_key(read(answer))
            except Unreadable as error:
                unreadable, code = _short(str(error)), error.code
            except RecursionError:
                unreadable = "the JSON is nested too deeply"
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
        """Remove the key from the bytes of an answer."""
        clean = hide(content.decode("latin-1"), self._sent).encode("latin-1")
        if clean != content:
            self._warn_once_about_key()
        return clean

    def _without_key(self, content: T) -> T:
        """Remove the key from parsed content: escapes in JSON can hide it from `_clean`."""
        clean = _hide_in(content, self._sent) if self._sent else content
        if clean != content:
            self._warn_once_about_key()
        return clean

    def _warn_once_about_key(self) -> None:
        if not self._key_warned:
            self._key_warned = True
            logger.warning(
                "%s returns the API key in its answers; it is replaced by [redacted] in the rows",
                self.spec.url,
            )

    def post(self, address: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Send a POST request with a JSON body, like `ask`; `read` gets the parsed JSON."""
        return self.ask(lambda client: client.post(address, body=dict(body), cast_to=object), read)

    def chat(self, messages: Sequence[Message], read: Callable[[Any], T], **options: Any) -> T:
        """Send a request for one chat completion, like `ask`."""
        message_list: Any = list(messages)
        return self.ask(
            lambda client: client.chat.completions.create(
                model=self.spec.model,
                messages=message_list,
                **options,
            ),
            read,
        )


def _client(spec: EndpointSpec, key: str | None, clean: Callable[[bytes], bytes]) -> OpenAI:
    try:
        import openai
    except ImportError:
        raise RecipeError(
            "endpoints require the library openai, which is not installed",
            code="recipe.missing-library",
            where=spec.url,
            why="only remote endpoints use it",
            fix="pip install 'rpo-trainer[endpoint]'",
        ) from None
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise RecipeError(
            f"the key in {spec.api_key_env} has a line break, a leading or trailing space, or "
            "non-ASCII characters",
            code="endpoint.invalid-key",
            where=spec.url,
            why="an HTTP header cannot contain it",
            fix=f"set {spec.api_key_env} to the key alone",
        )
    from rpo_trainer.rewards.http_client import BoundedClient

    redact_logs_of("openai", "httpx", "httpcore", "httpx2", "httpcore2")
    parts = urlsplit(spec.url)
    return openai.OpenAI(
        # The client appends paths to its base url, even after a query.
        base_url=urlunsplit(parts._replace(query="", fragment="")),
        default_query=dict(parse_qsl(parts.query)),
        # The client requires a text; servers without keys ignore it.
        api_key=key or "none",
        timeout=spec.timeout,
        max_retries=spec.retries,
        http_client=BoundedClient(spec.timeout, clean),
    )


def _redirected(url: str, error: Any) -> RunError:
    target = urljoin(str(error.response.request.url), error.response.headers.get("location", ""))
    # Its query may contain a token that the server issued for this request.
    target = _short(redact(target.partition("?")[0]))
    return RunError(
        f"the endpoint redirects ({error.status_code}) to {target}",
        code="endpoint.redirect",
        where=url,
        why="prompts and the key are sent only to the configured host",
        fix="if the new address is correct, set it as `url`",
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
    """Return the seconds of `Retry-After`; 0 if it is absent or a date."""
    try:
        wait = float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return wait if math.isfinite(wait) else 0.0


def _reason(error: Any) -> str:
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return f"{error.status_code} {_short(str(message or error.message))}"


def _short(text: str) -> str:
    """Shorten a text to one line without secrets (removed first: truncation could leave part of one)."""
    text = " ".join(redact(text).split())
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# ---------------------------------------------------------------- reading answers


def message_of(answer: Any) -> str:
    """Return the text of a chat completion. Raises Unreadable if there is none."""
    message = answer.choices[0].message
    if isinstance(message, list):  # of some reward endpoints
        message = message[0]
    content = message.get("content") if isinstance(message, Mapping) else message.content
    if isinstance(content, str) and content.strip():
        return encodable(content)
    raise Unreadable("the endpoint returned a completion without text", code="endpoint.no-text")


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    text, count = _LONE_SURROGATE.subn("\ufffd", text)
    if count:
        logger.warning("an answer contains %d lone surrogates, replaced by U+FFFD", count)
    return text


_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NAME = re.compile(r"[A-Za-z][\w -]*")
_SCORE = re.compile(_NUMBER)


def _pair(text: str) -> tuple[str, float] | None:
    """Parse `name: number` or `name = number`.

    Split before matching: a single pattern takes quadratic time on long runs of blanks.
    """
    name, *value = (part.strip() for part in re.split("[:=]", text, maxsplit=1))
    if not value or not _NAME.fullmatch(name) or not _SCORE.fullmatch(value[0]):
        return None
    return name, float(value[0])


def attribute_scores(answer: Any) -> tuple[dict[str, float], str]:
    """Return the scores by attribute in the answer of a reward endpoint, and its text.

    Two formats exist: `helpfulness:1.6,correctness:1.7` as the text of the message (NIM), and the
    attributes as the tokens of `logprobs`, with each score as the log-prob (the hosted Nemotron reward
    models).

    Raises:
        Unreadable: the answer has neither format, or a score is not finite.
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
        raise Unreadable(
            f"the answer has no scores by attribute: {_short(text)!r}", code="endpoint.no-scores"
        )
    if not all(map(math.isfinite, scores.values())):
        raise Unreadable(
            f"the answer has a score that is not finite: {_short(text)!r}",
            code="endpoint.non-finite-scores",
        )
    return scores, text
