"""Every command of the documentation runs: those in blocks by page, those in sentences together.

Each page has a separate directory, with small models and files under the names that its commands use. The
values of placeholders, and the options that make a command small, are in the tables below.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.chain import default_run_dir
from rpo_trainer.cli.commands import cli, main
from rpo_trainer.recipe import expand_stages, load_recipe
from tests.chain.tiny import records
from tests.distributed import launch
from tests.documents import ROOT, SHIPPED, TOLD, code, commands, name_of, spans
from tests.documents_data import rows, save_base_model, save_policy, save_reward_model, write
from tests.real_data import write_local
from tests.test_model_recipes import ultrafeedback

# ---------------------------------------------------------------- which commands are run

_CHECKOUT = (
    "sets up or tests the checkout: what CI and a fresh clone do; the target is looked up below"
)
_COMPARES = "needs two runs: tests/report/test_compare.py has them"
_INSTALLS = "installs from a package index"
NOT_RUN = {
    "make quickstart": _CHECKOUT,
    "make real-small": _CHECKOUT,
    "make test": _CHECKOUT,
    "make test-all": _CHECKOUT,
    "make lint": _CHECKOUT,
    "make audit": _CHECKOUT,
    "make format": _CHECKOUT,
    "make docs": _CHECKOUT,
    "make PYTHON=python3.12 test": _CHECKOUT,
    ".ci/run": _CHECKOUT,
    ". .venv/bin/activate": "of the environment that make has made",
    "pip install -c constraints.txt '.[report]'": _INSTALLS,
    "pip install pre-commit && pre-commit install": _INSTALLS,
    "pip install 'rpo-trainer[report]'": _INSTALLS,
    "rpo-trainer compare runs/a runs/b --html comparison.html": _COMPARES,
    "rpo-trainer compare RUN RUN": _COMPARES,
    "python -m benchmarks.models --write": "of all families; tests/sweep/test_models_page.py has some",
    "python docs/tools/hardware.py --write": "takes minutes; tests/test_docs_site.py computes a part",
    "torchrun --max-restarts N": "an option; tests/distributed/test_chain.py kills ranks under it",
}
# Launchers with a chain: tests/distributed/test_chain.py reads these lines from the page and runs them.
LAUNCHED = ("accelerate launch", "torchrun", "deepspeed")
PROGRAMS = ("rpo-trainer", "accelerate", "torchrun", "deepspeed", "python")


def pages() -> dict[str, list[str]]:
    """The commands in blocks, by page; each once, at its first occurrence."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    shipped = [path for path in SHIPPED if path.parent.name != "models"]  # test_model_recipes.py
    for path in [*TOLD, *shipped]:
        for block in code(path):
            if block.kind == "sh":  # run unchanged by test_docs_run.py
                continue
            new = [command for command in commands(block) if command not in seen]
            seen |= set(new)
            found.setdefault(name_of(path), []).extend(new)
    return found


def in_text() -> list[str]:
    """The commands in sentences and tables that have arguments."""
    found = [span for path in [ROOT / "README.md", *TOLD] for span in spans(path)]
    return [span for span in dict.fromkeys(found) if is_whole(span)]


def is_whole(span: str) -> bool:
    if not re.match(
        r"(rpo-trainer|python|torchrun|accelerate launch|deepspeed|make|pip|\.ci/run|\. )\b",
        span,
    ):
        return False
    name = re.fullmatch(r"rpo-trainer(?: (\w+))?|torchrun|accelerate launch|deepspeed|make", span)
    if name is None:
        return True
    if not name[1] or name[1] not in cli.commands:
        return False
    # `check` requires a recipe or `--template`.
    return not any(p.required or p.name == "recipe" for p in cli.commands[name[1]].params)


def by_launcher_tests(command: str) -> bool:
    return any(
        command == f"{shlex.join(launch.documented(launcher))} RECIPE" for launcher in LAUNCHED
    )


