"""The base class of config sections, and the types of numbers and names in them.

Invalid values are rejected here, with a one-line message, before a run writes anything. The upper bounds are far above
useful values, and small enough for int32 and float32 arithmetic.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1  # the largest int32


class Section(BaseModel):
    """A frozen section of a config. Unknown keys and values of another type ("1" for a number) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _plain(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"a name has letters, and no line ends or other signs that nobody sees; got {text!r}")
    return text


def _inside(text: str) -> str:
    if text.startswith("/") or not {"", ".", ".."}.isdisjoint(text.split("/")):
        raise ValueError(f"it names a folder within runs/, so it has no '..' and no '/' at an end; got {text!r}")
    return text


Count = Annotated[int, Field(gt=0, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(gt=0, le=2**20)]
"""A size of a network, a mesh or a batch."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Chance = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of a whole, below 1."""
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
Return = Annotated[float, Field(ge=-1e30, le=1e30)]
"""A return. The bounds keep it, and sums of it, finite in float32."""
Text = Annotated[str, AfterValidator(_plain)]
RunName = Annotated[str, AfterValidator(_plain), AfterValidator(_inside)]
"""The name of a run: a path relative to runs/, without "..", such as "walker" or "sweep/walker-0"."""
