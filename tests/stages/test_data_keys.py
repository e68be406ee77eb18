"""Content keys of prepared data: what changes them, and that no field of a stage is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.data.tokenizer_digest import tokenizer_digest
from rpo_trainer.recipe import SourceSpec
from rpo_trainer.recipe.schema.stages import STAGE_KINDS
from rpo_trainer.stages.data_keys import DATA_FIELDS, SourceDigests
from rpo_trainer.stages.prepare import StagePreparer
from tests.chain import tiny
from tests.stages.test_prepare import given_pairs, write_pairs

# Fields that do not change which rows a stage is trained on, or how they are tokenized.
OTHERS = {
    "name", "init", "reference", "seed", "eval", "repeat",  # seed and eval are in the key by their values
    "global_batch_size", "micro_batch_size", "micro_batch_tokens", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "max_grad_norm", "optim", "gradient_checkpointing", "logging_steps", "save_steps", "save_total_limit",
    "save_dtype", "eval_steps", "report_to", "router_aux_loss_coef", "on_nonfinite", "max_skipped_steps",
    "peft", "training_args", "beta", "loss_type", "sft_loss_weight", "sft_reduction", "average_logps",
    "step0_check", "disable_dropout", "label_smoothing", "reward_weights",
}  # fmt: skip


def test_every_field_of_a_stage_is_in_the_key_or_known_not_to_matter() -> None:
    fields = {name for kind in STAGE_KINDS.values() for name in kind.model_fields}
    assert fields <= {*DATA_FIELDS, *OTHERS} and not {*DATA_FIELDS} & OTHERS


def key(folder: Path, recipe: tiny.Recipe) -> str:
    preparer = StagePreparer(tiny.load(folder, recipe))
    return preparer.build(preparer.stages[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 99),
        ("truncation", "truncate"),
        ("seed", 9),
        ("learning_rate", 0.5),
        ("beta", 0.7),
    ],
)
def test_settings_of_the_data_change_the_key_and_others_do_not(
    field: str, value: Any, tmp_path: Path
) -> None:
    recipe = given_pairs(tmp_path, "one")
    before = key(tmp_path, recipe)
    assert key(tmp_path, recipe) == before
    recipe["stages"][0][field] = value
    assert (key(tmp_path, recipe) == before) == (field in ("learning_rate", "beta"))


@pytest.mark.parametrize("changed", ["rows", "held-out", "filter", "kwargs", "evaluation"])
def test_sources_filter_template_and_evaluation_change_the_key(
    changed: str, tmp_path: Path
) -> None:
    recipe = given_pairs(tmp_path, "one")
    before = key(tmp_path, recipe)
    if changed == "rows":
        write_pairs(tmp_path / "one.jsonl", "*")
    elif changed == "held-out":
        write_pairs(tmp_path / "one-held.jsonl", "*")
    elif changed == "filter":
        recipe["stages"][0]["data"]["filter"] = {"ties": "keep"}
    elif changed == "kwargs":
        recipe["stages"][0]["data"]["train"][0]["special_tokens"] = "parse"
    else:
        recipe["stages"][0]["eval"] = {"nll": [tiny.task("code", "heldout", 4)]}
    assert key(tmp_path, recipe) != before


def test_the_digest_of_a_tokenizer_follows_its_template_and_tokens() -> None:
    before = tokenizer_digest(character_tokenizer())
    assert tokenizer_digest(character_tokenizer()) == before
    templated, extended = character_tokenizer(), character_tokenizer()
    templated.chat_template = "{{ messages }}"
    extended.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert len({before, tokenizer_digest(templated), tokenizer_digest(extended)}) == 3


def test_digests_are_of_local_files_by_their_written_path(tmp_path: Path) -> None:
    def local(*sources: SourceSpec) -> dict[str, str]:
        return SourceDigests(tmp_path, None).local(sources)

    (tmp_path / "a.jsonl").write_text("x")
    sources = [
        SourceSpec(path="a.jsonl"), SourceSpec(path="somebody/dataset"),
        SourceSpec(task="quickstart/code", size=1),
    ]  # fmt: skip
    first = local(*sources)
    assert list(first) == ["a.jsonl"]
    (tmp_path / "a.jsonl").write_text("y")
    assert local(*sources) != first
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.arrow").write_text("x")
    folder = SourceSpec(path="folder")
    before = local(folder)
    assert list(before) == ["folder"] and local(folder) == before
    (tmp_path / "folder" / "data.arrow").write_text("y")
    assert local(folder) != before


def test_digests_in_the_index_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpo_trainer.runtime.files._TIME_STEP_NS", 0)
    monkeypatch.setattr("rpo_trainer.runtime.files._digests", {})  # those of this process
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "data.arrow").write_text("x")
    sources = [SourceSpec(path="a.jsonl"), SourceSpec(path="folder")]
    index = tmp_path / "sources.json"
    expected = SourceDigests(tmp_path, index).local(sources)
    assert expected == SourceDigests(tmp_path, None).local(sources)
    monkeypatch.setattr("rpo_trainer.runtime.files._digests", {})
    monkeypatch.delattr("rpo_trainer.runtime.files.file_digest")
    assert SourceDigests(tmp_path, index).local(sources) == expected
