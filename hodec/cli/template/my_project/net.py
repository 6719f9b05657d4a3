"""The net: ``model=custom model._target_=my_project.net.Net``."""

from torch import Tensor, nn


class Net(nn.Module):
    """Three convolutions and a linear layer.

    Args:
        in_channels, num_classes: hodec gives those of the data, to any net with arguments of these names.
        width: of the first convolution; a setting of yours, ``+model.width=16``.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((in_channels, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> scores (N, num_classes)."""
        scores: Tensor = self.classifier(self.features(images))
        return scores
