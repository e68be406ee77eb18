"""The Hugging Face Hub: which names can be repositories there, and whether the hub answers.

The libraries of the hub retry for 25 to 45 seconds if it cannot be reached. One request with a short timeout
decides first whether to load from the hub or from its cache.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

RepoKind = Literal["model", "dataset"]
_FILE: dict[RepoKind, str] = {"model": "config.json", "dataset": "README.md"}
_TEXT: dict[RepoKind, str] = {"model": "model", "dataset": "data set"}


def is_hub_name(name: str) -> bool:
    """Whether a repository on the hub can have this name; otherwise it can only be a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii()


def is_cached(name: str, cache_dir: str | Path | None = None) -> bool:
    """Whether the hub's cache has files of a model.

    Args:
        cache_dir: the cache; None: the default one.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="model")
    snapshots = Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / folder / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def hub_answers(
    name: str, kind: RepoKind, revision: str | None = None, token: str | bool | None = None
) -> bool:
    """Whether the hub answers a request about a repository, also if it has none of this name.

    The wait is at most that of one request (`HF_HUB_ETAG_TIMEOUT`, 10 s by default), and is logged once per
    name, as is a missing answer. With `HF_HUB_OFFLINE` there is no request.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if is_offline_mode():
        return False
    _log_request(name, kind)
    try:
        HfApi(token=token).file_exists(name, _FILE[kind], repo_type=kind, revision=revision)
    except (HfHubHTTPError, HFValidationError):
        return True  # an answer; loading reports it
    except Exception:  # no network; the type depends on the hub library's client
        _warn_no_answer(name, kind)
        return False
    return True


@functools.cache
def _log_request(name: str, kind: RepoKind) -> None:
    from huggingface_hub import constants

    logger.info(
        "no local file or directory %s: requesting the %s of this name from the Hugging Face Hub "
        "(timeout %d s)",
        name, _TEXT[kind], constants.HF_HUB_ETAG_TIMEOUT,
    )  # fmt: skip


@functools.cache
def _warn_no_answer(name: str, kind: RepoKind) -> None:
    logger.warning(
        "the Hugging Face Hub does not answer; only its local cache is searched for the %s %s",
        _TEXT[kind], name,
    )  # fmt: skip


def no_answer_reason() -> str:
    """Return why the hub does not answer, to follow a semicolon."""
    from huggingface_hub import is_offline_mode

    return "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
