"""`eval` after a stage: responses, pairs, rows and tasks, compared with a baseline."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from rpo_trainer.chain import evaluation, run_chain
from rpo_trainer.chain.evaluation import baseline_of
from rpo_trainer.chain.response_figures import response_examples
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError, Problems, RPOTrainerError, RunError
from rpo_trainer.recipe import expand_stages, load_recipe
from rpo_trainer.report import build_report, status_view
from rpo_trainer.report.collect import collect_run
from rpo_trainer.step.layout_probe import probe_on_all_ranks
from rpo_trainer.step.reference import dataset_logprobs
from tests.chain import tiny
from tests.raising import raises
from tests.rewards.server import Answer, serving

pytestmark = pytest.mark.slow

GENERATE = {"responses": 2, "max_new_tokens": 5}


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n} + 1 = ", "chosen": f"{n + 1}", "rejected": f"{n}!"} for n in range(2, 8)
    ]


def texts() -> list[dict[str, Any]]:
    return [{"prompt": f"say {w}: ", "response": w} for w in ("a", "bcd", "efghij")]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def recipe_with(folder: Path, **spec: Any) -> dict[str, Any]:
    """The tiny chain, evaluated on held-out pairs and rows of two files."""
    recipe = tiny.tiny_recipe()
    recipe["eval"] = {
        "preferences": [{"path": write(folder / "pairs.jsonl", pairs())}],
        "nll": [
            {"path": write(folder / "one.jsonl", texts())},
            {"path": write(folder / "two.jsonl", texts()[:1])},
        ],
        **spec,
    }
    return recipe


def logp(model: Any, prompt: str, response: str, *, end: bool = True) -> float:
    """Sum over the response's tokens and its end token, by a plain forward."""
    tokenizer = character_tokenizer()
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    after += [tokenizer.eos_token_id] * end
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logps = model(ids).logits.double().log_softmax(-1)
    places = range(len(before), ids.shape[1])
    return float(sum(logps[0, i - 1, ids[0, i]] for i in places))


