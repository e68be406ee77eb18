"""Arguments of TRL's configs and trainers: they take effect, are listed as without effect, or are refused."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.trainers import DPOConfig, RewardConfig, RPOConfig, SFTConfig, SFTTrainer
from rpo_trainer.trainers.argument_status import by_name
from rpo_trainer.trainers.trl_arguments import _note_once
from rpo_trainer.trainers.unknown_arguments import ELSEWHERE
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.conftest import TRAINERS
from tests.trainers.plain import PAIRS, as_lists, assert_bitwise_equal, make_rows, rows_of

CONFIGS = [SFTConfig, DPOConfig, RewardConfig]
# A value that changes the result, for each argument with some refused values
OTHER: dict[str, Any] = {
    "truncation_mode": "keep_end", "activation_offloading": True, "packing_strategy": "wrapped",
    "dataset_kwargs": {"add_special_tokens": False}, "completion_only_loss": False,
    "assistant_only_loss": False, "loss_type": "dft", "reference_free": True, "loss_weights": [0.5, 1.0],
    "f_divergence_type": "js_divergence", "ld_alpha": 0.5, "use_weighting": True, "sync_ref_model": True,
    "center_rewards_coefficient": 0.01,
}  # fmt: skip
HARMLESS: dict[str, Any] = {
    "dataset_num_proc": 4, "pad_to_multiple_of": "8", "padding_free": True, "shuffle_dataset": True,
    "packing": True, "eval_packing": False, "precompute_ref_log_probs": True,
    "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05, "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
}  # fmt: skip


def make(config: type, **settings: Any) -> Any:
    return config(output_dir="out", use_cpu=True, report_to="none", **settings)


def rows_by_config() -> list[tuple[type, str, str]]:
    return [
        (config, name, row.status)
        for config in (*CONFIGS, RPOConfig)
        for name, row in by_name(config.trl_table).items()
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_argument_of_trl_is_read_or_answered(config: type) -> None:
    trl = pytest.importorskip("trl")
    theirs = {field.name for field in dataclasses.fields(getattr(trl, config.__name__))}
    ours = {field.name for field in dataclasses.fields(config)}
    assert theirs - ours - ELSEWHERE.keys() == set()


@pytest.mark.parametrize("config", [*CONFIGS, RPOConfig])
def test_the_table_is_about_the_fields(config: type) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(by_name(config.trl_table)) <= fields


@pytest.mark.parametrize(("config", "name", "status"), rows_by_config())
def test_an_argument_is_refused_or_listed(
    config: type, name: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    _note_once.cache_clear()
    if status == "refused":
        with raises("training.unsupported-setting", RecipeError, settings=[name]) as caught:
            make(config, **{name: OTHER[name]})
        assert (
            "remove it" in caught.value.what
            or "use " in caught.value.what
            or ("train in rounds" in caught.value.what)
        )
        accepted = [v for v in by_name(config.trl_table)[name].taken if v is not None]
    else:
        accepted = [HARMLESS[name]] if status == "harmless" else []
    for value in accepted:
        caplog.clear()
        made = make(config, **{name: value})
        assert getattr(made, name) == value
        said = [record for record in caplog.records if f"{name}=" in record.getMessage()]
        assert len(said) == (name != "truncation_mode")  # which takes effect


def test_all_are_listed_once(caplog: pytest.LogCaptureFixture) -> None:
    _note_once.cache_clear()
    for _ in range(2):
        made = make(SFTConfig, packing=True, assistant_only_loss=True, use_liger_kernel=True)
    (line,) = [r.getMessage() for r in caplog.records]
    assert all(
        name in line for name in ("packing=True", "assistant_only_loss=True", "use_liger_kernel")
    )
    assert "per_device_train_batch_size" in line
    assert not made.use_liger_kernel  # otherwise transformers would patch the model


def test_an_argument_that_is_set_afterwards_is_looked_at_too(start: Any, tokenizer: Any) -> None:
    args = make(SFTConfig)
    args.packing_strategy = "wrapped"
    with raises("training.unsupported-setting", RecipeError, settings=["packing_strategy"]):
        SFTTrainer(copy.deepcopy(start), args, make_rows(0, (1,) * 4), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("config", "given", "field", "value"),
    [
        (DPOConfig, {"loss_type": "sigmoid"}, "loss_type", "dpo"),
        (DPOConfig, {"loss_type": ["sigmoid"]}, "loss_type", "dpo"),
        (DPOConfig, {"loss_type": ["ipo"]}, "loss_type", "ipo"),
        (SFTConfig, {"max_seq_length": 77}, "max_length", 77),
        (SFTConfig, {"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        (DPOConfig, {"evaluation_strategy": "no"}, "eval_strategy", "no"),
        (DPOConfig, {"truncation_mode": "keep_start"}, "truncation", "truncate"),
        (DPOConfig, {"max_prompt_length": None}, "max_length", 1024),
    ],
)
def test_other_names_act(config: type, given: Any, field: str, value: Any) -> None:
    assert getattr(make(config, **given), field) == value


def test_two_names_of_one_argument_contradict_each_other() -> None:
    settings = ["max_seq_length", "max_length"]
    with raises("training.conflicting-settings", RecipeError, settings=settings):
        make(SFTConfig, max_seq_length=7, max_length=8)


# --- arguments of trainers ---


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_foreign_arguments_of_a_trainer_that_are_none_are_left_out(
    kind: str, start: Any, make_config: Any, tokenizer: Any
) -> None:
    rows = rows_of("dpo", PAIRS) if kind == "dpo" else make_rows(0, (1,) * 4)
    trainer = TRAINERS[kind](
        copy.deepcopy(start), args=make_config(kind), train_dataset=rows, tokenizer=tokenizer,
        compute_metrics=None, data_collator=None, model_init=None,
    )  # fmt: skip
    assert trainer.processing_class is tokenizer


def test_an_optimizer_class_acts(start: Any, make_config: Any, tokenizer: Any) -> None:
    rows = make_rows(0, (1,) * 4)
    trainer = SFTTrainer(
        copy.deepcopy(start), make_config("sft"), rows, processing_class=tokenizer,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.25}),
    )  # fmt: skip
    trainer.train()
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.25


def test_a_model_by_name_is_loaded_as_asked(
    tokenizer: Any, make_config: Any, tmp_path: Any
) -> None:
    make_model(vocab_size=100).save_pretrained(tmp_path / "m")
    rows = make_rows(0, (1,) * 4)
    for kwargs, dtype in (
        ({}, torch.float32), ({"dtype": None}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    ):  # fmt: skip
        args = make_config("sft", model_init_kwargs=kwargs)
        trainer = SFTTrainer(str(tmp_path / "m"), args, rows, processing_class=tokenizer)
        assert next(trainer.model.parameters()).dtype is dtype


def test_loading_arguments_for_a_loaded_model_are_refused(
    start: Any, make_config: Any, tokenizer: Any
) -> None:
    args = make_config("sft", model_init_kwargs={"dtype": "float32"})
    with raises("training.no-effect", RecipeError, settings=["model_init_kwargs"]):
        SFTTrainer(copy.deepcopy(start), args, make_rows(0, (1,) * 4), processing_class=tokenizer)


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_tokens_are_set_on_the_tokenizer(
    name: str, start: Any, make_config: Any, tokenizer: Any
) -> None:
    own, rows = copy.deepcopy(tokenizer), make_rows(0, (1,) * 4)
    token = own.convert_ids_to_tokens(7)
    SFTTrainer(
        copy.deepcopy(start), make_config("sft", **{name: token}), rows, processing_class=own
    )
    assert getattr(own, name) == token
    args = make_config("sft", **{name: "<nowhere>"})
    with raises("training.unknown-token", RecipeError, settings=[name]):
        SFTTrainer(copy.deepcopy(start), args, rows, processing_class=own)


def test_a_model_card_names_the_data_set(
    start: Any, make_config: Any, tokenizer: Any, tmp_path: Any
) -> None:
    rows = make_rows(0, (1,) * 4)
    trainer = SFTTrainer(copy.deepcopy(start), make_config("sft"), rows, processing_class=tokenizer)
    trainer.create_model_card(model_name="m", dataset_name="org/rows")
    assert "org/rows" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# --- rows ---

TEXTS = [{"q": f"{n} + 1?", "a": str(n + 1)} for n in range(4)]


@pytest.fixture(scope="module")
def character_model() -> Any:
    return make_model(vocab_size=100)


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda row: row["q"] + row["a"], [{"text": r["q"] + r["a"]} for r in TEXTS]),
        (
            lambda row: {"prompt": row["q"], "completion": row["a"]},
            [{"prompt": r["q"], "completion": r["a"]} for r in TEXTS],
        ),
    ],
    ids=["text", "row"],
)
def test_a_formatting_function_makes_the_rows(
    function: Any, rows: Any, character_model: Any, make_config: Any, tokenizer: Any
) -> None:
    def trained(rows: Any, **more: Any) -> Any:
        return SFTTrainer(
            copy.deepcopy(character_model), make_config("sft"), rows, processing_class=tokenizer, **more
        ).train_dataset  # fmt: skip

    made, expected = trained(TEXTS, formatting_func=function), trained(rows)
    columns = ("prompt_ids", "response_ids", "response_mask")
    for one, other in zip(map(as_lists, made), map(as_lists, expected), strict=True):
        assert [one[name] for name in columns] == [other[name] for name in columns]


def test_a_formatting_function_for_batches_is_refused(
    character_model: Any, make_config: Any, tokenizer: Any
) -> None:
    with raises("data.formatting-func", DataError, row=0):
        SFTTrainer(
            copy.deepcopy(character_model), make_config("sft"), TEXTS, processing_class=tokenizer,
            formatting_func=lambda rows: [rows["q"]],
        )  # fmt: skip


def test_text_of_another_column_trains_with_its_special_tokens(
    character_model: Any, make_config: Any, tokenizer: Any
) -> None:
    rows = [{"words": f"{n} is{tokenizer.eos_token}"} for n in range(4)]
    args = make_config("sft", dataset_text_field="words")
    trainer = SFTTrainer(copy.deepcopy(character_model), args, rows, processing_class=tokenizer)
    (ids,) = trainer.train_dataset[0]["response_ids"]
    assert (ids == tokenizer.eos_token_id).sum() == 1 and ids[-1] == tokenizer.eos_token_id


IDS = [1, 5, 6, 7, 8, 2]
TOKENIZED: list[tuple[dict[str, Any], int, list[int], list[int]]] = [
    ({"input_ids": IDS}, 1, IDS[1:], [1] * 5),
    ({"input_ids": IDS, "labels": [-100, -100, -100, 7, 8, 2]}, 3, IDS[3:], [1, 1, 1]),
    ({"input_ids": IDS, "completion_mask": [0, 0, 1, 1, 1, 1]}, 2, IDS[2:], [1] * 4),
    (
        {"input_ids": IDS, "completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [0, 1, 1, 0, 1, 0]},
        2, [6, 7, 8], [1, 0, 1],
    ),
    ({"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, *[1] * 6]}, 1, IDS[1:], [1] * 5),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "response", "mask"), TOKENIZED)
def test_tokenized_rows_of_sft(
    row: Any, prompt: int, response: Any, mask: Any, start: Any, make_config: Any, tokenizer: Any
) -> None:
    trainer = SFTTrainer(
        copy.deepcopy(start), make_config("sft"), [row] * 4, processing_class=tokenizer
    )
    made = as_lists(trainer.train_dataset[0])
    assert made["prompt_ids"] == row["input_ids"][-6:][:prompt]
    assert (made["response_ids"], made["response_mask"]) == ([response], [mask])


@pytest.mark.parametrize(
    "names",
    [
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
    ],
)
def test_tokenized_pairs_train_as_the_same_examples(
    names: Any, start: Any, make_trainer: Any
) -> None:
    rows = rows_of("rpo", PAIRS)
    rows = [{**r, "response_mask": [[1] * len(ids) for ids in r["response_ids"]]} for r in rows]
    theirs = [
        {
            **dict(zip(names, (row["prompt_ids"], *row["response_ids"]), strict=True)),
            "chosen_reward": row["rewards"][0], "rejected_reward": row["rewards"][1],
        }
        for row in rows
    ]  # fmt: skip
    models = []
    for data in (rows, theirs):
        trainer = make_trainer("rpo", copy.deepcopy(start), data, global_batch_size=8)
        trainer.train()
        models.append(trainer.model)
    assert_bitwise_equal(*models)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": IDS, "labels": IDS[1:]},
        {"input_ids": IDS, "completion_mask": [1, 1]},
        {"input_ids": IDS, "labels": [*IDS[1:], -100]},
    ],
)
def test_columns_that_do_not_match_are_refused(
    row: Any, start: Any, make_config: Any, tokenizer: Any
) -> None:
    with raises("data.tokenized-row", DataError, row=0):
        SFTTrainer(copy.deepcopy(start), make_config("sft"), [row], processing_class=tokenizer)


def test_long_tokenized_rows_are_dropped_or_truncated(
    start: Any, make_config: Any, tokenizer: Any
) -> None:
    rows = [{"input_ids": [1, *range(5, 5 + n)]} for n in (4, 9, 4)]
    for truncation, lengths in ("drop", [4, 4]), ("truncate", [4, 5, 4]):
        args = make_config("sft", max_length=6, truncation=truncation)
        trainer = SFTTrainer(copy.deepcopy(start), args, rows, processing_class=tokenizer)
        found = [len(row["response_ids"][0]) for row in trainer.train_dataset]
        assert found == lengths
        counted = trainer.audits["train"]
        assert bool(counted.dropped) == (truncation == "drop")
        assert bool(counted.warnings) == (truncation == "truncate")
