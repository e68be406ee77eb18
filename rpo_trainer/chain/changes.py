"""Changes between two starts of a run: which are safe, and which need `--allow-changed`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo_trainer.errors import RecipeError, RunError, suggestion
from rpo_trainer.recipe.rules.chain import expanded_names

if TYPE_CHECKING:
    from rpo_trainer.recipe import Stage

# Stage fields that do not affect what a stage computes: they may change when a run resumes.
SAFE_FIELDS = frozenset(
    {
        "micro_batch_size",
        "micro_batch_tokens",
        "gradient_checkpointing",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "report_to",
        "step0_check",
        "eval",
        "on_nonfinite",
        "max_skipped_steps",
    }
)


# A run cannot resume with a change of these: its checkpoints would not fit.
_FIXED_FIELDS = frozenset({"kind", "peft", "optim"})

# Training arguments that affect logging, storage and loading, not what is computed.
SAFE_ARGUMENTS = frozenset(
    {
        "async_save", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "ddp_timeout", "disable_tqdm", "hub_always_push",
        "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
        "include_num_input_tokens_seen", "log_level", "log_level_replica", "log_on_each_node",
        "logging_first_step", "project", "push_to_hub", "run_name",
        "skip_memory_metrics", "trackio_space_id",
    }
)  # fmt: skip


class Change(NamedTuple):
    """A value of the recipe that differs from the one that the run was computed with."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}"


def _shown(value: Any) -> str:
    """Return a value as JSON, without the unset fields of the elements of a list."""
    if isinstance(value, list):
        value = [
            {k: v for k, v in each.items() if v is not None} if isinstance(each, Mapping) else each
            for each in value
        ]
    return json.dumps(value)


def differences(key: str, old: Any, new: Any) -> list[Change]:
    """Return every value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            change
            for name in names
            for change in differences(f"{key}.{name}", old.get(name), new.get(name))
        ]
    return [] if old == new else [Change(key, old, new)]


def data_changed(what: str, stage: str, run_dir: Path, *, why: str, undo: str) -> RunError:
    """Return the error for data that changed after a stage began."""
    return RunError(
        what,
        code="run.data-changed",
        where=str(run_dir),
        why=why,
        fix=ways_out(undo, [f"stages.{stage}.data"]),
    )


def ways_out(undo: str, keys: Sequence[str]) -> str:
    """Return the fix for a change: undo it, start over, or allow these keys."""
    ways = [undo, "start in a new directory (--run-dir)", "start over (`run --overwrite`)"]
    if keys:
        ways.append("resume with the change: " + " ".join(f"--allow-changed {key}" for key in keys))
    return ", or ".join([", ".join(ways[:-1]), ways[-1]])


def computed_with(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a stage's spec that its results depend on."""
    fields = {name: value for name, value in spec.items() if name not in SAFE_FIELDS}
    arguments = fields.get("training_args")
    if isinstance(arguments, Mapping):
        fields["training_args"] = {k: v for k, v in arguments.items() if k not in SAFE_ARGUMENTS}
    return fields


def covers(allowed: Sequence[str], key: str) -> bool:
    """Whether a key or one of its parents is allowed."""
    return any(key == one or key.startswith(f"{one}.") for one in allowed)


def is_fixed(key: str, stage: str | None = None) -> bool:
    """Whether a change of the key (of a field of `stage`) can never be allowed."""
    if stage is None:
        return key == "model.from_config" or key.startswith("model.from_config.")
    return key.removeprefix(f"stages.{stage}.").split(".")[0] in _FIXED_FIELDS


def require_key(
    key: str,
    stages: Sequence[Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Raise RecipeError if `--allow-changed KEY` is neither a key nor a prefix of keys.

    Args:
        stages: the specs of all stages, those that the run has begun with among them.
        models: the model of the recipe, and the one that the run has begun with.
    """
    owners = [(f"stages.{spec['name']}", spec) for spec in stages]
    owners += [("model", model) for model in models]
    owners += [("eval", evaluation)] if evaluation is not None else []
    for own, spec in owners:
        if key == own or (key.startswith(f"{own}.") and _leads(spec, key[len(own) + 1 :])):
            return
    if key in ("seed", "stages"):
        return
    known = ["seed", "stages", *(f"{own}.{name}" for own, spec in owners for name in spec)]
    raise RecipeError(
        f"the recipe has no key `{key}`{suggestion(key, list(dict.fromkeys(known)))}",
        code="option.unknown-key",
        where=f"--allow-changed {key}",
        why="only changes of existing keys can be allowed",
        fix="copy the key from the error about the change, for example stages.dpo.beta, or a prefix of it, "
        "for example stages.dpo",
    )


def with_rounds(keys: Collection[str], stages: Sequence[Stage]) -> list[str]:
    """Return the keys, those of a repeated stage (`stages.rpo`) as keys of all its rounds."""
    found = []
    for key in keys:
        for stage in stages:
            own = f"stages.{stage.name}"
            if stage.repeat > 1 and (key == own or key.startswith(f"{own}.")):
                rounds = expanded_names({"name": stage.name, "repeat": stage.repeat})
                found += [f"stages.{name}{key[len(own) :]}" for name in rounds]
                break
        else:
            found.append(key)
    return found


def _leads(spec: Any, way: str) -> bool:
    for part in way.split("."):
        if isinstance(spec, list) and part.isdecimal() and int(part) < len(spec):
            spec = spec[int(part)]
        elif isinstance(spec, Mapping) and part in spec:
            spec = spec[part]
        else:
            return False
    return True
