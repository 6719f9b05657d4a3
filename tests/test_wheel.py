"""The wheel in an empty environment: the library with its core alone, and the experiment with all extras.

Slow: builds the wheel and installs torch twice. Needs uv on the path, and an index or uv's cache.
"""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds the wheel and the environments"),
]
ROOT = Path(__file__).parents[1]

# What a user of the library has with `pip install hodec`: no Lightning, no Hydra, no torchvision.
LIBRARY = """
import importlib.util, sys, torch, hodec
from torch import nn
for name in ("hydra", "pytorch_lightning", "lightning", "sklearn", "matplotlib", "wandb", "torchvision", "onnx"):
    assert importlib.util.find_spec(name) is None, f"{name} came along"
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
plan = hodec.make_plan(net, hodec.ranks.Manual(4), method="tt", example_input=x[:1])
assert "reduction" in str(plan)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
admm = hodec.Admm(net, plan, optimizer, steps_per_epoch=4)
for epoch in range(3):
    for step in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        admm.before_step(); optimizer.step(); admm.after_step()
    admm.end_epoch()
compressed = admm.convert(batches=[x]).eval()
hodec.save(compressed, "small.safetensors")
assert torch.equal(hodec.load("small.safetensors", net).eval()(x), compressed(x))
fused = hodec.fuse(compressed, example_input=x, target="macs")
torch.testing.assert_close(fused(x), compressed(x), rtol=1e-4, atol=1e-4)
try:
    hodec.AdmmCallback
except ImportError as error:
    assert "hodec[lightning]" in str(error), error
else:
    raise SystemExit("AdmmCallback came without Lightning")
"""

TINY = (
    "data=fake", "data.fake_size=64", "data.fake_classes=4", "data.image_size=8", "data.batch_size=16", "tt_ranks=4",
    "dense_epochs=1", "retrain_epochs=1", "bn_batches=1", "trainer.accelerator=cpu", "trainer.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["uv", "build", "-q", "--wheel", "-o", str(folder)], cwd=ROOT, check=True, timeout=300)
    return next(folder.glob("*.whl"))


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """The scripts' folder of a new environment that holds the wheel."""
    subprocess.run(["uv", "venv", "-q", str(folder)], check=True, timeout=120)
    command = ["uv", "pip", "install", "-q", "--python", str(folder / "bin" / "python"), f"{wheel}{extra}"]
    subprocess.run(command, check=True, timeout=1200)
    return folder / "bin"


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_settings_and_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hodec/py.typed", "hodec/experiment/conf/config.yaml", "hodec/experiment/conf/ranks/budget.yaml"} <= {
        *names
    }


def test_the_core_alone_plans_trains_converts_and_saves(wheel, tmp_path):
    scripts = environment(tmp_path / "core", wheel)
    run(scripts / "python", "-c", LIBRARY, folder=tmp_path)
    text = run(scripts / "hodec", "plan", "--model", "resnet20", "--method", "tucker", "--ranks", "8", folder=tmp_path)
    assert "reduction" in text


def test_with_all_extras_it_trains_in_an_empty_folder(wheel, tmp_path):
    scripts, empty = environment(tmp_path / "all", wheel, "[all]"), tmp_path / "empty"
    empty.mkdir()
    run(scripts / "hodec", "train", *TINY, "hydra.run.dir=one", folder=empty)
    assert (empty / "one" / "report.html").exists()
    run(scripts / "hodec", "train", "-m", *TINY, "seed=0,1", "report=false", "hydra.sweep.dir=sweep", folder=empty)
    assert (empty / "sweep" / "sweep.html").exists()


def test_a_project_of_ones_own_in_an_environment_of_its_own(wheel, tmp_path):
    scripts = environment(tmp_path / "own", wheel, "[experiment]")
    python = str(scripts / "python")
    subprocess.run(["uv", "pip", "install", "-q", "--python", python, "pytest"], check=True, timeout=300)
    run(scripts / "hodec", "init", "mine", folder=tmp_path)
    project = tmp_path / "mine"
    assert "2 passed" in run(python, "-m", "pytest", "-q", folder=project)
    own = ("--trust", "mine", "--config-dir", "conf", "experiment=own", "trainer.accelerator=cpu", "trainer.threads=1")
    run(scripts / "hodec", "train", *own, "hydra.run.dir=out", folder=project)
    assert (project / "out" / "report.html").exists()
    # Installed, its names are choices in any folder and without trust.
    subprocess.run(["uv", "pip", "install", "-q", "--python", python, "--no-deps", project], check=True, timeout=300)
    names = ("model=my_net", "data=my_digits", "ranks=share", "ranks.share=0.25", "method=balanced", "dense_epochs=1")
    run(scripts / "hodec", "train", *names, "trainer.accelerator=cpu", "hydra.run.dir=named", folder=tmp_path)
    text = run(scripts / "hodec", "plan", "--model", "my_net", "--method", "tucker", "--ranks", "4", folder=tmp_path)
    assert "reduction" in text
