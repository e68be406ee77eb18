"""`rpo-trainer init`: the kind from the rows, lengths from the tokenizer; `check` and `run` accept it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.recipe import load_recipe
from tests.chain import tiny
from tests.cli.test_convert import call

Row = dict[str, Any]


def turns(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


ROWS: dict[str, list[Row]] = {
    "conversations": [
        {"messages": [*turns(f"q{i}"), {"role": "assistant", "content": "a" * (1 + i)}]}
        for i in range(24)
    ],
    "pairs": [
        {"prompt": turns(f"q{i}"), "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(24)
    ],
    "scored": [
        {"prompt": turns(f"q{i}"), "chosen": f"yes {i}", "rejected": f"no {i}",
         "chosen_reward": 1.0 + i % 3, "rejected_reward": 0.0}
        for i in range(24)
    ],
    "orca": [
        {"system": "", "question": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(24)
    ],
    "few": [
        {"prompt": turns(f"q{i % 19}"), "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(24)
    ],
    "rated": [{"prompt": "q", "response": "a", "score": 1.0}],
    "kto": [{"prompt": "q", "completion": "a", "label": True}],
    "prompts": [{"prompt": "q"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rpo_trainer.data.quickstart import character_tokenizer
    from tests.rewards.policies import llama

    folder = tmp_path_factory.mktemp("init")
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    llama(vocab_size=len(tokenizer), max_position_embeddings=96).save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def init(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`init("pairs", ...)`: the exit code, with these files as `--data`."""
    monkeypatch.chdir(folder)

    def _init(*data: str, recipe: Path = tmp_path / "new.yaml", more: Sequence[str] = ()) -> int:
        files = [word for name in data for word in ("--data", f"{name}.jsonl")]
        return call("init", recipe, "--model", "model", *files, *more)

    return _init


