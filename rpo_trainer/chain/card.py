"""The model card of a stage's output: lineage, settings and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from rpo_trainer.chain.state import library_versions
from rpo_trainer.models.adapter_files import is_adapter
from rpo_trainer.recipe import Recipe, Stage, is_local, resolve_path
from rpo_trainer.recipe.rules.chain import looks_like_path
from rpo_trainer.recipe.template_kwargs import kwargs_key
from rpo_trainer.recipe.yaml_document import dump
from rpo_trainer.report.formatting import short
from rpo_trainer.report.scores import Figure, read_agreement, read_scores
from rpo_trainer.runtime.files import atomic_write
from rpo_trainer.stages.record import EvaluationRecord, StageRecord
from rpo_trainer.trainers.manifest import add_to_manifest

CARD = "README.md"
_KINDS = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimization with an SFT term",
    "rpo": "Reward-aware preference optimization",
    "reward": "Reward model",
}
_SETTINGS = {
    "loss_type": "loss", "objective": "objective", "beta": "β", "reward_scale": "η",
    "sft_loss_weight": "SFT weight", "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule", "global_batch_size": "global batch size",
    "num_train_epochs": "epochs", "max_steps": "steps", "max_length": "maximum length, tokens",
}  # fmt: skip


def write_card(
    final: Path,
    stage: Stage,
    stages: Sequence[Stage],
    records: Mapping[str, StageRecord],
    recipe: Recipe,
    base_dir: Path,
) -> None:
    """Write `README.md` of an output and add it to the manifest.

    The card depends on the run only: writing it again when a run resumes changes nothing.

    Args:
        records: the records of all stages, by name.
    """
    text = card(final, stage, stages, records, recipe, base_dir)
    path = final / CARD
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic_write(path, text)
    add_to_manifest(final, CARD)


def card(
    final: Path,
    stage: Stage,
    stages: Sequence[Stage],
    records: Mapping[str, StageRecord],
    recipe: Recipe,
    base_dir: Path,
) -> str:
    """Return the text of the card."""
    record = records.get(stage.name, StageRecord())
    names = [other.name for other in stages]
    line = _lineage(stage, {other.name: other for other in stages})
    way = " → ".join([_start(recipe, line[0]), *(other.name for other in line[:-1])])
    parts = [
        f"---\n{_metadata(final, stage, recipe, base_dir)}\n---\n",
        f"# {stage.name}\n",
        f"{_KINDS[stage.kind]}, stage {names.index(stage.name) + 1} of {len(names)} of a "
        f"chain trained with rpo-trainer: {way} → **{stage.name}**.\n",
        "## Lineage\n",
        _table(
            ("stage", "kind", "initialized from", "reference model", "data", "examples", "weights"),
            [_descent(other, records.get(other.name, StageRecord())) for other in line],
        ),
        "Data files are listed with the first digits of their xxh3-128 digests; `data` is the digest of "
        "the tokenized examples. Weights are identified by the hashes of their files.\n",
        "## Settings\n",
        _table(
            ("", ""),
            [*_settings(stage, record), *_template(stage, recipe)],
        ),
        *_measured(record.eval or EvaluationRecord()),
        "## Recipe of this stage\n",
        f"```yaml\n{_excerpt(stage)}```\n",
        "Fields with default values are omitted.\n",
        "## Versions\n",
        ", ".join(f"{name} {version}" for name, version in library_versions().items()) + "\n",
    ]
    return "\n".join(parts)


def _metadata(final: Path, stage: Stage, recipe: Recipe, base_dir: Path) -> str:
    name = recipe.model.name_or_path
    of_hub = name is not None and not looks_like_local(name, base_dir)
    reward = stage.trains_reward_model
    data = ModelCardData(
        base_model=name if of_hub else None,
        library_name="peft" if is_adapter(final) else "transformers",
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=["rpo-trainer", stage.kind, *(["reward-model"] if reward else [])],
    )
    return str(data.to_yaml()).strip()


def looks_like_local(name: str, base_dir: Path) -> bool:
    """Whether a model's name is a local directory, which is meaningless on the hub."""
    return is_local(name, resolve_path(base_dir, name))


def _start(recipe: Recipe, first: Stage) -> str:
    if first.init != "model":
        return f"`{Path(first.init).name}`"
    name = recipe.model.name_or_path
    if name is None:
        return "random weights"
    return f"`{Path(name).name if Path(name).is_absolute() else name}`"


def _lineage(stage: Stage, by_name: Mapping[str, Stage]) -> list[Stage]:
    """Return the stages that produced the weights, in order."""
    line = [stage]
    while (before := by_name.get(line[0].init)) is not None:
        line.insert(0, before)
    return line


def _descent(stage: Stage, record: StageRecord) -> list[str]:
    files = [
        f"{Path(name).name} `{digest[:12]}`"
        for name, digest in sorted((record.sources or {}).items())
    ]
    tasks = [str(source.task) for source in stage.data.train if source.task]
    fingerprint = record.data.fingerprint if record.data is not None else None
    data = "<br>".join([*files, *tasks, f"data `{fingerprint[:12]}`" if fingerprint else ""])
    weights = record.output.fingerprint if record.output is not None else ""
    init, reference = (
        Path(source).name if looks_like_path(source) else source
        for source in (stage.init, stage.models_read.get("reference", ""))
    )
    examples = record.examples
    return [
        stage.name, stage.kind, init, reference, data,
        "" if examples is None else f"{examples:,}", f"`{weights[:12]}`" if weights else "",
    ]  # fmt: skip


def _settings(stage: Stage, record: StageRecord) -> list[list[str]]:
    found = []
    for field, label in _SETTINGS.items():
        value = getattr(stage, field, None)
        if field == "reward_scale" and value == "auto" and record.reward_scale is not None:
            found.append([label, f"{record.reward_scale:g} (fitted)"])
        elif value is not None:
            found.append([label, f"{value:g}" if isinstance(value, float) else str(value)])
    if record.output is not None and record.output.dtype is not None:
        found.append(["saved weights", record.output.dtype])
    return found


def _template(stage: Stage, recipe: Recipe) -> list[list[str]]:
    """Return the chat template variables that conversations were rendered with."""
    levels = [("chat template variables", recipe.model.chat_template_kwargs)]
    for source in stage.data.train:
        name = Path(source.path).name if source.path else source.task
        levels.append((f"chat template variables, rows of {name}", source.chat_template_kwargs))
    return [[label, f"`{kwargs_key(kwargs)}`"] for label, kwargs in levels if kwargs]


def _measured(record: EvaluationRecord) -> list[str]:
    figures = read_scores(record).all()
    accuracy = read_agreement(record).accuracy
    if accuracy is not None:
        figures.insert(0, Figure("reward_accuracy", "pair accuracy", accuracy))
    if not figures:
        return []
    rows = []
    for figure in figures:
        measure = figure.measure
        assert measure is not None  # of `all`
        interval = ""
        if measure.low is not None and measure.high is not None:
            interval = (
                f"{short(measure.low, figure.digits)} to {short(measure.high, figure.digits)}"
            )
        rows.append([figure.name, short(measure.value, figure.digits), interval])
    by = f" Rewards and win rates were computed by {record.scorer}." if record.scorer else ""
    return [
        "## Evaluation on held-out data\n",
        _table(("", "value", "95% interval"), rows),
        f"Confidence intervals are over prompts and rows, not over training seeds.{by}\n",
    ]


def _excerpt(stage: Stage) -> str:
    fields = stage.model_dump(exclude_none=True, exclude_defaults=True)
    fields = {"name": stage.name, "kind": stage.kind, **fields}
    return dump(fields)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
