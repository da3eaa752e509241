"""Demo models in plain PyTorch: each shows one thing that a pipeline must get right."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxpipe.demos.seed import seeded

N_CLASSES = 10


class Mlp(nn.Module):
    """Linear layers and ReLUs, then the cross-entropy."""

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(n_layers)))
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """``x`` [batch, width], ``target`` int64 [batch] -> the mean loss, a scalar."""
        return F.cross_entropy(self.head(self.layers(x)), target)


def mlp(*, seed: int = 0, batch: int = 16, width: int = 32, n_layers: int = 6) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The simplest chain: positional inputs, a bare scalar loss."""
    with seeded(seed):
        return Mlp(width, n_layers), (torch.randn(batch, width), torch.randint(N_CLASSES, (batch,)))


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm around an identity skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(hidden)))


class Cnn(nn.Module):
    """A residual network: BatchNorm buffers, in-place ReLU, max-pool, dropout."""

    def __init__(self, channels: int, n_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(n_blocks)))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(channels, N_CLASSES)

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` [batch, 3, size, size], ``label`` int64 [batch] -> the mean loss, the logits [batch, classes]."""
        features = self.blocks(self.pool(self.stem(image))).mean(dim=(2, 3))
        logits = self.head(self.dropout(features))
        return F.cross_entropy(logits, label), logits


def cnn(
    *, seed: int = 0, batch: int = 16, size: int = 16, channels: int = 16, n_blocks: int = 4
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Buffers that change in forward, short skips, random masks; the loss is the first of two outputs."""
    with seeded(seed):
        return Cnn(channels, n_blocks), (torch.randn(batch, 3, size, size), torch.randint(N_CLASSES, (batch,)))


class Unet(nn.Module):
    """An encoder and a decoder of equal depth; the first encoder level feeds the last decoder level, and so on."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(depth + 1)]
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(narrow, wide, 3, stride=2, padding=1) for narrow, wide in pairwise(widths))
        self.up = nn.ModuleList(nn.Conv2d(narrow + wide, narrow, 3, padding=1) for narrow, wide in pairwise(widths))
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """``image`` and ``target`` [batch, 3, size, size] -> the mean squared error, a scalar."""
        levels = [F.gelu(self.stem(image))]
        for conv in self.down:
            levels.append(F.gelu(conv(levels[-1])))
        x = levels.pop()
        for conv in reversed(self.up):
            wider = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.gelu(conv(torch.cat([levels.pop(), wider], dim=1)))
        return F.mse_loss(self.head(x), target)


def unet(
    *, seed: int = 0, batch: int = 8, size: int = 16, channels: int = 8, depth: int = 3
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Long skips: values that cross every cut between the first and the last stage."""
    with seeded(seed):
        image = torch.randn(batch, 3, size, size)
        return Unet(channels, depth), (image, image.roll(1, dims=-1))


class Tied(nn.Module):
    """One table embeds the tokens at the start and scores them at the end."""

    def __init__(self, vocabulary: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(n_layers))
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """``tokens`` and ``target`` int64 [batch, length] -> the mean loss, a scalar."""
        logits = self.head(self.layers(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def tied(
    *, seed: int = 0, batch: int = 8, length: int = 12, vocabulary: int = 64, width: int = 32, n_layers: int = 4
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A weight that the first and the last stage share: its gradient is the sum of both uses."""
    with seeded(seed):
        tokens = torch.randint(vocabulary, (batch, length))
        return Tied(vocabulary, width, n_layers), (tokens, tokens.roll(-1, dims=-1))


class Multi(nn.Module):
    """Two towers, one for each input, drawn together."""

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.left = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(n_layers)))
        self.right = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(n_layers)))

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """``left`` and ``right`` [batch, width] -> ``loss``, a scalar, and both ``codes`` [batch, 2, width]."""
        codes = torch.stack([self.left(left), self.right(right)], dim=1)
        return {"loss": F.mse_loss(codes[:, 0], codes[:, 1]), "codes": codes}


def multi(*, seed: int = 0, batch: int = 16, width: int = 24, n_layers: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two branches with nothing between them until the end; keyword inputs and a dict of outputs."""
    with seeded(seed):
        return Multi(width, n_layers), {"left": torch.randn(batch, width), "right": torch.randn(batch, width)}
