"""The trainers as a library: adapters, callbacks, raw rows, loading and saving."""

from __future__ import annotations

import copy
import math
import types
from typing import Any

import pytest
import torch

from rpo_trainer.errors import DataError, ModelError, RecipeError, StepZeroError
from rpo_trainer.trainers import DPOTrainer, RewardTrainer, RPOTrainer, SFTTrainer
from rpo_trainer.trainers.examples import Examples
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import (
    PAIRS,
    as_lists,
    assert_bitwise_equal,
    plain_reference,
    plain_sums,
    rows_of,
)

# --- adapters ---


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **settings})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(checkpointing, tmp_path, make_trainer, start):
    from peft import PeftModel

    rows = rows_of("rpo", PAIRS)
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, peft_config=lora(lora_dropout=0.2),
        global_batch_size=8, max_steps=3, learning_rate=1.0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer.train()
    assert trainer.step_zero["nats_per_token"] < 1e-6
    base = {n: p for n, p in trainer.model.named_parameters() if "lora_" not in n}
    for name, p in start.named_parameters():
        stem, leaf = name.rsplit(".", 1)
        found = next(q for n, q in base.items() if n.endswith((name, f"{stem}.base_layer.{leaf}")))
        assert torch.equal(found, p), name
    assert any(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)

    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "adapter").eval()
    trainer.model.eval()
    with torch.no_grad():
        for row in rows:
            torch.testing.assert_close(plain_sums(loaded, row), plain_sums(trainer.model, row))


def test_a_second_adapter_is_refused(start, make_trainer):
    from peft import get_peft_model

    with pytest.raises(ModelError, match="peft_config"):
        make_trainer(
            "dpo", get_peft_model(copy.deepcopy(start), lora()), rows_of("dpo", PAIRS),
            peft_config=lora(),
        )  # fmt: skip


