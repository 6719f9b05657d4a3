"""Run notebooks and keep what they print: ``uv run --extra docs python notebooks/run.py [NAME.ipynb ..]``, all of them by default."""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; files that it writes go to a folder that is thrown away.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()  # seconds, a cell
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution, which differ each time
    return notebook


def main() -> None:
    """Write the notebooks anew."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(path), path)


if __name__ == "__main__":
    main()
