from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.counts import DROPS, WARNINGS
from rpo_trainer.errors import RunError
from rpo_trainer.report import build_report
from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.verdict import judge
from tests.raising import raises
from tests.report.conftest import about

Make = Callable[..., Any]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Text, element ids and links; fails on elements that are not closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "srcset", "action"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(run_dir: Path) -> Page:
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_what_was_put_in_is_in_the_page(make_run: Make, make_stage: Make) -> None:
    audit = {
        "read": {"a": 500},
        "dropped": {"tie": {"count": 317, "examples": ["a.jsonl:12"]}},
        "warnings": {"duplicate_prompt": {"count": 23, "examples": ["a.jsonl:7"]}},
    }
    run_dir = make_run(samples={"sft": [{"prompt": "add 2 and 3", "sampled": "6", "reward": 2.5}]})
    words = page_of(run_dir).words()
    for value in ("2.79", "3.41", "3.87", "2.74 to 2.84", "0.600", "1.250", "1:23 min", "3.0 GiB"):
        assert value in words
    for value in ("sftdata01234", "dpoout012345", "add 2 and 3", "(2.50)", "passed", "1,234"):
        assert value in words

    other = [make_stage("dpo", "dpo", data={"fingerprint": "f" * 32, "audit": audit})]
    (run_dir / "chain.json").write_text(json.dumps({"stages": other}), encoding="utf-8")
    words = page_of(run_dir).words()
    assert f"dpo {DROPS['tie']} such as a.jsonl:12 317" in words
    assert f"{WARNINGS['duplicate_prompt']} such as a.jsonl:7 23" in words


def test_the_verdict_comes_first(make_run: Make, make_preference_rows: Make) -> None:
    run_dir = make_run(metrics=make_preference_rows("dpo", delta=-8.0, rejected=-12.0))
    words, run = page_of(run_dir).words(), collect_run(run_dir)
    verdict = words.index(judge(run).headline)
    decline = words.index(about(run, "dpo", "likelihood-decline").text)
    assert verdict < decline < words.index("All stages") < words.index("Chain 1.")
    assert "1 finding needs attention" in words


def test_lineage_names_seed_and_reference(make_run: Make, make_stage: Make) -> None:
    stages = [
        make_stage("a", "sft", init="model"),
        make_stage("b", "dpo", init="previous", reference="init"),
        make_stage("c", "rpo", init="b", reference="a"),
    ]
    words = page_of(make_run(stages=stages, metrics=[])).words()
    assert "1. a sft state done starts from the model data" in words
    assert "2. b dpo state done starts from a reference a" in words
    assert "3. c rpo state done starts from b reference a" in words


def test_data_files_are_in_the_lineage_with_their_hashes(make_run: Make, make_stage: Make) -> None:
    sources = {"rows.jsonl": "0123456789abcdef" * 2}
    run_dir = make_run(stages=[make_stage("a", "sft", init="model", sources=sources)], metrics=[])
    assert "file rows.jsonl 0123456789ab" in page_of(run_dir).words()
    assert sources["rows.jsonl"] in (run_dir / "report.html").read_text(encoding="utf-8")


def test_samples_of_all_stages_stand_together(make_run: Make) -> None:
    def answer(greedy: str) -> list[dict[str, Any]]:
        row = {"prompt": "reverse abc", "ground_truth": "cba", "greedy": greedy, "greedy_reward": 5}
        return [row | {"sampled": "cab", "reward": 1.5}]

    run_dir = make_run(samples={"sft": answer("acb"), "rpo-1": answer("cba")})
    words = page_of(run_dir).words()
    assert (
        "known answer: cba after greedy sampled mean reward sft acb (5.00) cab (1.50) 1.50 rpo-1 cba"
        in words
    )
    markup = (run_dir / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="text right">([^<]*)<', markup) == ["cba"]


def test_samples_from_before_the_run_come_first(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    row = {"prompt": "reverse abc", "ground_truth": "cba", "greedy": "acb", "greedy_reward": 2}
    stages = [
        make_stage(
            name,
            "dpo",
            eval={
                **make_evaluation(2.0),
                "baseline": "model",
                "of_baseline": make_evaluation(1.5),
            },
        )
        for name in ("dpo", "more")
    ]
    run_dir = make_run(stages=stages, metrics=[], samples={"dpo": [row], "more": [row]})
    for name in ("dpo", "more"):  # the same answers: shown once
        text = json.dumps({**row, "greedy": "zzz"}) + "\n"
        (run_dir / name / "baseline-samples.jsonl").write_text(text)
    words = page_of(run_dir).words()
    assert "model, before" in words and "1.50" in words  # in the table, without a link
    assert "mean reward model, before zzz (2.00) – – dpo acb (2.00)" in words
    assert words.count("zzz") == 1


def test_row_text_is_escaped(make_run: Make, make_stage: Make) -> None:
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}\ud800"
    stage = make_stage(
        "sft", "sft", data={"audit": {"remarks": [nasty], "dropped": {nasty: {"count": 3}}}}
    )
    run_dir = make_run(
        stages=[stage],
        samples={"sft": [{"prompt": nasty, "ground_truth": nasty, "greedy": nasty}]},
    )
    page = page_of(run_dir)
    assert page.tags.count("script") == 1  # that of the sample browser
    assert "img" not in page.tags
    assert "<script>alert(1)</script>" in page.words()
    assert "{{ 7 * 7 }}" in page.words()


def test_the_page_needs_nothing_from_elsewhere(make_run: Make) -> None:
    gaps = [{"id": str(n), "implicit_gap": n / 10, "target_gap": n / 20} for n in range(30)]
    run_dir = make_run(gaps={"rpo-1": gaps}, samples={"sft": [{"prompt": "a", "sampled": "b"}]})
    page = page_of(run_dir)
    markup = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "http" not in markup
    assert "@import" not in markup
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    assert page.tags.count("script") == 1 and "<script src" not in markup
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|WebSocket|sendBeacon)\b", markup)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert str(run_dir.parent) not in markup  # a run can be moved, and shared
    assert "prefers-color-scheme: dark" in markup
    assert 'name="viewport"' in markup


