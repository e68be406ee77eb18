"""The search for private names of other libraries: what it finds, and what it ignores."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest
from transformers import Trainer

from tests.private_names import foreign_in, foreign_in_classes, own_attributes


@pytest.mark.parametrize(
    "source",
    [
        "import torch._x", "from torch._x import y", "from torch import _x", "model._x", "torch.a._x.b()",
        "model._x = 1", "getattr(model, '_x', None)", "'_x' in vars(model)", "make(_x=1)",
        "def _x(): torch._x()", "class A:\n def f(self): return self._x",
    ],
)  # fmt: skip
def test_a_private_name_of_others_is_found(source: str) -> None:
    tree = ast.parse(source)
    assert foreign_in(tree, own_attributes([tree])) == {"_x"}


@pytest.mark.parametrize(
    "source",
    [
        "from rpo_trainer.runtime.files import _x", "_x = 1", "def _x(): return _x()", "model.__dict__",
        "os._exit(1)",
        "class A:\n def _x(self): return self._x", "class A:\n _x: int = 1\nA()._x",
        "class A:\n def f(self): self._x = 1\nA()._x", "name.endswith('_x')", "f'{name}_x'", "model._rpo_x",
    ],
)  # fmt: skip
def test_names_of_our_own_are_left_out(source: str) -> None:
    tree = ast.parse(source)
    assert foreign_in(tree, own_attributes([tree])) == set()


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("def _save(self): ...", {"_save"}),
        ("def _ours(self): self._tr_loss = 0", {"_tr_loss"}),
        ("def save_model(self, output_dir=None, _internal_call=False): ...", {"_internal_call"}),
        ("_train_batch_size = 1", {"_train_batch_size"}),
        ("def _ours(self): return self._ours()", set()),
    ],
)
def test_a_name_of_ours_that_a_base_class_has_is_found(body: str, names: set[str]) -> None:
    tree = ast.parse(f"class Ours(Trainer):\n {body}")
    made = type("Ours", (Trainer,), {"__module__": "rpo_trainer.ours"})
    assert foreign_in_classes(SimpleNamespace(Ours=made), tree) == names
