"""Secrets in recipes: detection, and `${NAME}` for environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from rpo_trainer.errors import RecipeError
from rpo_trainer.redact import register

# Names of keys with a secret value, and names of tokens of the tokenizer.
_SECRET_KEY = re.compile(
    r"(^|_)(token|password|passwd|secret|api_?key|access_?key|private_?key|credentials?)$", re.I
)
_PLAIN_TOKEN = re.compile(r"^(eos|bos|pad|unk|sep|cls|mask|image|stop)_token$", re.I)
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[bp]-)[A-Za-z0-9_-]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b"
    r"|://[^/\s:@]*:[^/\s]+@"  # the password of a URL
    r"|://.*[?&](api_?key|key|access_token|token|secret|password|sig|signature)=[^&\s]"
)
_VARIABLE = re.compile(r"^\$\{([A-Za-z_][A-Za-z0-9_]*)\}$")


def is_secret(key: str, value: object) -> bool:
    """Whether a value must not be in a recipe, which is copied into every run directory."""
    if not isinstance(value, str) or not value or _VARIABLE.match(value):
        return False
    named = bool(_SECRET_KEY.search(key)) and not _PLAIN_TOKEN.match(key)
    return named or bool(_SECRET_VALUE.search(value))


def fill_from_environment(fields: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a copy of `fields` with each value `${NAME}` replaced by the environment variable NAME.

    Applied to `training_args` just before they are passed to a trainer, so that the value is never
    written; messages and errors show `[redacted]` instead.

    Args:
        where: key of the fields, for errors.

    Raises:
        RecipeError: the variable is not set.
    """
    filled = dict(fields)
    for key, value in fields.items():
        match = _VARIABLE.match(value) if isinstance(value, str) else None
        if match is None:
            continue
        if match[1] not in os.environ:
            raise RecipeError(
                f"`{key}` reads the environment variable {match[1]}, which is not set",
                code="recipe.unset-variable",
                where=where,
                why="the recipe refers to the variable, so that the value is not written to disk",
                fix=f"set it: export {match[1]}=...",
            )
        filled[key] = os.environ[match[1]]
        register(filled[key])
    return filled