def test_a_sent_report_has_no_absolute_path_and_no_user_name(
    make_run: Make, make_stage: Make
) -> None:
    home = "/home/jdoe/projects/secret"
    audit = {
        "dropped": {"tie": {"count": 9, "examples": [f"{home}/rows.jsonl:3"]}},
        "remarks": [f"{home}/rows.jsonl has no rewards"],
        "unread_columns": {f"{home}/rows.jsonl": ["a"]},
    }
    stage = make_stage(
        "sft", "sft", init=f"{home}/model", sources={f"{home}/rows.jsonl": "ab" * 16},
        data={"audit": audit}, hub={"repo": "me/it", "error": f"cannot read {home}/token"},
    )  # fmt: skip
    run_dir = make_run(stages=[stage], metrics=[])
    recipe = (
        f"run_dir: {run_dir}\nmodel: {{name_or_path: {home}/model}}\nother: C:\\Users\\jdoe\\x\n"
    )
    (run_dir / "recipe.yaml").write_text(recipe)
    build_report(run_dir)
    markup = (run_dir / "report.html").read_text()
    for part in ("jdoe", "secret", str(run_dir), str(run_dir.parent)):
        assert part not in markup
    assert "…/rows.jsonl:3" in markup and "…/model" in markup and "run_dir: ." in markup


def test_the_system_panel_groups_stages(make_run: Make, make_stage: Make) -> None:
    gpu = {
        "devices": {"NVIDIA H100": 8}, "launcher": "torchrun", "world_size": 8,
        "precision": "bfloat16", "engine": "FSDP", "libraries": {"torch": "2.9.0"},
    }  # fmt: skip
    cpu = {"devices": {"CPU": 1}, "launcher": "rpo-trainer", "world_size": 1, "cores": 1}
    stages = [
        make_stage("sft", "sft", system=gpu),
        make_stage("dpo", "dpo", system=gpu),
        make_stage("rpo", "rpo", system=cpu),
    ]
    words = page_of(make_run(stages=stages, metrics=[])).words()
    panel = words[words.index("System sft, dpo") :]
    for text in ("8 × NVIDIA H100", "torchrun", "processes 8", "bfloat16", "FSDP", "torch 2.9.0"):
        assert text in panel[: panel.index("rpo devices")]
    assert "1 × CPU" in panel and "total time 4:09 min" in panel and "3.0 GiB" in panel


def test_without_a_system_record_there_is_no_panel(make_run: Make) -> None:
    assert "System" not in page_of(make_run()).words()


def test_every_color_of_the_figures_is_defined(make_run: Make) -> None:
    markup = build_report(make_run()).read_text(encoding="utf-8")
    used, defined = set(re.findall(r"var\((--\w+)\)", markup)), set(re.findall(r"(--\w+):", markup))
    assert used <= defined


def test_an_unfinished_run_has_a_report(make_run: Make, make_stage: Make) -> None:
    stages = [
        make_stage("sft", "sft", init="model", state="running", seconds=None, data={}, output=None),
        {"name": "dpo", "kind": "dpo", "state": "pending"},
    ]
    run_dir = make_run(stages=stages, metrics=[])
    words, run = page_of(run_dir).words(), collect_run(run_dir)
    assert judge(run).headline in words and "0 of 2" in words
    assert about(run, "dpo", "not-started").text in words
    assert "sft running" in words


@pytest.mark.parametrize("missing", ["chain.json", "metrics.jsonl", "recipe.yaml"])
def test_a_missing_file_is_named(make_run: Make, missing: str) -> None:
    run_dir = make_run()
    (run_dir / missing).unlink()
    assert f"{missing} is missing" in page_of(run_dir).words()


def test_a_run_without_stages_has_a_report(make_run: Make) -> None:
    run_dir = make_run(stages=[], metrics=[])
    headline = judge(collect_run(run_dir)).headline
    assert headline and headline in page_of(run_dir).words()


def test_it_is_written_again_and_leaves_nothing_else(make_run: Make) -> None:
    run_dir = make_run()
    before = set(run_dir.rglob("*"))
    build_report(run_dir)
    build_report(run_dir)
    assert set(run_dir.rglob("*")) - before == {run_dir / "report.html"}


def test_without_the_extra_it_says_what_to_install(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rpo_trainer.report.html", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with raises("report.missing-library", RunError) as error:
        build_report(make_run())
    assert "jinja2" in error.value.what and "rpo-trainer[report]" in str(error.value.fix)