PAGES = {
    page: [c for c in found if c not in NOT_RUN and not by_launcher_tests(c)]
    for page, found in pages().items()
}
IN_TEXT = [command for command in in_text() if command not in NOT_RUN]

# ---------------------------------------------------------------- placeholders

# {here} is the directory.
OWN = {
    "init RECIPE --model M --data FILE": "init new.yaml --model {here}/base-model --data pairs.jsonl",
    "convert FILE -o RECIPE": "convert llama_factory.yaml -o converted.yaml",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "{here}/base-model",
    "model.name_or_path=FOLDER": "",
    "RECIPE": "mine.yaml",
    "RUN": "runs/mine",
    "KEY": "stages.dpo.beta",
    "[NAME]": "quickstart/chain",
    "MODEL": "{here}/base-model",
    "TOKENIZER": "{here}/base-model",
    "DATA": "{here}/data",
    "model.name_or_path=...": "model.name_or_path={here}/base-model",
    "stages.sft.data.train.0.path=...": "stages.sft.data.train.0.path={here}/sft.jsonl",
    "stages.code-sft.data.train.0.path=...": "stages.code-sft.data.train.0.path={here}/sft.jsonl",
    "stages.dpo.data.train.0.path=...": "stages.dpo.data.train.0.path={here}/pairs.jsonl",
    "stages.rpo.data.train.0.path=...": "stages.rpo.data.train.0.path={here}/pairs.jsonl",
    "stages.sft.data.eval.0.path=...": "stages.sft.data.eval.0.path={here}/sft.jsonl",
    "stages.dpo.data.eval.0.path=...": "stages.dpo.data.eval.0.path={here}/pairs.jsonl",
    "stages.rpo.data.eval.0.path=...": "stages.rpo.data.eval.0.path={here}/pairs.jsonl",
    "--nproc_per_node 8": "--nproc_per_node 2",
    "[k=v ...]": "",
}
INPUT = {
    "generate": "prompts.jsonl", "score": "responses.jsonl", "pairs": "scored.jsonl",
    "calibrate": "pairs.jsonl", "audit": "pairs.jsonl",
}  # fmt: skip
QUICK = (
    "model.from_config.hidden_size=32 model.from_config.num_hidden_layers=2"
    " eval.data.0.size=4 stages.dpo.data.train.0.size=16 stages.rpo.data.train.0.size=16"
    + "".join(
        f" stages.{stage}.max_steps=2 stages.{stage}.warmup_steps=0"
        f" stages.{stage}.data.train.0.size=128 stages.{stage}.data.eval.0.size=8"
        for stage in ("code-sft", "general-sft")
    )
)
# A small model and data in place of those on the hub.
SMALL_MODEL = "model.name_or_path={here}/base-model defaults.warmup_steps=1" + "".join(
    f" stages.{stage}.data.{part}.0.path={{here}}/ultrafeedback.jsonl stages.{stage}.data.{part}.0.split=null"
    for stage in ("dpo", "rpo")
    for part in ("train", "eval")
)
# Arguments appended to commands with this beginning: what readers add, or what makes it small.
MORE = {
    "rpo-trainer check --template": "--chat-template plain",
    "rpo-trainer generate INPUT": "--policy ./model --max-new-tokens 4",
    "rpo-trainer score INPUT": "--verifier numeric",
    "rpo-trainer run RECIPE --allow-changed KEY": "stages.dpo.beta=0.2",
    "rpo-trainer sft RECIPE": "--run-dir runs/alone",
    "rpo-trainer dpo RECIPE": "--run-dir runs/alone",
    "rpo-trainer rpo RECIPE": "--run-dir runs/alone",
    "rpo-trainer reward RECIPE": "--run-dir runs/alone",
    "python -m rpo_trainer": "--version",
    "rpo-trainer check recipes/nemotron4/chain.yaml": "model.name_or_path={here}/base-model",
    "rpo-trainer reward recipes/reward/helpsteer2.yaml": (
        "'stages.helpsteer2.data={train: [{path: {here}/ratings.jsonl}]}'"
    ),
    "rpo-trainer check recipes/models/": SMALL_MODEL,
    "rpo-trainer plan recipes/models/": SMALL_MODEL,
    "rpo-trainer preview recipes/models/": SMALL_MODEL,
    "rpo-trainer run recipes/models/": SMALL_MODEL,
    "rpo-trainer run recipes/sft.yaml": "stages.sft.warmup_steps=1",
    "rpo-trainer run recipes/dpo.yaml": "stages.dpo.warmup_steps=1",
    "rpo-trainer run recipes/examples/real_chain.yaml": "defaults.max_steps=2",
    "python recipes/real/prepare.py": "--local {here}/local",
    "rpo-trainer run recipes/real/chain.yaml": (
        "model.name_or_path={here}/base-model defaults.warmup_steps=0 eval.data.0.max_rows=1"
        " 'eval.generate={responses: 1, max_new_tokens: 4, batch_size: 8}'"
        + "".join(
            f" stages.rpo-{stage}.data.generate.max_new_tokens=8"
            for stage in ("math", "code", "instructions")
        )
    ),
    "python recipes/real/measure.py": "--rows 1 --max-new-tokens 4",
    "rpo-trainer run recipes/examples/reward_models.yaml": (
        "stages.stories.max_steps=2 stages.scores.max_steps=2 stages.pairs.max_steps=2"
    ),
    "rpo-trainer plan recipes/quickstart/": QUICK,
    "rpo-trainer run recipes/quickstart/": f"{QUICK} eval.generate.max_new_tokens=4",
    "rpo-trainer run recipes/quickstart/reward.yaml": (
        "stages.reward.max_steps=2 stages.reward.warmup_steps=0 stages.reward.data.train.0.size=60"
        " stages.reward.data.generate.with_ground_truth=true"
    ),
}
# Contents of the files that these commands and the shipped recipes name.
FILES = {
    "prompts.jsonl": "prompts", "sft.jsonl": "sft", "pairs.jsonl": "pairs", "responses.jsonl": "many",
    "scored.jsonl": "many", "ratings.jsonl": "helpsteer2", "data/code.jsonl": "sft",
    "data/attr_hanna_human_stories.jsonl": "stories",
}  # fmt: skip
KINDS = {
    r"sft|math_|data/code": "sft", r"pref_multi": "many",
    r"scored_single": "score", r"attr_hanna": "stories", r"eval_humaneval": "canonical_solution",
    r"eval_gsm8k": "answer_raw", r"pref|pairs|scored": "pairs",
}  # fmt: skip
MINE = """
model:
  from_config: {model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}
  tokenizer: characters
  dtype: float32
defaults: {max_length: 64, global_batch_size: 8, micro_batch_size: 8, learning_rate: 1.0e-3, max_steps: 2}
stages:
  - {name: sft, kind: sft, data: {train: [{path: sft.jsonl}]}}
  - {name: reward, kind: reward, objective: bradley_terry, data: {train: [{path: pairs.jsonl}]}}
  - {name: dpo, kind: dpo, beta: 0.1, data: {train: [{path: pairs.jsonl}]}}
  - {name: rpo, kind: rpo, beta: 0.1, data: {train: [{path: pairs.jsonl}]}}
"""
LLAMA_FACTORY = """
model_name_or_path: ./base-model
stage: sft
do_train: true
finetuning_type: full
dataset: sums
dataset_dir: .
template: chatml
cutoff_len: 64
per_device_train_batch_size: 1
learning_rate: 1.0e-5
output_dir: out
"""


