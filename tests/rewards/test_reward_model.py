"""Rewards from a reward model on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError, ModelError, RecipeError
from rpo_trainer.rewards.reward_model import RewardModel, check_template
from tests.raising import raises
from tests.rewards.policies import TEMPLATE

ROWS = [
    {"id": "a", "prompt": "12 plus 30: ", "responses": ["42", "43 or so", "x"]},
    {"id": "b", "prompt": "reverse abc: ", "responses": ["cba", "a much longer answer"]},
    {"id": "c", "prompt": "x", "responses": ["y"]},
    {"id": "d", "prompt": "", "responses": ["z", "zz"]},
]


def save_model(folder: Path, *, template: str | None = None, **config: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1, **config,
    }  # fmt: skip
    model = LlamaForSequenceClassification(LlamaConfig(**settings))
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def scores(model: RewardModel, rows: Any = ROWS, **settings: Any) -> dict[int, Any]:
    arguments = {"pending": range(len(rows)), "batch_tokens": 10_000, **settings}
    return {done.index: done.fields for done in model.score(rows, **arguments)}


def test_each_response_alone_by_transformers_own_classifier(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    found = scores(RewardModel(folder))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = character_tokenizer()
    for index, row in enumerate(ROWS):
        for response, reward in zip(row["responses"], found[index]["rewards"], strict=True):
            ids = [*tokenizer(row["prompt"] + response)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                expected = plain(torch.tensor([ids])).logits[0, 0]
            assert reward == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_no_padding_and_the_prompt_once_give_the_scores_of_padded_rows(
    layout: Any, tmp_path: Path
) -> None:
    folder = save_model(
        tmp_path, num_labels=3, num_key_value_heads=1, reward_weights={
            "LABEL_0": 1.0, "LABEL_1": -0.5, "LABEL_2": 2.0,
        },
    )  # fmt: skip
    mine, padded = RewardModel(folder, layout=layout), RewardModel(folder, layout="padded")
    assert RewardModel(folder).layout == "shared" and padded.layout == "padded"
    seen: list[int] = []
    mine.model.base_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    repeats = {"id": "e", "prompt": "ab", "responses": ["c", "cd", "c"]}
    rows = [*ROWS, repeats, {"id": "n", "prompt": "x", "responses": []}]
    found, expected = scores(mine, rows), scores(padded, rows)
    assert found.keys() == expected.keys() == set(range(6)) and found[5]["rewards"] == []
    for index, fields in expected.items():
        assert found[index]["rewards"] == pytest.approx(fields["rewards"], abs=1e-5)
        for one, other in zip(found[index]["scores"], fields["scores"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    texts = [mine.encode(row) for row in rows]
    every = sum(len(ids) for row in texts for ids in row)
    assert sum(seen) == every if layout == "packed" else sum(seen) < 0.8 * every


def test_texts_without_a_token_in_common(tmp_path: Path) -> None:
    model = RewardModel(save_model(tmp_path))
    model._encoder.begin = []
    row = {"id": "d", "prompt": "", "responses": ["z", "yy"]}
    single = [scores(model, [{**row, "responses": [r]}])[0]["rewards"][0] for r in ("z", "yy")]
    assert scores(model, [row])[0]["rewards"] == pytest.approx(single, abs=1e-5)


def test_the_pad_token_may_be_the_end_token(tmp_path: Path) -> None:
    mine = scores(RewardModel(save_model(tmp_path / "a")))
    folder = save_model(tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}))
    assert scores(RewardModel(folder)) == mine


@pytest.mark.parametrize("batch_tokens", [1, 30, 90])
def test_batches_do_not_matter(batch_tokens: int, tmp_path: Path) -> None:
    model = RewardModel(save_model(tmp_path))
    whole, parts = scores(model), scores(model, batch_tokens=batch_tokens)
    for index in whole:
        assert parts[index]["rewards"] == pytest.approx(whole[index]["rewards"], abs=1e-5)


def test_the_longest_come_first_and_shards_share_the_batches(tmp_path: Path) -> None:
    model = RewardModel(save_model(tmp_path))
    order = [done.index for done in model.score(ROWS, range(4), 1)]
    assert order == [1, 0, 3, 2] or order == [1, 0, 2, 3]
    shards = [[done.index for done in model.score(ROWS, range(4), 1, (r, 2))] for r in (0, 1)]
    assert sorted(shards[0] + shards[1]) == [0, 1, 2, 3] and len(shards[0]) == 2


def test_only_what_is_pending_in_the_batches_of_all(tmp_path: Path) -> None:
    model = RewardModel(save_model(tmp_path))
    whole = scores(model)
    assert scores(model, pending=[2]) == {2: whole[2]}


def test_several_heads_and_their_weights(tmp_path: Path) -> None:
    names = {0: "helpfulness", 1: "verbosity"}
    folder = save_model(
        tmp_path, num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
    )
    mean = scores(RewardModel(folder))[0]
    assert [*mean["scores"][0]] == ["helpfulness", "verbosity"]
    assert mean["rewards"][0] == pytest.approx(sum(mean["scores"][0].values()) / 2)
    given = scores(RewardModel(folder, {"helpfulness": 2.0, "verbosity": -0.5}))[0]
    one = given["scores"][0]
    assert given["rewards"][0] == pytest.approx(2 * one["helpfulness"] - 0.5 * one["verbosity"])
    with raises("rewards.wrong-attributes", RecipeError) as error:
        RewardModel(folder, {"helpfulness": 1.0})
    assert "verbosity" in error.value.what and "helpfulness" not in error.value.what
    own = save_model(
        tmp_path / "own",
        num_labels=2,
        id2label=names,
        reward_weights={"helpfulness": 1.0, "verbosity": 0.0},
    )
    found = scores(RewardModel(own))[0]
    assert found["rewards"][0] == pytest.approx(found["scores"][0]["helpfulness"])


def test_messages_go_through_its_template(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{% for", "{% for", 1).replace(
        "{{ m['content'] }}\n",
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n",
    )
    model = RewardModel(save_model(tmp_path, template=template))
    row = {"id": "m", "prompt": [{"role": "user", "content": "hi"}], "responses": ["yo"]}
    (ids,) = model.encode(row)
    tokenizer = character_tokenizer()
    assert (
        tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "u:hia:yo"
    )  # it has no line break
    assert ids[-1] == tokenizer.eos_token_id  # and not the line break after it
    check_template(model, [row])


def test_what_cannot_be_scored(tmp_path: Path) -> None:
    model = RewardModel(save_model(tmp_path))
    long = {"id": "l", "prompt": "p", "responses": ["x" * 100]}
    done = {d.index: d for d in model.score([*ROWS, long], range(5), 100)}
    assert done[4].failed is not None and done[4].failed.code == "model.context-exceeded"
    assert "64" in str(done[4].failed)
    assert all(done[i].failed is None for i in range(4))
    messages = {"id": "m", "prompt": [{"role": "user", "content": "hi"}], "responses": ["yo"]}
    with raises("template.missing", DataError, where=model.path):
        check_template(model, [messages])
    with torch.no_grad():
        model.model.score.weight.fill_(float("nan"))
    with raises("model.non-finite-scores", ModelError, where=model.path):
        scores(model)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    with raises("model.cannot-load", ModelError, where=str(tmp_path / "none")):
        RewardModel(tmp_path / "none")
    config = BertConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    character_tokenizer().save_pretrained(tmp_path / "bert")
    with raises("model.no-score-head", ModelError, where=str(tmp_path / "bert")):
        RewardModel(tmp_path / "bert")


def test_rows_are_scored_with_their_variables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{{ mode }}" + TEMPLATE.replace(
        "\n{% endfor", "{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor"
    )
    model = RewardModel(save_model(tmp_path, template=template))
    talk = {"prompt": [{"role": "user", "content": "hi"}], "responses": ["yo", "no"]}
    given = [{"mode": "b"}, {"mode": "c", "depth": 1}, {}]
    rows = [{**talk, "id": str(n), "chat_template_kwargs": each} for n, each in enumerate(given)]
    texts = [
        [model.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") for ids in found]
        for found in map(model.encode, rows)
    ]
    assert texts == [[f"{mode}u:hia:{r}" for r in ("yo", "no")] for mode in ("b", "c", "")]
    assert len({found["rewards"][0] for found in scores(model, rows).values()}) == 3
    assert "`depth` of `chat_template_kwargs` (1 of 3 rows)" in caplog.text
