"""report.html: a single file with the plots, the numbers, the commands, the versions and the settings."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from agents.cli import ConfigError
from agents.comparisons import compared
from agents.plot import PlotResult
from agents.results import Result, merged, merged_versions
from agents.statistics import SummaryRow, summary_notes
from data.atomic_file import atomic_file

_MEDIA = {".png": "image/png", ".svg": "image/svg+xml", ".mp4": "video/mp4"}

_STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; padding: 0 1.25rem; max-width: 64rem; background: #fff; color: #222;
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
figure { margin: 1.5rem 0; }
img, video { max-width: 100%; height: auto; }
p.note, figcaption, summary { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { color: #555; font-weight: 600; border-bottom: 1px solid #888; }
.text { text-align: left; }
tr.first td { border-top: 2px solid #bbb; }
pre { background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    plot: PlotResult,
    more_plots: Sequence[PlotResult] = (),
    rows: Sequence[SummaryRow],
    results: Sequence[Result],
    commands: Sequence[str],
    config: str,
) -> None:
    """Writes a self-contained page: the plots with their captions, the numbers drawn, all rows of the summary with
    their caveats, the commands that made it, the versions used, and the config.

    rows: the summary of `results`. Raises ConfigError for a plot that is not a .png, .svg or .mp4 file.
    """
    plots = [plot, *more_plots]
    shown = list(dict.fromkeys(row for drawn in plots for row in drawn.rows))
    parts = [f"<h1>{html.escape(title)}</h1>", *(_figure(drawn) for drawn in plots)]
    parts += ["<h2>The numbers drawn</h2>", _table(shown)]
    parts += _comparisons(results)
    parts += [f"<details><summary>All {len(rows)} rows of the summary</summary>{_table(rows)}</details>"]
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in summary_notes(results, rows)]
    parts += ["<h2>Made by</h2>", _text("\n".join(commands))]
    parts += ["<h2>Versions</h2>", _pairs(merged_versions(results))]
    trained_with = merged(result.trained_with for result in results)
    if trained_with and trained_with != merged_versions(results):
        parts += ["<h2>Versions of training</h2>", _pairs(trained_with)]
    parts += ["<h2>Config</h2>", _text(config)]
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
    with atomic_file(path) as file:
        file.write(page.encode())


def _comparisons(results: Sequence[Result]) -> list[str]:
    """Returns the section that compares contexts with no context; empty where there is nothing to compare."""
    rows = compared(results)
    if not rows:
        return []
    lines = ["<th class=text>agent<th class=text>task<th>context<th>tokens<th>mean, less that without history"
             "<th>less the predicted one, of known - prior<th>rise a doubling<th>p"]  # fmt: skip
    before = ("", "")
    for row in rows:
        is_first = before != (row.agent, row.task)
        before = (row.agent, row.task)
        rise = ("", "") if row.rise is None or not is_first else (f"{row.rise.slope:+.2f}", f"{row.rise.p_value:.2g}")
        beyond = "" if row.beyond is None else "{:+.0%} [{:+.0%}, {:+.0%}]".format(*row.beyond)
        numbers = (f"{row.context_trajectories:,}", f"{row.context_tokens:,}",
                   "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row.more), beyond, *rise)  # fmt: skip
        texts = "".join(f"<td class=text>{html.escape(text)}" for text in before)
        lines.append(f"<tr class={'first' if is_first else 'more'}>{texts}{''.join(f'<td>{n}' for n in numbers)}")
    note = (
        "Paired by goal, 95 % intervals. Rise: slope of the mean over log2(1 + trajectories). p: the chance of as "
        "steep a rise if contexts made no difference; they are permuted within each goal (of a map, within each "
        "world), one-sided."
    )
    table = f"<div class=wide><table><tr>{chr(10).join(lines)}</table></div>"
    return ["<h2>Does more history help?</h2>", table, f"<p class=note>{note}</p>"]


def _figure(drawn: PlotResult) -> str:
    media = _MEDIA.get(drawn.path.suffix)
    if media is None:
        raise ConfigError(f"a report shows .png and .svg plots, and .mp4; got {drawn.path}")
    image = base64.b64encode(drawn.path.read_bytes()).decode()
    if drawn.path.suffix == ".mp4":
        source = f'<video controls loop muted playsinline src="data:{media};base64,{image}"></video>'
        return f"<figure>{source}<figcaption>{html.escape(drawn.caption)}</figcaption></figure>"
    # The picture contains the caption; the alternative text repeats it for screen readers.
    return f'<figure><img src="data:{media};base64,{image}" alt="{html.escape(drawn.caption)}"></figure>'


def _table(rows: Sequence[SummaryRow]) -> str:
    """Returns an HTML table of the rows in the order of the summary, with a rule above each agent."""
    heads = ("agent", "context", "tokens", "statistic", "mean", "predicted", "interquartile mean", "goals", "seeds",
             "episodes", "interval over", "task", "mode")  # fmt: skip
    texts = {"agent", "task", "mode", "statistic", "interval over"}
    kind = ["text" if head in texts else "number" for head in heads]
    lines = ["".join(f"<th class={k}>{head}</th>" for head, k in zip(heads, kind, strict=True))]
    before: tuple[str, ...] = ()
    for row in rows:
        cells = (
            row.agent,
            _context(row),
            f"{row.context_tokens:,}",
            row.statistic,
            f"{row.mean:.2f} [{row.mean_ci_low:.2f}, {row.mean_ci_high:.2f}]",
            "" if math.isnan(row.predicted) else f"{row.predicted:.2f}",
            f"{row.iqm:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]",
            str(row.groups),
            str(row.seeds),
            f"{row.episodes:,}",
            row.interval_over,
            row.task,
            row.mode,
        )
        first = "first" if before != (row.agent, row.task, row.mode) else "more"
        before = (row.agent, row.task, row.mode)
        inner = "".join(f"<td class={k}>{html.escape(cell)}</td>" for cell, k in zip(cells, kind, strict=True))
        lines.append(f"<tr class={first}>{inner}")
    return f"<div class=wide><table><tr>{''.join(lines[:1])}\n{chr(10).join(lines[1:])}</table></div>"


def _context(row: SummaryRow) -> str:
    count = row.context_trajectories
    if row.mode == "self" and count:  # as in the plot: the statistic is over the episodes played
        return f"{count:,} episode{'s' if count > 1 else ''} played"
    return f"{count:,} trajector{'y' if count == 1 else 'ies'}"


def _pairs(values: Mapping[str, str]) -> str:
    lines = (f"<tr><td class=text>{html.escape(key)}<td class=text>{html.escape(values[key])}" for key in values)
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _text(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