@pytest.fixture(scope="module")
def measured(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain whose last round was evaluated in every way that needs no external service."""
    folder = tmp_path_factory.mktemp("measured")
    run_dir = tiny.cut_before(finished, folder / "run", "rpo-2")
    recipe = recipe_with(
        folder,
        data=[tiny.task("general", "heldout", 6)],
        generate=GENERATE,
        score={"verifier": "partial_match"},
        max_rows=5,
    )
    tiny.run(folder, recipe)
    return run_dir


def test_responses_are_scored_and_compared_with_the_baseline(measured: Path) -> None:
    found = tiny.records(measured)["rpo-2"]["eval"]
    assert (found["prompts"], found["responses"], found["scorer"]) == (
        5, 10, "verifier partial_match",
    )  # fmt: skip
    assert found["baseline"] == "general"  # the start of the first preference stage
    assert 0 <= found["win_rate"]["low"] <= found["win_rate"]["value"] <= found["win_rate"]["high"]
    kept = {p.name.split("-")[0] for p in (measured / "evaluation").iterdir()}
    assert kept == {"responses", "rewards", "logps"}
    files = sorted((measured / "evaluation").glob("rewards-*.jsonl"))
    tables = [[json.loads(x)["rewards"] for x in f.read_text().splitlines()] for f in files]
    means = {sum(sum(row[:2]) for row in table) / 10 for table in tables}
    assert any(found["reward_mean"] == pytest.approx(mean) for mean in means)
    assert len((measured / "rpo-2" / "samples.jsonl").read_text().splitlines()) == 5
    assert not (
        measured / "rpo-2" / "baseline-samples.jsonl"
    ).exists()  # for a stage, which has its own evaluation


def test_samples_have_lengths_and_log_ratios_of_plain_forwards(measured: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(measured / "rpo-2" / "final")
    base = AutoModelForCausalLM.from_pretrained(measured / "general" / "final")
    answers = [
        {row["id"]: row for row in map(json.loads, file.open())}
        for file in (measured / "evaluation").glob("responses-*.jsonl")
    ]
    checked = 0
    for line in (measured / "rpo-2" / "samples.jsonl").open():
        sample = json.loads(line)
        assert len(sample["rewards"]) == len(sample["tokens"]) == len(sample["log_ratios"]) == 2
        assert sample["rewards"][0] == sample["reward"]
        (answer,) = [
            own[sample["id"]] for own in answers if own[sample["id"]]["greedy"] == sample["greedy"]
            and own[sample["id"]]["responses"][0] == sample["sampled"]
        ][:1]  # fmt: skip
        for k, text in enumerate(answer["responses"]):
            if not text.strip():
                assert sample["tokens"][k] is None and sample["log_ratios"][k] is None
                continue
            if text != text.strip():
                continue  # a truncated response is trained up to its last word
            ended = answer["finished"][k]
            own, other = (logp(m, sample["prompt"], text, end=ended) for m in (policy, base))
            assert sample["tokens"][k] == len(text) + ended
            assert sample["log_ratios"][k] == pytest.approx(own - other, abs=1e-4)
            checked += 1
    assert checked >= 3


def test_the_system_of_a_stage_is_recorded(measured: Path) -> None:
    system = tiny.records(measured)["rpo-2"]["system"]
    assert system["devices"] == {"CPU": 1} and system["world_size"] == 1
    assert system["precision"] == "float32" and system["launcher"] == "rpo-trainer"
    assert system["libraries"]["torch"] == torch.__version__


def test_pairs_and_rows_are_those_of_plain_forwards(measured: Path) -> None:
    found = tiny.records(measured)["rpo-2"]["eval"]
    policy = AutoModelForCausalLM.from_pretrained(measured / "rpo-2" / "final")
    base = AutoModelForCausalLM.from_pretrained(measured / "general" / "final")
    gains, ranked = [], []
    for row in pairs()[:5]:
        own = [logp(policy, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        other = [logp(base, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        gains.append([a - b for a, b in zip(own, other, strict=True)])
        ranked.append(own[0] > own[1])
    preferences = found["preferences"]
    assert preferences["pairs"] == 5
    assert preferences["ranked"]["value"] == pytest.approx(sum(ranked) / 5)
    assert preferences["accuracy"]["value"] == pytest.approx(sum(c > r for c, r in gains) / 5)
    margin = sum(c - r for c, r in gains) / 5
    assert preferences["margin"]["value"] == pytest.approx(margin, abs=1e-4)
    delta = sum(c for c, _ in gains) / 5
    assert preferences["chosen_delta"]["value"] == pytest.approx(delta, abs=1e-4)
    nll = found["nll_by_source"]
    rows = texts()
    assert {name: entry["rows"] for name, entry in nll.items()} == {"one.jsonl": 3, "two.jsonl": 1}
    total = -sum(logp(policy, row["prompt"], row["response"]) for row in rows)
    tokens = sum(len(row["response"]) + 1 for row in rows)
    assert nll["one.jsonl"]["value"] == pytest.approx(total / tokens, abs=1e-5)


def test_measuring_changes_nothing(measured: Path, finished: Path) -> None:
    assert tiny.weights(measured) == tiny.weights(finished)


def test_what_was_sampled_and_computed_is_not_made_again(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpo_trainer.chain import evaluation
    from rpo_trainer.rewards import evaluate

    shutil.copytree(measured.parent, tmp_path / "again")
    state = tmp_path / "again" / "run" / "chain.json"
    content = json.loads(state.read_text())
    before = content["stages"][-1].pop("eval")
    del content["digest"]
    content["stages"][-1]["state"] = "running"  # as if it had been killed after its last step
    state.write_text(json.dumps(content))
    monkeypatch.setattr(evaluate, "respond", lambda *_, **__: pytest.fail("sampled again"))
    monkeypatch.setattr(evaluation, "dataset_logprobs", lambda *_, **__: pytest.fail("computed"))
    run_chain(load_recipe(tmp_path / "again" / "recipe.yaml"), tmp_path / "again" / "run")
    assert tiny.records(tmp_path / "again" / "run")["rpo-2"]["eval"] == before


def test_the_baseline_is_compared_with_nothing(finished: Path, tmp_path: Path) -> None:
    tiny.cut_before(finished, tmp_path / "run", "dpo")
    recipe = recipe_with(tmp_path, baseline="dpo")
    tiny.run(tmp_path, recipe, only={"dpo"})
    found = tiny.records(tmp_path / "run")["dpo"]["eval"]
    assert "baseline" not in found and set(found["preferences"]) == {"pairs", "ranked"}


def test_the_default_baseline(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path, recipe_with(tmp_path))
    stages = expand_stages(loaded.recipe)
    spec = loaded.recipe.eval
    assert spec is not None
    assert baseline_of(spec, stages) == "general"
    assert baseline_of(spec, stages[:2]) is None
    assert baseline_of(spec.model_copy(update={"baseline": "model"}), stages) == "model"


def measured_at(
    answer: Any, finished: Path, folder: Path, score: str, **settings: Any
) -> dict[str, Any]:
    """Rewards of an endpoint for the last round's responses, compared with those of the first stage."""
    tiny.cut_before(finished, folder / "run", "rpo-2")
    with serving(answer) as server:
        recipe = tiny.tiny_recipe()
        recipe["eval"] = {
            "data": [tiny.task("general", "heldout", 6)], "generate": GENERATE, "greedy": False,
            "score": {score: {"url": server.url, "model": f"{score}-1", **settings}},
            "baseline": "code",
        }  # fmt: skip
        tiny.run(folder, recipe)
    found: dict[str, Any] = tiny.records(folder / "run")["rpo-2"]["eval"]
    return found


def test_a_reward_endpoint_scores_policy_and_baseline(finished: Path, tmp_path: Path) -> None:
    def length(request: dict[str, Any], _: int) -> Answer:
        return Answer(f"reward:{len(request['messages'][-1]['content'])}")

    found = measured_at(length, finished, tmp_path, "endpoint")
    assert found["scorer"] == "reward model endpoint-1" and found["baseline"] == "code"
    lengths = [
        [[len(text) for text in json.loads(line)["responses"]] for line in path.open()]
        for path in (tmp_path / "run" / "evaluation").glob("responses-*.jsonl")
    ]
    means = [sum(map(sum, rows)) / 12 for rows in lengths]
    wins = [(a > b) + (a == b) / 2 for x, y in zip(*lengths, strict=True) for a in x for b in y]
    share = sum(wins) / len(wins)
    mine = means.index(pytest.approx(found["reward_mean"]))
    assert found["win_rate"]["value"] == pytest.approx(1 - share if mine else share)
    assert "exact" not in found or found["exact"] is None  # no reward is the highest


def test_a_judge_gives_a_win_rate_and_what_is_undecided(finished: Path, tmp_path: Path) -> None:
    def always_first(request: dict[str, Any], _: int) -> Answer:
        return Answer("[[A]]")  # the verdict changes with the order: undecided

    def longer(request: dict[str, Any], _: int) -> Answer:
        text = request["messages"][0]["content"]
        first = text.split("<answer_A>\n")[1].split("\n</answer_A>")[0]
        second = text.split("<answer_B>\n")[1].split("\n</answer_B>")[0]
        sizes = (len(first), first), (len(second), second)
        return Answer("[[A]]" if sizes[0] > sizes[1] else "[[B]]")

    def measured_by(answer: Any, folder: Path) -> dict[str, Any]:
        return measured_at(answer, finished, folder, "judge", retries=0)

    found = measured_by(longer, tmp_path / "a")
    assert found["scorer"] == "judge judge-1" and found["baseline"] == "code"
    assert found["undecided"] == 0 and "reward_mean" not in found
    assert found["judge"]["consistent"] == found["judge"]["comparisons"] > 0
    assert found["judge"]["first_position"] == 0.5
    answers = [
        [json.loads(line)["responses"][0] for line in path.read_text().splitlines()]
        for path in (tmp_path / "a" / "run" / "evaluation").glob("responses-*.jsonl")
    ]
    wins = sum((len(a), a) > (len(b), b) for a, b in zip(*answers, strict=True))
    ties = sum(a == b for a, b in zip(*answers, strict=True))
    share = (wins + ties / 2) / 6
    assert found["win_rate"]["value"] in (pytest.approx(share), pytest.approx(1 - share))
    found = measured_by(always_first, tmp_path / "b")
    assert found["undecided"] == 6 - ties
    assert ("win_rate" in found) == (ties > 0)


# --- lm-eval ---

TASK = """\
task: count_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def questions() -> list[dict[str, Any]]:
    return [
        {"question": f"{n} + 1 =", "choices": [str(n), str(n + 1)], "label": 1} for n in range(2, 8)
    ]


def tasks_of(folder: Path) -> dict[str, Any]:
    file = folder / "tasks" / "questions.jsonl"
    write(file, questions())
    (folder / "tasks" / "count_up.yaml").write_text(TASK.format(file=file))
    return {"tasks": ["count_up"], "include_path": "./tasks", "limit": 5}


@pytest.mark.extras("lm_eval")
def test_tasks_of_lm_eval_are_run_on_the_output(finished: Path, tmp_path: Path) -> None:
    tiny.cut_before(finished, tmp_path / "run", "rpo-2")
    recipe = tiny.tiny_recipe()
    recipe["eval"] = {"lm_eval": tasks_of(tmp_path)}
    tiny.run(tmp_path, recipe)
    found = tiny.records(tmp_path / "run")["rpo-2"]["eval"]["lm_eval"]["count_up"]["acc"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "rpo-2" / "final")
    tokenizer = character_tokenizer()

    def score(question: str, choice: str) -> float:
        before = tokenizer(question)["input_ids"]
        whole = tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            logps = policy(torch.tensor([whole])).logits.log_softmax(-1)
        return float(sum(logps[0, i - 1, whole[i]] for i in range(len(before), len(whole))))

    right = [
        max(range(2), key=lambda i: score(row["question"], row["choices"][i])) == row["label"]
        for row in questions()[:5]
    ]
    assert found["value"] == pytest.approx(sum(right) / 5)


@pytest.mark.extras("lm_eval")
def test_tasks_that_cannot_be_run_are_found_by_check(tmp_path: Path) -> None:
    from rpo_trainer.chain.check import check_recipe

    def found(**spec: Any) -> RPOTrainerError:
        recipe = tiny.tiny_recipe()
        recipe["stages"] = recipe["stages"][:2]
        recipe["eval"] = {"lm_eval": {**tasks_of(tmp_path), **spec}}
        with pytest.raises(Problems) as caught:
            check_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
        assert caught.value.exit_code == 2
        (problem,) = caught.value.problems  # not once per stage
        return problem

    unknown = found(tasks=["count_down"])
    assert unknown.code == "recipe.unknown-task" and "'count_down'" in unknown.what
    assert "count_up?" in str(unknown.fix)
    code = found(tasks=["humaneval"])
    assert code.code == "recipe.code-execution-not-allowed" and "humaneval" in code.what
    absent = found(include_path="./nowhere")
    assert absent.code == "recipe.no-such-directory" and "include_path)" in str(absent.where)


def test_without_the_extra_check_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from rpo_trainer.chain.check import check_recipe

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    recipe = tiny.tiny_recipe()
    recipe["stages"] = recipe["stages"][:1]
    recipe["eval"] = {"lm_eval": {"tasks": ["ifeval"]}}
    with raises("recipe.missing-library", Problems) as caught:
        check_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
    assert caught.value.exit_code == 2 and "rpo-trainer[eval]" in str(caught.value)


@pytest.mark.extras("lm_eval")
def test_a_task_whose_data_cannot_be_had_is_named(tmp_path: Path) -> None:
    from rpo_trainer.recipe.schema import LmEvalSpec
    from rpo_trainer.stages.lm_eval_tasks import run_tasks
    from tests.small_models import make_model

    spec = LmEvalSpec.model_validate(tasks_of(tmp_path))
    (tmp_path / "tasks" / "questions.jsonl").unlink()
    with raises("run.lm-eval-failed", RunError) as caught:
        run_tasks(make_model(), character_tokenizer(), spec, tmp_path, seed=0)
    assert "count_up" in str(caught.value) and caught.value.exit_code == 2


def test_the_baseline_from_before_the_run_is_measured_too(tmp_path: Path) -> None:
    recipe = recipe_with(
        tmp_path,
        data=[tiny.task("code", "heldout", 4)],
        generate=GENERATE,
        score={"verifier": "partial_match"},
        baseline="model",
    )
    recipe["stages"] = recipe["stages"][:1]
    run_dir = tiny.run(tmp_path, recipe)
    after, before = (
        [json.loads(line) for line in (run_dir / "code" / name).read_text().splitlines()]
        for name in ("samples.jsonl", "baseline-samples.jsonl")
    )
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert before != after and all(0 <= row["reward"] <= 5 for row in before)

    found = tiny.records(run_dir)["code"]["eval"]
    theirs = found["of_baseline"]
    assert theirs["reward_mean"] != found["reward_mean"] and theirs["responses"] == 8
    assert set(theirs["preferences"]) == {"pairs", "ranked"}
    untrained = math.log(len(character_tokenizer()))  # all tokens are equal
    assert theirs["nll_by_source"]["one.jsonl"]["value"] == pytest.approx(untrained, rel=0.05)

    page = build_report(run_dir).read_text(encoding="utf-8")
    assert page.index("model, before") < page.index('<span class="stage">code</span>')
    console = Console(width=200)
    with console.capture() as shown:
        console.print(status_view(collect_run(run_dir)))
    assert shown.get().index("model, before") < shown.get().index("\ncode ")


def test_a_baseline_that_is_not_there_is_found_by_check(tmp_path: Path) -> None:
    from rpo_trainer.chain.check import check_recipe

    with pytest.raises(Problems) as caught:
        check_recipe(tiny.load(tmp_path, recipe_with(tmp_path, baseline="./no")), tmp_path / "run")
    (problem,) = caught.value.problems
    assert type(problem) is ModelError and problem.code == "model.not-found"
    assert "eval.baseline" in str(problem.where)
    assert str(tmp_path / "no") in str(problem.where)


def _without_last_evaluation(run_dir: Path) -> dict[str, Any]:
    """Set the last stage back to before its evaluation, whose record is returned."""
    state = run_dir / "chain.json"
    content = json.loads(state.read_text())
    before: dict[str, Any] = content["stages"][-1].pop("eval")
    del content["digest"]
    content["stages"][-1]["state"] = "running"
    state.write_text(json.dumps(content))
    return before


def test_what_is_damaged_is_made_again(
    measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(measured.parent, tmp_path / "again")
    run_dir = tmp_path / "again" / "run"
    before = _without_last_evaluation(run_dir)
    harmed = [*(run_dir / "evaluation").glob("*.jsonl")]
    kinds = {path.name.partition("-")[0] for path in harmed}
    assert kinds == {"responses", "rewards"}
    for number, path in enumerate(harmed):
        raw = path.read_bytes()
        lines = raw.splitlines(keepends=True)
        path.write_bytes([raw[:-9], b"\xff" + raw[1:], b"".join(lines[:-1])][number % 3])
    run_chain(load_recipe(tmp_path / "again" / "recipe.yaml"), run_dir)
    warned = [r.getMessage() for r in caplog.records if r.name == "rpo_trainer.data.resumable_rows"]
    assert len(warned) == len(harmed)
    assert all(any(path.name in text for text in warned) for path in harmed)
    assert tiny.records(run_dir)["rpo-2"]["eval"] == before


def test_a_policy_is_probed_once_and_dropped_samples_are_not_tokenized(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, pairs and rows of the stage and of its baseline, which is a stage as well."""
    probed: list[int] = []
    lengths: list[int] = []
    tokenized: list[int] = []

    def probe(policy: Any, *, longest: int, **settings: Any) -> Any:
        probed.append(longest)
        return probe_on_all_ranks(policy, longest=longest, **settings)

    def compute(policy: Any, examples: Any, **settings: Any) -> Any:
        lengths.append(
            max(len(e["prompt_ids"]) + max(map(len, e["response_ids"])) for e in examples)
        )
        return dataset_logprobs(policy, examples, **settings)

    def tokenize(rows: Any, answers: Any, tokenizer: Any) -> Any:
        tokenized.append(len(rows))
        return response_examples(rows, answers, tokenizer)

    monkeypatch.setattr(evaluation, "probe_on_all_ranks", probe)
    monkeypatch.setattr(evaluation, "dataset_logprobs", compute)
    monkeypatch.setattr(evaluation, "response_examples", tokenize)
    shutil.copytree(measured.parent, tmp_path / "again")
    run_dir = tmp_path / "again" / "run"
    shutil.rmtree(run_dir / "evaluation")
    before = _without_last_evaluation(run_dir)
    run_chain(load_recipe(tmp_path / "again" / "recipe.yaml"), run_dir)
    assert tiny.records(run_dir)["rpo-2"]["eval"] == before
    assert before["baseline"] == "general" and before["nll_by_source"] and before["preferences"]
    assert tokenized == [5]
    assert len(lengths) == 5  # samples and pairs of both, rows of the stage
    assert probed == [max(lengths)] * 2
