"""Every setting of transformers and accelerate takes effect, is refused, or changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from accelerate.utils import GradientAccumulationPlugin
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.trainers import DPOConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rpo_trainer.trainers.argument_page import page
from rpo_trainer.trainers.argument_status import by_name, defaults_of
from rpo_trainer.trainers.argument_table import ACCELERATOR, ACCUMULATION, FSDP, TRAINING
from rpo_trainer.trainers.sft import example_lengths
from tests.documents import ROOT
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import PAIRS, assert_bitwise_equal, make_rows, rows_of

TABLES = {
    TrainingArguments: TRAINING,
    AcceleratorConfig: ACCELERATOR,
    GradientAccumulationPlugin: ACCUMULATION,
}


def values_to_refuse() -> dict[str, Any]:
    """A value that must be refused, for each refused setting of `TrainingArguments`."""
    other = {
        "include_for_metrics": ["inputs"], "label_names": ["labels"], "liger_kernel_config": {"rope": True},
        "length_column_name": "size", "train_sampling_strategy": "group_by_length",
        "label_smoothing_factor": 0.1, "parallelism_config": object(),
    }  # fmt: skip
    defaults = defaults_of(TrainingArguments)
    found = {}
    for name, row in by_name(TRAINING).items():
        if row.status == "refused":
            found[name] = other[name] if name in other else not (row.taken or (defaults[name],))[0]
    return found


@pytest.mark.parametrize("settings", TABLES, ids=lambda settings: settings.__name__)
def test_the_table_has_every_field_of_the_installed_version(settings):
    installed = {field.name for field in dataclasses.fields(settings)}
    table = by_name(TABLES[settings])
    assert installed - set(table) == set(), "say in argument_table.py what becomes of these"
    old = {name for name, row in table.items() if row.some_versions}
    assert set(table) - installed <= old
    assert len(table) == sum(len(row.names) for row in TABLES[settings])  # no duplicates


def test_the_page_is_what_the_table_says():
    written = (ROOT / "docs" / "training-arguments.md").read_text(encoding="utf-8")
    assert written == page(), "regenerate it: see the head of docs/training-arguments.md"


@pytest.mark.parametrize("name", values_to_refuse())
def test_a_setting_that_could_not_act_is_refused(name, make_config):
    row, value = by_name(TRAINING)[name], values_to_refuse()[name]
    with raises("training.unsupported-setting", RecipeError) as caught:
        make_config("sft", **{name: value})
    assert name in caught.value.details["settings"]
    assert f"{name}=" in caught.value.what and row.text in caught.value.what
    assert row.instead in caught.value.what


@pytest.mark.parametrize("name", ["batch_rebalance", "longest"])
def test_other_sampling_strategies_are_refused(name, make_config):
    with raises("training.unsupported-setting", RecipeError, settings=["train_sampling_strategy"]):
        make_config("sft", train_sampling_strategy=name)


@pytest.mark.parametrize(
    ("settings", "code", "word"),
    [
        ({"optim": "lomo"}, "unsupported-setting", "optim='lomo'"),
        ({"optim": "galore_adamw_layerwise"}, "unsupported-setting", "optim='galore_adamw_layerwise'"),
        ({"debug": "tpu_metrics_debug"}, "unsupported-setting", "debug"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "no-effect", "constant_with_warmup"),
        (
            {"gradient_checkpointing": True, "activation_checkpointing": False},
            "conflicting-settings", "activation_checkpointing=False",
        ),
        (
            {"gradient_checkpointing": False, "activation_checkpointing": True},
            "conflicting-settings", "activation_checkpointing=True",
        ),
        (
            {"gradient_checkpointing_kwargs": {}, "activation_checkpointing_kwargs": {"x": 1}},
            "conflicting-settings", "activation_checkpointing_kwargs",
        ),
        ({"dataloader_persistent_workers": True}, "no-effect", "dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "spawn"}, "no-effect", "dataloader_num_workers"),
        ({"fsdp_config": {"version": 2}}, "no-effect", "fsdp_config"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "no-effect", "save_strategy=best"),
        (
            {"global_batch_size": 8, "gradient_accumulation_steps": 2},
            "conflicting-settings", "gradient_accumulation_steps=2",
        ),
        (
            {"micro_batch_tokens": 8, "global_batch_size": 8, "gradient_accumulation_steps": 2},
            "conflicting-settings", "gradient_accumulation_steps=2",
        ),
        (
            {"shuffle": True, "train_sampling_strategy": "sequential"},
            "conflicting-settings", "train_sampling_strategy",
        ),
    ],
)  # fmt: skip
def test_values_and_pairs_that_could_not_act_are_refused(settings, code, word, make_config):
    if new := {n for n in settings if n.startswith("activation_")} - {
        f.name for f in dataclasses.fields(SFTConfig)
    }:
        pytest.skip(f"this transformers has no {new}")
    with raises(f"training.{code}", RecipeError) as caught:
        make_config("sft", **settings)
    assert word in caught.value.what


REFUSED_BY_ACCELERATE: list[tuple[dict[str, Any], str]] = [
    ({"split_batches": True}, "split_batches=True"),
    ({"dispatch_batches": True}, "dispatch_batches=True"),
    ({"even_batches": False}, "even_batches=False"),
    ({"use_seedable_sampler": False}, "use_seedable_sampler=False"),
    ({"gradient_accumulation_kwargs": {"num_steps": 2}}, "num_steps=2"),
    ({"gradient_accumulation_kwargs": {"adjust_scheduler": False}}, "adjust_scheduler=False"),
    ({"gradient_accumulation_kwargs": {"sync_each_batches": True}}, "sync_each_batch?"),
]


@pytest.mark.parametrize(("given", "word"), REFUSED_BY_ACCELERATE)
@pytest.mark.parametrize("form", ["dict", "text", "file", "object"])
def test_accelerators_config_is_looked_at_in_every_form(form, given, word, make_config, tmp_path):
    path = tmp_path / "accelerator.json"
    path.write_text(json.dumps(given))
    forms: dict[str, Any] = {
        "dict": given, "text": json.dumps(given), "file": str(path), "object": AcceleratorConfig(**given)
    }  # fmt: skip
    kind = "unknown" if word.endswith("?") else "unsupported"
    with raises(f"training.{kind}-setting", RecipeError) as caught:
        make_config("sft", accelerator_config=copy.deepcopy(forms[form]))
    assert word in caught.value.what


@pytest.mark.parametrize("given", [{"split_batch": True}, "no/such/file.json"])
def test_an_accelerators_config_that_cannot_be_read(given, make_config):
    with pytest.raises(RecipeError) as caught:
        make_config("sft", accelerator_config=given)
    assert caught.value.where == "accelerator_config"


def test_accelerators_settings_that_act_may_serve_two_trainers(start, make_trainer, make_config):
    kwargs = {"gradient_accumulation_kwargs": {"sync_each_batch": True}, "non_blocking": True}
    args = make_config("sft", accelerator_config=kwargs, global_batch_size=4, max_steps=1)
    rows = make_rows(0, (1,) * 6)
    for _ in range(2):
        trainer = SFTTrainer(copy.deepcopy(start), args, rows, processing_class=_tokenizer())
        trainer.train()
        assert trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"]
        assert args.gradient_accumulation_steps == 2


def _tokenizer() -> Any:
    from rpo_trainer.data.quickstart import character_tokenizer

    return character_tokenizer()


def test_a_config_that_was_changed_is_looked_at_again(start, make_config):
    args = make_config("sft")
    args.label_smoothing_factor = 0.1
    with raises("training.unsupported-setting", RecipeError, settings=["label_smoothing_factor"]):
        SFTTrainer(
            copy.deepcopy(start), args, make_rows(0, (1,) * 4), processing_class=_tokenizer()
        )


@pytest.mark.parametrize("table", [TRAINING, ACCELERATOR, ACCUMULATION, FSDP])
def test_refused_settings_say_what_to_do(table):
    for row in table:
        assert row.text
        assert bool(row.instead) == (row.status == "refused" or bool(row.not_taken)), row.names


def test_a_config_made_again_from_its_fields_is_the_same(make_config):
    for settings in ({}, {"shuffle": False}, {"train_sampling_strategy": "sequential"}):
        args = make_config("sft", global_batch_size=8, **settings)
        again = dataclasses.replace(args)
        assert (again.shuffle, again.train_sampling_strategy) == (
            args.shuffle, args.train_sampling_strategy,
        )  # fmt: skip


# --- the order of the data ---


def steps_of(trainer: Any) -> list[set[str]]:
    """The rows of each optimizer step."""
    seen: list[set[str]] = []
    own = trainer.get_batch_samples

    def get_batch_samples(*args: Any) -> Any:
        batches, counts = own(*args)
        flat = [part for b in batches for part in b.micro_batches]
        seen.append({row for batch in flat for row in batch.ids})
        return batches, counts

    trainer.get_batch_samples = get_batch_samples
    trainer.train()
    return [step for step in seen if step]


@pytest.mark.parametrize(
    "settings", [{"shuffle": False}, {"train_sampling_strategy": "sequential"}], ids=str
)
@pytest.mark.parametrize("more", [{}, {"micro_batch_tokens": 40}], ids=["micro", "tokens"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_without_shuffling_the_order_is_the_datas(kind, more, settings, start, make_trainer):
    rows = rows_of(kind, (1 if kind == "sft" else 2,) * 7)
    trainer = make_trainer(
        kind, copy.deepcopy(start), rows, global_batch_size=4, max_steps=4,
        **({"per_device_train_batch_size": 2} | more), **settings,
    )  # fmt: skip
    first, rest = {f"row-{n}" for n in range(4)}, {f"row-{n}" for n in range(4, 7)}
    assert steps_of(trainer) == [first, rest, first, rest]


def test_by_default_every_epoch_is_a_permutation(start, make_trainer):
    rows = make_rows(0, (1,) * 8)
    trainer = make_trainer("sft", copy.deepcopy(start), rows, global_batch_size=4, max_steps=4)
    assert (trainer.args.shuffle, trainer.args.train_sampling_strategy) == (True, "random")
    steps = steps_of(trainer)
    assert steps[:2] != steps[2:]


# --- settings that take effect ---


def test_the_loaders_have_their_settings(start, make_trainer):
    settings = {
        "dataloader_num_workers": 1, "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "spawn", "dataloader_persistent_workers": True,
    }  # fmt: skip
    rows = make_rows(0, (1,) * 4)
    trainer = make_trainer("sft", copy.deepcopy(start), rows, eval_rows=rows, **settings)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.multiprocessing_context.get_start_method() == "spawn"
        assert (loader.num_workers, loader.prefetch_factor) == (1, 3)
        assert loader.persistent_workers


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("wanted", ["all", "non_padding"])
def test_tokens_seen_are_counted(wanted, budget, layout, start, make_trainer):
    rows = rows_of("dpo", (2,) * 6)
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, layout=layout, global_batch_size=6, max_steps=2,
        per_device_train_batch_size=1, micro_batch_tokens=budget, logging_strategy="steps",
        logging_steps=1, include_num_input_tokens_seen=wanted, include_for_metrics=[],
    )  # fmt: skip
    trainer.train()
    padding = 0
    for row in rows:
        lengths = [len(row["prompt_ids"]) + len(r) for r in row["response_ids"]]
        padding += 2 * max(lengths) - sum(lengths) if layout == "padded" else 0
        if layout == "shared":
            padding -= len(row["prompt_ids"])
    tokens = sum(2 * len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows)
    if layout == "shared" or (wanted == "all" and budget is None):
        tokens += padding
    seen = [line["num_input_tokens_seen"] for line in trainer.state.log_history][:2]
    if wanted == "all" and budget is not None and layout == "padded":
        assert seen[0] > tokens  # padded over entire forwards
    else:
        assert seen == [tokens, 2 * tokens]
    rates = [line["train_tokens_per_second"] for line in trainer.state.log_history[:2]]
    assert all(rate > 0 for rate in rates)
    assert trainer.state.total_flos > 0


def test_noise_on_embeddings_is_scaled_by_the_example(start, make_trainer):
    rows = make_rows(0, (1,) * 4)
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"][0]) for row in rows]
    for layout in ("packed", "padded"):
        trainer = make_trainer("sft", copy.deepcopy(start), rows, layout=layout)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        found = example_lengths(batch.model_inputs)
        wanted = [n for n in lengths for _ in range(n)]
        if layout == "padded":
            wanted = [n for n in lengths for _ in range(max(lengths))]
        assert found.flatten().tolist() == wanted


def test_noise_of_one_example_a_forward_is_scaled_by_its_length(start, make_trainer):
    rows, sizes = make_rows(0, (1,) * 4), []
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, layout="single", neftune_noise_alpha=5.0,
        per_device_train_batch_size=4,
    )  # fmt: skip
    embeddings = trainer.model.get_input_embeddings()
    plain = embeddings.weight.detach().clone()

    def look(_: Any, args: Any, output: Any) -> None:
        (ids,) = args
        largest = (output - plain[ids]).abs().max().item()
        sizes.append(largest * (ids.numel() * output.shape[-1]) ** 0.5 / 5.0)

    train = trainer._inner_training_loop

    def watched(*args: Any, **kwargs: Any) -> Any:  # its hook comes after the noise's
        handle = embeddings.register_forward_hook(look)
        try:
            return train(*args, **kwargs)
        finally:
            handle.remove()

    trainer._inner_training_loop = watched
    trainer.train()
    assert len(sizes) == 4 and all(0.9 < size <= 1.0 + 1e-6 for size in sizes)


def test_noise_acts_in_training_alone(start, make_trainer):
    rows, models, losses, hooks = make_rows(0, (1,) * 4), [], [], []
    for alpha in (None, 5.0):
        trainer = make_trainer(
            "sft", copy.deepcopy(start), rows, eval_rows=rows, neftune_noise_alpha=alpha,
            eval_on_start=True, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer.train()
        losses.append(next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e))
        models.append(trainer.model)
        hooks.append(len(trainer.model.model.embed_tokens._forward_hooks))
    assert hooks[0] == hooks[1]  # the noise is gone
    assert losses[0] == losses[1]
    assert any(
        not torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


@pytest.mark.parametrize("config", [DPOConfig, RewardConfig])
def test_noise_is_for_sft(config, tmp_path):
    with raises("training.unsupported-setting", RecipeError, settings=["neftune_noise_alpha"]):
        config(output_dir=str(tmp_path), use_cpu=True, neftune_noise_alpha=5.0)


def test_other_data_are_predicted_on_without_predictions(start, make_trainer):
    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer("dpo", copy.deepcopy(start), rows, eval_rows=rows)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions is None
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


# --- gradient checkpointing and arithmetic by default ---


def test_gradient_checkpointing_is_on_where_the_model_can(start, make_trainer, make_config):
    rows = make_rows(0, (1,) * 4)
    trainer = make_trainer("sft", copy.deepcopy(start), rows)
    trainer.train()
    assert trainer.model.model.layers[0].gradient_checkpointing
    again = make_trainer("sft", trainer.model, rows, gradient_checkpointing=False)
    again.train()
    assert not again.model.model.layers[0].gradient_checkpointing
    unable = make_model()
    type_ = type("Unable", (type(unable),), {"supports_gradient_checkpointing": False})
    unable.__class__ = type_
    unable.model.__class__ = type("UnableInside", (type(unable.model),), {
        "supports_gradient_checkpointing": False})  # fmt: skip
    make_trainer("sft", unable, rows).train()
    with raises("model.no-gradient-checkpointing", RecipeError) as caught:
        make_trainer("sft", unable, rows, gradient_checkpointing=True)
    assert caught.value.where == "gradient_checkpointing"


def test_kwargs_of_checkpointing_that_is_off_are_named(start, make_trainer, caplog):
    rows = make_rows(0, (1,) * 4)
    for on in (True, False):
        caplog.clear()
        make_trainer(
            "sft", copy.deepcopy(start), rows, gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        said = [r for r in caplog.records if "gradient_checkpointing_kwargs" in r.getMessage()]
        assert [r.levelname for r in said] == ([] if on else ["WARNING"])


def test_bfloat16_is_on_where_the_device_has_it(monkeypatch, tmp_path):
    from rpo_trainer.trainers import argument_checks

    def bf16(**settings: Any) -> Any:
        return SFTConfig(output_dir=str(tmp_path), **settings).bf16

    assert bf16(use_cpu=True) is False
    for module in (argument_checks, __import__("transformers.training_args").training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)
    assert bf16() is True
    assert bf16(use_cpu=True) is False and bf16(fp16=True) is False and bf16(bf16=False) is False
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert bf16(use_cpu=True) is True


def test_evaluation_leaves_the_weights(start, make_trainer):
    rows = make_rows(0, (1,) * 4)
    model = make_model()
    trainer = make_trainer("sft", copy.deepcopy(model), rows, eval_rows=rows, bf16=True)
    trainer.evaluate()
    assert_bitwise_equal(trainer.model, model)


# --- arguments of other trainers ---


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("compute_metrics", "evaluate"),
        ("data_collator", "packs"),
        ("preprocess_logits_for_metrics", "logits"),
        ("compute_loss_func", "LOSSES"),
        ("max_seq_length", "max_length in the config"),
        ("reward_processing_class", "processing_class"),
        ("model_init", "model"),
        ("callback", "callbacks"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_unknown_argument_of_a_trainer_is_answered(kind, name, word, start, make_config):
    from tests.trainers.conftest import TRAINERS

    with raises("training.unknown-argument", RecipeError) as caught:
        TRAINERS[kind](copy.deepcopy(start), args=make_config(kind), **{name: print})
    assert name in caught.value.what and word in caught.value.fix
    assert caught.value.where == TRAINERS[kind].__name__


def test_a_subclass_may_have_arguments_of_its_own(start, make_config):
    class Own(SFTTrainer):
        def __init__(self, *args: Any, extra: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = extra

    rows = make_rows(0, (1,) * 4)
    made = Own(
        copy.deepcopy(start), make_config("sft"), rows, processing_class=_tokenizer(), extra=3
    )
    assert made.extra == 3
    with raises("training.unknown-argument", RecipeError):
        Own(copy.deepcopy(start), make_config("sft"), rows, compute_metrics=print)


def test_a_model_loaded_in_parts_is_refused(make_config):
    model = make_model()
    model.__class__ = type(
        "Parts", (type(model),), {"is_distributed_loading_by_transformers": True}
    )
    with raises("model.sharded", ModelError):
        SFTTrainer(model, make_config("sft"), make_rows(0, (1,) * 4), processing_class=_tokenizer())


def test_a_reward_model_is_trained_without_dropout(tmp_path):
    noisy = make_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    for disable in (True, False):
        trainer = RewardTrainer(
            copy.deepcopy(noisy),
            RewardConfig(
                output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_dropout=disable
            ),
            rows_of("dpo", PAIRS),
            processing_class=_tokenizer(),
        )
        active = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        assert bool(active) != disable
