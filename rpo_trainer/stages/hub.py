"""The hub: pushes outputs (`push_to_hub` and related `training_args`), and finds commits of inputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rpo_trainer.errors import RecipeError, RPOTrainerError, first_line

logger = logging.getLogger(__name__)

_STRATEGIES = ("end", "every_save")
RepoKind = Literal["model", "dataset"]
# Files that loading always puts into the hub cache
_CACHED: dict[RepoKind, tuple[str, ...]] = {
    "model": ("config.json", "tokenizer_config.json", "adapter_config.json"),
    "dataset": ("README.md",),
}
_SECONDS = 10.0


def hub_commit(name: str, revision: str | None, kind: RepoKind = "model") -> str | None:
    """Return the commit of a model or data set on the hub; None if neither the hub nor the cache has it.

    Args:
        revision: None: `main`.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    revision = revision or "main"
    try:
        api = HfApi()
        info = api.dataset_info if kind == "dataset" else api.model_info
        return info(name, revision=revision, timeout=_SECONDS).sha
    except Exception:  # no network, or no such repository: read the cache, as loading does
        pass
    for file in _CACHED[kind]:
        try:
            cached = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
        except ValueError:  # not a repository name
            return None
        if isinstance(cached, str):
            return Path(cached).parent.name
    return None


def check_strategy(arguments: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError if `hub_strategy` pushes checkpoints: a chain pushes finished outputs only."""
    strategy = str(getattr(s := arguments.get("hub_strategy", "end"), "value", s))
    if arguments.get("push_to_hub") and strategy not in _STRATEGIES:
        raise RecipeError(
            f"hub_strategy {strategy} is not supported: a run pushes outputs of stages, not checkpoints",
            code="hub.strategy",
            where=where,
            why="the output is pushed with its model card and metrics, which checkpoints lack",
            fix="remove hub_strategy",
        )


def push_output(
    final: Path, arguments: Mapping[str, Any], *, stage: str, run: str
) -> dict[str, Any] | None:
    """Upload a stage's output if `push_to_hub` is set; a failed push is logged as a WARNING.

    Args:
        arguments: `training_args` of the stage: `push_to_hub`, `hub_model_id` (default `run`-`stage`, in the
            namespace of the token's owner), `hub_token`, `hub_private_repo`, `hub_revision`.

    Returns:
        `repo`, and the `commit` or the `error`; None if `push_to_hub` is not set.
    """
    if not arguments.get("push_to_hub"):
        return None
    repo = str(arguments.get("hub_model_id") or f"{run}-{stage}")
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=arguments.get("hub_token"))
        created = api.create_repo(
            repo, private=arguments.get("hub_private_repo"), exist_ok=True, repo_type="model"
        )
        repo = created.repo_id
        commit = api.upload_folder(
            repo_id=repo, folder_path=str(final), commit_message=f"Output of stage {stage}",
            revision=arguments.get("hub_revision"),
        )  # fmt: skip
    except RPOTrainerError:
        raise  # stopped by a signal
    except Exception as error:  # network, token or hub: the output is on disk
        # Also written into the record of the stage.
        first = first_line(error)
        logger.warning(
            "the output of stage %s could not be pushed to the hub (%s): %s. It is complete on disk; "
            "to push it, run `hf upload %s %s`",
            stage, repo, first, repo, final,
        )  # fmt: skip
        return {"repo": repo, "error": first}
    logger.info("pushed the output of stage %s to the hub: %s", stage, repo)
    config = final / "adapter_config.json"
    base = json.loads(config.read_text())["base_model_name_or_path"] if config.is_file() else ""
    if Path(base).is_absolute():
        logger.warning(
            "the base model of the pushed adapter is a local directory, %s: others can load the adapter only "
            "after you push the base model and set base_model_name_or_path in adapter_config.json",
            base,
        )
    return {"repo": repo, "commit": str(commit.oid)}
