"""Variables of the chat template in a run: used, recorded, and compared on resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.data.encode import PromptEncoder
from rpo_trainer.errors import Problems, RunError
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.report import build_report
from rpo_trainer.rewards.prompts import Prompts
from rpo_trainer.stages.preview import preview
from tests.chain import tiny

TEMPLATE = (
    "<{{ mode }}{{ size or '' }}>{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def recipe_with(folder: Path) -> tiny.Recipe:
    (folder / "t.jinja").write_text(TEMPLATE)
    says = [{"messages": [*talk(f"{i}"), {"role": "assistant", "content": "ab"}]} for i in range(8)]
    asks = [{"prompt": talk(f"{i}"), "ground_truth": "abcd"} for i in range(16)]
    asks[0][COLUMN] = {"mode": "row"}
    for name, rows in (("sft", says), ("dpo", asks)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    made = tiny.tiny_recipe()
    made["model"] |= {"chat_template": "t.jinja", COLUMN: {"mode": "all"}}
    source = {"path": "dpo.jsonl", COLUMN: {"size": 2}}
    data = {
        "train": [source], "generate": {"responses": 8, "max_new_tokens": 4, "batch_size": 64},
        "score": {"verifier": "partial_match"}, "pairs": {"select": "best_worst"},
    }  # fmt: skip
    made["stages"] = [
        {"name": "sft", "kind": "sft", "max_steps": 1, "data": {"train": [{"path": "sft.jsonl"}]}},
        {"name": "dpo", "kind": "dpo", "beta": 0.5, "max_steps": 1, "data": data},
    ]
    made["defaults"] |= {"micro_batch_size": 1, "global_batch_size": 1}
    return made


def rows_in(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in found if "prompt" in row]


def test_a_run_samples_trains_and_records_with_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(tmp_path)
    prompts: list[str] = []
    encoded = Prompts.encoded

    def spied(self: Prompts, index: int, encoder: PromptEncoder) -> list[int]:
        ids = encoded(self, index, encoder)
        prompts.append(encoder.tokenizer.decode(ids, skip_special_tokens=True))
        return ids

    monkeypatch.setattr(Prompts, "encoded", spied)
    run_dir = tiny.run(tmp_path, recipe)
    wanted = [f"<{'all' if i else 'row'}2>u:{i}a:" for i in range(16)]
    assert sorted(prompt.replace(" ", "") for prompt in prompts) == sorted(wanted)
    (path,) = (run_dir / "dpo").glob("generated-*.jsonl")
    given = [row[COLUMN] for row in rows_in(path)]
    assert given == [{"mode": "row" if not i else "all", "size": 2} for i in range(16)]
    # Recorded in chain.json, recipe.yaml, the card and the report.
    assert json.loads((run_dir / "chain.json").read_text())["model"][COLUMN] == {"mode": "all"}
    assert f"{COLUMN}:\n    mode: all" in (run_dir / "recipe.yaml").read_text()
    for name, sizes in (("sft", 0), ("dpo", 1)):
        card = (run_dir / name / "final" / "README.md").read_text()
        assert '`{"mode": "all"}`' in card and card.count('`{"size": 2}`') == sizes
    assert "mode: all" in build_report(run_dir).read_text()
    # A change is detected when the run resumes.
    for key, value, shown in (
        ("model", {"mode": "none"}, f'model.{COLUMN}.mode: "all" → "none"'),
        ("source", {"size": 3}, "stages.dpo.data.train"),
    ):
        other = copy.deepcopy(recipe)
        place = other["model"] if key == "model" else other["stages"][1]["data"]["train"][0]
        place[COLUMN] = value
        with pytest.raises(RunError) as error:
            tiny.run(tmp_path, other)
        assert shown in str(error.value)
    tiny.run(tmp_path, recipe)


def test_a_stage_is_trained_and_shown_with_them(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    loaded = tiny.load(tmp_path, recipe)
    text = "\n".join(line.plain for line in preview(loaded, 1, colors=False)).replace(" ", "")
    assert "<all>u:0a:" in text  # training
    assert "<row2>u:0a:" in text  # the prompt that is sampled from
    assert '{"mode":"row","size":2}' in text


def test_what_the_template_does_not_read_is_found_by_check(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    assert check_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
    recipe["model"][COLUMN] = {"thinking": True}
    recipe["eval"] = {"nll": [{"path": "sft.jsonl", COLUMN: {"depth": 1}}]}
    recipe["stages"][1]["data"]["train"][0][COLUMN] = {"width": 1}
    with pytest.raises(Problems) as error:
        check_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
    (found,) = error.value.problems  # without a tokenizer, no more can be checked
    assert found.where is not None and f"(model.{COLUMN}.thinking)" in found.where
    assert "`mode`, `size`" in str(found.fix)
    recipe["model"][COLUMN] = {"mode": "all"}
    with pytest.raises(Problems) as error:
        check_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
    places = [problem.where or "" for problem in error.value.problems]
    assert any(f"(eval.nll.0.{COLUMN}.depth)" in where for where in places)
    assert any(f"(stages.dpo.data.train.0.{COLUMN}.width)" in where for where in places)


def test_rows_with_variables_of_their_own_are_counted(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    path = tmp_path / "dpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, COLUMN: {"depth": 1}}) + "\n" for row in rows))
    lines = check_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
    assert any("`depth`" in line and "16" in line and "WARNING" in line for line in lines)


@pytest.mark.extras("lm_eval")
def test_tasks_of_lm_eval_are_rendered_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models import huggingface

    from rpo_trainer.recipe.schema import LmEvalSpec
    from rpo_trainer.stages.lm_eval_tasks import run_tasks

    class Stopped(Exception):
        pass

    given: dict[str, Any] = {}

    def model(**arguments: Any) -> None:
        given.update(arguments)
        raise Stopped

    monkeypatch.setattr(huggingface, "HFLM", model)
    spec = LmEvalSpec.model_validate({"tasks": ["ifeval"], "chat_template": True})
    with pytest.raises(Stopped):
        run_tasks(None, None, spec, tmp_path, seed=0, template_kwargs={"mode": "a"})
    assert given["chat_template_args"] == {"mode": "a"}


def test_a_generation_prompt_that_training_does_not_have_is_reported(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    recipe["stages"] = recipe["stages"][:1]
    opened = TEMPLATE.replace("}a:{%", "}a:{{ '<t>' if size }}{%")
    (tmp_path / "t.jinja").write_text(opened)
    said = {}
    for size in (0, 1):
        recipe["model"][COLUMN] = {"mode": "all", "size": size}
        loaded = tiny.load(tmp_path, recipe)
        lines = check_recipe(loaded, tmp_path / "run")
        shown = [line.plain for line in preview(loaded, 1, colors=False)]
        said[size] = [line for line in [*lines, *shown] if "<t>" in line]
    assert not said[0]
    assert len(said[1]) >= 2 and all("generation" in line for line in said[1])
    assert any("WARNING" in line for line in said[1])
    (warning,) = {line for line in said[1] if line.startswith("warning: ")}
    assert (
        "%" not in warning and "(1)" not in warning
    )  # of one row, which does not apply to the others
