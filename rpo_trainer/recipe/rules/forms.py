"""How a rule on several fields of a part is stated, and the error that it gives.

A rule reads the raw mapping, before validation, so that it is reported beside wrong types and ranges; a
value of a wrong type is left to its field's own error. It yields a pydantic error at the key to go to.
The models of the schema list their rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

from pydantic_core import InitErrorDetails, PydanticCustomError

Raw: TypeAlias = Mapping[str, Any]
Errors: TypeAlias = Iterator[InitErrorDetails]
Rule: TypeAlias = Callable[[Raw], Errors]
At: TypeAlias = tuple[str | int, ...]

CUSTOM = "recipe_rule"  # the error type of what pydantic has no type for
LARGEST = 2**31 - 1  # a larger number is a mistake: it would take all memory, or never end

NOT_CONVERTED = "what is written is taken as it is, and never converted"
NOT_READ = "nothing would read it"
KEEP_ONE = "keep one of the two"


def wrong_value(
    what: str, fix: str, why: str | None = NOT_CONVERTED, *, code: str
) -> PydanticCustomError:
    """An error that keeps code, what, why and fix apart."""
    context = {"what": what, "fix": fix, "why": why, "code": code}
    return PydanticCustomError(CUSTOM, "{what}; {fix}", context)


def wrong(at: At, what: str, *, code: str, why: str, fix: str) -> InitErrorDetails:
    """The same for a rule, at the key `at` below the part."""
    return InitErrorDetails(type=wrong_value(what, fix, why, code=code), loc=at, input=None)


def unread(at: At, what: str, fix: str | None = None, why: str = NOT_READ) -> InitErrorDetails:
    """The error of a field that has no effect beside the others."""
    return wrong(at, what, code="recipe.unused-field", why=why, fix=fix or f"remove `{at[-1]}`")


def given(raw: Raw, fields: Collection[str]) -> list[str]:
    """Those of the fields that have a value; an empty list is none."""
    return [field for field in fields if raw.get(field) not in (None, [])]


def is_mapping(value: object) -> bool:
    """Whether the value is a mapping; another one is left to its field's own error."""
    return isinstance(value, dict)


def short(number: float) -> str:
    """A number as people write it: without `.0`."""
    return str(int(number)) if float(number).is_integer() else str(number)


def is_number(value: object) -> bool:
    """Whether the value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def at_most_one(*fields: str, both: str, why: str) -> Rule:
    """Fields that exclude each other.

    Args:
        both: the error, with `{first}` and `{other}`.
    """

    def rule(raw: Raw) -> Errors:
        there = given(raw, fields)
        for other in there[1:]:
            what = both.format(first=there[0], other=other)
            yield wrong((other,), what, code="recipe.conflicting-fields", why=why, fix=KEEP_ONE)

    return rule


def at_least_one(
    *fields: str, at: At, none: str, why: str, fix: str, of_lists: bool = False
) -> Rule:
    """Fields of which one must be given, else the error `none`.

    Args:
        of_lists: an empty list counts as absent.
    """

    def rule(raw: Raw) -> Errors:
        if all(raw.get(field) is None or (of_lists and not raw[field]) for field in fields):
            yield wrong(at, none, code="recipe.missing-field", why=why, fix=fix)

    return rule


def exactly_one(first: str, second: str, owner: str) -> tuple[Rule, Rule]:
    """One of two fields, which say where something comes from."""
    return (
        at_most_one(
            first, second,
            both=f"{owner} has both `{{first}}` and `{{other}}`",
            why="which of the two is meant cannot be guessed",
        ),
        at_least_one(
            first, second,
            at=(first,),
            none=f"{owner} needs `{first}` or `{second}`",
            why="nothing says where it comes from",
            fix=f"add `{first}: ...` or `{second}: ...`",
        ),
    )  # fmt: skip


def requires(
    field: str,
    *others: str,
    why: str,
    fix: str,
    what: str | None = None,
    when: Callable[[Any], bool] = lambda value: True,
) -> Rule:
    """A field that needs one of others beside it.

    Args:
        what: the error, if not `field` without the first of the others.
        when: the values that need it.
    """

    def rule(raw: Raw) -> Errors:
        if given(raw, [field]) and when(raw[field]) and not given(raw, others):
            text = what or f"`{field}` without `{others[0]}`"
            yield wrong((field,), text, code="recipe.missing-companion", why=why, fix=fix)

    return rule


def belongs(
    alternatives: Collection[str],
    owners: Mapping[str, tuple[str, ...]],
    what: str,
    fixes: Mapping[str, str] | None = None,
) -> Rule:
    """Fields that have an effect only beside the alternative that they belong to.

    Args:
        alternatives: fields of which one is given.
        owners: the alternatives that each field belongs to.
        what: the error, with `{field}`, `{owners}` and `{given}`.
        fixes: what to do, if not to remove the field.
    """

    def rule(raw: Raw) -> Errors:
        chosen = given(raw, alternatives)
        for field in given(raw, owners) if len(chosen) == 1 else ():
            if raw[field] is not False and chosen[0] not in owners[field]:
                names = "` or `".join(owners[field])
                text = what.format(field=field, owners=names, given=chosen[0])
                yield unread((field,), text, (fixes or {}).get(field))

    return rule


def sizes(raw: Raw, bounded: Collection[str]) -> Errors:
    """Whole numbers above `LARGEST`.

    Args:
        bounded: fields whose own upper bound says so.
    """
    for key, value in raw.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and value > LARGEST and key not in bounded:
            yield wrong(
                (key,),
                f"must be at most {LARGEST}",
                code="recipe.out-of-range",
                why="what it asks for would take all memory, or never end",
                fix="write a smaller number",
            )
