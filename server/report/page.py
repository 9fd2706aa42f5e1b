"""The page as HTML: sections, figures, tables. What goes in is text, and is escaped here; plots are SVG.

The page fetches nothing: its policy forbids every request, and there is no script in it.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SERIES = 6  # colours there are, --c1 and up
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b2230; --soft: #56617a; --line: #c9d0dc;
  --c1: #1f5fbf; --c2: #b34d00; --c3: #137a52; --c4: #9a35a8; --c5: #8a6a00; --c6: #5c6f86; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --card: #1a202a; --ink: #e9edf4; --soft: #a9b4c6;
  --line: #3c4758; --c1: #7fb2ff; --c2: #ffab66; --c3: #62d3a0; --c4: #e09bef; --c5: #e6c352; --c6: #a8b9cf; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem max(.5rem, min(1rem, 2vw)) 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .5rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; } .verdict { font-size: 1.15rem; max-width: 60rem; }
.soft, figcaption .note { color: var(--soft); }
ul { margin: .5rem 0; padding-left: 1.1rem; font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); gap: .6rem;
  margin: 1.25rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.facts dt { color: var(--soft); font-size: .875rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.facts dd + dd { font-size: .875rem; font-weight: 400; color: var(--soft); }
.cards { columns: 2 22rem; column-gap: 1rem; }
section { break-inside: avoid; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem max(.6rem, min(1rem, 2vw)); margin: 0 0 1rem; } .cards section { width: 100%; display: inline-block; }
figure { margin: .75rem 0 0; } figure + figure { margin-top: 1.5rem; }
.plot { overflow-x: auto; } .plot svg { display: block; width: 100%; min-width: 17rem; max-width: 34rem; height: auto; }
figcaption { margin: .5rem 0; overflow-wrap: anywhere; } figcaption .note { display: block; font-size: .875rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--c1); }
table { border-collapse: collapse; min-width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
th, td { text-align: right; padding: .3rem .4rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } tbody th { min-width: 5.5rem; } table.words tbody th { white-space: nowrap; }
th { font-weight: 600; } th:first-child, table.words :is(td, th) { text-align: left; }
tbody th { font-weight: 400; } table.words td { overflow-wrap: anywhere; min-width: 7rem; white-space: normal; }
summary { cursor: pointer; padding: .25rem 0; color: var(--soft); }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first column names the rows.

    Attributes:
        words: the cells are words, not figures.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        svg: drawn by `server.report.plots`; empty: there is nothing to draw.
        finding: what it shows, in words: for those who do not see it too.
        note: how to read it.
        numbers: tables with what is drawn.
    """

    svg: str
    finding: str
    note: str = ""
    numbers: Sequence[Table] = ()


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: text, tables, figures.

    Attributes:
        wide: it takes the page's whole width; the others stand in columns.
        folded: tables behind a summary of these words.
        notes: how to read what stands above them.
    """

    title: str
    parts: Sequence[str | Table | Figure]
    wide: bool = False
    folded: Sequence[tuple[str, Table]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Fact:
    """A figure of the verdict: its name, the figure, more about it."""

    name: str
    value: str
    more: str = ""


def page(title: str, verdict: str, facts: Iterable[Fact], sections: Sequence[Section]) -> str:
    """A whole document."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{_text(title)}</h1>\n<p class='verdict'>{_text(verdict)}</p>\n"
        f"<dl class='facts'>{''.join(map(_fact, facts))}</dl>\n"
        f"{''.join(_cards(wide, list(group)) for wide, group in groupby(sections, lambda each: each.wide))}"
        "</main></body></html>\n"
    )


def _fact(fact: Fact) -> str:
    more = f"<dd>{_text(fact.more)}</dd>" if fact.more else ""
    return f"<div><dt>{_text(fact.name)}</dt><dd>{_text(fact.value)}</dd>{more}</div>"


def _cards(wide: bool, sections: Sequence[Section]) -> str:
    inside = "".join(map(_section, sections))
    return inside if wide else f"<div class='cards'>\n{inside}</div>\n"


def _section(section: Section) -> str:
    folded = "".join(_folded(words, (table,)) for words, table in section.folded)
    notes = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
    listed = f"<ul class='soft'>{notes}</ul>" if notes else ""
    return f"<section><h2>{_text(section.title)}</h2>{''.join(map(_part, section.parts))}{listed}{folded}</section>\n"


def _part(part: str | Table | Figure) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Figure):
        return _figure(part)
    return f"<p>{_text(part)}</p>"


def _figure(figure: Figure) -> str:
    note = f"<span class='note'>{_text(figure.note)}</span>" if figure.note else ""
    numbers = _folded("The numbers", figure.numbers) if figure.numbers else ""
    if not figure.svg:
        return f"<p>{_text(figure.finding)}</p>{numbers}"
    return (
        f"<figure><div class='plot' role='img' aria-label='{_text(figure.finding)}'>{figure.svg}</div>"
        f"<figcaption>{_text(figure.finding)}{note}</figcaption>{numbers}</figure>"
    )


def _folded(words: str, tables: Sequence[Table]) -> str:
    return f"<details><summary>{_text(words)}</summary>{''.join(map(_table, tables))}</details>"


def _table(table: Table) -> str:
    head = "".join(f"<th scope='col'>{_text(name)}</th>" for name in table.head)
    rows = "".join(
        f"<tr><th scope='row'>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>"
        for row in table.rows
    )
    kind = " class='words'" if table.words else ""
    return (
        f"<div class='scroll' role='region' tabindex='0' aria-label='{_text(table.caption)}'><table{kind}>"
        f"<caption>{_text(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _text(value: str) -> str:
    return html.escape(value)
