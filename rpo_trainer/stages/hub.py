"""The hub: outputs that go there (`push_to_hub` and its companions in `training_args`), commits of inputs."""

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
# Files that loading brings into the cache of the hub
_CACHED: dict[RepoKind, tuple[str, ...]] = {
    "model": ("config.json", "tokenizer_config.json", "adapter_config.json"),
    "dataset": ("README.md",),
}
_SECONDS = 10.0


def hub_commit(name: str, revision: str | None, kind: RepoKind = "model") -> str | None:
    """The commit of a revision of a model or data set on the hub; None: the hub and the cache have none.

    Args:
        revision: None: `main`.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    revision = revision or "main"
    try:
        api = HfApi()
        info = api.dataset_info if kind == "dataset" else api.model_info
        return info(name, revision=revision, timeout=_SECONDS).sha
    except Exception:  # no network, or no such repository: the cache is read, as in loading
        pass
    for file in _CACHED[kind]:
        try:
            cached = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
        except ValueError:  # not a name of the hub
            return None
        if isinstance(cached, str):
            return Path(cached).parent.name
    return None


def check_strategy(arguments: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError where checkpoints are to be pushed: a chain pushes finished outputs alone."""
    strategy = str(getattr(s := arguments.get("hub_strategy", "end"), "value", s))
    if arguments.get("push_to_hub") and strategy not in _STRATEGIES:
        raise RecipeError(
            f"hub_strategy {strategy}: a run pushes the finished output of a stage, not its checkpoints",
            code="hub.strategy",
            where=where,
            why="the output is pushed with its model card and metrics, which checkpoints lack",
            fix="leave hub_strategy out",
        )


def push_output(
    final: Path, arguments: Mapping[str, Any], *, stage: str, run: str
) -> dict[str, Any] | None:
    """Uploads a stage's output where `push_to_hub` asks for it; a push that fails is a WARNING.

    Args:
        arguments: `training_args` of the stage: `push_to_hub`, `hub_model_id` (by default `run`-`stage`,
            in the namespace of the token's owner), `hub_token`, `hub_private_repo`,
            `hub_revision`.

    Returns:
        `repo`, and the `commit` or the `error`; None: nothing was asked for.
    """
    if not arguments.get("push_to_hub"):
        return None
    repo = str(arguments.get("hub_model_id") or f"{run}-{stage}")
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=arguments.get("hub_token"))
        made = api.create_repo(
            repo, private=arguments.get("hub_private_repo"), exist_ok=True, repo_type="model"
        )
        repo = made.repo_id
        commit = api.upload_folder(
            repo_id=repo, folder_path=str(final), commit_message=f"Output of stage {stage}",
            revision=arguments.get("hub_revision"),
        )  # fmt: skip
    except RPOTrainerError:
        raise  # a signal that came meanwhile
    except Exception as error:  # the network, the token, the hub: the output is on disk
        # It is also written into the record of the stage.
        first = first_line(error)
        logger.warning(
            "the output of stage %s is not on the hub (%s): %s. It is complete in its `final`; "
            "`hf upload %s %s` pushes it by hand",
            stage, repo, first, repo, final,
        )  # fmt: skip
        return {"repo": repo, "error": first}
    logger.info("the output of stage %s is on the hub: %s", stage, repo)
    config = final / "adapter_config.json"
    base = json.loads(config.read_text())["base_model_name_or_path"] if config.is_file() else ""
    if Path(base).is_absolute():
        logger.warning(
            "the adapter on the hub belongs to %s, a directory of this machine: push the base too, and set "
            "base_model_name_or_path in its adapter_config.json, or others cannot load it",
            base,
        )
    return {"repo": repo, "commit": str(commit.oid)}
