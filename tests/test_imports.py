"""Imports point one way, and asking for hodec does not load what only some runs need."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hodec

PACKAGE = Path(hodec.__file__).parent

# A module may import those to its left.
ORDER = [
    "errors", "files", "kinds", "eigen", "linalg", "formats", "layers", "methods", "plan_table", "plan", "cost",
    "patches", "metric", "conversion", "ranks", "admm", "config_values", "config", "config_check", "run_folder", "lit",
    "loggers", "export", "onnx_graph", "report", "training", "stages", "pipeline", "commands", "cli",
]  # fmt: skip
HEART = ORDER[: ORDER.index("ranks") + 1]
# These are leaves: nets and data know nothing of decomposition.
LEAVES = ("models", "data")
LEAF_IMPORTS = ("errors", "files")


def top(module: str) -> str:
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


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, hodec module) of every import in a file, inside functions too, but not those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(ast.Module(body=node.orelse, type_ignores=[]), module)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "hodec")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            if node.module == "hodec":  # from hodec import linalg
                yield from ((node.lineno, f"hodec.{alias.name}") for alias in node.names)
            elif (node.module or "").startswith("hodec."):
                yield node.lineno, str(node.module)
        else:
            yield from imported(node, module)


def wrong(source: str, module: str) -> list[str]:
    """Imports of one module that point the wrong way."""
    here, problems = top(module), []
    for line, target in imported(ast.parse(source), module):
        there = top(target) if "." in target else "hodec"
        if there == here or (there in ("hodec", "__version__") and here not in HEART):
            continue  # above the heart the front page may be asked for the version
        if here in LEAVES:
            allowed = there in LEAF_IMPORTS
        elif there in LEAVES:
            allowed = ORDER.index(here) > ORDER.index("admm")
        else:
            allowed = there in ORDER and ORDER.index(there) < ORDER.index(here)
        if not allowed:
            problems.append(f"{module}:{line} imports {target}")
    return problems


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str):
    assert top(module) in (*ORDER, *LEAVES), f"{module} has no place in ORDER yet"
    assert wrong(modules()[module].read_text(encoding="utf-8"), module) == []


def test_every_module_of_the_heart_is_there():
    assert {top(module) for module in modules()} >= set(HEART)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hodec.errors", "import hodec.files"),
        ("hodec.linalg", "from hodec.formats.modes import Modes"),
        ("hodec.formats.tt", "def f():\n    from hodec.layers import tt"),
        ("hodec.plan", "from hodec import conversion"),
        ("hodec.data.digits", "from hodec.linalg import truncate"),
        ("hodec.models", "from hodec.plan import Plan"),
        ("hodec.formats.tt", "from hodec.models import build_model"),
        ("hodec.ranks.manual", "import hodec"),
        ("hodec.cost.count", "if TYPE_CHECKING:\n    pass\nelse:\n    import hodec.cli"),
    ],
)
def test_a_wrong_import_would_be_found(module: str, source: str):
    assert len(wrong(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hodec.plan", "from hodec.formats.modes import Modes\nimport torch"),
        ("hodec.plan_table", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hodec.plan import Plan"),
        ("hodec.data.digits", "from hodec.errors import DataError\nfrom hodec.data.loaders import x"),
        ("hodec.pipeline", "from hodec.models import build_model"),
        ("hodec.formats.tt", "from hodec.formats.modes import Modes"),
    ],
)
def test_a_right_import_is_not(module: str, source: str):
    assert wrong(source, module) == []


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    script = f"import sys\n{code}\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_hodec_loads_no_heavy_library():
    heavy = {"wandb", "matplotlib", "onnx", "onnxruntime", "tensorboard", "torch", "torchvision", "pytorch_lightning"}
    assert loaded_by("import hodec") & heavy == set()


def test_planning_and_converting_need_torch_and_little_else():
    """And hodec.convert is the function, whatever was imported before it."""
    loaded = loaded_by(
        "import hodec\nimport hodec.ranks\nassert type(hodec.convert).__name__ == 'function', hodec.convert\n"
        "hodec.make_plan, hodec.Plan, hodec.METHODS, hodec.formats"
    )
    assert "torch" in loaded
    heavy = {"wandb", "matplotlib", "onnx", "onnxruntime", "torchvision", "pytorch_lightning", "sklearn", "hydra"}
    assert loaded & heavy == set()


def test_every_public_name_is_there():
    for name in hodec.__all__:
        assert getattr(hodec, name) is not None
    assert callable(hodec.convert)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = hodec.nonsense
