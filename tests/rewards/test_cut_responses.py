"""Whether a response is truncated is passed on by files, endpoints, previews and stages to the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.data import Audit, prepare_dataset
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.stages.inputs import ScoredData
from rpo_trainer.stages.prepare import StagePreparer
from tests.chain import tiny
from tests.rewards.policies import llama
from tests.rewards.server import Answer, serving
from tests.rewards.test_commands import read, run, write

END = character_tokenizer().eos_token_id
PROMPTS = [
    {"id": f"q{i}", "prompt": f"add {i} and 2: ", "ground_truth": f"{i + 2}"} for i in range(9)
]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses of a policy that ends some of them, with the ground truth, scored."""
    folder = tmp_path_factory.mktemp("generated")
    llama(0, vocab_size=len(character_tokenizer())).save_pretrained(folder / "policy")
    character_tokenizer().save_pretrained(folder / "policy")
    data, sampled, out = write(folder / "p.jsonl", PROMPTS), folder / "s.jsonl", folder / "o.jsonl"
    command = ("generate", data, "--policy", folder / "policy", "--max-new-tokens", 20)
    assert run(*command, "--responses", 6, "--with-ground-truth", "-o", sampled) == 0
    assert run("score", sampled, "--verifier", "partial_match", "-o", out) == 0
    return out


def ended(path: Path) -> dict[tuple[str, str], bool]:
    """By prompt and response."""
    rows = read(path)
    found = {
        (row["prompt"], text): whole
        for row in rows
        for text, whole in zip(row["responses"], row["finished"], strict=True)
    }
    assert set(found.values()) == {True, False}
    return found


def trained(examples: Any) -> dict[tuple[str, str], bool]:
    """Whether each trained response ends with the end token, by prompt and response."""
    decode = character_tokenizer().decode
    return {
        (
            decode(example["prompt_ids"], skip_special_tokens=True),
            decode(ids, skip_special_tokens=True),
        ): ids[-1] == END
        for example in examples
        for ids in example["response_ids"]
    }


@pytest.mark.parametrize("select", ["best_worst", "all_pairs", "all_responses"])
def test_files_keep_it(generated: Path, tmp_path: Path, select: str) -> None:
    """Sampled, scored, paired, and scored again as pairs."""
    pairs, again = tmp_path / "pairs.jsonl", tmp_path / "again.jsonl"
    assert run("pairs", generated, "--select", select, "-o", pairs) == 0
    assert run("score", pairs, "--verifier", "partial_match", "-o", again) == 0
    known = ended(generated)
    for path in (generated, pairs, again):
        audit = Audit()
        examples = prepare_dataset(
            read(path), character_tokenizer(), kind="pair", max_length=200, audit=audit
        )
        found = trained(examples)
        assert set(found.values()) == {True, False}
        assert found == {key: known[key] for key in found}
        lacking = sum(ids[-1] != END for e in examples for ids in e["response_ids"])
        assert audit.as_dict()["cut"]["dataset"]["count"] == lacking


@pytest.mark.parametrize("kind", ["dpo", "rpo", "reward"])
def test_stages_keep_it(generated: Path, tmp_path: Path, kind: str) -> None:
    """Rows generated in a run; a reward model is trained on what it scores, texts with their end."""
    recipe = tiny.tiny_recipe()
    reward = {"name": "judge", "kind": "reward", "objective": "bradley_terry"}
    recipe["stages"].append({**reward, "data": {"responses_from": "dpo", "pairs": {}}})
    preparer = StagePreparer(tiny.load(tmp_path, recipe))
    stage = next(stage for stage in preparer.stages if stage.kind == kind)
    rows = [{**row, "source": "s"} for row in read(generated)]
    found = trained(preparer.prepare(stage, ScoredData(rows, "digest", Audit())).train)
    known = ended(generated)
    assert found and found == {key: known[key] or kind == "reward" for key in found}


def test_an_endpoint_says_it(tmp_path: Path) -> None:
    def answer(request: dict[str, Any], _: int) -> Answer:
        number = request["seed"]
        return Answer(f"said {number}", finish_reason="stop" if number % 2 else "length")

    out, pairs = tmp_path / "o.jsonl", tmp_path / "p.jsonl"
    with serving(answer) as server:
        command = ("generate", write(tmp_path / "q.jsonl", PROMPTS), "--endpoint", server.url)
        command = (*command, "--max-new-tokens", 4)
        assert run(*command, "--name", "m", "--responses", 4, "-o", out) == 0
    known = ended(out)
    assert known == {key: int(key[1].split()[1]) % 2 == 1 for key in known}
    ranked = ("--format", "ranked", "--select", "all_responses")
    assert run("pairs", out, *ranked, "-o", pairs) == 0
    examples = prepare_dataset(read(pairs), character_tokenizer(), kind="pair", max_length=200)
    assert trained(examples) == known


def test_a_preview_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "add 1 and 2: ", "chosen": "3", "rejected": "41", "finished": [False, True]}
    recipe = tiny.tiny_recipe()
    recipe["stages"] = [
        {"name": "dpo", "kind": "dpo", "beta": 0.1, "data": {"train": [{"path": "rows.jsonl"}]}}
    ]
    write(tmp_path / "rows.jsonl", [row])
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit):
        main(["preview", str(tmp_path / "recipe.yaml")])
    shown = capsys.readouterr().out
    assert "chosen response: 1 tokens, 1 trained" in shown
    assert "rejected response: 3 tokens, 3 trained" in shown
    assert "1 of 2 responses" in shown
