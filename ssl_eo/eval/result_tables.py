"""Tables, and how they look in Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["Cell", "Row", "Table", "as_latex", "as_markdown", "with_numbers"]

_OF_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_OF_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


@dataclass(frozen=True)
class Cell:
    """A number, and what stands smaller beside it or, line by line, below it."""

    text: str = ""
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """`kind` is that of the entrant, or empty; `note` stands smaller below the title."""

    title: str
    kind: str
    cells: Sequence[Cell]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; `corner` is the title of their first column.

    `caption` says in one paragraph what a reader needs who sees the table alone; without one it is the title. `note`
    stands with the table in every form.
    """

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    note: str = ""


def with_numbers(tables: Iterable[Table]) -> list[Table]:
    """`tables` without columns in which no row has a number, and without tables of which nothing is left."""
    found = []
    for table in tables:
        kept = [i for i in range(len(table.columns)) if any(row.cells[i].text for row in table.rows)]
        if kept:
            rows = [replace(row, cells=[row.cells[i] for i in kept]) for row in table.rows]
            found.append(replace(table, columns=[table.columns[i] for i in kept], rows=rows))
    return found


def as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Pipe tables under headings, then what must be said of them."""
    parts = []
    for table in tables:
        lines = [f"## {_of_markdown(table.title)}", ""]
        lines += [_of_markdown(_one_line(table.note)), ""] if table.note else []
        lines.append(_pipes(map(_of_markdown, [table.corner, *table.columns])))
        lines.append("|" + "|".join([" --- ", *(" ---: " for _ in table.columns)]) + "|")
        for row in table.rows:
            lines.append(_pipes([_of_markdown(_titled(row)), *map(_markdown_cell, row.cells)]))
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {_of_markdown(_one_line(note))}" for note in notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def as_latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """One `table` environment each, for the packages booktabs and graphicx; notes are comments at the top.

    Labels are `tab:` and the title in small letters, with a number where several tables have one title.
    """
    parts = ["\n".join(["% needs \\usepackage{booktabs, graphicx}", *(f"% {_one_line(note)}" for note in notes)])]
    labels: list[str] = []
    for table in tables:
        labels.append(_label(table.title))
        times = labels.count(labels[-1])
        label = labels[-1] if times == 1 else f"{labels[-1]}-{times}"
        said = [table.caption or table.title, table.note]
        caption = rf"\caption{{{_of_latex(_one_line('. '.join(filter(None, said))))}}}"
        lines = [r"\begin{table}", r"\centering", caption, rf"\label{{tab:{label}}}"]
        lines += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        lines.append(" & ".join(map(_of_latex, [table.corner, *table.columns])) + r" \\")
        lines.append(r"\midrule")
        before = table.rows[0].kind if table.rows else ""
        for row in table.rows:
            lines += [r"\midrule"] if row.kind != before else []
            before = row.kind
            title = "{}" * row.title.startswith(("[", "*")) + _of_latex(_titled(row))  # else an argument of \\
            lines.append(" & ".join([title, *map(_latex_cell, row.cells)]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _titled(row: Row) -> str:
    return f"{row.title} ({row.note})" if row.note else row.title


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.is_best else cell.text
    return " ".join([text, *map(_of_markdown, cell.note.split("\n"))]).strip()


def _of_markdown(text: str) -> str:
    """A `[` ends as a link only before a `(`, so those of intervals may stand."""
    return re.sub(r"([\\`*_<>|]|\](?=\())", r"\\\1", text)


def _latex_cell(cell: Cell) -> str:
    text = rf"\textbf{{{_of_latex(cell.text)}}}" if cell.is_best else _of_latex(cell.text)
    note = _of_latex(cell.note.replace("\n", " "))
    return rf"{text} {{\scriptsize {note}}}" if note else text


def _label(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "table"


def _of_latex(text: str) -> str:
    return "".join(_OF_LATEX.get(sign, sign) for sign in text).replace("±", r"$\pm$")