@pytest.mark.parametrize(
    ("data", "more", "kinds"),
    [
        (["conversations"], [], ["sft"]),
        (["pairs"], [], ["dpo"]),
        (["scored"], [], ["rpo"]),
        (["scored"], ["--kind", "dpo"], ["dpo"]),
        (["scored", "pairs"], [], ["dpo"]),  # RPO needs a reward for every response
        (["conversations", "scored"], [], ["sft", "rpo"]),
        (["pairs", "conversations"], ["--kind", "chain"], ["sft", "dpo"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_rows_decide_the_stages(
    data: list[str], more: list[str], kinds: list[str], init: Any, tmp_path: Path
) -> None:
    assert init(*data, more=more) == 0
    recipe = load_recipe(tmp_path / "new.yaml").recipe
    assert [stage.kind for stage in recipe.stages] == kinds
    assert sum(len(stage.data.train) for stage in recipe.stages) == len(data)


def test_lengths_are_those_of_the_rows(init: Any, tmp_path: Path, folder: Path) -> None:
    from rpo_trainer.models.loading import load_tokenizer
    from rpo_trainer.recipe import ModelSpec

    assert init("conversations") == 0
    loaded = load_recipe(tmp_path / "new.yaml")
    assert loaded.recipe.model.chat_template == "plain"  # the tokenizer has none
    spec = ModelSpec(name_or_path=str(folder / "model"), chat_template="plain")
    tokenizer = load_tokenizer(spec, folder)
    longest = max(
        len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"])
        for row in ROWS["conversations"]
    )
    (stage,) = loaded.recipe.stages
    assert longest <= stage.max_length < longest + 64
    assert stage.max_length <= 96  # the model's context length


def test_lora_and_held_out_rows(init: Any, tmp_path: Path) -> None:
    assert init("pairs", more=["--lora", "--eval", "scored.jsonl"]) == 0
    (adapter,) = load_recipe(tmp_path / "new.yaml").recipe.stages
    assert init("pairs", recipe=tmp_path / "full.yaml") == 0
    (full,) = load_recipe(tmp_path / "full.yaml").recipe.stages
    assert adapter.peft is not None and full.peft is None
    assert adapter.learning_rate == pytest.approx(10 * full.learning_rate)
    assert adapter.eval_steps is not None and len(adapter.data.eval) == 1
    assert adapter.data.eval_fraction is None  # not both


@pytest.mark.parametrize("name", ["conversations", "pairs", "scored"])
def test_prompts_are_held_out_where_no_held_out_rows_are_given(
    name: str, init: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(name) == 0
    assert "eval_fraction" in capsys.readouterr().out
    (stage,) = load_recipe(tmp_path / "new.yaml").recipe.stages
    assert stage.data.eval_fraction == 0.05 and stage.eval_steps is not None
    assert call("check", tmp_path / "new.yaml") == 0
    assert f"{len(ROWS[name]) - 1} examples" in capsys.readouterr().out


def test_every_stage_of_a_chain_has_held_out_rows(init: Any, tmp_path: Path) -> None:
    assert init("conversations", "scored", more=["--eval", "scored.jsonl"]) == 0
    sft, rpo = load_recipe(tmp_path / "new.yaml").recipe.stages
    assert sft.data.eval_fraction == 0.05 and not sft.data.eval
    assert rpo.data.eval_fraction is None and len(rpo.data.eval) == 1


def test_a_few_prompts_are_all_trained_on(
    init: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("few") == 0
    assert "--eval" in capsys.readouterr().out
    (stage,) = load_recipe(tmp_path / "new.yaml").recipe.stages
    assert stage.data.eval_fraction is None and stage.eval_steps is None


def test_orca_rows_are_named(init: Any, tmp_path: Path) -> None:
    assert init("orca") == 0
    (stage,) = load_recipe(tmp_path / "new.yaml").recipe.stages
    assert stage.data.train[0].format == "orca"


@pytest.mark.parametrize(
    ("data", "more", "code"),
    [
        (["rated"], [], "init.rated-rows"),
        (["kto"], ["--kind", "dpo"], "data.unpaired-labels"),
        (["prompts"], [], "data.no-responses"),
        (["pairs"], ["--kind", "rpo"], "init.missing-rewards"),
        (["pairs"], ["--kind", "chain"], "init.missing-data"),
        (["scored"], ["--eval", "pairs.jsonl"], "init.missing-rewards"),
        (["pairs"], ["--eval", "conversations.jsonl"], "init.unused-held-out"),
        (["absent"], [], "data.no-such-file"),
        (["pairs"], ["--model", "./absent"], "init.no-such-model"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_on_is_reported(
    data: list[str], more: list[str], code: str, init: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert init(*data, more=more) in (2, 3)
    assert code in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()


def test_an_existing_recipe_is_kept(
    init: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.yaml").write_text("mine")
    assert init("pairs") == 2
    assert "option.path-exists" in capsys.readouterr().err
    assert (tmp_path / "new.yaml").read_text() == "mine"
    assert init("pairs", more=["--overwrite"]) == 0


def test_the_recipe_checks_and_trains(
    init: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths are relative to the recipe, not to where the command was given."""
    assert init("conversations", "scored", more=["--eval", "scored.jsonl"]) == 0
    shown = capsys.readouterr().out
    for command in ("check", "plan", "run"):
        assert f"rpo-trainer {command} {tmp_path / 'new.yaml'}" in shown
    assert call("check", tmp_path / "new.yaml") == 0
    short = [
        word
        for stage in ("sft", "rpo")
        for word in (f"stages.{stage}.max_steps=2", f"stages.{stage}.warmup_steps=0",
                     f"stages.{stage}.lr_scheduler_type=constant")
    ]  # fmt: skip
    run = tmp_path / "run"
    assert call("run", tmp_path / "new.yaml", "--run-dir", run, "--no-report", *short) == 0
    assert (run / "rpo" / "final" / "model.safetensors").is_file()
    found = {name: record["eval"] for name, record in tiny.records(run).items()}
    assert found["sft"]["nll"] > 0
    assert found["rpo"].get("nll") is None  # its SFT term differs
