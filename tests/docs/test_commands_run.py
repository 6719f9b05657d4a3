"""The commands of README, docs and --help are carried out, in the order of their page, on nets and data small enough.

What a reader has to bring lies in the folder under the name of the page: ``model.onnx``, ``calib.npz``, ``PATH``,
``outputs/DAY/TIME``. A run of ``train.py`` gets fewer epochs and images, one value of each sweep and one trial of a
sweeper. Left to tests of their own: launchers of clusters, several devices, what trains or measures for minutes.
"""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs  # noqa: F401  (it has resnet8)
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from small_graphs import FLOAT, node, numbers, save
from test_pages import EXAMPLES, TEXTS, commands
from train_script import Forked, wait

from hodec.cli import main as cli
from hodec.models import build_model

ELSEWHERE = ("local_jobs", "ray_jobs", "slurm_jobs", "trainer.devices=")
SMALL = {
    "pretrain_epochs": "0", "dense_epochs": "1", "retrain_epochs": "1", "bn_batches": "1", "trainer.threads": "1",
    "trainer.accelerator": "cpu", "data.batch_size": "4", "optimizer.lr": "1e-3", "optimizer.retrain_lr": "1e-3",
}  # fmt: skip
FAKE = {"data": "fake", "data.fake_size": "24", "data.image_size": "16", "data.val_fraction": "0.25"}
PNG = {"data.image_size": "64", "data.val_fraction": "0.25", "data.num_workers": "0", "data.eval_batch_size": "4"}
PAGES = [name for name in TEXTS if any(page == name and words[0] in ("hodec", "python") for page, words in commands())]
# docs/extend.md has a test of its own, which has the package that its commands name.
TRIED = [name for name in PAGES if name != "docs/extend.md"]


def smaller(words):
    """The arguments of train.py with fewer epochs and images, one value of each sweep, one trial."""
    given = dict(word.partition("=")[::2] for word in words if "=" in word)
    sweeper = "hydra/sweeper" in given
    given = {key: value if sweeper else first(value) for key, value in given.items()}
    data = PNG if given.get("data") == "image_folder" else FAKE
    given = {key: value for key, value in given.items() if key != "data.download"} | SMALL | data
    if sweeper:
        given["hydra.sweeper.n_trials"] = "1"
    if "logger" in given:
        given["logger.mode"] = "offline"
    return [*(["-m"] if "-m" in words else []), *(f"{key}={value}" for key, value in given.items())]


def first(value):
    """The first of several values; lists and mappings are one."""
    return value if value[:1] in "[{" else value.partition(",")[0]


def weights_for(name, folder, classes):
    """``WEIGHTS`` of a net of that name: the file."""
    save_file(build_model(name, in_channels=3, num_classes=classes).state_dict(), folder / "weights.safetensors")
    return "weights.safetensors"


def model_file(path):
    """Images of any size, (N, 3, H, W) -> (N, 10); its widest convolution has rank 4."""
    low = (numbers(64, 4) @ numbers(4, 576)).reshape(64, 64, 3, 3)
    nodes = [
        node("Conv", "x w1 b1", "h1", pads=[1, 1, 1, 1]), node("Relu", "h1", "h2"),
        node("Conv", "h2 w2 b2", "h3", pads=[1, 1, 1, 1]), node("Relu", "h3", "h4"),
        node("GlobalAveragePool", "h4", "h5"), node("Flatten", "h5", "h6"), node("Gemm", "h6 w3 b3", "y", transB=1),
    ]  # fmt: skip
    weights = {"w1": numbers(64, 3, 3, 3), "w2": low, "w3": numbers(10, 64)}
    weights |= {f"b{k}": np.zeros(size, np.float32) for k, size in enumerate((64, 64, 10), 1)}
    save(path, nodes, weights, inputs={"x": ("n", 3, "h", "w")}, outputs=("y",))


def speech_file(path):
    """Sound (N, 512), a state (2, N, 128) and a rate -> (N, 128)."""
    nodes = [
        node("Unsqueeze", "input one", "h1"), node("Conv", "h1 w1", "h2"), node("Conv", "h2 w2", "h3"),
        node("GlobalAveragePool", "h3", "h4"), node("Flatten", "h4", "h5"), node("Cast", "sr", "h6", to=FLOAT),
        node("Div", "h5 h6", "h7"), node("ReduceSum", "state zero", "h8", keepdims=0), node("Add", "h7 h8", "y"),
    ]  # fmt: skip
    weights = {"w1": numbers(128, 1, 5), "w2": numbers(128, 128, 5), "one": np.array([1]), "zero": np.array([0])}
    rate = helper.make_tensor_value_info("sr", TensorProto.INT64, ())
    sizes = {"input": ("n", 512), "state": (2, "n", 128)}
    save(path, nodes, weights, inputs=sizes, outputs=("y",), extra_inputs=(rate,))


