"""Draft a new recipe from a model and data files: stage kinds from the rows, lengths from the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.conversation import PROMPT_COLUMNS
from rpo_trainer.data.detect import find_format, kind_of
from rpo_trainer.data.duplicates import prompt_key
from rpo_trainer.data.rows import Row
from rpo_trainer.data.sources import load_source
from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.recipe import ModelSpec, Recipe, SourceSpec, is_local
from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.paths import Paths
from rpo_trainer.recipe.yaml_document import Key, parse
from rpo_trainer.runtime.files import near_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RecipeKind = Literal["sft", "dpo", "rpo", "chain"]
_RowKind = Literal["sft", "pair"]
_MEASURED_ROWS = 2000  # tokenized for their lengths
_LENGTH_STEP = 64
_DEFAULT_LENGTH = 2048
_UNLIMITED = 2**30
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_STEPS = 20  # optimizer steps of an epoch that a small data set should give, at least
_EVAL_FRACTION = 0.05  # of the prompts, held out where no held-out rows are given
_SFT_WEIGHT = {"dpo": 5e-3, "rpo": 1e-3}
# Peak learning rates for full fine-tuning of a few billion weights, see docs/choosing.md; adapters take
# about ten times as much.
_RATES = {"sft": 2e-5, "dpo": 5e-7, "rpo": 3e-7}
_ADAPTER_FACTOR = 10


@dataclass(frozen=True)
class NewRecipe:
    """The text of a recipe, and one line per finding about the data."""

    text: str
    facts: list[str]


@dataclass(frozen=True)
class _Source:
    """A data file: its source in the recipe, its rows and their kind."""

    spec: dict[str, Any]
    rows: list[Row]
    kind: _RowKind
    comment: str

    @property
    def scored(self) -> bool:
        """Whether every response has a reward."""
        return all(bool(row.get("rewards")) and None not in row["rewards"] for row in self.rows)


def new_recipe(
    recipe: Path,
    *,
    model: str,
    data: Sequence[str],
    columns: Mapping[str, str] | None = None,
    held_out: Sequence[str] = (),
    kind: RecipeKind | None = None,
    lora: bool = False,
) -> NewRecipe:
    """Draft a recipe of one stage, or of SFT followed by a preference stage.

    A stage without held-out rows holds out a fraction of its prompts, if it has enough of them.

    Args:
        recipe: path of the new recipe; its paths are relative to the directory of this file.
        model: directory or hub name.
        data: files or hub names of the training rows.
        columns: {expected name: name in the files}, for the files that have such a column.
        held_out: files or hub names of held-out rows.
        kind: None: conversations give `sft`, pairs `dpo`, pairs with rewards `rpo`, both `chain`.
        lora: train an adapter.

    Raises:
        DataError, Problems: the data cannot be read, or its format is unknown.
        RecipeError: the rows do not fit `kind`.
        ModelError: `model` is a directory whose config or tokenizer cannot be used.
    """
    paths = Paths(recipe, recipe)
    named = dict(columns or {})
    sources = [_read(path, kind, paths, named) for path in data]
    tests = [_read(path, kind, paths, named) for path in held_out]
    _check_named(named, [*sources, *tests])
    kinds = _stage_kinds(sources, kind)
    _check_held_out(tests, kinds)
    draft = Draft()
    facts = [f"{s.spec['path']}: {len(s.rows):,} rows, {s.comment}" for s in sources]
    tokenizer, limit = _put_model(draft, paths, model, [*sources, *tests])
    if tokenizer is None:
        near = near_directory(Path(model).expanduser())
        facts.append(f"model {model}: no such directory, so this is a hub name{near}")
    draft.put(("run_dir",), f"runs/{recipe.stem}")
    for number, stage in enumerate(kinds):
        row_kind: _RowKind = "sft" if stage == "sft" else "pair"
        own = [source for source in sources if source.kind == row_kind]
        tested = [source for source in tests if source.kind == row_kind]
        key = ("stages", number)
        fraction = None if tested else _eval_fraction(own)
        _put_stage(draft, key, stage, own, tested, fraction, lora)
        length, comment = _max_length(
            [row for s in own for row in s.rows], row_kind, tokenizer, limit
        )
        draft.put((*key, "max_length"), length, comment)
        facts.append(f"{stage}: max_length {length} ({comment})")
        if fraction is not None:
            facts.append(
                f"{stage}: eval_fraction {fraction} (no --eval: {fraction:.0%} of the prompts are held out)"
            )
        elif not tested:
            facts.append(f"{stage}: no held-out rows (too few prompts); give them with --eval FILE")
    header = ["Written by `rpo-trainer init`. docs/choosing.md explains how to choose the values."]
    text = draft.text(header)
    Recipe.model_validate(parse(text).data)
    return NewRecipe(text, facts)


def _read(path: str, kind: RecipeKind | None, paths: Paths, named: Mapping[str, str]) -> _Source:
    """Read a data file and detect its format."""
    local = Path(path).expanduser()
    spec: dict[str, Any] = {"path": path}
    raw = load_source(SourceSpec.model_validate(spec), None, 0)
    if local.exists():
        spec["path"] = paths.of_recipe(local)
    columns = {column for row in raw.rows for column in row}
    if mapped := {ours: theirs for ours, theirs in named.items() if theirs in columns}:
        spec["columns"] = mapped
        columns = columns - {*mapped.values()} | mapped.keys()
    found = {"sft": "sft", "dpo": "pair", "rpo": "pair"}.get(str(kind)) or kind_of(columns)
    if found == "rating":
        raise RecipeError(
            "the rows are ratings of single responses, for a reward model",
            code="init.rated-rows",
            where=path,
            fix="start from `rpo-trainer recipes reward/helpsteer2`, or give --kind sft",
        )
    row_kind: _RowKind = "sft" if found == "sft" else "pair"
    pairs = {"question", "chosen", "rejected"} <= columns
    if row_kind == "pair" and pairs and not columns & set(PROMPT_COLUMNS):
        spec["format"] = "orca"
    form = find_format(columns, row_kind, spec.get("format"), raw.where)
    rows = adapt(
        raw, kind=row_kind, format=spec.get("format"), columns=mapped or None, audit=Audit()
    )
    if not rows:
        raise DataError(
            "none of the rows can be trained on",
            code="data.no-rows-left",
            where=path,
            fix="correct the rows",
        )
    source = _Source(spec, rows, row_kind, "")
    what = "conversations" if row_kind == "sft" else "pairs"
    what += " with rewards" if row_kind == "pair" and source.scored else ""
    return _Source(spec, rows, row_kind, f"{what} ({', '.join(form.required)})")


def _check_named(named: Mapping[str, str], sources: Sequence[_Source]) -> None:
    """Raise RecipeError if no file has one of the columns of --column."""
    for ours, theirs in named.items():
        if not any(ours in source.spec.get("columns", {}) for source in sources):
            raise RecipeError(
                f"no file has a column `{theirs}`",
                code="init.unknown-column",
                where=f"--column {ours}={theirs}",
                fix="write OURS=THEIRS, with the name that the file uses after `=`",
            )


def _stage_kinds(sources: Sequence[_Source], kind: RecipeKind | None) -> list[str]:
    """Return the kinds of the stages, in order.

    Raises RecipeError: the rows do not fit `kind`.
    """
    present = {source.kind for source in sources}
    pairs = [source for source in sources if source.kind == "pair"]
    scored = bool(pairs) and all(source.scored for source in pairs)
    preference = "rpo" if scored else "dpo"
    if kind == "chain" and present != {"sft", "pair"}:
        lacking = "pairs (chosen and rejected)" if "pair" not in present else "conversations"
        raise RecipeError(
            f"a chain requires conversations and pairs, but no file has {lacking}",
            code="init.missing-data",
            where="--data",
            fix="give a file of each with --data, or choose another --kind",
        )
    if kind == "rpo" and not scored:
        raise RecipeError(
            "RPO requires a reward for every response, and some have none",
            code="init.missing-rewards",
            where="--data",
            fix="score the responses first (`rpo-trainer score`), or give --kind dpo",
        )
    if kind in ("sft", "dpo", "rpo"):
        return [kind]
    return [*(["sft"] if "sft" in present else []), *([preference] if pairs else [])]


def _check_held_out(tests: Sequence[_Source], kinds: Sequence[str]) -> None:
    """Raise RecipeError if a stage cannot read a held-out file, or no stage reads it."""
    for source in tests:
        where = f"--eval {source.spec['path']}"
        if ("sft" not in kinds) if source.kind == "sft" else (set(kinds) == {"sft"}):
            raise RecipeError(
                f"no stage uses these rows: {source.comment}",
                code="init.unused-held-out",
                where=where,
                fix="give held-out rows in the same layout as those of --data",
            )
        if source.kind == "pair" and "rpo" in kinds and not source.scored:
            raise RecipeError(
                "RPO requires a reward for every held-out response, and some have none",
                code="init.missing-rewards",
                where=where,
                fix="score the responses first (`rpo-trainer score`), or give --kind dpo",
            )


def _put_model(
    draft: Draft, paths: Paths, model: str, sources: Sequence[_Source]
) -> tuple[PreTrainedTokenizerBase | None, int | None]:
    """Put `model`; return the tokenizer and the context length (tokens) of a local model."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and is_local(model, folder):
        what = "this is a file, not a directory" if folder.is_file() else "no such directory"
        raise RecipeError(
            f"{what}{near_directory(folder)}",
            code="init.no-such-model",
            where=f"--model {model}",
            fix="give a directory with config.json and safetensors files, or a hub name",
        )
    local = folder.is_dir()
    name = paths.converted(model)[0] if local else model
    draft.put(("model", "name_or_path"), name)
    draft.put(("model", "dtype"), "auto", "bfloat16 on a GPU that supports it, else float32")
    if not local:
        return None, None
    from rpo_trainer.models.loading import load_tokenizer, saved_config

    config = saved_config(folder, f"--model {model}").get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    own = {"name_or_path": str(folder.absolute())}
    tokenizer = load_tokenizer(ModelSpec.model_validate(own), Path())
    if tokenizer.chat_template is None and any(_is_messages(s.rows[0]) for s in sources):
        template = "chatml" if set(_CHATML_TOKENS) <= set(tokenizer.get_vocab()) else "plain"
        draft.put(("model", "chat_template"), template, "the tokenizer has none")
        spec = ModelSpec.model_validate(own | {"chat_template": template})
        tokenizer = load_tokenizer(spec, Path())
    return tokenizer, limit


