"""General forms of rules on several fields of a part, and their errors.

A rule reads the raw mapping before validation, so that its errors are reported together with those of
types and ranges; it skips values of a wrong type. It yields a pydantic error located at a key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

from pydantic_core import InitErrorDetails, PydanticCustomError

Raw: TypeAlias = Mapping[str, Any]
Errors: TypeAlias = Iterator[InitErrorDetails]
Rule: TypeAlias = Callable[[Raw], Errors]
At: TypeAlias = tuple[str | int, ...]

CUSTOM = "recipe_rule"  # pydantic error type of errors of this package
LARGEST = 2**31 - 1  # a larger number is a mistake

NOT_CONVERTED = "values are not converted from one type to another"
NOT_READ = "the setting would have no effect"
KEEP_ONE = "keep one of the two"


def wrong_value(
    what: str, fix: str, why: str | None = NOT_CONVERTED, *, code: str
) -> PydanticCustomError:
    """Return a pydantic error with code, what, why and fix."""
    context = {"what": what, "fix": fix, "why": why, "code": code}
    return PydanticCustomError(CUSTOM, "{what}; {fix}", context)


def wrong(at: At, what: str, *, code: str, why: str, fix: str) -> InitErrorDetails:
    """Return the error of a rule, at the key `at` below the part."""
    return InitErrorDetails(type=wrong_value(what, fix, why, code=code), loc=at, input=None)


def unread(at: At, what: str, fix: str | None = None, why: str = NOT_READ) -> InitErrorDetails:
    """Return the error of a field that has no effect with the values of other fields."""
    return wrong(at, what, code="recipe.unused-field", why=why, fix=fix or f"remove `{at[-1]}`")


def given(raw: Raw, fields: Collection[str]) -> list[str]:
    """Return the fields that have a value; an empty list does not count."""
    return [field for field in fields if raw.get(field) not in (None, [])]


def is_mapping(value: object) -> bool:
    """Whether the value is a mapping."""
    return isinstance(value, dict)


def short(number: float) -> str:
    """Format a number without a trailing `.0`."""
    return str(int(number)) if float(number).is_integer() else str(number)


def is_number(value: object) -> bool:
    """Whether the value is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def at_most_one(*fields: str, both: str, why: str) -> Rule:
    """Make a rule: at most one of the fields.

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
    """Make a rule: at least one of the fields, else the error `none`.

    Args:
        of_lists: an empty list counts as absent.
    """

    def rule(raw: Raw) -> Errors:
        if all(raw.get(field) is None or (of_lists and not raw[field]) for field in fields):
            yield wrong(at, none, code="recipe.missing-field", why=why, fix=fix)

    return rule


def exactly_one(first: str, second: str, owner: str) -> tuple[Rule, Rule]:
    """Make the rules for two alternative sources of something, of which exactly one is required."""
    return (
        at_most_one(
            first, second,
            both=f"{owner} has both `{{first}}` and `{{other}}`",
            why="they are alternatives",
        ),
        at_least_one(
            first, second,
            at=(first,),
            none=f"{owner} requires `{first}` or `{second}`",
            why="one of them is required",
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
    """Make a rule: a field requires at least one of the others.

    Args:
        what: the error; by default "`field` without `other`".
        when: selects the values for which the rule holds.
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
    """Make a rule: fields that have an effect with some of several alternatives only.

    Args:
        alternatives: fields of which exactly one is set.
        owners: for each field, the alternatives with which it has an effect.
        what: the error, with `{field}`, `{owners}` and `{given}`.
        fixes: the fix by field; by default to remove the field.
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
    """Yield errors for integers above `LARGEST`.

    Args:
        bounded: fields with an upper bound, which are skipped.
    """
    for key, value in raw.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if is_integer and value > LARGEST and key not in bounded:
            yield wrong(
                (key,),
                f"must be at most {LARGEST}",
                code="recipe.out-of-range",
                why="it would exceed the memory, or take too long",
                fix="write a smaller number",
            )