@pytest.fixture
def brought(tmp_path, monkeypatch, finished):
    """The folder with all that the pages say that a reader has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    model_file(tmp_path / "model.onnx")
    speech_file(tmp_path / "speech.onnx")
    generator = np.random.default_rng(1)
    images = generator.standard_normal((32, 3, 24, 24)).astype(np.float32)
    np.savez("calib.npz", x=images)
    np.save("y.npy", np.arange(32) % 10)
    Path("loader.py").write_text("import numpy as np\n\n\ndef batches():\n    yield dict(np.load('calib.npz'))\n")
    Path("score.py").write_text(
        "import numpy as np\n\n\ndef accuracy(run):\n    return float(run(dict(np.load('calib.npz')))['y'].mean())\n"
    )
    for part in ("photos", *(f"PATH/{split}/{name}" for split in ("train", "test") for name in ("cat", "dog"))):
        Path(part).mkdir(parents=True)
        for k in range(16):
            Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(f"{part}/{k}.png")
    for run in ("outputs/DAY/TIME", "outputs/RUN", "outputs/DAY/ONE", "outputs/DAY/TWO", "multirun/DAY/TIME/0"):
        shutil.copytree(finished[0], run)
    return tmp_path


def test_what_is_tried():
    assert {"README.md", "docs/quickstart.md", "docs/files.md", "docs/ranks.md", "docs/sweeps.md"} <= set(TRIED)


@pytest.mark.slow
@pytest.mark.parametrize("page", TRIED)
def test_commands_of_a_page_do_what_they_say(page, brought, capsys):
    for name, words in commands():
        if name == page:
            carry_out(words, brought, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("example", [one for one in EXAMPLES if "..." not in one])
def test_examples_of_the_help_do_what_they_say(example, brought, capsys):
    carry_out(shlex.split(example), brought, capsys)


def carry_out(words, folder, capsys):
    match words:
        case ["python", "train.py", "--help"]:
            train(["--help"], folder)
        case ["uv", "run", "python", "train.py", *rest] | ["python", "train.py", *rest] | ["hodec", "train", *rest]:
            if not any(word in " ".join(rest) for word in ELSEWHERE):
                train(with_places(smaller(rest), folder), folder)
        case ["hodec", "compare", *_]:  # races of hours; tests/experiment/test_arms.py runs small ones
            pass
        case ["hodec", *rest]:
            call(rest, folder, capsys)


def train(argv, folder):
    log = folder / "log"
    log.unlink(missing_ok=True)
    code = wait(Forked(*argv, log=log))
    assert code == 0, f"{argv}\n{log.read_text()[-3000:]}"


def with_places(argv, folder):
    """The arguments with the net's weights and the folder of an earlier run under the names that they give."""
    given = dict(word.partition("=")[::2] for word in argv)
    if given.get("init") == "WEIGHTS":
        name = f"torchvision/{given['model.name']}" if given["model"] == "torchvision" else given["model"]
        name = name.replace("resnet20", "resnet8")  # as Forked builds it
        given["init"] = weights_for(name, folder, 2 if given["data"] == "image_folder" else 10)
    if "/RUN/" in given.get("init_stage", ""):
        (run, *_) = sorted(path.parent.name for path in folder.glob("multirun/rho/*/metrics.json"))
        given["init_stage"] = given["init_stage"].replace("RUN", run)
    return [f"{key}={value}" if value else key for key, value in given.items()]


def call(argv, folder, capsys):
    """Run a verb; what it is to write is not there, what it reads is."""
    if "--weights" in argv:
        file = weights_for(argv[argv.index("--model") + 1], folder, 2)  # as PATH has classes
        argv = [file if word == "WEIGHTS" else word for word in [*argv, "--num-classes", "2"]]
    if "-o" in argv and "--force" not in argv:
        output = Path(argv[argv.index("-o") + 1])
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    if argv[0] in ("bench", "show") and not Path(argv[-1]).exists() and "small.onnx" in argv:
        shutil.copy("model.onnx", "small.onnx")  # where nothing paid
    code = cli.main(argv)
    said = capsys.readouterr()
    assert code == 0 or (argv[0] == "compress" and code == 3), f"{argv}: {said.err}"
