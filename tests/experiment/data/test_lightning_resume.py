"""Lightning calls the loader as it expects: epochs are set, and a run goes on in mid-epoch, batch for batch."""

import pytest
import torch
from torch import nn

from hodec.experiment.data.images import TensorSplit
from hodec.experiment.data.loaders import TensorLoader
from hodec.experiment.data.options import Digits

pl = pytest.importorskip("pytorch_lightning")

BATCHES = 5  # per epoch
EPOCHS = 3


def loader():
    images = torch.randint(0, 256, (42, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    option = Digits(batch_size=8, mean=[0.5], std=[0.5], augment=True, crop_padding=1, flip=True)
    return TensorLoader(TensorSplit(images, torch.arange(42)), option, seed=0, train=True)


class Recorder(pl.LightningModule):
    """Keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, batch[1].tolist(), batch[0].sum().item()))
        return self.net(batch[0].flatten(1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def keep(folder, **when):
    return pl.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, filename="{step}", auto_insert_metric_name=False, **when
    )


def fit(folder, *, resume=None):
    """Train, with a checkpoint after every step in ``steps`` and at the end of every epoch in ``epochs``."""
    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        callbacks=[
            keep(folder / "steps", every_n_train_steps=1),
            keep(folder / "epochs", every_n_epochs=1, save_on_train_epoch_end=True),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and loggers is none of ours
def test_run_goes_on_batch_for_batch_from_any_step(tmp_path):
    whole = fit(tmp_path / "whole")
    assert [epoch for epoch, *_ in whole.seen] == [epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]
    alone = loader()
    for epoch in range(EPOCHS):
        alone.sampler.set_epoch(epoch)
        expected = [(epoch, y.tolist(), x.sum().item()) for x, y in alone]
        assert whole.seen[epoch * BATCHES : (epoch + 1) * BATCHES] == expected
    saved = ["steps/4", "steps/5", "steps/11", "epochs/10"]
    for name in saved:
        resumed = fit(tmp_path / "resumed" / name, resume=tmp_path / "whole" / f"{name}.ckpt")
        step = int(name.split("/")[1])
        assert resumed.seen == whole.seen[step:], f"resumed from {name}"
        torch.testing.assert_close(resumed.net.weight, whole.net.weight, rtol=0, atol=0)
