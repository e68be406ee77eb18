"""Configs of LLaMA-Factory, Axolotl and TRL become recipes; settings without a counterpart are listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.recipe import load_recipe
from rpo_trainer.recipe.convert.convert import Converted, convert_file
from rpo_trainer.recipe.convert.recognize import foreign_tool
from rpo_trainer.recipe.schema import Recipe
from rpo_trainer.recipe.yaml_document import dump, parse
from tests.raising import raises

LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "org/base",
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "pref_beta": 0.2,
    "pref_ftx": 0.5,
    "dataset": "pairs",
    "template": "llama3",
    "cutoff_len": 512,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": "5.0e-6",
    "num_train_epochs": 2,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "output_dir": "saves/x",
}
DATASET_INFO: dict[str, Any] = {
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
    },
    "chat": {"file_name": "chat.jsonl", "formatting": "sharegpt"},
    "hub": {"hf_hub_url": "org/rows", "split": "train_sft", "num_samples": 7, "subset": "en"},
    "kto": {"file_name": "kto.json", "columns": {"kto_tag": "label"}},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
    "tagged": {
        "file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "client"},
    },
}  # fmt: skip
AXOLOTL: dict[str, Any] = {
    "base_model": "org/base",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template", "ds_type": "json"}],
    "sequence_len": 1024,
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "num_epochs": 1,
    "optimizer": "adamw_bnb_8bit",
    "learning_rate": 0.0002,
    "bf16": "auto",
    "sample_packing": True,
}
TRL: dict[str, Any] = {
    "model_name_or_path": "org/base",
    "dataset_name": "org/rows",
    "dataset_train_split": "train_prefs",
    "beta": 0.05,
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.25],
    "max_length": 700,
    "use_peft": True,
    "lora_r": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "packing": False,
}

Convert = Callable[..., Converted]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """`convert(values, **changed)`: a config of these values; None removes a key."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (data / "pairs.json").write_text(json.dumps([{"question": "?"}] * 80))
    (data / "chat.jsonl").write_text('{"conversations": []}\n' * 10)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n' * 60)

    def _convert(values: dict[str, Any], *, devices: int | None = None, kind: str | None = None,
                 **changed: Any) -> Converted:  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(dump({k: v for k, v in {**values, **changed}.items() if v is not None}))
        return convert_file(path, tmp_path / "recipe.yaml", devices=devices, kind=kind)

    return _convert


def stage_of(converted: Converted) -> dict[str, Any]:
    data = parse(converted.text).data
    Recipe.model_validate(data)
    (stage,) = data["stages"]
    return stage


def keys(notes: list[Any]) -> set[str]:
    return {note.key for note in notes}


# --- recognition ---


