"""What every section of keys is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Scalar = str | int | float | bool


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """Keys that are typed, known and finite."""

    # strict: every source of keys is typed, and `rounds=true` must not mean 1
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, alias_generator=_kebab, validate_default=True
    )
