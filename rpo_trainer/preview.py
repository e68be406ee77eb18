"""Examples as the model will get them: every token, coloured by whether it is trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rpo_trainer.chain.data import needs_policy, rows_by_stage, stage_seed, tokenize_stage
from rpo_trainer.chain.made import load_prompts, prompt_ids
from rpo_trainer.chain.places import placed
from rpo_trainer.data import Audit
from rpo_trainer.data.counts import DROPS
from rpo_trainer.data.rows import row_texts
from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.loading import load_tokenizer
from rpo_trainer.recipe import LoadedRecipe, Stage, expand_stages

Row = dict[str, Any]

PROMPT, UNTRAINED, LOST = "cyan", "yellow", "red strike"
# Neighbouring tokens differ in shade, so that their borders are seen.
TRAINED = ("black on green", "black on bright_green")
# The same for a terminal without colours, and for files.
_MARKS = {PROMPT: ("", ""), UNTRAINED: ("", ""), LOST: ("⟨", "⟩"), TRAINED[0]: ("[", "]")}
# Around a special token: its name in the data, read as text, looks the same but for them.
SPECIAL = ("⟦", "⟧")
_SHOWN = 400  # tokens of a prompt or a response; of a longer one both ends
_LONG = 2**30  # tokens: longer than any text
_CONTEXT = 4  # tokens decoded in front of one, since some tokenizers join words by what precedes
_JOINERS = "\u200c\u200d"  # parts of emoji and of words


def preview(
    loaded: LoadedRecipe, count: int, *, stage: str | None = None, colours: bool = True
) -> Iterator[Text]:
    """Some examples of each stage, evenly spread over its rows, and the longest one.

    Args:
        count: examples of a stage; the longest comes on top.
        stage: its name; None: all. A stage with the data of one before it is only named.
        colours: else marks in the text: `[trained]`, `⟨lost to max_length⟩`.

    Raises:
        RecipeError: no such stage.
        DataError, ModelError, Problems: of its data or tokenizer.
    """
    with placed(loaded.origins):
        shown = _Preview(loaded, colours)
    names = [each.name for each in shown.stages]
    if stage is not None and stage not in names:
        raise RecipeError(
            f"there is no stage {stage!r}",
            where=str(loaded.path),
            why="it is not taken for another; the rounds of a repeated stage have numbers (rpo-1, rpo-2)",
            fix=f"one of: {', '.join(names)}",
        )
    yield shown.legend()
    for each in shown.stages:
        if stage in (None, each.name):
            with placed(loaded.origins, f"stages.{each.name}"):
                yield from shown.stage(each, count)


class _Preview:
    def __init__(self, loaded: LoadedRecipe, colours: bool) -> None:
        self.loaded = loaded
        self.colours = colours
        self.stages = expand_stages(loaded.recipe)
        self.rows = rows_by_stage(self.stages, loaded.recipe, loaded.base_dir)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            loaded.recipe.model, loaded.base_dir
        )
        self._seen: dict[str, str] = {}

    def legend(self) -> Text:
        """What the colours mean."""
        line = Text("prompt", PROMPT) if self.colours else Text("prompt as it is")
        names = (("trained", TRAINED[0]), ("response, not trained", UNTRAINED))
        for name, style in (*names, ("lost to max_length", LOST)):
            line.append("   ").append_text(self._styled(name, style))
        opening, closing = SPECIAL
        return line.append(
            f"   {opening}special token{closing}: one token; without the marks, letters"
        )

    def stage(self, stage: Stage, count: int) -> Iterator[Text]:
        """Its head and its examples."""
        yield Text(f"\n{stage.name} ({stage.kind})", "bold")
        data = stage.data.model_dump_json() + stage.kind + str(stage.max_length)
        if (before := self._seen.setdefault(data, stage.name)) != stage.name:
            yield Text(f"the same data as {before}")
            return
        seed = stage_seed(stage, self.loaded.recipe)
        if stage.data.rows_of is not None:
            yield Text(f"the responses of stage {stage.data.rows_of}")
        elif needs_policy(stage.data):
            rows = load_prompts(stage.data, self.loaded.base_dir, seed=seed, audit=Audit())
            yield Text(f"{len(rows):,} prompts; their responses are sampled when the stage runs")
            for row, note in _spread(rows, count):
                yield from self._prompt(row, note)
        else:
            rows = self.rows(stage.name)
            yield Text(f"{len(rows):,} rows, max_length {stage.max_length:,} ({stage.truncation})")
            for row, note in _spread(rows, count):
                yield from self._example(stage, row, note)

    def _prompt(self, row: Row, note: str) -> Iterator[Text]:
        (ids,) = prompt_ids([row], self.tokenizer)
        yield Text(f"\nrow {row['id']}{note}: prompt of {len(ids):,} tokens", "bold")
        yield self._tokens(ids, [PROMPT] * len(ids))

    def _example(self, stage: Stage, row: Row, note: str) -> Iterator[Text]:
        whole, reason = self._tokenised(stage.model_copy(update={"max_length": _LONG}), row)
        if whole is None:
            yield Text(f"\nrow {row['id']}{note}: dropped: {reason}", "bold red")
            yield from (Text(_visible(text)) for text in row_texts(row))
            return
        kept, reason = self._tokenised(stage, row)
        prompt = whole["prompt_ids"]
        yield Text(f"\nrow {row['id']}{note}: prompt of {len(prompt):,} tokens", "bold")
        if kept is None:
            yield Text(f"dropped: {reason}", "bold red")
        yield self._tokens(prompt, _lost_behind([PROMPT] * len(prompt), stage.max_length))
        room = stage.max_length - len(prompt)
        for number, ids in enumerate(whole["response_ids"]):
            mask = whole["response_mask"][number]
            yield Text(_head(whole, number, ids, mask, room), "bold")
            styles = [TRAINED[i % 2] if trained else UNTRAINED for i, trained in enumerate(mask)]
            yield self._tokens(ids, _lost_behind(styles, room))

    def _tokenised(self, stage: Stage, row: Row) -> tuple[Row | None, str]:
        """The example, or why there is none."""
        audit = Audit()
        try:
            return tokenize_stage(stage, [row], self.tokenizer, audit)[0], ""
        except DataError:
            if not audit.dropped:  # a fault, not a row to leave out
                raise
            return None, ", ".join(DROPS[name] for name in audit.dropped)

    def _tokens(self, ids: Sequence[int], styles: Sequence[str]) -> Text:
        """The text of the tokens, each in its style; of many tokens both ends."""
        line = Text()
        half = _SHOWN // 2
        parts = [(0, len(ids))]
        if len(ids) > _SHOWN:
            parts = [(0, half), (len(ids) - half, len(ids))]
        for number, (start, end) in enumerate(parts):
            if number:
                line.append(f" … {len(ids) - 2 * half:,} tokens … ", "dim")
            pieces = self._marked(ids, _pieces(self.tokenizer, ids, start, end))
            for style, text in pieces if self.colours else _runs(pieces, styles):
                line.append_text(self._styled(text, styles[style]))
        return line

    def _marked(self, ids: Sequence[int], pieces: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The pieces with marks around those that are one added token: special ones, and tags."""
        added = self.tokenizer.added_tokens_decoder
        opening, closing = SPECIAL

        def marked(number: int, text: str) -> str:
            token = added.get(ids[number])
            if token is None or not token.content.strip() or token.content not in text:
                return text
            return text.replace(token.content, f"{opening}{token.content}{closing}")

        return [(number, marked(number, text)) for number, text in pieces]

    def _styled(self, text: str, style: str) -> Text:
        if self.colours:
            return Text(_visible(text), style)
        before, behind = _MARKS[TRAINED[0] if style in TRAINED else style]
        return Text(f"{before}{_visible(text)}{behind}")


