"""Run notebooks, by default all, and keep the outputs: ``uv run --extra docs python notebooks/run.py [NAME ..]``."""

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
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=place, coalesce_streams=True).execute()  # seconds, a cell
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution, which differ each time
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.output_type != "stream" or one.text.strip()]
    return notebook


def main() -> None:
    """Write the notebooks anew."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(path), path)


if __name__ == "__main__":
    main()
