"""Sample browser of the page: held-out prompts with the responses after each stage, worst change first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rpo_trainer.report.collect import RunResults, StageResults
from rpo_trainer.report.formatting import short, signed
from rpo_trainer.stages.record import SampleRecord

_LONGEST = 4000  # characters of a prompt or response that the page shows


@dataclass(frozen=True)
class Response:
    """A response as text, with its reward; `right`: whether it equals the known answer."""

    text: str
    reward: str
    right: bool


@dataclass(frozen=True)
class Answer:
    """The responses of the policy after one stage to one prompt.

    Attributes:
        reward: mean reward of the sampled responses; None without rewards.
        shown_reward: the same as text.
    """

    stage: str
    greedy: Response
    sampled: Response
    reward: float | None
    shown_reward: str


@dataclass(frozen=True)
class PromptView:
    """A held-out prompt and the answers after each stage, in chain order.

    Attributes:
        change: mean reward after the last stage minus that of the start; None without both.
        shown_change: the same as text.
        rewards: the mean reward after each stage of the browser, for sorting in the page.
    """

    number: int
    prompt: str
    ground_truth: str | None
    answers: list[Answer]
    change: float | None
    shown_change: str
    rewards: str


@dataclass(frozen=True)
class Browser:
    """All prompts in the order "got worse first", and what is compared.

    Attributes:
        stages: names of the stages with samples, in chain order.
        start, end: indices of the stages whose rewards are compared.
        of: number of held-out prompts, if more than the page shows; else None.
    """

    stages: list[str]
    start: int
    end: int
    prompts: list[PromptView]
    of: int | None

    @property
    def scored(self) -> bool:
        """Whether there are rewards to sort by."""
        return any(view.change is not None for view in self.prompts)


def browse_samples(run: RunResults) -> Browser:
    """Collect the samples of all stages by prompt."""
    stages = [stage for stage in run.compared if stage.samples]
    names = [stage.name for stage in stages]
    start, end = _start(run, stages), len(stages) - 1
    found: dict[str, tuple[SampleRecord, dict[str, Answer]]] = {}
    for stage in stages:
        for sample in stage.samples:
            _, answers = found.setdefault(_prompt_text(sample.prompt), (sample, {}))
            answers.setdefault(stage.name, _answer(stage.name, sample))
    views = [
        _view(number, prompt, sample, answers, names, start, end)
        for number, (prompt, (sample, answers)) in enumerate(found.items(), 1)
    ]
    # Without a change to sort by, keep the original order.
    views.sort(key=lambda view: (view.change is None, view.change or 0.0))
    total = max((stage.scores.prompts or 0 for stage in stages), default=0)
    return Browser(names, start, end, views, total if total > len(views) else None)


def _start(run: RunResults, stages: Sequence[StageResults]) -> int:
    """Return the index of the start of the first preference stage, else of the first stage with samples."""
    first = next((stage for stage in run.stages if stage.is_preference), None)
    seed = run.seed(first) if first is not None else None
    names = [stage.name for stage in stages]
    return names.index(seed.name) if seed is not None and seed.name in names else 0


def _view(
    number: int,
    prompt: str,
    sample: SampleRecord,
    answers: dict[str, Answer],
    names: Sequence[str],
    start: int,
    end: int,
) -> PromptView:
    rewards = [answers[name].reward if name in answers else None for name in names]
    change = None
    if start < end and (first := rewards[start]) is not None and (last := rewards[end]) is not None:
        change = last - first
    return PromptView(
        number=number,
        prompt=_capped(prompt),
        ground_truth=sample.ground_truth,
        answers=list(answers.values()),
        change=change,
        shown_change="" if change is None else signed(change) if change else short(change),
        rewards=",".join("" if reward is None else f"{reward:.6g}" for reward in rewards),
    )


def _answer(stage: str, sample: SampleRecord) -> Answer:
    rewards = [reward for reward in sample.rewards or () if reward is not None]
    mean = sum(rewards) / len(rewards) if rewards else sample.reward
    return Answer(
        stage=stage,
        greedy=_response(sample.greedy, sample.greedy_reward, sample.ground_truth),
        sampled=_response(sample.sampled, sample.reward, sample.ground_truth),
        reward=mean,
        shown_reward=short(mean),
    )


def _response(text: str | None, reward: float | None, truth: str | None) -> Response:
    right = bool(truth) and text is not None and text.strip() == str(truth).strip()
    shown = "–" if text is None else _capped(text)
    return Response(shown, "" if reward is None else short(reward), right)


def _capped(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt as text; a conversation has one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in prompt)
