"""The base of everything a user sets: the options of methods, and the sections of a recipe."""

from __future__ import annotations

import sys
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """Unknown keys are errors, so are infinite and NaN numbers; values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``yes`` for a number, which pydantic counts as 1, and numbers too large for any library."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("Input should be a number, not yes or no")
        if isinstance(value, int) and abs(value) > sys.maxsize:
            raise ValueError(f"Input should be at most {sys.maxsize}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = [part for part in get_args(annotation) if isinstance(part, type) or get_args(part)]
    return {annotation, *parts}.union(*map(_kinds, parts))
