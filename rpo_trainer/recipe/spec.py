"""The base of every model of the recipe schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias

from annotated_types import Le, Lt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe.checks import details_of, size_checks

Text: TypeAlias = Annotated[str, Field(min_length=1)]


class Spec(BaseModel):
    """Base of all models here: strict, frozen, no unknown keys, all errors at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _all_errors(cls, value: Any, handler: ModelWrapValidatorHandler[Spec]) -> Spec:
        """Field and cross-field errors in one exception; pydantic alone stops at the former."""
        if not isinstance(value, dict):
            return handler(value)
        value = cls.prepare(value)
        errors = [*size_checks(value, cls._bounded()), *cls.cross_checks(value)]
        spec = None
        try:
            spec = handler(value)
        except ValidationError as error:
            errors += details_of(error)
        if spec is None or errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return spec

    @classmethod
    def _bounded(cls) -> set[str]:
        """Fields with an upper bound of their own."""
        return {
            name
            for name, field in cls.model_fields.items()
            if any(isinstance(each, Le | Lt) for each in field.metadata)
        }

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The raw mapping with what follows from it filled in, before validation."""
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        """Errors that concern more than one field; `raw` is not validated yet."""
        yield from ()
