"""Image files of figures, and the size of text in them."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from agents.cli import ConfigError
from data import DataError
from data.atomic_file import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = 12.5  # points


def check_suffix(path: Path) -> None:
    """Raises ConfigError when the file name does not end in .png, .svg or .pdf."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"a plot is a .png, .svg or .pdf file; got {path}")


def check_picture(path: Path) -> None:
    """Raises DataError when `path` is an existing file that Matplotlib did not write: a plot would replace it.
    Matplotlib leaves its name in the files that it writes."""
    if path.is_file() and b"atplotlib" not in path.read_bytes():
        raise DataError(f"{path} exists and is no plot; choose another --out, or move it")


def write_image(figure: "Figure", path: Path) -> None:
    """Writes a figure to `path` atomically. Raises DataError as `check_picture` does."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=200)
    with atomic_file(path, check_old=check_picture) as file:
        file.write(content.getvalue())


def text_width(line: str, size: float = 9) -> float:
    """Returns the width of a line of bold text in inches. size: in points."""
    from matplotlib.font_manager import FontProperties  # slow to import
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), line, size=size, prop=FontProperties(weight="bold")).get_extents().width / 72


def title_size(title: str, inches: float) -> float:
    """Returns the font size in points, at most TITLE, at which a title fits into a width in inches."""
    return TITLE * min(1.0, inches / max(text_width(title, TITLE), 1e-9)) if title else TITLE