def as_typed(command: str, here: Path) -> str:
    """Return the command with its placeholders replaced."""
    more = [words for start, words in MORE.items() if command.startswith(start)]
    for word, own in OWN.items():
        command = re.sub(rf"(?<![\w/]){re.escape(word)}(?!\w)", own, command)
    name = command.split()[1]
    command = command.removesuffix(" ...")
    command = command.replace("INPUT", INPUT.get(name, "INPUT")).replace("OUT", f"{name}-out.jsonl")
    return " ".join([command.strip(), *more]).replace("{here}", str(here))


# ---------------------------------------------------------------- running them


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "page"
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("data"))
    write_local(folder / "local")
    save_base_model(folder / "base-model")
    save_policy(folder / "model")
    save_reward_model(folder / "reward-model")
    for name, kind in FILES.items():
        write(folder / name, rows(kind))
    for path in (folder / "recipes").rglob("*.yaml"):
        if path.parent.name == "real":  # its data are made by prepare.py
            continue
        for name in re.findall(r"path: (\S+\.jsonl)", path.read_text(encoding="utf-8")):
            kind = next(kind for pattern, kind in KINDS.items() if re.search(pattern, name))
            write(path.parent / name, rows(kind))
    ultrafeedback(folder / "ultrafeedback.jsonl", 16)
    (folder / "mine.yaml").write_text(MINE, encoding="utf-8")
    (folder / "llama_factory.yaml").write_text(LLAMA_FACTORY, encoding="utf-8")
    (folder / "dataset_info.json").write_text('{"sums": {"file_name": "alpaca.json"}}', "utf-8")
    (folder / "alpaca.json").write_text('[{"instruction": "1 + 1 =", "output": "2"}]', "utf-8")
    return folder