def _spread(rows: Sequence[Row], count: int) -> Iterator[tuple[Row, str]]:
    """`count` rows at even distances, then the longest with a note, where it is not among them."""
    count = min(count, len(rows))
    chosen = [number * len(rows) // count for number in range(count)] if count else []
    for number in chosen:
        yield rows[number], ""
    longest = max(range(len(rows)), key=lambda i: sum(map(len, row_texts(rows[i]))), default=None)
    if longest is not None and longest not in chosen:
        yield rows[longest], " (the longest)"


def _head(example: Row, number: int, ids: Sequence[int], mask: Sequence[int], room: int) -> str:
    said = f"response {number + 1}: {len(ids):,} tokens, {sum(mask):,} trained"
    if len(ids) > room:
        said += f", {len(ids) - max(room, 0):,} beyond max_length"
    if example["rewards"] is not None:
        said += f", reward {example['rewards'][number]:g}"
    if example.get("attributes"):
        said += f", ratings {example['attributes']}"
    return said


def _lost_behind(styles: list[str], room: int) -> list[str]:
    room = max(room, 0)
    return [*styles[:room], *[LOST] * (len(styles) - room)]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int
) -> list[tuple[int, str]]:
    """Each token's number and its text; the tokens of one character come as one, under the last."""
    found: list[tuple[int, str]] = []
    done = start
    for number in range(start, end):
        first = max(start, done - _CONTEXT)
        before = _decoded(tokenizer, ids[first:done])
        text = _decoded(tokenizer, ids[first : number + 1])[len(before) :]
        if text.endswith("�") and number + 1 < end and number - done < _CONTEXT:
            continue  # the bytes of a character so far
        found.append((number, text))
        done = number + 1
    return found


def _runs(pieces: list[tuple[int, str]], styles: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Neighbours of one meaning joined: marks around every token would hide the text."""
    held: tuple[int, str] | None = None
    for number, text in pieces:
        if held is not None and _meaning(styles[held[0]]) == _meaning(styles[number]):
            held = (held[0], held[1] + text)
            continue
        if held is not None:
            yield held
        held = (number, text)
    if held is not None:
        yield held


def _meaning(style: str) -> str:
    return "trained" if style in TRAINED else style


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def _visible(text: str) -> str:
    """Line ends shown and kept; control characters as their pictures: data must not steer a terminal."""
    shown = []
    for character in text:
        code = ord(character)
        if character == "\n":
            shown.append("↵\n")
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif code == 0x7F:
            shown.append("␡")
        elif unicodedata.category(character) in ("Cc", "Cf") and character not in _JOINERS:
            shown.append(f"\\u{code:04x}")
        else:
            shown.append(character)
    return "".join(shown)
