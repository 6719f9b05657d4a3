"""README.md and all pages: links lead somewhere, commands are accepted, names exist, Python runs as it stands."""

import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hodec
from hodec.cli import main as cli
from hodec.experiment.config.overrides import check_overrides

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
TESTED = ("docs/files.md", "docs/ranks.md", "docs/sweeps.md")  # by tests of their own
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands():
    """(page, words) of each command in a block of bash."""
    for name, text in TEXTS.items():
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    if words := shlex.split(part, comments=True):
                        yield name, words


COMMANDS = sorted({tuple(words) for name, words in commands() if name not in TESTED})


def accepted(words: list[str]) -> bool:
    """Whether a command is one that works here; arguments of hodec and of train.py are read by them."""
    match words:
        case ["uv", "run", "--extra", extra, *rest]:
            return extra in EXTRAS and rest[0] in ("mkdocs", "python")
        case ["uv", "run", *rest]:
            return rest == ["pytest"] or accepted(rest)
        case ["torchrun", *rest] if "train.py" in rest:
            return accepted(["python", *rest[rest.index("train.py") :]])
        case ["hodec", "train", *rest]:  # of a package of the reader's own, which is not here: Hydra's syntax
            return bool(OverridesParser.create().parse_overrides(own_overrides(rest)))
        case ["hodec", *rest]:
            return bool(cli.parser().parse_args(rest).verb)
        case ["python", *rest]:
            return accepted_python(rest)
        case ["pip", "install", *rest]:
            return all(extra in EXTRAS for extra in re.findall(r"\[(\w+)\]", " ".join(rest)))
        case ["pytest", *rest]:
            return (ROOT / rest[-1]).exists()
    return words[0] in ("$EDITOR", "cd")


def accepted_python(words: list[str]) -> bool:
    """Whether what follows ``python`` is there; arguments of train.py are read."""
    match words:
        case ["train.py", "--help"]:
            return True
        case ["train.py", *rest]:
            check_overrides([first_of(word) for word in rest if word != "-m"], ROOT / "conf")
            return True
        case ["-m", module, *_]:
            return importlib.util.find_spec(module) is not None
    return (ROOT / words[0]).is_file()


def own_overrides(words: list[str]) -> list[str]:
    """The arguments of ``hodec train`` without its flags, which have a value each."""
    return [word for before, word in zip(["", *words], words, strict=False) if "--" not in before + word]


def first_of(word: str) -> str:
    """An override with the first of the values that it sweeps over: all pairs of them take seconds."""
    return re.sub(r"^([\w./]+=[^,\[{(]+),.*", r"\1", word)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_accepted(command):
    assert accepted(list(command))


