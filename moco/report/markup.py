"""Write the parts of an HTML page: tables, panels, notes and keys of curves."""

import html
from collections.abc import Callable, Iterable
from pathlib import Path

from moco.errors import InputError
from moco.files import creating
from moco.report import plots
from moco.report.plots import Look
from moco.report.runs import Run
from moco.report.style import STYLE


def escaped(text: object) -> str:
    """Return untrusted text, escaped so that the browser does not interpret it as HTML."""
    return html.escape(plots.printable(text))


def document(title: str, heading: str, parts: Iterable[str]) -> str:
    """Return a page as HTML, without its empty `parts`.

    Args:
        title: title of the browser's window, as text.
        heading: the heading of the page, as HTML.
        parts: the sections, as HTML.
    """
    # this policy forbids the browser to load anything from elsewhere
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escaped(title)}</title><style>{STYLE}</style>"
    body = "\n".join(filter(None, parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><h1>{heading}</h1>\n{body}\n</body></html>\n"
    )


def save(text: str, out: Path, force: bool) -> None:
    """Write a page to the file `out`, which must not exist unless `force`.

    Raises InputError if it cannot be written.
    """
    try:
        with creating(out, force) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written: {error.strerror}; choose another file"
        ) from None


def table(heads: Iterable[str], rows: list[list[str]], left: int) -> str:
    """Return a table as HTML, without the columns that are empty in all rows.

    Args:
        heads: titles of the columns.
        rows: cells, as HTML.
        left: number of columns to align to the left; the others hold numbers.
    """
    columns = [
        (head, cells, i < left)
        for i, (head, *cells) in enumerate(zip(heads, *rows, strict=True))
        if any(cells)
    ]
    top = "".join(f"<th{_align(text)}>{escaped(head)}</th>" for head, _, text in columns)
    body = ""
    for i in range(len(rows)):
        cells = "".join(f"<td{_align(text)}>{cells[i]}</td>" for _, cells, text in columns)
        body += f"<tr>{cells}</tr>"
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _align(text: bool) -> str:
    return "" if text else ' class="number"'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values, given as HTML. Rows without a value are left out."""
    lines = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{value}</dd></div>" for name, value in rows if value
    )
    return f"<dl>{lines}</dl>"


def section(title: str, *parts: str) -> str:
    """Return a section of the page with a heading; "" if it has no other content."""
    content = "\n".join(filter(None, parts))
    name = title.lower().replace(" ", "-")
    return content and f'<section id="{name}"><h2>{escaped(title)}</h2>\n{content}</section>'


def grid(panels: Iterable[str], shape: str = "") -> str:
    """Return panels side by side, as many as fit; "" without panels. `shape` is a CSS class."""
    content = "".join(panels)
    return content and f'<div class="panels {shape}">{content}</div>'


def panel(title: str, content: str, caption: str = "") -> str:
    """Return a panel with a title, content given as HTML, and a caption below it."""
    below = caption and f"<figcaption>{escaped(caption)}</figcaption>"
    return f"<figure><h4>{escaped(title)}</h4>{content}{below}</figure>"


def note(run: Run, text: object) -> str:
    """Return a line about a run: what is missing or damaged."""
    return f'<p class="absent">{escaped(run.name)}: {escaped(text)}</p>'


def or_why_not(run: Run, make: Callable[[], str]) -> str:
    """Return the HTML that `make` returns, or a line with its error."""
    try:
        return make()
    except (InputError, OSError) as error:
        return note(run, error)


def key(looks: dict[str, Look], most: int = 60) -> str:
    """Return the key of several curves or classes: a sample of each, and its name."""
    items = (
        f"<li>{sample(look)} {escaped(plots.shortened(name, most))}</li>"
        for name, look in looks.items()
    )
    return f'<ul class="key">{"".join(items)}</ul>'


_SHAPES = {
    "o": '<circle cx="14" cy="6" r="4"/>',
    "s": '<rect x="10.5" y="2.5" width="7" height="7"/>',
    "D": '<path d="M14 1l5 5-5 5-5-5z"/>',
    "^": '<path d="M14 1.5l5 9h-10z"/>',
    "v": '<path d="M14 10.5l5-9h-10z"/>',
}


def sample(look: Look) -> str:
    """Return a small picture of a curve's color, dashes and marker, or of a marker alone."""
    dashes = " ".join(f"{2 * length:g}" for length in look.dashes or ())
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = '<path d="M0 6h28" stroke-width="2"' + f"{dashed}/>"
    return (
        f'<svg class="sample" width="28" height="12" viewBox="0 0 28 12" aria-hidden="true" '
        f'stroke="{look.color}" fill="{look.color}">'
        f"{'' if look.dashes is None else line}<g>{_SHAPES[look.marker]}</g></svg>"
    )


def run_name(i: int, run: Run) -> str:
    """Return the name of run number `i`, with a sample of its curves."""
    folder = escaped(Path(run.folder))
    return f'{sample(plots.look(i))} <span title="{folder}">{escaped(run.name)}</span>'