def test_an_adapter_in_training_is_its_own_reference(start, make_trainer):
    """LoRA chains re-base: the reference is the model with the adapter it starts from."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(start), lora(init_lora_weights=False))
    rows = rows_of("dpo", PAIRS)
    with_adapter = plain_reference(model.eval(), rows)
    trainer = make_trainer("dpo", model, rows, global_batch_size=8)
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for row, values in zip(rows, trainer.train_dataset.extra["reference_logps"], strict=True):
        assert values == pytest.approx(with_adapter[row["id"]].tolist(), rel=1e-5)


# --- what users of TRL expect ---


def test_callbacks_are_called_with_our_metrics(start, make_trainer):
    from transformers import TrainerCallback

    calls: list[str] = []
    logged: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            calls.append("begin")

        def on_step_end(self, *args, **kwargs):
            calls.append("step")

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            calls.append("evaluate")
            assert "eval_rewards/margins" in metrics

        def on_train_end(self, *args, **kwargs):
            calls.append("end")

    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, eval_rows=rows[:3], callbacks=[Watch()], max_steps=2,
        logging_strategy="steps", logging_steps=1, eval_strategy="epoch", global_batch_size=4,
    )  # fmt: skip
    result = trainer.train()
    assert calls == ["begin", "step", "step", "evaluate", "end"]
    assert "rewards/accuracies" in logged[0]
    assert result.global_step == 2 and math.isfinite(result.training_loss)


def test_a_list_a_dataset_and_examples_are_the_same_data(start, make_trainer):
    import datasets

    rows = rows_of("rpo", (2, 3, 2, 4))
    models = []
    for data in (rows, datasets.Dataset.from_list(rows), Examples(rows)):
        trainer = make_trainer("rpo", copy.deepcopy(start), data, global_batch_size=4)
        trainer.train()
        models.append(trainer.model)
    assert_bitwise_equal(models[0], models[1])
    assert_bitwise_equal(models[0], models[2])


@pytest.fixture(scope="module")
def character_model() -> Any:
    return make_model(vocab_size=100)


TEXTS = [
    {"prompt": f"question {i}: ", "chosen": "yes " * (i + 1), "rejected": "no",
     "chosen_reward": 1.5 + i, "rejected_reward": 1.0}
    for i in range(4)
]  # fmt: skip


def test_raw_text_rows_are_tokenized(character_model, make_trainer, tokenizer):
    trainer = make_trainer("rpo", copy.deepcopy(character_model), TEXTS, max_length=None)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]) == "<s>question 0: "
    assert [tokenizer.decode(r) for r in row["response_ids"]] == ["yes </s>", "no</s>"]
    assert row["rewards"] == [1.5, 1.0]
    assert as_lists(row["response_mask"]) == [[1] * 5, [1] * 3]
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(trainer.step_zero["expected"], abs=1e-6)


def test_rows_too_long_are_dropped_and_counted(character_model, make_trainer):
    trainer = make_trainer("rpo", copy.deepcopy(character_model), TEXTS, max_length=24)
    assert len(trainer.train_dataset) == 2
    assert trainer.audits["train"].dropped["too_long"].count == 2
    with pytest.raises(DataError, match=r"\bdata\.no-rows-left\b"):
        make_trainer("rpo", copy.deepcopy(character_model), TEXTS, max_length=5)


def test_messages_go_through_the_chat_template(character_model, make_trainer):
    from rpo_trainer.data import set_chat_template
    from rpo_trainer.data.quickstart import character_tokenizer

    chat = set_chat_template(character_tokenizer(), "plain")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(2)
    ]
    trainer = make_trainer("dpo", copy.deepcopy(character_model), rows, processing_class=chat)
    row = trainer.train_dataset[0]
    assert "question 0" in chat.decode(row["prompt_ids"])
    texts = [chat.decode(r).strip() for r in row["response_ids"]]
    assert texts[0].startswith("yes") and texts[1].startswith("no")
    trainer.train()


def test_what_is_dropped_is_a_warning_with_its_share(character_model, make_trainer, caplog):
    long = {**TEXTS[0], "chosen": "5" * 90}
    with caplog.at_level("WARNING"):
        trainer = make_trainer(
            "dpo", copy.deepcopy(character_model), [*TEXTS[:2], *[long] * 6],
            eval_rows={"own": [*TEXTS[:1], long]}, max_length=40,
        )  # fmt: skip
    assert len(trainer.train_dataset) == 2
    said = [record.message for record in caplog.records if "dropped" in record.message]
    assert (
        "75% of train_dataset (6 of 8 rows) dropped: 6 rows, longer than max_length 40" in said[0]
    )
    assert "50% of eval_own_dataset (1 of 2 rows) dropped" in said[1]


def test_special_tokens_are_parsed_where_the_config_says_so(
    character_model, make_trainer, tokenizer
):
    end = tokenizer.eos_token
    rows = [{"prompt": f"{i}: ", "chosen": f"5{end}", "rejected": f"6{end}"} for i in range(3)]
    parsed = make_trainer("dpo", copy.deepcopy(character_model), rows, special_tokens="parse")
    letters = make_trainer("dpo", copy.deepcopy(character_model), rows)
    ids = tokenizer.eos_token_id
    assert [(r == ids).sum() for r in parsed.train_dataset[0]["response_ids"]] == [1, 1]
    assert len(parsed.train_dataset[0]["response_ids"][0]) == 2
    assert len(letters.train_dataset[0]["response_ids"][0]) == 2 + len(end)
    with raises("training.invalid-value", RecipeError, settings=["special_tokens"]):
        make_trainer("dpo", copy.deepcopy(character_model), rows, special_tokens="both")


def test_a_path_is_loaded_trained_and_saved_again(
    character_model, tmp_path, make_config, tokenizer
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "start"
    character_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = RPOTrainer(
        str(folder), ref_model=str(folder), args=make_config("rpo"), train_dataset=TEXTS
    )
    assert trainer.processing_class.vocab_size == 100
    trainer.train()
    assert trainer.step_zero["nats_per_token"] < 1e-4  # the same weights: the check ran
    trainer.save_model(str(tmp_path / "end"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert_bitwise_equal(loaded, trainer.model)
    assert loaded.config._attn_implementation != "rpo_packed"
    assert AutoTokenizer.from_pretrained(tmp_path / "end").vocab_size == 100
    ids = torch.tensor([[1, 20, 30, 40]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model(ids).logits)


def test_a_path_is_loaded_in_float32_whatever_its_files_hold(
    character_model, tmp_path, make_config, tokenizer, caplog
):
    folder = tmp_path / "start"
    copy.deepcopy(character_model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = RPOTrainer(
        str(folder), ref_model=str(folder), args=make_config("rpo"), train_dataset=TEXTS
    )
    for model in (trainer.model, trainer.ref_model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "weights are bfloat16" not in caplog.text


def test_half_precision_weights_are_warned_of(character_model, make_config, tokenizer, caplog):
    RPOTrainer(
        copy.deepcopy(character_model).to(torch.bfloat16), args=make_config("rpo"),
        train_dataset=TEXTS, processing_class=tokenizer,
    )  # fmt: skip
    assert "weights are bfloat16" in caplog.text


def test_evaluate_first_and_train_then_still_checks_step_zero(start, make_trainer):
    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer("dpo", copy.deepcopy(start), rows, eval_rows=rows[:2])
    trainer.evaluate()
    with torch.no_grad():  # without the trainer
        trainer.model.lm_head.weight.mul_(1.1)
    with pytest.raises(StepZeroError):
        trainer.train()


def test_default_arguments_are_those_of_the_class(start, tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = DPOTrainer(copy.deepcopy(start), processing_class=tokenizer)
    assert trainer.args.output_dir == "trainer_output" and trainer.args.beta == 0.1
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer, RPOTrainer, RewardTrainer])
def test_a_constructor_leaves_no_empty_directory(kind, start, tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kind(copy.deepcopy(start), processing_class=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_before_the_constructor_stays(
    start, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer_output").mkdir()
    DPOTrainer(copy.deepcopy(start), processing_class=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_output"]


def test_what_is_written_without_training_has_its_directory(start, make_trainer, tmp_path):
    """Example scripts write metrics and state, which expects the directory."""
    rows = rows_of("dpo", PAIRS)
    writers = {
        "eval_results.json": lambda trainer: trainer.save_metrics("eval", {"eval_loss": 1.0}),
        "trainer_state.json": lambda trainer: trainer.save_state(),
        "README.md": lambda trainer: trainer.create_model_card(model_name="m"),
        "model.safetensors": lambda trainer: trainer.save_model(),
    }
    for file, write in writers.items():
        output = tmp_path / file / "out"
        trainer = make_trainer("dpo", copy.deepcopy(start), rows, output_dir=str(output))
        assert not output.exists()
        write(trainer)
        assert (output / file).is_file()


def test_the_model_stays_a_whole_model(start, make_trainer):
    """Other code can still use it: stock calls return the same values."""
    model = copy.deepcopy(start)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
    make_trainer("dpo", model, rows_of("dpo", PAIRS))
    assert isinstance(model.forward, types.FunctionType | types.MethodType)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, before)


@pytest.mark.parametrize("given", [{"mode": "x"}, '{"mode": "x"}'], ids=["dict", "JSON"])
def test_variables_of_the_template_are_those_of_the_config_and_of_the_row(
    given, character_model, make_trainer, tokenizer
):
    talk = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    rows = [talk, {**talk, "chat_template_kwargs": {"mode": "y"}}]
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{{ mode }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    options = {"processing_class": own, "shuffle": False}
    trainer = make_trainer(
        "dpo", copy.deepcopy(character_model), rows, chat_template_kwargs=given, **options
    )
    prompts = [own.decode(trainer.train_dataset[n]["prompt_ids"]) for n in range(2)]
    assert sorted(text.removeprefix("<s>").strip()[0] for text in prompts) == ["x", "y"]
    assert trainer.args.chat_template_kwargs == {"mode": "x"}
    for wrong in ({"depth": 1}, {"tools": []}, [1]):
        with pytest.raises(RecipeError, match="chat_template_kwargs"):
            make_trainer(
                "dpo", copy.deepcopy(character_model), rows, chat_template_kwargs=wrong, **options
            )
