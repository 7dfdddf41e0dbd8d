"""What every section of a run description has in common."""

from __future__ import annotations

from reprlib import repr as short_repr
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    """Keys with units, defaults and bounds; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        """YAML takes yes, no, on and off for true and false; here they would count as 1 and 0."""
        if any(isinstance(part, bool) for part in (value if isinstance(value, list) else [value])):
            raise ValueError(f"expected no true or false (nor yes, no, on, off), got {short_repr(value)}")
        return value


Length = Annotated[float, Field(gt=0)]
"""[Å]."""

Direction = tuple[float, float, float]
"""(x, y, z)."""
