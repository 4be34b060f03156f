"""The reference network: a small residual encoder whose lesion map is also its only road to a probability."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LABELS = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
WIDTHS = (16, 32, 64, 96, 128)
MAP_WIDTH = 32


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):  # type: ignore[misc]
    """Two 3×3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to the same."""
        return functional.relu(x + self.second(self.first(x)))


class Network(nn.Module):  # type: ignore[misc]
    """Slabs to map logits and slab logits.

    Every label has its own map at a quarter of the input's resolution. A label's slab logit is an affine function of
    the highest 3×3 mean of its map, so that a slab is called positive only where the map shows why.
    """

    def __init__(self) -> None:
        super().__init__()
        w = WIDTHS
        self.stem = _convolution(3, w[0], 2)
        self.stage1 = nn.Sequential(_convolution(w[0], w[1], 2), Residual(w[1]))
        self.stage2 = nn.Sequential(_convolution(w[1], w[2], 2), Residual(w[2]))
        self.stage3 = nn.Sequential(_convolution(w[2], w[3], 2), Residual(w[3]))
        self.stage4 = nn.Sequential(_convolution(w[3], w[4], 2), Residual(w[4]))
        self.lateral = nn.ModuleList([nn.Conv2d(width, MAP_WIDTH, 1) for width in w[1:]])
        self.fuse = _convolution(MAP_WIDTH, MAP_WIDTH)
        self.head = nn.Conv2d(MAP_WIDTH, len(LABELS), 1)
        nn.init.constant_(self.head.bias, -4.0)  # lesions are rare: start there
        self.scale = nn.Parameter(torch.ones(len(LABELS)))
        self.shift = nn.Parameter(torch.zeros(len(LABELS)))

    def forward(self, slabs: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, 256, 256) in 0..1 to map logits (n, 6, 64, 64) and slab logits (n, 6), in the order of LABELS."""
        features = [self.stage1(self.stem(slabs))]
        for stage in (self.stage2, self.stage3, self.stage4):
            features.append(stage(features[-1]))
        top = self.lateral[3](features[3])
        for level in (2, 1, 0):
            top = functional.interpolate(top, scale_factor=2.0, mode="nearest") + self.lateral[level](features[level])
        maps = self.head(self.fuse(functional.relu(top)))
        peak = functional.avg_pool2d(maps, 3, 1, 1).amax(dim=(2, 3))
        return maps, peak * functional.softplus(self.scale) + self.shift


class Shipped(nn.Module):  # type: ignore[misc]
    """The network as the appliance sees it: probabilities (n, 6) and the map of "any" (n, 1, 64, 64), both 0..1."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, slabs: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, 256, 256) in 0..1 to (probabilities, lesion map)."""
        maps, logits = self.network(slabs)
        return torch.sigmoid(logits), torch.sigmoid(maps[:, :1])
