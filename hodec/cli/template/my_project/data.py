"""The data: ``data=datamodule data._target_=my_project.data.Digits``."""

import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split


class Digits(LightningDataModule):
    """Handwritten digits of scikit-learn, floats (1, 8, 8) in 0..1: three fifths train, one chooses, one tests.

    Args:
        batch_size: images per step; hodec takes it from the loaders.
    """

    num_classes = 10  # hodec reads this

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        source = load_digits()
        images = torch.from_numpy(source.images).float().unsqueeze(1) / 16
        whole: Dataset[tuple[torch.Tensor, ...]] = TensorDataset(images, torch.from_numpy(source.target).long())
        self.parts = random_split(whole, [0.6, 0.2, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(self.parts[1], 256)

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(self.parts[2], 256)
