"""The documentation matches the code: recipes load, programs run, names and links exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rpo_trainer
from rpo_trainer.cli.commands import cli
from rpo_trainer.data import prepare_dataset, set_chat_template
from rpo_trainer.data.detect import kind_of
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.recipe import load_recipe
from tests.documents import DOCUMENTS, ROOT, blocks, name_of, page
from tests.documents_data import save_base_model
from tests.test_model_recipes import ultrafeedback

PACKAGE = Path(rpo_trainer.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

RECIPES = [
    pytest.param(block, path, id=f"{name_of(path)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(blocks(path.read_text(encoding="utf-8"), "yaml"), start=1)
    if re.search(r"^stages:", block, flags=re.MULTILINE)
]


@pytest.mark.parametrize(("block", "path"), RECIPES)
def test_a_recipe_in_a_document_loads(block: str, path: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(block, encoding="utf-8")
    assert load_recipe(file).recipe.stages


def test_the_readme_is_short_and_has_a_recipe() -> None:
    assert len(README.split()) <= 900
    assert any(param.values[1] == ROOT / "README.md" for param in RECIPES)


def test_every_line_of_the_complete_recipe_has_a_comment() -> None:
    (block,) = [b for b in blocks(page("recipes"), "yaml") if "stages:" in b]
    assert [line for line in block.splitlines() if " # " not in line] == []


@pytest.mark.slow
def test_the_program_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with a small model in place of the one on the hub, and small data."""
    import datasets

    (program,) = blocks(README, "python")
    above_the_fold = README[: README.index(program)]
    assert above_the_fold.count("\n") < 12 and "RPOTrainer(" in program
    monkeypatch.chdir(tmp_path)
    save_base_model(tmp_path / "model")
    rows = ultrafeedback(tmp_path / "rows.jsonl", 8)

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        assert (name, split) == ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")
        return datasets.Dataset.from_json(str(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub_name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert program.count(hub_name) == 1
    run_program(program.replace(hub_name, str(tmp_path / "model")), "README")
    assert list((tmp_path / "smollm2-rpo").glob("checkpoint-*/model.safetensors"))


@pytest.mark.slow
def test_the_program_of_the_tutorial_prints_a_reply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_base_model(tmp_path / "model")
    (program,) = blocks(page("tutorial"), "python")
    output = "runs/first/rpo-2/final"
    assert program.count(output) == 1 and f"`{output}`" in page("tutorial")
    program = program.replace(output, str(tmp_path / "model")).replace("=100", "=3")
    run_program(program, "tutorial")
    assert capsys.readouterr().out.strip()


def test_the_librarys_program_runs_and_logs_the_metrics_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = blocks(page("library"), "python")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # With a separate file name, so that a traceback shows the place in the page.
    exec(compile(program, "library.md", "exec"), {"__name__": "__main__"})
    state = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    logged = {*state["log_history"][0]} - {"step", "epoch", "grad_norm", "learning_rate"}
    table = page("library").split("| name | is |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.strip().splitlines()[1:]]
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert named - {"loss/router_aux"} == logged  # only for mixtures of experts


def run_program(program: str, name: str) -> None:
    exec(compile(program, f"{name}.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "number"), [("library", 1), ("adding-a-loss", 0)])
def test_a_documented_loss_is_one_and_its_step_zero_is_right(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpo_trainer import losses

    table = dict(losses.LOSSES)
    monkeypatch.setattr(losses, "LOSSES", table)
    run_program(blocks(page(name), "python")[number], name)
    (added,) = table.keys() - {"dpo", "ipo", *(x for x in table if x.startswith("rpo_"))}
    logps = torch.randn(3, 2, dtype=torch.float64)
    found = losses.preference_loss(logps, logps, loss_type=added, beta=0.1).losses
    expected = losses.step_zero_losses(added, beta=0.1, shape=(3, 2))
    torch.testing.assert_close(found, torch.as_tensor(expected).expand(3).double())


def test_the_documented_data_format_gives_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from rpo_trainer.data.formats import preferences
    from rpo_trainer.data.rows import RowError

    table: dict[str, Any] = {}
    monkeypatch.setattr(preferences, "PREFERENCE_FORMATS", table)
    run_program(blocks(page("adding-a-data-format"), "python")[0], "adding-a-data-format")
    (made,) = table.values()
    row = {"task": "1 + 1 = ", "good": "2", "bad": "3"}
    assert made.read(row) == set(row)
    assert made.convert(row) == {"prompt": "1 + 1 = ", "responses": ["2", "3"], "rewards": None}
    with pytest.raises(RowError):
        made.convert({**row, "bad": "2"})


def test_the_documented_verifier_gives_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    from rpo_trainer.rewards import verifiers

    table: dict[str, Any] = {}
    monkeypatch.setattr(verifiers, "VERIFIERS", table)
    run_program(blocks(page("adding-a-verifier"), "python")[0], "adding-a-verifier")
    (verifier,) = table.values()
    check = verifier.prepare({"id": "a", "ground_truth": "four"})
    assert [check(text) for text in ("five", "5")] == [1.0, 0.0]


def test_every_loss_is_in_the_table_with_the_responses_it_takes() -> None:
    from rpo_trainer.losses import LOSSES

    table = page("rpo").split("| `loss_type` |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    pairs_only = [(f"`{name}`", loss.pairs_only) for name, loss in LOSSES.items()]
    assert [(name, more == "–") for name, _, more in rows] == pairs_only


def test_the_table_of_commands_has_all_commands() -> None:
    table = page("commands").split("| command | description |")[1].split("\n\n")[0]
    assert set(re.findall(r"`rpo-trainer ([a-z]+)", table)) == set(cli.commands)


def test_the_data_flow_names_every_module_and_nothing_else() -> None:
    (picture,) = [block for block in blocks(page("architecture"), "") if "recipe YAML" in block]
    drawn = re.findall(r"^[^\w]*(\w+\.py|\w+/)\s{2,}\S", picture, flags=re.MULTILINE)
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    modules |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == modules


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert [link for link in local if link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_of_the_repository_named_in_a_document_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    pattern = r"(?<![\w./-])((?:recipes|tests|rpo_trainer|benchmarks|\.ci)/[\w./*-]*\w)"
    placeholders = {"tests/PART"}
    named = {name for name in re.findall(pattern, text) if not any(ROOT.glob(name))} - placeholders
    assert named == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_document_names_no_path_of_some_machine(path: Path) -> None:
    text = re.sub(r"\w+://\S+", "", path.read_text(encoding="utf-8"))
    # A slash at the beginning of a word with another one after it: an absolute path, or a home directory.
    assert re.findall(r"(?<![\w.\-/)\]}>])~?/\w[\w.-]*/\S*", text) == []


def test_what_may_change_on_resume_is_what_the_page_says() -> None:
    from rpo_trainer.chain.changes import SAFE_FIELDS

    (sentence,) = re.findall(r"these may change: (.*?)\.\n", page("running"), flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == set(SAFE_FIELDS)


def test_every_format_is_in_the_table() -> None:
    from rpo_trainer.data.formats import FORMATS, PROMPT_FORMATS

    table = page("data").split("## Rows and formats")[1].split("\n\n")[1]
    cells = [line.split("|")[2] for line in table.splitlines()[2:]]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == {
        *FORMATS,
        *PROMPT_FORMATS,
    }


def test_exit_codes_are_those_of_the_errors() -> None:
    from rpo_trainer import errors

    table = page("commands").split("| exit code | meaning |")[1].split("\n\n")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)}
    raised = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RPOTrainerError)
    }
    assert listed == raised | {0, 130}


def test_the_rows_of_the_documents_are_read_as_they_are() -> None:
    found = [text for path in DOCUMENTS for text in blocks(path.read_text("utf-8"), "json")]
    lines = [line for text in found for line in text.splitlines()]
    assert len(lines) >= 2
    tokenizer = set_chat_template(character_tokenizer(), "plain")
    for line in lines:
        row = json.loads(line)
        kind = kind_of(row)
        assert kind == "sft" or kind == "pair"
        (example,) = prepare_dataset([row], tokenizer, kind=kind, max_length=999)
        told = tokenizer.decode(example["prompt_ids"] + example["response_ids"][0])
        assert "User: " in told and "Assistant: " in told  # the template has written it
