"""Names on the hub and misspelled paths; a hub that does not answer costs one short request."""

from __future__ import annotations

import logging
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rpo_trainer.runtime import hub_access
from rpo_trainer.runtime.hub_access import hub_answers, is_hub_name


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to the hub are allowed, and nothing has been logged yet."""
    hub_access._log_request.cache_clear()
    hub_access._warn_no_answer.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    "name",
    [
        "./data", "../data", "/data", "~/data", ".", "a/b/c", "a//b", "a/", "a\\b", "a b", "a..b", "-a",
        "daten/süß", "a" * 200, "",
    ],
)  # fmt: skip
def test_some_paths_are_not_names_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)


@pytest.mark.parametrize("name", ["gpt2", "someone/data", "some.one/da_ta-1.5", "data/prefs"])
def test_other_names_may_be_on_the_hub(name: str) -> None:
    assert is_hub_name(name)


class Refused(HfHubHTTPError):
    def __init__(self) -> None:
        Exception.__init__(self, "no access")


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        (True, True), (False, True), (Refused(), True), (HFValidationError("no name"), True),
        (ConnectionError("no network"), False), (TimeoutError("too slow"), False),
    ],
)  # fmt: skip
def test_the_hub_gets_one_request_that_is_logged_once(
    answer: bool | Exception,
    answers: bool,
    online: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def file_exists(self: Any, name: str, file: str, *, repo_type: str, revision: Any) -> bool:
        requests.append((name, repo_type, revision))
        if isinstance(answer, Exception):
            raise answer
        return answer

    requests: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", file_exists)
    caplog.set_level(logging.INFO, "rpo_trainer")
    for _ in range(2):
        assert hub_answers("some/data", "dataset", "v1") is answers
    assert requests == [("some/data", "dataset", "v1")] * 2
    line, *warnings = caplog.records
    assert "some/data" in line.message and line.levelname == "INFO"
    assert [one.levelname for one in warnings] == ([] if answers else ["WARNING"])


def test_offline_there_is_no_request(
    online: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def file_exists(*_: Any, **__: Any) -> bool:
        raise AssertionError("requested")

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", file_exists)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    caplog.set_level(logging.INFO, "rpo_trainer")
    assert not hub_answers("some/model", "model")
    assert caplog.messages == []
