"""hodec init: write a project folder with a net, a data set, a rank rule and a method of one's own."""

import argparse
import keyword
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hodec.cli import Answer
from hodec.errors import ConfigError
from hodec.io.atomic import writing

HELP = "write a project of your own: a net, a data set, a rank rule, a method, settings and a test to begin from"

TEMPLATE, NAME = Path(__file__).parent / "template", "my_project"
SUFFIXES = (".md", ".py", ".toml", ".yaml")  # of the files of the template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name of the package, the folder."""
    parser.add_argument("name", metavar="NAME", help="of the project and its package, such as my_project")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where it is written; a new folder (default: NAME)")


def run(options: argparse.Namespace) -> Answer:
    """Write the folder, and return how to go on."""
    name = checked_name(options.name)
    folder = Path(options.output or name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: there already; allowed: a new folder, -o FOLDER")
    with writing(folder, ConfigError):
        files = write_project(name, folder)
    steps = [f"cd {folder}", f"hodec train --trust {name} --config-dir conf experiment=own", "python -m pytest"]
    text = "\n  ".join([f"written to {folder}: {', '.join(files)}", *steps])
    return Answer(text, {"folder": str(folder), "files": files})


def checked_name(name: str) -> str:
    """``name``, where a package can have it.

    Raises:
        ConfigError: no name of a Python package, or that of one that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"NAME: {name!r} given; allowed: a name of a Python package, small letters, digits and _")
    if name in sys.stdlib_module_names or (name != NAME and find_spec(name) is not None):
        raise ConfigError(f"NAME: {name!r} given; there is a package of that name already; allowed: another name")
    return name


def write_project(name: str, folder: Path) -> list[str]:
    """Write the template under another name into a folder, as a whole or not at all; return its files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
        made, files = Path(scratch) / name, []
        for source in sorted(path for path in TEMPLATE.rglob("*") if path.suffix in SUFFIXES):
            target = made / str(source.relative_to(TEMPLATE)).replace(NAME, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text("utf-8").replace(NAME, name), "utf-8")
            files.append(str(target.relative_to(made)))
        made.chmod(0o755)  # as folders are; those of tempfile are private
        if folder.exists():
            folder.rmdir()  # it is empty
        shutil.move(made, folder)
    return files
