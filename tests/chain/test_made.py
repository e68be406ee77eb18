"""Chains whose rows are scored by a reward model of the chain or by endpoints, with a fitted η."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rpo_trainer.data.judge_bias import bias_lines, biases
from rpo_trainer.errors import DataError, ModelError, Problems
from tests.chain import tiny
from tests.raising import codes_of, raises
from tests.rewards.server import Answer, refused, serving
from tests.rewards.test_judge import by_length


def recipe_with(score: dict[str, Any], **generate: Any) -> dict[str, Any]:
    """SFT → a reward model on pairs → RPO twice on responses that it scores, with a fitted η."""
    recipe = tiny.tiny_recipe()
    code, rpo = tiny.stage_of(recipe, "code"), tiny.stage_of(recipe, "rpo")
    rm = {
        "name": "rm", "kind": "reward", "objective": "bradley_terry", "max_steps": 2,
        "data": {"train": [{"path": "pairs.jsonl"}]},
    }  # fmt: skip
    rpo["reward_scale"] = "auto"
    rpo["data"] |= {"score": score, "generate": {**rpo["data"]["generate"], **generate}}
    recipe["stages"] = [code, rm, rpo]
    return recipe


def write_pairs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"double {n}: ", "chosen": str(2 * n), "rejected": str(n + 1)}
        for n in range(2, 18)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(run_dir: Path, stage: str, kind: str = "generated") -> list[dict[str, Any]]:
    (file,) = (run_dir / stage).glob(f"{kind}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_reward_model_of_the_chain_scores_its_rounds(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    run_dir = tiny.run(tmp_path, recipe_with({"model": "rm"}))
    found = tiny.records(run_dir)
    assert all(record["state"] == "done" for record in found.values())
    rows = [rows_of(run_dir, name) for name in ("rpo-1", "rpo-2")]
    assert all(set(score) == {"reward"} for row in rows[0] for score in row["scores"])
    assert rows[0][0]["policies"] == ["code"] * 3 and rows[1][0]["policies"] == ["rpo-1"] * 3
    for name in ("rpo-1", "rpo-2"):
        fitted = found[name]["data"]["audit"]["calibration"]
        assert fitted["method"] == "quantile" and fitted["reward_scale"] > 0
        assert found[name]["reward_scale"] == fitted["reward_scale"]
        gaps = [json.loads(x) for x in (run_dir / name / "gaps.jsonl").read_text().splitlines()]
        (row,) = [r for r in rows[name == "rpo-2"] if r["id"] == gaps[0]["id"]]
        said = {t: r for t, r in zip(row["responses"], row["rewards"], strict=True) if t.strip()}
        best, *others = sorted(said.values(), reverse=True)
        gap = best - sum(others) / len(others)
        target = gaps[0].get("target", gaps[0].get("target_gap"))
        assert target == pytest.approx(fitted["reward_scale"] * gap, rel=1e-3)


def test_rewards_in_other_units_train_the_same_policy(finished: Path, tmp_path: Path) -> None:
    """Only with a fitted η; with a fixed one, the targets are reported as saturated."""
    rows = rows_of(finished, "rpo-1")
    made, remarks = {}, {}
    for name, unit, eta in (("one", 1, "auto"), ("hundred", 100, "auto"), ("given", 100, 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{**row, "rewards": [unit * reward for reward in row["rewards"]]} for row in rows]
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        recipe = tiny.tiny_recipe()
        stage = tiny.stage_of(recipe, "rpo")
        del stage["repeat"]
        stage |= {"init": str(finished / "dpo" / "final"), "reward_scale": eta}
        stage["data"] = {
            "train": [{"path": "rows.jsonl"}], "pairs": {"select": "all_responses"},
        }  # fmt: skip
        recipe["stages"] = [stage]
        run_dir = tiny.run(folder, recipe)
        record = tiny.records(run_dir)["rpo"]
        remarks[name] = record["data"]["audit"]["remarks"]
        made[name] = load_file(run_dir / "rpo/final/model.safetensors"), record.get("reward_scale")
    assert made["hundred"][1] == pytest.approx(made["one"][1] / 100, rel=1e-3)
    for key, weights in made["one"][0].items():
        torch.testing.assert_close(made["hundred"][0][key], weights, rtol=0, atol=1e-6)
    apart = [made["given"][0][key] - weights for key, weights in made["one"][0].items()]
    assert max(float(one.abs().max()) for one in apart) > 1e-4
    assert any("sigmoid" in remark for remark in remarks["given"])
    assert not any("sigmoid" in remark for remark in remarks["one"] + remarks["hundred"])


def test_several_policies_and_endpoints_with_a_judge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(tmp_path)
    caplog.set_level("INFO")

    def answer(request: dict[str, Any], count: int) -> Answer:
        if count == 0:
            return refused(503)
        if "prompt" in request:
            return Answer(
                "x" * (request["seed"] % 7 + 6)
            )  # longer than the policies' responses can be
        return by_length(request, count)

    with serving(answer) as server:
        at = {"url": server.url, "model": "m"}
        recipe = recipe_with({"judge": at}, responses=1, policies=["init", "model"], endpoints=[at])
        data = tiny.stage_of(recipe, "rpo")["data"]
        data |= {"resample": "once", "train": [tiny.task("general", "preference", 12, seed=2)]}
        run_dir = tiny.run(tmp_path, recipe)
    rows = rows_of(run_dir, "rpo-1")
    assert rows[0]["policies"] == ["code", "model", "m"]
    assert all(len(row["judge"]) == 3 and max(row["rewards"]) == row["rewards"][2] for row in rows)
    assert not list((run_dir / "rpo-2").glob("generated-*"))
    found = tiny.records(run_dir)
    first, second = (found[f"rpo-{n}"]["data"]["fingerprint"] for n in (1, 2))
    assert first == second
    # The judge's biases are reported for every stage that trains on its verdicts.
    said = found["rpo-1"]["data"]["audit"]["judge"]
    assert said == found["rpo-2"]["data"]["audit"]["judge"] == biases(rows)
    assert said["comparisons"] == 3 * len(rows) and said["longer_wins"] == 1.0
    assert all(line in caplog.text for line in bias_lines(said))


def test_an_endpoint_that_refuses_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    bad = True

    def answer(request: dict[str, Any], count: int) -> Answer:
        text = request["messages"][-1]["content"]
        if bad and "1" in text:
            return refused(400, "no ones")
        return Answer(f"reward:{len(text)}")

    with serving(answer) as server:
        recipe = recipe_with({"endpoint": {"url": server.url, "model": "m"}})
        with raises("rewards.rows-failed", DataError) as error:
            tiny.run(tmp_path, recipe)
        assert "no ones" in str(error.value)
        bad, before = False, len(server.asked)
        tiny.run(tmp_path, recipe)
        total = sum(
            len(r["responses"]) for n in (1, 2) for r in rows_of(tmp_path / "run", f"rpo-{n}")
        )
        assert len(server.asked) - before < total
    assert all(r["state"] == "done" for r in tiny.records(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("score", "code", "shown"),
    [
        ({"model": "./nowhere"}, "model.no-reward-model", "nowhere"),
        (
            {"judge": {"url": "http://x", "model": "m", "template": "none.txt"}},
            "judge.template-not-readable",
            "none.txt",
        ),
        ({"verifier": "instructions"}, "verifier.missing-column", "`instruction_id_list`"),
    ],
)
def test_what_can_be_known_is_reported_before_the_run(
    score: dict[str, Any], code: str, shown: str, tmp_path: Path
) -> None:
    write_pairs(tmp_path)
    with pytest.raises((Problems, ModelError)) as error:
        tiny.run(tmp_path, recipe_with(score))
    assert shown in str(error.value) and code in codes_of(error.value)
    assert not (tmp_path / "run" / "code").exists()