Run = Callable[[str], None]


@pytest.fixture
def run(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run a command in a separate directory, and check its documented output."""
    here = tmp_path / "page"
    shutil.copytree(prepared, here)
    monkeypatch.chdir(here)

    def typed(command: str) -> None:
        words = shlex.split(as_typed(command, here))
        print(shlex.join(words))
        if words[0] == "rpo-trainer":
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            said = capsys.readouterr()
            code, output = ended.value.code, said.out + said.err
        else:
            code, output = launched(words)
        assert code == 0, f"{shlex.join(words)}\n{output[-5000:]}"
        assert output.strip() and "Traceback" not in output
        look_at_output(words)

    return typed


def launched(words: list[str]) -> tuple[int, str]:
    """By another program, in a separate process; ranks may communicate on a CPU."""
    assert words[0] in PROGRAMS
    if words[0] == "torchrun":
        words = ["torchrun", "--master_port", str(launch.free_port()), *words[1:]]
    site = str(ROOT / "tests" / "distributed" / "site")
    done = subprocess.run(
        words, env=launch.environment(PYTHONPATH=site), capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def look_at_output(words: list[str]) -> None:
    """The file of `-o`, or the run with its stages and report, exists."""
    words = words[words.index("rpo_trainer") :] if "rpo_trainer" in words else words
    name = words[1]
    if "-o" in words:
        assert Path(words[words.index("-o") + 1]).read_text(encoding="utf-8").strip()
    if name == "report":
        assert Path(words[2], "report.html").is_file()
    if name not in ("run", "sft", "dpo", "rpo", "reward"):
        return
    options = cli.commands[name].make_context(name, words[2:]).params
    loaded = load_recipe(options["recipe"], options["overrides"])
    folder = options["run_dir"] or default_run_dir(loaded)
    stages = expand_stages(loaded.recipe)
    finished = {n for n, record in records(folder).items() if record["state"] == "done"}
    assert finished >= {stage.name for stage in stages if name in ("run", stage.kind)}
    assert all((folder / n / "final" / "manifest.json").is_file() for n in finished)
    assert (folder / "report.html").is_file() or name != "run"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, found in PAGES.items() if found])
def test_the_commands_of_a_page_run(page: str, run: Run) -> None:
    for made in re.findall(r"-o (\S+)", "\n".join(PAGES[page])):
        Path(made).unlink(missing_ok=True)
    for command in PAGES[page]:
        run(command)


@pytest.mark.slow
def test_the_commands_in_the_text_run(run: Run) -> None:
    for command in {as_typed(command, Path()): command for command in IN_TEXT}.values():
        run(command)


# ---------------------------------------------------------------- none is missing


def test_what_is_not_run_is_in_the_documents_and_what_has_words_of_its_own_too() -> None:
    everything = {*in_text(), *(command for found in pages().values() for command in found)}
    assert set(NOT_RUN) <= everything
    assert [start for start in MORE if not any(c.startswith(start) for c in everything)] == []
    assert [word for word in OWN if not any(word in c for c in everything)] == []
    assert {command for command in everything if by_launcher_tests(command)} == {
        f"{shlex.join(launch.documented(launcher))} RECIPE" for launcher in LAUNCHED
    }


def test_every_command_is_run_or_has_a_reason_not_to() -> None:
    to_run = [*IN_TEXT, *(command for found in PAGES.values() for command in found)]
    assert len(to_run) > 35
    assert [command for command in to_run if command.split()[0] not in PROGRAMS] == []


@pytest.mark.parametrize("command", [c for c in NOT_RUN if c.startswith("make ")])
def test_what_is_made_can_be_made(command: str) -> None:
    words = [*shlex.split(command.removesuffix(" ...")), "--dry-run"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_name_of_a_command_is_one() -> None:
    named = {
        name
        for path in TOLD
        for span in spans(path)
        for name in re.findall(r"^rpo-trainer (\w+)$", span)
    }
    assert len(named) > 5 and named <= set(cli.commands)


# Blocks that are not code: diagrams, formulas, tables, a diff
PICTURES = {
    ("README.md", "exact"), ("docs/running.md", "RUN/"), ("docs/architecture.md", "recipe YAML"),
    ("docs/architecture.md", "cli"), ("docs/rpo.md", "implicit reward gap"), ("docs/rpo.md", "dpo: "),
    # The Slurm script is run by test_docs_site.py; Docker and W&B need a service.
    ("docs/clusters.md", "RECIPE=mine.yaml sbatch"), ("docs/clusters.md", "docker build"),
    ("docs/clusters.md", "WANDB_PROJECT="), ("docs/coming-from.md", "-from trl"),
}  # fmt: skip


def test_every_block_is_known() -> None:
    """A block of another kind would not be tested."""
    unknown = []
    for path in TOLD:
        for block in code(path):
            lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
            picture = any(
                (block.page, start) in PICTURES and block.text.strip().startswith(start)
                for _, start in PICTURES
            )
            piece = re.match(r"\w+: [\[{]", block.text)  # of a recipe: test_docs_yaml.py
            all_commands = block.kind == "indented" and len(commands(block)) == len(lines)
            tested = (block.page, block.kind) in {
                ("docs/library.md", "python"), ("docs/getting-started.md", "sh"),
                ("docs/getting-started.md", "json"), ("docs/adding-a-loss.md", "python"),
                ("docs/adding-a-data-format.md", "python"), ("docs/adding-a-verifier.md", "python"),
                ("docs/tutorial.md", "python"), ("README.md", "python"),
                ("docs/rewards.md", "jsonc"), ("docs/data.md", "json"),
            }  # fmt: skip
            if not (picture or piece or all_commands or tested or block.kind == "yaml"):
                unknown.append(block)
    assert unknown == []


def test_no_command_stands_where_it_is_not_found() -> None:
    found = {command for commands_ in pages().values() for command in commands_}
    for path in TOLD:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if re.match(r"\s+```", line)] == []
        for line in lines:
            if re.match(r"\s+(rpo-trainer|torchrun|accelerate launch|deepspeed) ", line):
                start = re.sub(r"\s+(#.*|\\)$", "", line.strip())
                assert any(command.startswith(start) for command in found), line