@pytest.mark.parametrize(
    ("values", "tool"),
    [(LLAMA_FACTORY, "LLaMA-Factory"), (AXOLOTL, "Axolotl"), (TRL, "TRL"),
     ({"model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}}, "torchtune"),
     ({"model": {"name_or_path": "x"}, "stages": []}, None),
     ({"model": {"name_or_path": "x"}, "stage": "dpo", "template": "x", "dataset": "y"}, None),
     ({"model_name_or_path": "x", "stages": [], "template": "x", "stage": "x"}, None),
     ({"base_model": "x", "merge_method": "slerp"}, None), ([], None), ("text", None)],
)  # fmt: skip
def test_a_tool_is_known_by_its_keys(values: Any, tool: str | None) -> None:
    assert foreign_tool(values) == tool


@pytest.mark.parametrize("values", [LLAMA_FACTORY, AXOLOTL, TRL], ids=["lf", "axolotl", "trl"])
def test_a_foreign_file_in_place_of_a_recipe_is_one_error(
    values: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(values))
    with raises("recipe.foreign-file") as caught:
        load_recipe(path)
    (error,) = caught.value.problems  # type: ignore[attr-defined]
    assert f"rpo-trainer convert {path}" in (error.fix or "")


# --- LLaMA-Factory ---


def test_llama_factory_dpo(convert: Convert) -> None:
    converted = convert(LLAMA_FACTORY, mystery=3)
    stage = stage_of(converted)
    assert (stage["kind"], stage["beta"], stage["max_length"]) == ("dpo", 0.2, 512)
    assert (stage["sft_loss_weight"], stage["sft_reduction"]) == (0.5, "sequence_mean")
    assert stage["truncation"] == "truncate"
    assert (stage["global_batch_size"], stage["micro_batch_size"]) == (8, 2)
    assert stage["learning_rate"] == 5e-6
    assert stage["peft"] == {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (source,) = stage["data"]["train"]
    assert source == {
        "path": "data/pairs.json", "format": "pairs",
        "columns": {"instruction": "question", "chosen": "good", "rejected": "bad"},
    }  # fmt: skip
    assert stage["warmup_steps"] == 2  # a tenth of 80 rows / 8 × 2 epochs
    assert {"mystery"} == keys(converted.left_out)
    assert {"template", "output_dir", "gradient_accumulation_steps"} == keys(converted.differences)
    assert "do_train" in keys(converted.not_needed)
    assert "mystery: 3" in converted.text  # a comment, so that the file contains it too


def test_defaults_of_llama_factory_are_written_out(convert: Convert) -> None:
    bare = {key: LLAMA_FACTORY[key] for key in ("model_name_or_path", "dataset", "template")}
    stage = stage_of(convert(bare, stage="sft", dataset="chat"))
    assert stage["learning_rate"] == 5e-5 and stage["num_train_epochs"] == 3.0
    assert stage["lr_scheduler_type"] == "linear" and stage["global_batch_size"] == 8
    assert stage["peft"] == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    assert stage["data"]["train"] == [{"path": "data/chat.jsonl", "format": "sharegpt"}]


def test_the_number_of_devices_multiplies_the_batch(convert: Convert) -> None:
    converted = convert(LLAMA_FACTORY, devices=4)
    assert stage_of(converted)["global_batch_size"] == 32
    assert "gradient_accumulation_steps" not in keys(converted.differences)


def test_full_fine_tuning_and_a_reward_model_have_no_adapter(convert: Convert) -> None:
    assert "peft" not in stage_of(convert(LLAMA_FACTORY, finetuning_type="full"))
    converted = convert(LLAMA_FACTORY, stage="rm", pref_beta=None, pref_ftx=None, val_size=0.1)
    stage = stage_of(converted)
    assert (stage["kind"], stage["objective"]) == ("reward", "bradley_terry")
    assert "peft" not in stage and stage["data"]["eval_fraction"] == 0.1
    assert {"finetuning_type", "lora_rank", "lora_target"} <= keys(converted.left_out)


def test_ipo_averages_as_in_llama_factory(convert: Convert) -> None:
    stage = stage_of(convert(LLAMA_FACTORY, pref_loss="ipo"))
    assert stage["loss_type"] == "ipo" and stage["average_logps"] is True


def test_four_bits_become_nf4_and_eight_are_left_out(convert: Convert) -> None:
    assert stage_of(convert(LLAMA_FACTORY, quantization_bit=4))["peft"]["quantization"] == "nf4"
    converted = convert(LLAMA_FACTORY, quantization_bit=8)
    assert "quantization" not in stage_of(converted)["peft"]
    assert "quantization_bit" in keys(converted.left_out)


def test_several_data_sets_with_weights(convert: Convert) -> None:
    converted = convert(
        LLAMA_FACTORY, stage="sft", pref_beta=None, pref_ftx=None, dataset="chat,hub",
        mix_strategy="interleave_under", interleave_probs="0.7,0.3", max_samples=5,
    )  # fmt: skip
    chat, hub = stage_of(converted)["data"]["train"]
    assert (chat["weight"], hub["weight"]) == (0.7, 0.3)
    assert hub["path"] == "org/rows" and hub["split"] == "train_sft" and hub["max_rows"] == 5
    assert "dataset_info.json.hub.subset" in keys(converted.left_out)
    assert "warmup_ratio" in keys(converted.left_out)  # the rows of the hub cannot be counted


def test_tags_that_are_not_read_are_listed(convert: Convert) -> None:
    converted = convert(LLAMA_FACTORY, stage="sft", pref_beta=None, pref_ftx=None, dataset="tagged")
    (source,) = stage_of(converted)["data"]["train"]
    assert source["columns"] == {"messages": "turns"} and source["format"] == "messages"
    assert keys(converted.left_out) == {"dataset_info.json.tagged.tags.user_tag"}


def test_a_column_that_llama_factory_would_not_read_is_reported(
    convert: Convert, tmp_path: Path
) -> None:
    rows = tmp_path / "data" / "pairs.json"
    rows.write_text(json.dumps([{"question": "?", "input": "more"}]))
    assert "dataset_info.json.pairs.columns" in keys(convert(LLAMA_FACTORY).differences)


def test_a_data_set_that_is_not_defined_is_reported(convert: Convert) -> None:
    converted = convert(LLAMA_FACTORY, dataset="elsewhere")
    assert stage_of(converted)["data"]["train"] == [{"path": "elsewhere"}]
    assert "dataset" in keys(converted.differences)


@pytest.mark.parametrize(
    "changed",
    [{"stage": "kto"}, {"stage": "pt"}, {"stage": "ppo"}, {"pref_loss": "simpo"},
     {"pref_loss": "orpo"}, {"finetuning_type": "freeze"}, {"image_max_pixels": 100},
     {"dataset": "kto"}, {"dataset": "pictures"}],
    ids=str,
)  # fmt: skip
def test_methods_of_llama_factory_without_a_counterpart(
    changed: dict[str, Any], convert: Convert
) -> None:
    with raises("convert.unsupported-method", exit_code=2) as caught:
        convert(LLAMA_FACTORY, **changed)
    assert caught.value.fix


def test_a_config_that_does_not_train(convert: Convert) -> None:
    with raises("convert.not-a-training-config", exit_code=2):
        convert(LLAMA_FACTORY, dataset=None)


@pytest.mark.parametrize(
    ("values", "key", "changed"),
    [
        (LLAMA_FACTORY, "val_size", {}),
        (LLAMA_FACTORY, "val_size", {"stage": "sft", "dataset": "chat"}),
        (AXOLOTL, "val_set_size", {}),
        (AXOLOTL, "val_set_size", {"rl": "dpo"}),
    ],
    ids=["llama-factory-dpo", "llama-factory-sft", "axolotl-sft", "axolotl-dpo"],
)
def test_a_validation_fraction_is_kept(
    values: dict[str, Any], key: str, changed: dict[str, Any], convert: Convert
) -> None:
    converted = convert(values, **{key: 0.2}, **changed)
    stage = stage_of(converted)
    assert stage["kind"] == changed.get("rl", changed.get("stage", stage["kind"]))
    assert stage["data"]["eval_fraction"] == 0.2
    assert key not in keys(converted.left_out)


# --- Axolotl ---


def test_axolotl_sft(convert: Convert) -> None:
    converted = convert(AXOLOTL, special_tokens={"pad_token": "<pad>"}, val_set_size=0.0)
    stage = stage_of(converted)
    assert (stage["kind"], stage["max_length"]) == ("sft", 1024)
    assert stage["data"]["train"] == [{"path": "rows.jsonl", "format": "messages"}]
    assert stage["peft"] == {
        "r": 8, "lora_alpha": 16, "target_modules": "all-linear", "quantization": "nf4",
    }  # fmt: skip
    assert (stage["global_batch_size"], stage["optim"]) == (6, "adamw_bnb_8bit")
    assert stage["lr_scheduler_type"] == "cosine"  # Axolotl's default
    assert "truncation" not in stage  # both drop longer rows
    assert keys(converted.left_out) == {"special_tokens"}


def test_axolotl_without_an_adapter_and_its_warmup(convert: Convert) -> None:
    stage = stage_of(
        convert(AXOLOTL, adapter=None, load_in_4bit=None, num_epochs=10, lora_r=None,
                lora_alpha=None, lora_target_linear=None)
    )  # fmt: skip
    assert "peft" not in stage
    assert stage["warmup_steps"] == 3  # 3 % of 60 rows / 6 × 10 epochs


def test_counts_per_epoch_become_steps_where_the_rows_are_known(convert: Convert) -> None:
    counts = {"saves_per_epoch": 2, "evals_per_epoch": 5}
    converted = convert(AXOLOTL, test_datasets=AXOLOTL["datasets"], **counts)
    stage = stage_of(converted)
    assert (stage["save_steps"], stage["eval_steps"]) == (5, 2)  # 60 rows / 6: 10 steps
    hub = [{"path": "org/rows", "type": "alpaca"}]
    converted = convert(AXOLOTL, datasets=hub, **counts)
    assert set(counts) <= keys(converted.left_out)
    assert "save_steps" not in stage_of(converted)


def test_the_mixture_of_the_alignment_handbook(convert: Convert) -> None:
    mixture = {"datasets": [{"id": "org/rows", "split": "train_prefs", "columns": ["chosen"], "weight": 0.5}],
               "test_split_size": 10}  # fmt: skip
    converted = convert(TRL, dataset_name=None, dataset_mixture=mixture)
    assert stage_of(converted)["data"]["train"] == [{"path": "org/rows", "split": "train_prefs"}]
    assert keys(converted.left_out) == {
        "dataset_mixture.datasets.0.weight", "dataset_mixture.test_split_size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("chatml.intel", {"format": "orca"}),
        ("llama3.icr", {"format": "pairs", "columns": {"instruction": "input"}}),
        ("chatml.prompt_pairs", {"format": "pairs", "columns": {"instruction": "prompt"}}),
        ("argilla_chat", {"format": "pairs"}),
        ("chat_template.default", {"format": "pairs"}),
        ({"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad"},
         {"format": "pairs", "columns": {"instruction": "q", "chosen": "good", "rejected": "bad"}}),
    ],
    ids=str,
)  # fmt: skip
def test_axolotl_dpo(kind: Any, source: dict[str, Any], convert: Convert) -> None:
    datasets = [{"path": "org/pairs", "split": "train", "type": kind}]
    stage = stage_of(convert(AXOLOTL, rl="dpo", datasets=datasets, rl_beta=0.3, rpo_alpha=0.5))
    assert (stage["kind"], stage["beta"]) == ("dpo", 0.3)
    assert (stage["sft_loss_weight"], stage["sft_reduction"]) == (0.5, "token_mean")
    assert stage["data"]["train"] == [{"path": "org/pairs", "split": "train", **source}]


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ({"type": "alpaca"}, {"format": "alpaca"}),
        ({"type": "gpteacher"}, {"format": "alpaca", "columns": {"output": "response"}}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
        ({"type": "chat_template", "field_messages": "conversations",
          "message_property_mappings": {"role": "from", "content": "value"}}, {"format": "sharegpt"}),
    ],
    ids=str,
)  # fmt: skip
def test_axolotl_sft_types(entry: dict[str, Any], source: dict[str, Any], convert: Convert) -> None:
    stage = stage_of(convert(AXOLOTL, datasets=[{"path": "org/rows", **entry}]))
    assert stage["data"]["train"] == [{"path": "org/rows", **source}]


def test_keys_of_axolotl_data_sets_are_listed(convert: Convert) -> None:
    datasets = [{"path": "org/rows", "type": "chat_template", "name": "en", "shards": 4,
                 "message_property_mappings": {"role": "speaker", "content": "content"}}]  # fmt: skip
    converted = convert(AXOLOTL, datasets=datasets)
    assert keys(converted.left_out) == {
        "datasets.0.name", "datasets.0.shards", "datasets.0.message_property_mappings",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [{"rl": "kto"}, {"rl": "simpo"}, {"rl": "orpo"}, {"rl": "grpo"}, {"processor_type": "x"},
     {"pretraining_dataset": [{"path": "x"}]}, {"process_reward_model": True}, {"adapter": "x"}],
    ids=str,
)  # fmt: skip
def test_methods_of_axolotl_without_a_counterpart(
    changed: dict[str, Any], convert: Convert
) -> None:
    with raises("convert.unsupported-method", exit_code=2) as caught:
        convert(AXOLOTL, **changed)
    assert caught.value.fix


# --- TRL ---


def test_trl_dpo(convert: Convert) -> None:
    stage = stage_of(convert(TRL))
    assert (stage["kind"], stage["beta"], stage["loss_type"]) == ("dpo", 0.05, "dpo")
    assert (stage["sft_loss_weight"], stage["sft_reduction"]) == (0.25, "token_mean")
    assert stage["learning_rate"] == 1e-6 and stage["global_batch_size"] == 16
    assert stage["peft"] == {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
    assert stage["data"]["train"] == [{"path": "org/rows", "split": "train_prefs"}]


def test_trl_does_not_say_its_command(convert: Convert) -> None:
    plain = {key: TRL[key] for key in ("model_name_or_path", "dataset_name", "max_length")}
    with raises("convert.unknown-kind", exit_code=2):
        convert(plain)
    assert stage_of(convert(plain, kind="sft"))["learning_rate"] == 2e-5
    assert stage_of(convert(plain, kind="reward"))["objective"] == "bradley_terry"


def test_losses_of_trl_without_a_counterpart(convert: Convert) -> None:
    with raises("convert.unsupported-method"):
        convert(TRL, loss_type="hinge", loss_weights=None)


# --- any file ---


def test_nothing_is_dropped_without_a_word(convert: Convert) -> None:
    """Every key of a file is in the recipe, or in one of the lists."""
    extra = {f"key_{number}": number + 1 for number in range(5)}
    for values in (LLAMA_FACTORY, AXOLOTL, TRL):
        converted = convert(values, **extra)
        assert set(extra) <= keys(converted.left_out)


def test_a_secret_is_not_shown(convert: Convert) -> None:
    converted = convert(
        LLAMA_FACTORY, swanlab_api_key="abcdefgh12345678", hub_token="hf_" + "a" * 30
    )
    assert "abcdefgh12345678" not in converted.text and "hf_aaa" not in converted.text
    assert {"swanlab_api_key", "hub_token"} <= keys(converted.left_out)


def test_a_value_that_the_schema_refuses_is_left_out(convert: Convert) -> None:
    converted = convert(LLAMA_FACTORY, weight_decay=-1.0)
    assert "weight_decay" not in stage_of(converted)
    assert "weight_decay" in keys(converted.left_out)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: 1\n", "convert.unknown-file"),
        ("model: {_component_: x.y}\n", "convert.unknown-file"),
        ("model:\n  name_or_path: x\nstages: []\n", "convert.unknown-file"),
        ("a: [\n", "convert.invalid-yaml"),
        ("a: &b 1\n", "convert.invalid-yaml"),
    ],
)
def test_files_that_are_not_converted(text: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with raises(code, exit_code=2):
        convert_file(path, tmp_path / "recipe.yaml")


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    with raises("convert.unreadable-file", exit_code=2):
        convert_file(tmp_path / "absent.yaml", tmp_path / "recipe.yaml")


def test_a_number_that_is_none(convert: Convert) -> None:
    with raises("convert.not-a-number", exit_code=2):
        convert(LLAMA_FACTORY, learning_rate="fast")
