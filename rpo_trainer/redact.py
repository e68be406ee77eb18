"""Remove secrets from text that leaves the process: errors, log messages, tracebacks, files.

Secrets are the values passed to `register`, and the values of environment variables whose names end in
`_API_KEY`, `_TOKEN`, `_SECRET` and similar. They are also found in the encodings in which servers and
libraries repeat them: JSON, URL, HTML, base64. `redact` also removes credentials in URLs.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import traceback
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

REDACTED = "[redacted]"
_SHORTEST = 8  # characters; shorter values such as "none" and "EMPTY" are placeholders
_NAMES = re.compile(
    r"(API_?KEY|_TOKEN|_SECRET|_PASSWORD|_SECRET_KEY|_ACCESS_KEY|^HUGGING_FACE_HUB_TOKEN)$", re.I
)
_USER = re.compile(r"(?<=://)[^/\s?#\"'<>]+@")
_SECRET_PARAMETER = r"[\w.\-]*(?:key|token|secret|password|passwd|signature|sig)"
_QUERY = re.compile(rf"([?&;]{_SECRET_PARAMETER}=)[^&;#\s\"'<>)\]]+", re.I)
_registered: set[str] = set()


def register(secret: str | None) -> None:
    """Make `redact` remove this value. Values with fewer than 8 characters are ignored."""
    if secret is not None:
        _registered.update(
            value for value in (secret, secret.strip()) if len(value.strip()) >= _SHORTEST
        )


def register_url(url: str) -> list[str]:
    """Register user name, password and keys in a URL, and return the registered values."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    found = [
        value
        for name, value in parse_qsl(parts.query)
        if re.fullmatch(_SECRET_PARAMETER, name, re.I)
    ]
    if at:
        name, _, password = unquote(user).partition(":")
        # Clients send both as base64 of `name:password`; a user name alone may be a token.
        found += [value for value in (f"{name}:{password}", password or name) if value]
    for value in found:
        register(value)
    return [value for value in found if len(value) >= _SHORTEST]


def redact(text: str) -> str:
    """Return `text` without known secrets and credentials in URLs."""
    known = _registered | {
        value.strip()
        for name, value in os.environ.items()
        if _NAMES.search(name) and len(value.strip()) >= _SHORTEST
    }
    text = hide(text, known)
    text = _USER.sub(f"{REDACTED}@", text)
    return _QUERY.sub(rf"\g<1>{REDACTED}", text)


def hide(text: str, secrets: Iterable[str]) -> str:
    """Return `text` without these secrets, in any of their encodings."""
    pattern = _pattern(frozenset(secrets))
    return text if pattern is None else pattern.sub(REDACTED, text)


@lru_cache(maxsize=32)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    forms = {form for secret in secrets for form in _forms(secret)}
    if not forms:
        return None
    # Longest first: a secret may be a prefix of another. %2f and %2F are the same character.
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))), re.I)


def _forms(secret: str) -> set[str]:
    quoted = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret)}
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    escaped |= {repr(secret)[1:-1], secret.replace("/", "\\/"), html.escape(secret)}
    encoded = {
        code(secret.encode("utf-8", "surrogateescape")).decode()
        for code in (base64.b64encode, base64.urlsafe_b64encode)
    }
    encoded |= {form.rstrip("=") for form in encoded}
    # JSON in JSON, as in an error message that quotes a request.
    twice = {json.dumps(form)[1:-1] for form in escaped}
    thrice = {json.dumps(form)[1:-1] for form in twice}  # the same in the body of a response
    return quoted | escaped | twice | thrice | encoded


def redact_values(value: Any) -> Any:
    """Return a copy of a JSON-compatible value with `redact` applied to all texts."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(each) for each in value]
    return value


def redacted_traceback(error: BaseException) -> str:
    """Return the traceback of an exception as Python prints it, without secrets."""
    return redact("".join(traceback.format_exception(error)))


# ---------------------------------------------------------------- log records


class RedactingHandler(logging.Handler):
    """Redacts the records of a logger and its children before its other handlers.

    A logger's filters do not receive the records of its children; its handlers do. If the program has not
    configured logging, warnings are still printed by `logging.lastResort`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        redact_record(record)
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        last = logging.lastResort
        if last is not None and record.levelno >= last.level:
            last.handle(record)


def redact_logs_of(*names: str) -> None:
    """Redact the log messages of these libraries: HTTP clients log headers and URLs at DEBUG."""
    for logger in map(logging.getLogger, names):
        if not any(isinstance(handler, RedactingHandler) for handler in logger.handlers):
            logger.handlers.insert(0, RedactingHandler())  # before the handlers that print


def redact_record(record: logging.LogRecord) -> None:
    """Redact message, traceback and stack of a record in place."""
    try:
        message = record.getMessage()
    except Exception:  # wrong arguments, reported by the handler that formats the record
        return
    clean = redact(message)
    if clean != message:
        record.msg, record.args = clean, ()
    if record.exc_info and record.exc_info[1] is not None:
        # Formatters use `exc_text` if it is set.
        record.exc_text = redacted_traceback(record.exc_info[1]).rstrip("\n")
    if record.stack_info:
        record.stack_info = redact(record.stack_info)


def redact_all_records() -> None:
    """Redact the records of all loggers in this process. For programs, not for libraries."""
    before = logging.getLogRecordFactory()
    if getattr(before, "redacts", False):
        return

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        redact_record(record)
        return record

    make.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)
