"""The base class of the models of the recipe schema, and the types that their fields share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias
from urllib.parse import urlsplit

from annotated_types import Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticKnownError,
    core_schema,
)

from rpo_trainer.losses import losses_of
from rpo_trainer.recipe.rules.forms import CUSTOM, Rule, sizes, wrong_value
from rpo_trainer.redact import redact

Text: TypeAlias = Annotated[str, Field(min_length=1)]


class Spec(BaseModel):
    """Base class: strict, frozen, no unknown keys, all errors at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    rules: ClassVar[tuple[Rule, ...]] = ()  # on more than one field

    @model_validator(mode="wrap")
    @classmethod
    def _all_errors(cls, value: Any, handler: ModelWrapValidatorHandler[Spec]) -> Spec:
        """Report errors of fields and rules in one exception; pydantic alone stops at the fields."""
        if not isinstance(value, dict):
            return handler(value)
        value = cls.prepare(value)
        errors = [*sizes(value, cls._bounded()), *cls.cross_checks(value)]
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
        """Return the fields that have an upper bound."""
        return {
            name
            for name, field in cls.model_fields.items()
            if any(isinstance(each, Le | Lt) for each in field.metadata)
        }

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the raw mapping with derived values filled in, before validation."""
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        """Yield the errors of the rules; `raw` is not validated yet."""
        for rule in cls.rules:
            yield from rule(raw)


def details_of(error: ValidationError) -> list[InitErrorDetails]:
    """Return the errors of an exception in the form that a new exception is made from."""
    details = []
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        kind: str | PydanticCustomError = item["type"]
        if kind == CUSTOM:
            kind = PydanticCustomError(CUSTOM, "{what}; {fix}", context)
        details.append(
            InitErrorDetails(type=kind, loc=item["loc"], input=item["input"], ctx=context)
        )
    return details


def one_message(fits: Callable[[Any], bool], error: PydanticCustomError) -> BeforeValidator:
    """Report one error for a value of a union; pydantic alone reports one for each member."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise error
        return value

    return BeforeValidator(check)


@dataclass(frozen=True)
class LossOf:
    """The type of `loss_type`: one of the registered losses, those registered later included.

    Attributes:
        kind: the kind of stage.
    """

    kind: str

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._known)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(losses_of(self.kind)), "type": "string"}

    def _known(self, value: object) -> object:
        names = losses_of(self.kind)
        if value in names:
            return value
        *first, last = (f"'{name}'" for name in names)
        expected = f"{', '.join(first)} or {last}" if first else last
        raise PydanticKnownError("literal_error", {"expected": expected})


def _address(url: str) -> str:
    """Validate a URL: `http` or `https`, and a host."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is not a number
        good = False
    if not good or not url.isprintable() or " " in url:
        raise wrong_value(
            f"{redact(url)!r} is not a valid URL of an endpoint",
            "write the base URL, for example http://localhost:8000/v1",
            "it must start with http:// or https:// and name a host",
            code="recipe.invalid-url",
        )
    return url


Url: TypeAlias = Annotated[Text, AfterValidator(_address)]
