"""The library imports nothing of the experiment, nothing imports in a circle, and hodec alone loads little."""

import ast
import importlib.util
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hodec

PACKAGE = Path(hodec.__file__).parent

# Rooms of the library; each may import those to its left.
ORDER = [
    "_version", "errors", "options", "text_table", "io", "linalg", "formats", "layers", "inputs", "inference",
    "compare", "methods", "plan", "optim", "distillation", "fade_in",
    "cost", "models", "calibration", "conversion", "ranks", "compression", "admm", "fusion", "export", "onnx_graph",
]  # fmt: skip
# These stand on top of the library.
ABOVE = ("experiment", "cli", "__main__")


def room(module: str) -> str:
    """hodec.formats.tt -> formats."""
    return module.split(".")[1]


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all of hodec but its front page, which only names things."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "hodec":
            found[name] = path
    return found


@cache
def imported(source: str) -> list[tuple[int, str]]:
    """(line, hodec module or member) of every import: inside functions and for type checkers only too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "hodec"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if (node.module or "").split(".")[0] == "hodec":
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def wrong(source: str, module: str) -> list[str]:
    """Imports of one module that point the wrong way."""
    here, problems = room(module), []
    for line, target in imported(source):
        there = room(target) if "." in target else "hodec"
        if there == here or here in ABOVE:
            continue
        if there not in ORDER or ORDER.index(there) > ORDER.index(here):
            problems.append(f"{module}:{line} imports {target}")
    return problems


def test_the_library_imports_one_way_and_nothing_of_the_experiment():
    assert [module for module in modules() if room(module) not in (*ORDER, *ABOVE)] == [], "no place in ORDER yet"
    found = (wrong(path.read_text(encoding="utf-8"), module) for module, path in modules().items())
    assert [problem for problems in found for problem in problems] == []


def file_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules it imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = {target if target in sources else target.rpartition(".")[0] for _, target in imported(source)}
        graph[module] = (targets & sources.keys()) - {module}
    return graph


def test_no_file_imports_itself_in_a_circle():
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    list(TopologicalSorter(file_graph(sources)).static_order())


def test_a_circle_would_be_found():
    sources = {"hodec.a": "from hodec.b import x", "hodec.b": "if TYPE_CHECKING:\n    from hodec import a"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(file_graph(sources)).static_order())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hodec.errors", "import hodec.io"),
        ("hodec.linalg.svd", "from hodec.formats.modes import Modes"),
        ("hodec.formats.tt", "def f():\n    from hodec.layers import tt"),
        ("hodec.plan.plan", "from hodec import conversion"),
        ("hodec.formats.tt", "from hodec.models import build_model"),
        ("hodec.ranks.manual", "import hodec"),
        ("hodec.export.checkpoint", "from hodec.experiment.run_folder import RunFolder"),
        ("hodec.cost.count", "if TYPE_CHECKING:\n    import hodec.cli.main"),
    ],
)
def test_a_wrong_import_would_be_found(module: str, source: str):
    assert len(wrong(source, module)) == 1


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    script = f"import sys\n{code}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "hydra", "matplotlib", "onnx", "onnxruntime", "pytorch_lightning", "lightning", "sklearn", "tensorboard",
    "torchvision", "wandb",
}  # fmt: skip


def test_import_hodec_loads_no_heavy_library():
    assert loaded_by("import hodec") & {*HEAVY, "torch"} == set()


def test_planning_and_converting_need_torch_and_little_else():
    """And hodec.convert and hodec.fuse are functions, whatever was imported before them."""
    loaded = loaded_by(
        "import hodec\nimport hodec.conversion.swap, hodec.fusion.search\n"
        "assert type(hodec.convert).__name__ == type(hodec.fuse).__name__ == 'function'\n"
        "hodec.make_plan, hodec.Plan, hodec.METHODS, hodec.formats"
    )
    assert "torch" in loaded
    assert loaded & HEAVY == set()


def test_every_public_name_is_there():
    for name in hodec._HOMES:
        if name != "AdmmTrainerCallback" or importlib.util.find_spec("transformers"):
            assert getattr(hodec, name) is not None
    assert set(hodec._HOMES) - set(hodec.__all__) == {"AdmmCallback", "AdmmTrainerCallback"}
    assert callable(hodec.convert)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = hodec.nonsense
