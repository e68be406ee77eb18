"""RewardTrainer: its updates equal those of the formulas, and other tools can load its files."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError, ModelError, RecipeError
from rpo_trainer.models.reward_model import as_reward_model
from rpo_trainer.trainers import RewardConfig, RewardTrainer
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.reward_data import RatingCollator
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import assert_bitwise_equal, assert_same_update, global_batches, make_rows

NAMES = ("helpfulness", "depth")
WEIGHTS = {"helpfulness": 1.0, "depth": -0.5}
REGRESSION = {"objective": "regression", "attributes": NAMES, "reward_weights": WEIGHTS}


def start(names=NAMES, dtype=torch.float64):
    model = as_reward_model(make_model(dtype=dtype), attributes=names, weights=dict(WEIGHTS))
    with torch.no_grad():
        model.score.weight.mul_(20)
    return model


def rated_rows(seed, n=8):
    """Tokenized rows; every third rating of the second attribute is missing."""
    rows = make_rows(seed, (1,) * n)
    for i, row in enumerate(rows):
        row["attributes"] = [(7 * i) % 5, None if i % 3 == 0 else (3 * i) % 4]
    return rows


def plain_scores(model, row):
    """`[K, A]`, each response in a separate stock forward."""
    forward = type(model).forward
    ids = [torch.tensor([row["prompt_ids"] + r]) for r in row["response_ids"]]
    return torch.cat([forward(model, input_ids=i).logits for i in ids])


def plain_regression(model, batch):
    total, count = 0.0, 0
    for row in batch:
        for score, rating in zip(plain_scores(model, row)[0], row["attributes"], strict=True):
            if rating is not None:
                total, count = total + (score - rating) ** 2, count + 1
    return total / count


def plain_bradley_terry(margin_scale):
    def loss(model, batch):
        total = 0.0
        for row in batch:
            helpfulness, depth = plain_scores(model, row).unbind(-1)
            better, worse = helpfulness - 0.5 * depth
            given = row.get("rewards") or [0.0, 0.0]
            gap = better - worse - margin_scale * (given[0] - given[1])
            total = total - gap.sigmoid().log()
        return total / len(batch)

    return loss


def plain_train(model, loss, batches, lr):
    model = copy.deepcopy(model)
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
    return model


def make_trainer(tmp_path, model, rows, *, tokenizer=None, eval_rows=None, peft=None, **settings):
    defaults = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 2, "save_strategy": "no",
        "logging_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return RewardTrainer(
        model=model,
        args=RewardConfig(**{**defaults, **settings}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer or character_tokenizer(),
        peft_config=peft,
    )


# ---------------------------------------------------------------- the updates


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_regression_is_the_mean_over_the_ratings_of_the_global_batch(tmp_path, layout):
    rows, model = rated_rows(0), start()
    before = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model, rows, global_batch_size=4, layout=layout, **REGRESSION)
    trainer.train()
    assert trainer.layout == layout
    wanted = plain_train(before, plain_regression, global_batches(rows, 4), 0.01)
    # The ratings go to the device as float32, regardless of the model's dtype.
    assert_same_update(before, trainer.model, wanted, 1e-6)


@pytest.mark.parametrize("margin_scale", [0.0, 0.7])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_bradley_terry_of_weighted_scores_with_a_margin(tmp_path, layout, margin_scale):
    rows, model = make_rows(1, (2,) * 8, rewards=True), start()
    before = copy.deepcopy(model)
    trainer = make_trainer(
        tmp_path, model, rows, global_batch_size=4, layout=layout, margin_scale=margin_scale
    )
    trainer.train()
    wanted = plain_train(before, plain_bradley_terry(margin_scale), global_batches(rows, 4), 0.01)
    assert_same_update(before, trainer.model, wanted, 1e-6)


def test_a_token_budget_changes_nothing(tmp_path):
    rows, model = rated_rows(0), start()
    other = copy.deepcopy(model)
    make_trainer(tmp_path, model, rows, global_batch_size=4, **REGRESSION).train()
    make_trainer(
        tmp_path, other, rows, global_batch_size=4, micro_batch_tokens=30, **REGRESSION
    ).train()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def test_resumed_is_bitwise_the_same(tmp_path):
    rows = rated_rows(0)
    settings = {**REGRESSION, "optim": "adamw_torch", "global_batch_size": 4, "max_steps": 4}
    whole = make_trainer(tmp_path / "a", make_model(), rows, **settings)
    whole.train()
    stopped = make_trainer(
        tmp_path / "b", make_model(), rows, **{**settings, "max_steps": 2},
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    stopped.train()
    resumed = make_trainer(tmp_path / "b", make_model(), rows, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(resumed.model, whole.model)


# ---------------------------------------------------------------- evaluation


def test_held_out_ratings_are_measured_as_a_plain_forward_would_score_them(tmp_path):
    rows, model = rated_rows(3, n=11), start()
    trainer = make_trainer(tmp_path, model, rows, eval_rows=rows, **REGRESSION)
    metrics = trainer.evaluate()
    with torch.no_grad():
        scores = torch.cat([plain_scores(model, row) for row in rows]).numpy()
        assert metrics["eval_loss"] == pytest.approx(float(plain_regression(model, rows)))
    depth = [(s, row["attributes"][1]) for s, row in zip(scores[:, 1], rows, strict=True)]
    found, rated = (np.array(x) for x in zip(*[d for d in depth if d[1] is not None], strict=True))
    assert metrics["eval_pearson/depth"] == pytest.approx(np.corrcoef(found, rated)[0, 1])
    assert metrics["eval_bias/depth"] == pytest.approx(found.mean() - rated.mean())
    assert metrics["eval_rmse/depth"] == pytest.approx(math.sqrt(((found - rated) ** 2).mean()))
    assert set(trainer.calibration["eval"]) == {*NAMES, "reward"}
    assert sum(row["count"] for row in trainer.calibration["eval"]["depth"]) == len(rated)


def test_held_out_pairs_are_measured_as_a_plain_forward_would_score_them(tmp_path):
    rows, model = make_rows(1, (2,) * 7, rewards=True), start()
    trainer = make_trainer(tmp_path, model, rows, eval_rows={"some": rows, "few": rows[:2]})
    metrics = {**trainer.evaluate()}
    with torch.no_grad():
        rewards = [plain_scores(model, row) @ torch.tensor([1, -0.5]).double() for row in rows]
    gaps = np.array([float(r[0] - r[1]) for r in rewards])
    assert metrics["eval_some_accuracy"] == pytest.approx((gaps > 0).mean())
    assert metrics["eval_few_accuracy"] == pytest.approx((gaps[:2] > 0).mean())
    assert metrics["eval_some_rewards/margins"] == pytest.approx(gaps.mean())
    given = np.array([row["rewards"][0] - row["rewards"][1] for row in rows])
    assert metrics["eval_some_pearson/gap"] == pytest.approx(np.corrcoef(gaps, given)[0, 1])
    assert set(trainer.calibration) == {"eval_some", "eval_few"}


def test_accuracy_of_ratings_compares_responses_to_one_prompt(tmp_path):
    model = start()
    rows = rated_rows(5, n=4)
    for row in rows[:2]:
        row["prompt_ids"] = [5, 6, 7]
    rows[0]["attributes"], rows[1]["attributes"] = [1, 1], [4, 1]
    trainer = make_trainer(tmp_path, model, rows, eval_rows=rows, **REGRESSION)
    with torch.no_grad():
        first, second = (
            float(plain_scores(model, row)[0] @ torch.tensor([1, -0.5]).double())
            for row in rows[:2]
        )
    assert trainer.evaluate()["eval_accuracy"] == float(first < second)


def test_the_filler_of_a_rank_without_rows_counts_nothing():
    rows = rated_rows(0, n=2)
    batch = RatingCollator("shared", 0, Examples(rows))([])
    assert batch.counts.tolist() == [0, 0] and batch.weights.tolist() == [0]
    batch = RatingCollator("shared", 0)(rows)
    assert batch.counts.tolist() == [2, 3]
    assert batch.attributes[0].isnan().tolist() == [False, True]


# ---------------------------------------------------------------- rows and files


HELPSTEER = [
    {
        "prompt": f"{n} + 1 = ", "response": answer, "helpfulness": helpfulness, "correctness": None,
        "coherence": 4, "complexity": 0, "verbosity": n % 3,
    }
    for n in range(4)
    for answer, helpfulness in ((str(n + 1), 4), (str(n), 1))
]  # fmt: skip
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }}{{ eos_token }}"
    "{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def chat_tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_helpsteer2_rows_to_a_directory_that_any_tool_loads(tmp_path):
    names = ["helpfulness", "coherence", "verbosity"]
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as in many tokenizers
    trainer = make_trainer(
        tmp_path, make_model(vocab_size=len(tokenizer)), HELPSTEER, tokenizer=tokenizer,
        eval_rows=HELPSTEER, objective="regression", attributes=names,
        reward_weights={"helpfulness": 1.0, "coherence": 0.5, "verbosity": -0.5}, max_steps=1,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_accuracy" in metrics  # both answers have one prompt
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "helpfulness", "1": "coherence", "2": "verbosity"}
    assert config["reward_weights"]["coherence"] == 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain.pad_token != plain.eos_token and tokenizer.pad_token == tokenizer.eos_token
    texts = [f"U:{row['prompt']}\nA:{row['response']}</s>" for row in HELPSTEER]
    inputs = plain(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        scores = model(**inputs).logits[:, 0].numpy()
    rated = np.array([row["helpfulness"] for row in HELPSTEER])
    assert metrics["eval_pearson/helpfulness"] == pytest.approx(
        np.corrcoef(scores, rated)[0, 1], abs=1e-4
    )


def test_a_path_of_a_language_model_and_then_of_the_reward_model(tmp_path):
    tokenizer = character_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rows = [{"prompt": "a", "chosen": "b", "rejected": c} for c in "cdefg"]
    first = RewardTrainer(
        str(tmp_path / "policy"),
        RewardConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
    )
    assert type(first.model).__name__ == "LlamaForSequenceClassification"
    first.train()
    first.save_model(str(tmp_path / "rm"))
    second = RewardTrainer(
        str(tmp_path / "rm"), RewardConfig(str(tmp_path / "out"), use_cpu=True), rows
    )
    assert_bitwise_equal(second.model, first.model)


def test_an_adapter_is_trained_with_the_head(tmp_path):
    from peft import LoraConfig

    model = start(dtype=torch.float32)
    peft = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
    before = model.score.weight.clone()
    trainer = make_trainer(tmp_path, model, rated_rows(0), peft=peft, **REGRESSION)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    assert trainer.layout == "shared"
    assert not torch.equal(merged.score.weight, before)


def test_learns_which_of_two_answers_is_longer(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": "say ", "chosen": "a" * int(n + 3), "rejected": "a" * int(n)}
        for n in rng.integers(1, 9, 64)
    ]
    tokenizer = character_tokenizer()
    trainer = make_trainer(
        tmp_path, make_model(vocab_size=len(tokenizer)), rows[:48], eval_rows=rows[48:],
        optim="adamw_torch", learning_rate=5e-3, max_steps=30, global_batch_size=16,
        per_device_train_batch_size=16,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=0.1)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] < 0.2


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"objective": "ranking"}, "invalid-value", "objective"),
        ({"objective": "regression"}, "invalid-value", "attributes"),
        ({"objective": "regression", "attributes": ("a", "a")}, "invalid-value", "attributes"),
        ({"attributes": ("a",)}, "no-effect", "attributes"),
        ({"rating_range": (0, 4)}, "no-effect", "rating_range"),
        ({**REGRESSION, "margin_scale": 1.0}, "no-effect", "margin_scale"),
        ({**REGRESSION, "rating_range": (4, 0)}, "invalid-value", "rating_range"),
        ({**REGRESSION, "rating_range": (0, 2, 4)}, "invalid-value", "rating_range"),
        ({"margin_scale": -1.0}, "invalid-value", "margin_scale"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, code, named):
    with raises(f"training.{code}", RecipeError) as error:
        RewardConfig(str(tmp_path), **settings)
    assert named in error.value.details["settings"]


@pytest.mark.parametrize(
    ("rows", "settings", "code", "wrong"),
    [
        (make_rows(0, (2, 3)), {}, "data.response-count", 1),
        (make_rows(0, (2, 2)), {"margin_scale": 1.0}, "data.missing-rewards", [0, 1]),
        (make_rows(0, (1, 1)), REGRESSION, "data.missing-ratings", [0, 1]),
        (make_rows(0, (2,)), REGRESSION, "data.response-count", 1),
    ],
)
def test_rows_of_another_kind(tmp_path, rows, settings, code, wrong):
    with raises(code, DataError, data="train", rows=wrong):
        make_trainer(tmp_path, start(), rows, **settings)


@pytest.mark.parametrize("ratings", [[1.0], [None, None], [float("nan"), 1.0]])
def test_tokenized_rows_with_other_ratings(tmp_path, ratings):
    rows = rated_rows(0)
    rows[2]["attributes"] = ratings
    with raises("data.invalid-ratings", DataError, data="train", rows=[2]) as error:
        make_trainer(tmp_path, start(), rows, **REGRESSION)
    assert "helpfulness, depth" in error.value.what


def test_responses_that_end_with_the_pad_token(tmp_path):
    rows = rated_rows(0)
    rows[1]["response_ids"][0][-1] = character_tokenizer().pad_token_id
    with raises("tokenizer.pad-ends-response", ModelError) as error:
        make_trainer(tmp_path, start(), rows, **REGRESSION)
    assert "<pad>" in error.value.what


def test_another_config_is_refused(tmp_path):
    from rpo_trainer.trainers import SFTConfig

    names = {"wanted": "rpo_trainer.RewardConfig", "given": "rpo_trainer.SFTConfig"}
    with raises("training.wrong-config", RecipeError, where="args", **names):
        RewardTrainer(start(), SFTConfig(str(tmp_path)), rated_rows(0))