def _is_messages(row: Row) -> bool:
    return "messages" in row or isinstance(row.get("prompt"), list)


def _put_stage(
    draft: Draft,
    key: Key,
    kind: str,
    train: Sequence[_Source],
    tests: Sequence[_Source],
    fraction: float | None,
    lora: bool,
) -> None:
    """Put one stage, except for its `max_length`."""

    def put(field: str, value: Any, comment: str = "") -> None:
        draft.put((*key, field), value, comment)

    rows = round(sum(len(source.rows) for source in train) * (1 - (fraction or 0)))
    batch = min(64, max(4, 2 ** int(np.log2(max(rows // _STEPS, 1)))))
    epochs = 2 if kind == "sft" else 1
    steps = -(-rows // batch) * epochs
    put("name", kind)
    put("kind", kind)
    put("data", {"train": [source.spec for source in train]})
    for number, source in enumerate(train):
        draft.comments[(*key, "data", "train", number, "path")] = source.comment
    if tests:
        draft.put((*key, "data", "eval"), [source.spec for source in tests])
    elif fraction is not None:
        comment = "fraction of the prompts to hold out for evaluation"
        draft.put((*key, "data", "eval_fraction"), fraction, comment)
    if kind != "sft":
        put("beta", 0.1, "larger values keep the policy closer to the reference model")
        if kind == "rpo":
            put("reward_scale", "auto", "η, fitted to the rewards of the training rows")
        put(
            "sft_loss_weight",
            _SFT_WEIGHT[kind],
            "weight of the SFT loss on the chosen responses, which keeps them likely",
        )
    put("max_length", _DEFAULT_LENGTH)
    put("global_batch_size", batch, "examples per optimizer step, over all processes")
    put(
        "micro_batch_size",
        min(4, batch),
        "affects memory and speed only; lower it if memory runs out",
    )
    put("num_train_epochs", epochs, f"about {steps} steps")
    rate = _RATES[kind] * (_ADAPTER_FACTOR if lora else 1)
    put(
        "learning_rate",
        float(f"{rate:.1e}"),
        "peak value, for LoRA" if lora else "peak value, for full fine-tuning",
    )
    warmup = steps // 10
    if kind == "sft":
        put("lr_scheduler_type", "cosine")
    elif warmup:
        put("lr_scheduler_type", "constant_with_warmup")
    if warmup:
        put("warmup_steps", warmup)
    put("gradient_checkpointing", True, "saves memory, costs time")
    put("logging_steps", max(1, min(10, steps // 20)))
    every = max(1, min(200, steps // 4))
    put("save_steps", every, "a stopped run resumes from the last checkpoint")
    if tests or fraction is not None:
        put(
            "eval_steps", max(1, min(100, steps // 4)), "the held-out rows are evaluated this often"
        )
    if lora:
        put("peft", {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
        comment = (
            "final/ has the merged model, adapter/ the adapter; `keep`: final/ has the adapter"
        )
        draft.put((*key, "peft", "between_stages"), "merge", comment)


def _eval_fraction(train: Sequence[_Source]) -> float | None:
    """Return the fraction of the prompts to hold out; None: it is less than one prompt."""
    prompts = {prompt_key(row) for source in train for row in source.rows}
    return _EVAL_FRACTION if len(prompts) * _EVAL_FRACTION >= 1 else None


def _max_length(
    rows: Sequence[Row],
    kind: _RowKind,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None,
) -> tuple[int, str]:
    """Return `max_length` for these rows, and a comment on its origin."""
    if tokenizer is None:
        return _DEFAULT_LENGTH, "not measured: the model is not a local directory"
    lengths = _lengths(rows[:: max(1, len(rows) // _MEASURED_ROWS)], kind, tokenizer)
    longest, most = int(lengths.max()), int(np.ceil(np.quantile(lengths, 0.99)))
    fitting = longest if longest <= 2 * most else most
    length = -(-fitting // _LENGTH_STEP) * _LENGTH_STEP
    comment = f"99% of the rows have at most {most} tokens; the longest has {longest}"
    if limit is not None and length > limit:
        return limit, f"{comment}; the context length of the model is {limit}"
    return length, comment


def _lengths(rows: Sequence[Row], kind: _RowKind, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the tokens of prompt and longest response of each row: [rows] int."""
    from rpo_trainer.data.tokenize import tokenize_rows

    examples = tokenize_rows(
        rows, tokenizer, kind=kind, max_length=_UNLIMITED, truncation="drop", audit=Audit(),
        processes=1,
    )  # fmt: skip
    return np.array(
        [
            len(example["prompt_ids"]) + max(map(len, example["response_ids"]))
            for example in examples.to_list()
        ]
    )
