"""MkDocs hook of mkdocs.yml: pages of the site that lie outside docs/, and links between all of them.

Links are written so that they work in the repository: ``../experiments/x/README.md``, ``../notebooks/admm.ipynb``. Here
they become the site's own.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: File of the repository -> page of the site.
PAGES = {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
#: A link that is called like the file that it leads to.
FILE_LINK = re.compile(r"\[(?:docs/)?[\w/]+\.md\]\(([\w./]+\.md)")


def outside() -> Iterator[tuple[str, str]]:
    """Each page outside docs/, and the files that pages show or link to: its path in the repository and on the site."""
    yield from PAGES.items()
    for ending in ("README.md", "*.png", "*.py", "*.yaml", "*.csv"):
        for path in sorted((ROOT / "experiments").rglob(ending)):
            name = path.relative_to(ROOT).as_posix()
            yield name, name
    yield "conf/experiment/short_protocol.yaml", "experiments/short_protocol/short_protocol.yaml"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        yield f"notebooks/{path.name}", f"notebooks/{path.stem}.md"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside docs/."""
    for source, name in outside():
        if source.endswith(".ipynb"):
            text = notebook_page((ROOT / source).read_text(encoding="utf-8"), source)
            files.append(File.generated(config, name, content=text))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    places = dict(outside())
    home = {there: here for here, there in places.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link[2]))
        if ":" in link[2] or target not in places and not target.startswith("docs/"):
            return link[0]
        there = places.get(target, target.removeprefix("docs/"))
        return link[1] + posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".") + link[3]

    titles = dict(titled(config.nav or []))
    place = posixpath.dirname(page.file.src_uri)

    def named(link: re.Match[str]) -> str:
        there = posixpath.normpath(posixpath.join(place, link[1]))
        return f"[{titles[there]}]({link[1]}" if there in titles else link[0]

    return FILE_LINK.sub(named, LINK.sub(moved, markdown))


def titled(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """Each page of the navigation that has a title there, and that."""
    for entry in nav:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            if isinstance(below, list):
                yield from titled(below)
            else:
                yield below, title


def notebook_page(text: str, name: str) -> str:
    """A notebook as Markdown: its texts, its code, and what the code printed and drew."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_shown(output) for output in cell.get("outputs", ())]
    if not parts:
        raise PluginError(f"{name} has no cells")
    title, *rest = parts
    note = f"*The notebook `{name}` of the repository, as it ran.*"
    return "\n\n".join([title, note, *rest]) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data") or {"text/plain": output.get("text", "")}
    if "image/png" in data:
        return f"![drawn by the cell above](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
