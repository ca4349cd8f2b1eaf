"""Render a comparison as a LaTeX table with the rules of booktabs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from compress.report.columns import SOFTWARE, Column
from compress.report.compare import Comparison, Row

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # at the start of a row it would be an option of the line before
    "]": "{]}",
    "*": r"\textsuperscript{*}",
    "†": r"\textsuperscript{\dag}",
    "±": r"$\pm$",
    "÷": r"$\div$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "‖": r"$\Vert$",
    "•": r"\textbullet{}",
    "–": "--",
    "…": r"\ldots{}",
}


def to_latex(comparison: Comparison) -> str:
    """The comparison as a ``table*`` that needs the packages booktabs and graphicx, with notes below.

    The best value of a column is bold. A table wider than the text is scaled down to it. What software loads
    and runs a model is left out.
    """
    columns = [column for column in comparison.brief if column.group != SOFTWARE]
    groups = [(group, len(list(members))) for group, members in groupby(columns, lambda column: column.group)]
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        r"\caption{Compressed models beside the dense one.}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if comparison.is_number(c) else 'l' for c in columns)}}}",
        r"\toprule",
        *_group_header(groups),
        _line(_heading(column, comparison) for column in columns),
        r"\midrule",
        *_body(comparison, columns),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\par\medskip",
        r"\begin{minipage}{\linewidth}\footnotesize",
        *(rf"{escaped(line)}\par" for line in [*comparison.notes, *comparison.caption]),
        r"\end{minipage}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """The text, so that LaTeX prints it as it is."""
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))


def _group_header(groups: list[tuple[str, int]]) -> list[str]:
    """The headings that columns share, and a rule below each of them."""
    cells, rules, first = [], [], 1
    for group, number in groups:
        if not group:
            cells += [""] * number
        else:
            cells.append(rf"\multicolumn{{{number}}}{{c}}{{{escaped(group)}}}")
            rules.append(rf"\cmidrule(lr){{{first}-{first + number - 1}}}")
        first += number
    return [_line(cells), " ".join(rules)]


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _heading(column: Column, comparison: Comparison) -> str:
    side = "r" if comparison.is_number(column) else "l"
    lines = r" \\ ".join(escaped(line) for line in column.heading.splitlines())
    return rf"\shortstack[{side}]{{{lines}}}"


def _body(comparison: Comparison, columns: list[Column]) -> list[str]:
    """A line for each model, with a rule below the dense one."""
    lines = []
    for row in comparison.rows:
        lines.append(_line(_cell(row, column) for column in columns))
        if row.is_dense and len(comparison.rows) > 1:
            lines.append(r"\midrule")
    return lines


def _cell(row: Row, column: Column) -> str:
    text = escaped(row.text(column))
    return rf"\textbf{{{text}}}" if row.marked(column).best else text
