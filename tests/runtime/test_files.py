"""Files are complete or absent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from rpo_trainer.runtime.files import atomic_write, file_digest, tree_digest


def test_a_text_and_its_pieces_make_the_same_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a", "β\nη\n")
    atomic_write(tmp_path / "b", (line for line in ("β\n", "η\n")))
    assert (tmp_path / "new" / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "b").read_text(encoding="utf-8") == "β\nη\n"


def test_what_breaks_on_the_way_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        yield "new"
        raise ValueError("no more")

    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ValueError, match="no more"):
        atomic_write(path, pieces())
    assert path.read_text() == "old"


def test_the_digest_is_of_the_whole_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * (5 * 2**22 // 512)  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == xxhash.xxh3_128_hexdigest(content)


def test_scoring_by_a_text_verifier_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "ground_truth": "b"}\n')
    code = (
        "import sys\n"
        "from rpo_trainer.cli import commands as cli\n"
        "try:\n"
        "    cli.main(['score', 'rows.jsonl', '-o', 'out.jsonl', '--verifier', 'exact'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out.jsonl").is_file()


def test_the_digest_of_a_tree_is_of_names_and_contents(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return tree_digest(tmp_path / name, file_digest)

    first = tree("a", {"x": "1", "sub/y": "2"})
    assert first == tree("b", {"sub/y": "2", "x": "1"})
    others = [
        {"x": "1", "sub/y": "3"},
        {"x": "1", "sub/z": "2"},
        {"x": "1"},
        {"x": "12", "sub/y": ""},
    ]
    assert len({first, *(tree(f"c{i}", files) for i, files in enumerate(others))}) == 5
