"""Settings as sections: what every one of them refuses, and the kinds of numbers and names there are.

Whatever a setting cannot mean is refused here, in one line, before anything is made; every bound is far above what has
ever been of use, and below what no computer counts to.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1  # what an int32 counts to


class Section(BaseModel):
    """Unknown keys are errors, and a value of another type is one too ("1" is no number)."""

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
"""Of a network, a mesh or a batch."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Chance = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""A part that leaves something."""
Between = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
Return = Annotated[float, Field(ge=-1e30, le=1e30)]
"""In float32 still a number, and its sums too."""
Text = Annotated[str, AfterValidator(_plain)]
RunName = Annotated[str, AfterValidator(_plain), AfterValidator(_inside)]
"""The name of a folder in runs/, or of one in such a folder."""
