"""A custom data set with `len()` and integer indexing, such as a `torch.utils.data.Dataset`.

It is read once, before training. Rows are dicts in any format of `docs/data.md`, or tokenized (`prompt_ids`,
`response_ids`, `response_mask`). Streams (`IterableDataset`, generators) are refused: an epoch is a
permutation of the rows, which a resumed run must reproduce. `datasets.Dataset.from_generator` stores a stream
on disk.

    python examples/own_dataset.py
"""

from __future__ import annotations

import sqlite3
from typing import Any

from tiny import ROWS, SETTINGS, TOKENIZER, model
from torch.utils.data import Dataset

from rpo_trainer import RPOConfig, RPOTrainer


class Comparisons(Dataset[dict[str, Any]]):
    """Rated pairs in a database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __len__(self) -> int:
        (count,) = self.connection.execute("SELECT count(*) FROM pairs").fetchone()
        return int(count)

    def __getitem__(self, number: int) -> dict[str, Any]:
        query = "SELECT prompt, good, good_score, bad, bad_score FROM pairs WHERE rowid = ?"
        prompt, good, good_score, bad, bad_score = self.connection.execute(
            query, (number + 1,)
        ).fetchone()
        return {
            "prompt": prompt,
            "chosen": good,
            "chosen_reward": good_score,
            "rejected": bad,
            "rejected_reward": bad_score,
        }


connection = sqlite3.connect(":memory:")
connection.execute("CREATE TABLE pairs (prompt, good, good_score, bad, bad_score)")
connection.executemany(
    "INSERT INTO pairs VALUES (:prompt, :chosen, :chosen_reward, :rejected, :rejected_reward)", ROWS
)

args = RPOConfig(**SETTINGS, beta=0.5)
trainer = RPOTrainer(
    model(), args=args, train_dataset=Comparisons(connection), processing_class=TOKENIZER
)
trainer.train()
print(trainer.audits["train"].summary_lines())