HELP = (ROOT / "conf" / "config.yaml").read_text(encoding="utf-8").partition("Examples:")[2].partition("--cfg job")[0]
EXAMPLES = [re.split(r" {3,}", line)[0] for line in re.findall(r"^ *(hodec train.*)", HELP, re.MULTILINE)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_help_are_accepted(example):
    words = [word for word in shlex.split(example)[2:] if word != "..."]
    check_overrides([word if "hydra/sweeper=" in example else first_of(word) for word in words], ROOT / "conf")


def test_there_are_commands_of_every_kind():
    assert {"hodec", "python", "uv", "pip"} <= {command[0] for command in COMMANDS}
    assert len(COMMANDS) > 30
    assert len(EXAMPLES) == 10


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.DOTALL | re.MULTILINE)):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        if "://" not in link and not (path.is_file() and (not anchor or anchor in headings(path))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_is_taken_for_a_tag(name):
    """``<dF, G>`` outside a code mark would not be shown."""
    text = re.sub(r"^```.*?^```|`[^`]*`", "", TEXTS[name], flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"</?[a-zA-Z][^>]*>", text) == []


def headings(path: Path) -> set[str]:
    """The anchors of a page, as sites of Markdown make them."""
    titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_names_of_hodec_exist(name):
    for dotted in set(re.findall(r"`hodec\.([A-Za-z_][\w.]*\w)", TEXTS[name])):
        assert found(f"hodec.{dotted}"), dotted


def found(dotted: str) -> bool:
    """Whether a module, or an attribute of one, has that name; groups of entry points have too."""
    home, _, last = dotted.rpartition(".")
    if last == "json":  # a file
        return True
    if dotted in ("hodec.methods", "hodec.rules", "hodec.models", "hodec.data", "hodec.changes"):
        return True
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        try:
            return hasattr(importlib.import_module(home), last)
        except ModuleNotFoundError:
            outer, _, name = home.rpartition(".")
            return hasattr(getattr(importlib.import_module(outer), name), last)
    return True


@pytest.mark.parametrize("name", TEXTS)
def test_calls_have_arguments_that_exist(name):
    for dotted, text in re.findall(r"hodec\.([A-Za-z_][\w.]*)\(([^()`]*)\)", TEXTS[name]):
        if (
            dotted == "AdmmTrainerCallback"
        ):  # of a package that need not be there; tests/admm/test_loops_page.py runs it
            continue
        subject: object = hodec
        for part in dotted.split("."):
            subject = getattr(subject, part)
        taken = inspect.signature(subject).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
            assert set(re.findall(r"\b(\w+)=", text)) <= set(taken), dotted


def test_the_readme_is_one_screen_and_shows_what_hodec_does():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 110
    assert "docs/figures/what_it_does.svg" in readme
    assert "does not win" in readme.split("## Results")[1].split("\n\n")[1]


def numbers(text: str) -> set[str]:
    """The decimal numbers of a text, without what a multiplication sign or a per cent sign makes of them."""
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?!\d|\.\d|[a-wyz])", text))


def measured() -> set[str]:
    """Numbers of the pages that say how they were measured, and their roundings to fewer decimals."""
    sources = [text for name, text in TEXTS.items() if name not in ("README.md", "docs/choose.md")]
    sources += [path.read_text(encoding="utf-8") for path in (ROOT / "experiments").rglob("README.md")]
    found = numbers(" ".join(sources))
    return found | {f"{float(one):.{places}f}" for one in found for places in (1, 2)}


@pytest.mark.parametrize("name", ["README.md", "docs/choose.md"])
def test_numbers_are_those_that_were_measured(name):
    assert numbers(TEXTS[name]) - {"2.0"} <= measured()  # the licence


# -- Python ----------------------------------------------------------------------------------------------------------


class Module(pytorch_lightning.LightningModule):
    """What the callback trains."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pytorch_lightning.Trainer(**quiet, enable_checkpointing=False, **options)


def given():
    """What the pages say that the reader has: a net, data, a score."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 4)
    )
    x = torch.randn(8, 3, 8, 8)
    loader = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4), batch_size=4)

    def accuracy(net, batches=loader):
        net.eval()
        with torch.no_grad():
            return sum(float((net(a).argmax(1) == b).float().mean()) for a, b in batches) / len(batches)

    names = {"model": model, "x": x, "loader": loader, "train_loader": loader, "accuracy": accuracy, "epochs": 1}
    names |= {"Trainer": trainer, "module": Module(model), "loss": F.cross_entropy, "hodec": hodec}
    return names | {"optimizer": torch.optim.SGD(model.parameters(), lr=0.05)}


# the same calls as the README's, and a Trainer and an ONNX file
SLOW = [pytest.param(f"docs/{name}.md", marks=pytest.mark.slow) for name in ("quickstart", "howto/loop")]


@pytest.mark.parametrize("name", ["README.md", *SLOW])
def test_python_runs_as_it_stands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    for block in blocks(TEXTS[name], "python"):
        exec(compile(block, name, "exec"), names)
    assert isinstance(names["small"], nn.Module)
    assert Path("small.safetensors").is_file()
    fused = names["fast"](names["x"])
    assert fused.shape == names["model"].eval()(names["x"]).shape
