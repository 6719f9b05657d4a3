"""HTML in small pieces: elements that escape their text by default, tables, and the page around them."""

from html import escape
from string import Template

from hodec.experiment.report.canvas import INKS
from hodec.experiment.report.tables import Cell, Row, Table


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Html:
    """``<tag attributes>children</tag>``; children that are not ``Html`` are escaped, empty attributes left out.

    A trailing underscore of an attribute name is dropped, so ``class_="num"`` can be written.
    """
    pairs = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items() if value)
    return Html(f"<{tag}{pairs}>{joined(*children)}</{tag}>")


def joined(*children: str, between: str = "") -> Html:
    """Children one after the other, escaped unless they are ``Html``."""
    return Html(between.join(child if isinstance(child, Html) else escape(child) for child in children))


def table(content: Table, *, name: str = "") -> Html:
    """A table that scrolls sideways by itself when the window is narrower."""
    head = joined(*(element("th", title.strip(), scope="col", class_=_align(num)) for title, num in content.columns))
    body = joined(*(_rows(row, content) for row in content.rows))
    foot = joined(*(_rows(row, content) for row in content.foot))
    titled = any(title.strip() for title, _ in content.columns)
    parts = [element("thead", element("tr", head))] if titled else []
    parts += [element("tbody", body)]
    parts += [element("tfoot", foot)] if content.foot else []
    return element("div", element("table", *parts, class_=name), class_="wide")


def _align(numeric: bool) -> str:
    return "num" if numeric else ""


def _rows(row: Row, content: Table) -> Html:
    cells = [
        _cell(cell, numeric, first=at == 0)
        for at, (cell, (_, numeric)) in enumerate(zip(row.cells, content.columns, strict=True))
    ]
    classes = " ".join(word for word, on in (("strong", row.strong), ("noted", bool(row.note))) if on)
    line = element("tr", *cells, class_=classes)
    if not row.note:
        return line
    note = element("tr", element("td", row.note, colspan=str(len(content.columns))), class_="note")
    return joined(line, note)


def _cell(cell: Cell, numeric: bool, *, first: bool) -> Html:
    content = element("a", cell.text, href=cell.link) if cell.link else cell.text
    # a bar grows from the right edge of its cell; a layer that grew has none
    share = 0.0 if cell.bar is None else min(1.0, max(0.0, cell.bar))
    style = f"--share:{100 * share:.1f}%" if share else ""
    classes = " ".join(word for word, on in (("num", numeric), ("bar", bool(share))) if on)
    if first:
        return element("th", content, scope="row", class_=classes, title=cell.detail)
    return element("td", content, class_=classes, title=cell.detail, style=style)


def page(title: str, *parts: Html) -> str:
    """A whole HTML document that loads nothing from anywhere."""
    light = "".join(f"--{name}:{pair[0]};" for name, pair in INKS.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in INKS.items())
    return _PAGE.substitute(title=escape(title), light=light, dark=dark, body=joined(*parts, between="\n"))


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { $light --rule:#dfe4ea; --wash:#e9f0f8; --good:#2c8467; --warn:#b7791f; --bad:#b83a5c;
  --calm:#66717f; --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Consolas, "DejaVu Sans Mono", monospace; }
@media screen and (prefers-color-scheme: dark) { :root { $dark --rule:#2b343f; --wash:#22303f;
  --good:#70caac; --warn:#e0b15e; --bad:#ee8ba6; --calm:#9aa5b3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 56px 32px 96px; }
.kicker { margin: 0 0 10px; color: var(--muted); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0; font-size: 27px; line-height: 1.32; font-weight: 600; letter-spacing: -.01em; max-width: 40em;
  text-wrap: balance; }
h2 { margin: 60px 0 14px; font-size: 18px; line-height: 1.3; font-weight: 600; }
p { margin: 0 0 12px; max-width: 46em; }
.facts { margin: 14px 0 0; color: var(--muted); font-size: 14px; max-width: none; }
.facts span + span::before { content: "·"; margin: 0 .6em; }
.small { color: var(--muted); font-size: 13px; max-width: 66em; }
.verdict { margin-top: 40px; padding: 2px 0 2px 20px; border-left: 3px solid var(--tone, var(--calm)); }
.verdict h2 { margin: 0 0 6px; color: var(--tone, var(--ink)); }
.verdict p { margin: 0; }
.good { --tone: var(--good); } .warn { --tone: var(--warn); } .bad { --tone: var(--bad); }
.wide { overflow-x: auto; margin: 8px 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: left; font-weight: 400; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: 12.5px; border-bottom: 1px solid var(--muted); white-space: nowrap;
  vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--rule); } tbody tr:first-child { border-top: 0; }
tfoot tr { border-top: 1px solid var(--rule); } tfoot tr:first-child { border-top: 1px solid var(--muted); }
tfoot th, tfoot td, .strong th, .strong td { font-weight: 600; }
.num { text-align: right; white-space: nowrap; }
.results td:nth-child(2) { color: var(--muted); font-weight: 400; }
.layers { font-size: 12.5px; } .layers th, .layers td { padding: 5px 7px; white-space: nowrap; }
.layers tbody th, .skipped tbody th { font-family: var(--mono); font-size: 12px; }
.layers th:first-child { padding-left: 0; } .layers th:last-child, .layers td:last-child { padding-right: 0; }
.layers td.bar { background: linear-gradient(var(--wash), var(--wash)) right center / var(--share) 76% no-repeat; }
.sweep td:nth-child(3) { white-space: nowrap; } tr.note td { overflow-wrap: anywhere; }
.skipped { width: auto; } .skipped th:first-child { padding-right: 32px; }
.origin { width: auto; } .origin tbody th { color: var(--muted); white-space: nowrap; padding-right: 32px; }
.origin td { font-family: var(--mono); font-size: 12.5px; overflow-wrap: anywhere; }
tr.note { border-top: 0; }
tr.note td, .layers tr.note td { padding: 0 0 7px; color: var(--muted); font-size: 12px; white-space: normal; }
tr.noted th, tr.noted td { padding-bottom: 2px; }
a { color: var(--blue); }
figure { margin: 22px 0 40px; overflow-x: auto; break-inside: avoid; }
figure svg { display: block; width: 100%; min-width: 660px; height: auto; }
figure svg text { font-family: var(--sans) !important; }
figcaption { margin-top: 8px; color: var(--muted); font-size: 13px; max-width: 66em; }
figcaption b { color: var(--ink); font-weight: 600; }
.absent { color: var(--muted); font-size: 13.5px; }
.absent b { color: var(--ink); font-weight: 600; }
details { margin: 14px 0; border-top: 1px solid var(--rule); padding-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 12px 0; padding: 14px 16px; background: var(--band); border-radius: 6px; overflow-x: auto;
  font: 12.5px/1.5 var(--mono); }
@media (max-width: 640px) { main { padding: 28px 18px 56px; } h1 { font-size: 22px; }
  .results th:nth-child(2), .results td:nth-child(2) { display: none; } }
@page { size: A4 landscape; margin: 14mm; }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  tr { break-inside: avoid; } .wide, figure { overflow: visible; }
  figure svg { min-width: 0; max-height: 165mm; } .layers { font-size: 8pt; }
  h2 { margin-top: 32px; }
  .layers th, .layers td { padding: 2px 4px; } .layers tbody th { font-size: 8pt; }
  pre { white-space: pre-wrap; } details::details-content { content-visibility: visible; height: auto; } }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")
