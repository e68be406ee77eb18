"""The type of `loss_type`: a name in the table of losses, as it is when a recipe is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from rpo_trainer.losses import losses_of


@dataclass(frozen=True)
class LossOf:
    """What a `Literal` of the names would be, with the losses that are registered later.

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
