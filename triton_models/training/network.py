"""The reference network: a small residual encoder whose lesion map is also its only road to a probability.

It sees a slab between its two neighbours (2.5D): their windows one after the other, foot to head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .samples import MAP_SIZE

INPUTS = 9
"""Three windows of three slabs."""
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


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, 2), *(Residual(outputs) for _ in range(blocks)))


class Network(nn.Module):  # type: ignore[misc]
    """Slabs to map logits and slab logits.

    Every label has its own map at a quarter of the input's resolution. A label's slab logit is an affine function of
    two peaks of its map, of single pixels and of 3×3 means, so that a slab is called positive only where the map shows
    why. The single pixel is there for lesions that cover little more than one.
    """

    def __init__(self) -> None:
        super().__init__()
        w = WIDTHS
        # Deepest where a pixel is small: what is missed most is thin or covers little.
        self.stem = nn.Sequential(
            _convolution(INPUTS, w[0], 2), _convolution(w[0], w[0]), Residual(w[0]), Residual(w[0])
        )
        self.stage1 = _stage(w[0], w[1], 3)
        self.stage2 = _stage(w[1], w[2], 3)
        self.stage3 = _stage(w[2], w[3], 2)
        self.stage4 = _stage(w[3], w[4], 2)
        self.lateral = nn.ModuleList([nn.Conv2d(width, MAP_WIDTH, 1) for width in w[1:]])
        self.fuse = _convolution(MAP_WIDTH, MAP_WIDTH)
        self.refine = Residual(MAP_WIDTH)
        self.head = nn.Conv2d(MAP_WIDTH, len(LABELS), 1)
        nn.init.constant_(self.head.bias, -4.0)  # lesions are rare: start there
        self.scale = nn.Parameter(torch.zeros(2, len(LABELS)))
        self.shift = nn.Parameter(torch.zeros(len(LABELS)))

    def forward(self, slabs: Tensor) -> tuple[Tensor, Tensor]:
        """Slabs to map logits (n, 6, h/4, w/4) and slab logits (n, 6), in the order of LABELS.

        Args:
            slabs: (n, 9, h, w) in 0..1; h and w are 256 but in training, where less is looked at in a step.
        """
        features = [self.stage1(self.stem(slabs))]
        for stage in (self.stage2, self.stage3, self.stage4):
            features.append(stage(features[-1]))
        top = self.lateral[3](features[3])
        for level in (2, 1, 0):
            top = functional.interpolate(top, scale_factor=2.0, mode="nearest") + self.lateral[level](features[level])
        maps = self.head(self.refine(self.fuse(functional.relu(top))))
        pixel = maps.amax(dim=(2, 3))
        mean = functional.avg_pool2d(maps, 3, 1, 1).amax(dim=(2, 3))
        scale = functional.softplus(self.scale)
        return maps, pixel * scale[0] + mean * scale[1] + self.shift


class Shipped(nn.Module):  # type: ignore[misc]
    """The network as the appliance sees it: probabilities (n, 6) and the map of "any" (n, 1, 64, 64), both 0..1.

    It looks at each slab twice, as it is and mirrored left to right, and answers with the mean of both logits.

    Args:
        network: the trained one.
        slope, shift: of each label's logit (6,), so that a study's highest probability is a calibrated one.
    """

    def __init__(self, network: Network, slope: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("slope", slope)
        self.register_buffer("shift", shift)

    def forward(self, slabs: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 9, 256, 256) in 0..1 to (probabilities, lesion map)."""
        maps, logits = self.network(torch.cat([slabs, slabs.flip(3)]))
        # Fixed shapes: what is told from the input's would be more nodes than the network has.
        both = maps[:, :1].reshape(2, -1, 1, MAP_SIZE, MAP_SIZE)
        lesion_map = torch.sigmoid((both[0] + both[1].flip(3)) / 2)
        logits = logits.reshape(2, -1, len(LABELS)).mean(dim=0)
        return torch.sigmoid(logits * self.slope + self.shift), lesion_map
