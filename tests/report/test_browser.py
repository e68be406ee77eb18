"""The report in headless Chromium: no part is empty, overlapping or clipped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.report import build_report

pytestmark = [pytest.mark.slow, pytest.mark.extras("playwright")]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOOK = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")
SIZES = [("phone", 390, 844), ("desk", 1280, 900)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = found or (own if Path(own).is_file() else None)
        if path is None:
            pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def full_run(make_run: Callable[..., Path], make_stage: Any, make_evaluation: Any) -> Path:
    """Everything that a report can show, with names and texts of unusual lengths."""
    audit = {
        "read": {"a": 500},
        "dropped": {"tie": {"count": 317, "examples": ["a-rather-long-file-name.jsonl:12"]}},
        "warnings": {"duplicate_prompt": {"count": 23, "examples": ["a.jsonl:7", "a.jsonl:8"]}},
        "remarks": ["a remark about the lengths of both responses"],
    }
    more: dict[str, Any] = {
        "baseline": "general-sft",
        "scorer": "verifier partial_match",
        "win_rate": {"value": 0.62, "low": 0.58, "high": 0.66},
        "preferences": {"pairs": 50, "ranked": {"value": 0.7, "low": 0.6, "high": 0.8}},
        "nll_by_source": {"some_held_out_file.jsonl": {"value": 1.5, "low": 1.4, "high": 1.6}},
        "lm_eval": {"gsm8k": {"exact_match (flexible-extract)": {"value": 0.5}}},
    }
    names = ["code-sft", "general-sft", "dpo", "rpo-1", "rpo-2", "rpo-3"]
    kinds = ["sft", "sft", "dpo", "rpo", "rpo", "rpo"]
    warning = {
        "name": "margins_exploding", "step": 20, "text": "its implicit gap of 12.5 grows",
        "advice": "a lower learning_rate, a larger beta (0.1 now), or fewer steps",
    }  # fmt: skip
    stages = [
        make_stage(
            name,
            kind,
            init="model" if i == 0 else "previous",
            data={"fingerprint": f"{i}" * 32, "audit": audit},
            sources={"../data/a_file_whose_name_has_no_end_or_nearly_none.jsonl": "abcd" * 8},
            eval={**make_evaluation(2.0 + i / 4), **(more if kind != "sft" else {})},
            warnings=[warning] if kind == "rpo" else [],
        )
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    metrics: list[dict[str, Any]] = []
    for name, kind in zip(names, kinds, strict=True):
        for step in range(1, 241):
            wave = math.sin(step / 3) / 10
            row = {"stage": name, "step": step, "loss": 3 / step + wave + 1, "grad_norm": 1 + wave}
            row["learning_rate"] = 1e-5 * step / 240
            if kind != "sft":
                row |= {
                    "loss/preference": 0.6 + wave, "loss/sft": 20 + wave,
                    "rewards/margins": step / 100 + wave, "rewards/accuracies": 0.7 + wave,
                    "rewards/chosen": wave, "rewards/rejected": wave - step / 100,
                    "logps/chosen": -20.0, "logps/chosen_delta": -step / 20,
                    "logps/rejected_delta": -step / 10, "logps/chosen_falling": 0.5 + wave,
                }  # fmt: skip
            if kind == "rpo":
                row |= {"rewards/target_gap": 2 + wave}
            metrics.append(row)
    gaps = [
        {"id": str(n), "implicit_gap": math.sin(n) * 3, "target_gap": math.cos(n) * 4}
        for n in range(300)
    ]
    long = "https://example.org/" + "x" * 200
    prompt = {"prompt": f"Reverse the letters of {long}", "ground_truth": long[::-1]}
    samples = [
        {**prompt, "greedy": "abc " * 60, "greedy_reward": 2, "sampled": long, "reward": 1.5},
        {"prompt": "2 + 2 = ", "ground_truth": "4", "greedy": "4", "sampled": "5", "reward": 0.0},
    ]
    run = make_run(
        stages=stages,
        metrics=metrics,
        gaps=dict.fromkeys(names[2:], gaps),
        samples=dict.fromkeys(names[1:], samples),
    )
    recipe = "model: {tokenizer: characters}\nstages:\n" + "".join(
        f"  - {{name: {name}, kind: {kind}, beta: 0.5, sft_loss_weight: 0.005, learning_rate: 3e-5}}\n"
        for name, kind in zip(names, kinds, strict=True)
    )
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return run


@pytest.fixture
def page_of(browser: Any) -> Iterator[Callable[..., Any]]:
    opened = []

    def show(report: Path, width: int, height: int, scheme: str) -> Any:
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        opened.append(page)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.resolve().as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert asked == [report.resolve().as_uri()]  # one file, which loads nothing else
        return page

    yield show
    for page in opened:
        page.close()


def test_nothing_is_empty_overlapping_or_cut_off(
    make_run: Any, make_stage: Any, make_evaluation: Any, page_of: Any
) -> None:
    report = build_report(full_run(make_run, make_stage, make_evaluation))
    for name, width, height in SIZES:
        for scheme in ("light", "dark"):
            found = page_of(report, width, height, scheme).evaluate(LOOK)
            assert found.pop("figures") >= 40
            assert found.pop("texts") >= 500
            dark = found.pop("background") < 0.2
            assert dark is (scheme == "dark")
            assert found.pop("contrast") >= 4.5, f"{name}, {scheme}: text is hard to read"
            problems = {what: where for what, where in found.items() if where}
            assert problems == {}, f"{name}, {scheme}:\n{json.dumps(problems, indent=1)}"


def test_the_look_finds_what_it_looks_for(make_run: Any, page_of: Any) -> None:
    page = page_of(build_report(make_run()), 390, 844, "light")
    assert page.evaluate(LOOK)["overlapping"] == []
    page.evaluate(
        """() => {
          const card = document.querySelector('.card');
          card.insertAdjacentHTML('beforeend', '<p style="margin-top:-3rem">over it</p>');
          card.insertAdjacentHTML('beforeend', '<p></p>');
          card.insertAdjacentHTML('beforeend', '<div style="width:900px">wide</div>');
          const svg = document.querySelector('svg');
          const label = svg.querySelector('text');
          const copy = label.cloneNode(true);
          label.parentNode.appendChild(copy);
          svg.insertAdjacentHTML('beforeend', '<text x="-30" y="20">cut</text>');
          document.querySelectorAll('svg')[1].innerHTML = '';
        }"""
    )
    found = page.evaluate(LOOK)
    assert any("over it" in line for line in found["overlapping"])
    assert found["empty"] != [] and found["wide"] != []
    assert any("cut" in line for line in found["cut"])
    assert len(found["overlapping_labels"]) >= 1
    assert len(found["empty"]) >= 2  # the paragraph and the figure


SAMPLES = {
    "sft": [
        {"prompt": f"prompt {n}", "sampled": f"first {n}", "reward": float(n % 7)}
        for n in range(60)
    ],
    "rpo-1": [{"prompt": f"prompt {n}", "sampled": f"later {n}", "reward": 3.0} for n in range(60)],
}
VISIBLE = """() => [...document.querySelectorAll('.sample')].filter((e) => e.checkVisibility())
  .map((e) => [e.querySelector('.change').textContent, e.querySelector('summary .text').textContent])"""


def test_samples_are_searched_and_ordered(make_run: Any, page_of: Any) -> None:
    page = page_of(build_report(make_run(samples=SAMPLES)), 1280, 900, "light")
    shown = page.evaluate(VISIBLE)
    assert len(shown) == 40 and shown[0] == ["−3.00", "prompt 6"]  # 3 − 6
    page.click("#more")
    assert len(page.evaluate(VISIBLE)) == 60
    page.select_option("#order", "better")
    assert page.evaluate(VISIBLE)[0] == ["+3.00", "prompt 0"]
    page.select_option("#order", "given")
    assert [text for _, text in page.evaluate(VISIBLE)][:3] == ["prompt 0", "prompt 1", "prompt 2"]
    page.select_option("#from", label="rpo-1")
    page.select_option("#order", "worse")
    assert {change for change, _ in page.evaluate(VISIBLE)} == {"0.00"}
    page.fill("#search", "LATER 17")  # in a response, in any case
    assert [text for _, text in page.evaluate(VISIBLE)] == ["prompt 17"]
    assert page.inner_text("#count") == "1 of 60 prompts"


def test_without_scripts_the_samples_are_a_plain_list(make_run: Any, browser: Any) -> None:
    report = build_report(make_run(samples=SAMPLES))
    page = browser.new_context(java_script_enabled=False, offline=True).new_page()
    page.goto(report.resolve().as_uri())
    assert page.locator(".sample").count() == 60 and page.locator("#search").is_hidden()
    assert page.locator(".sample summary").first.inner_text().split()[-2:] == ["prompt", "6"]
    page.locator(".sample summary").nth(50).click()
    assert page.locator(".sample").nth(50).locator(".answers").is_visible()
    page.context.close()


def test_on_a_phone_tables_scroll_and_their_first_column_stays(
    make_run: Any, make_stage: Any, make_evaluation: Any, page_of: Any
) -> None:
    page = page_of(build_report(full_run(make_run, make_stage, make_evaluation)), 390, 844, "light")
    tables = page.evaluate(
        """() => [...document.querySelectorAll('.scroll')].map((box) => {
          const first = box.querySelector('td'), second = first.nextElementSibling;
          const left = (cell) => cell.getBoundingClientRect().left;
          const before = [left(first), left(second)];
          box.scrollLeft = 60;
          return {
            scrolls: box.scrollWidth > box.clientWidth,
            first: left(first) - before[0],
            second: left(second) - before[1],
            width: first.getBoundingClientRect().width / box.clientWidth,
          };
        })"""
    )
    assert len(tables) == 3
    for table in tables:
        assert table["scrolls"] and table["first"] == 0 and table["second"] < 0
        assert table["width"] < 0.45
