"""Well-known models in plain PyTorch and from Hugging Face configurations; ``known_profiles.py`` makes their layer graphs.

Sizes are those of the papers where the model has its plain name; "-like" ones have its structure.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Sequential):
    """A convolution of a square or a row, with BatchNorm and, unless told otherwise, ReLU; keeps the size at stride 1."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int] = 1, stride: int = 1, relu: bool = True):
        height, width = (size, size) if isinstance(size, int) else size
        conv = nn.Conv2d(inputs, outputs, (height, width), stride, (height // 2, width // 2), bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


def vgg16() -> nn.Module:
    """Simonyan and Zisserman, 2014, configuration D."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, n in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(n):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.Linear(4096, 1000))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = Conv(inputs, width), Conv(width, width, 3, stride)
        self.c = Conv(width, 4 * width, relu=False)
        changes = stride > 1 or inputs != 4 * width
        self.down = Conv(inputs, 4 * width, 1, stride, relu=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(self.b(self.a(x))) + self.down(x))


def resnet50() -> nn.Module:
    """He et al., 2015."""
    blocks, inputs = [], 64
    for width, n, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(n):
            blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(Conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *blocks, *_head(inputs))


def _head(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]


class Branches(nn.Module):
    """Every branch on the same input, their outputs side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception() -> nn.Module:
    """Blocks of Inception-v3 (Szegedy et al., 2015): wide kernels, rows and columns, and a reduction."""

    def square(inputs: int, pool: int) -> nn.Module:
        five, three = [Conv(inputs, 48), Conv(48, 64, 5)], [Conv(inputs, 64), Conv(64, 96, 3), Conv(96, 96, 3)]
        return Branches(Conv(inputs, 64), *map(_chain, (five, three, [nn.AvgPool2d(3, 1, 1), Conv(inputs, pool)])))

    def rows(width: int) -> nn.Module:
        seven = [Conv(768, width), Conv(width, width, (1, 7)), Conv(width, 192, (7, 1))]
        pool = [nn.AvgPool2d(3, 1, 1), Conv(768, 192)]
        long = [Conv(768, width), Conv(width, width, (7, 1)), Conv(width, width, (1, 7)), Conv(width, 192, (7, 1))]
        return Branches(Conv(768, 192), _chain(seven), _chain(long), _chain(pool))

    reduce = Branches(
        Conv(288, 384, 3, 2), _chain([Conv(288, 64), Conv(64, 96, 3), Conv(96, 96, 3, 2)]), nn.MaxPool2d(3, 2, 1)
    )
    stem = [Conv(3, 32, 3, 2), Conv(32, 64, 3), nn.MaxPool2d(3, 2, 1), Conv(64, 192, 3), nn.MaxPool2d(3, 2, 1)]
    body = [square(192, 32), square(256, 64), square(288, 64), reduce, rows(128), rows(160), rows(160), rows(192)]
    return nn.Sequential(*stem, *body, *_head(768))


def _chain(modules: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*modules)


class Dense(nn.Module):
    """Each convolution reads all that came before in the block."""

    def __init__(self, inputs: int, growth: int, n: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_chain([Conv(inputs + i * growth, 128), Conv(128, growth, 3)]) for i in range(n))

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for step in self.steps:
            made.append(step(torch.cat(made, 1)))
        return torch.cat(made, 1)


def densenet() -> nn.Module:
    """Blocks of 6, 12, 24 and 16 as in DenseNet-121 (Huang et al., 2016)."""
    layers: list[nn.Module] = [Conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for n in (6, 12, 24, 16):
        layers += [Dense(width, 32, n), Conv(width + 32 * n, (width + 32 * n) // 2), nn.AvgPool2d(2, ceil_mode=True)]
        width = (width + 32 * n) // 2
    return nn.Sequential(*layers, *_head(width))


class Cell(nn.Module):
    """Five sums of two operators on the outputs of the two cells before, side by side."""

    def __init__(self, before: int, last: int, width: int, stride: int) -> None:
        super().__init__()
        self.left, self.right = Conv(before, width, 1, stride), Conv(last, width, 1, stride)
        self.steps = nn.ModuleList(Conv(width, width, size) for size in (3, 5, 3, 5, 3))
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        a, b = self.left(F.adaptive_avg_pool2d(before, last.shape[-2:])), self.right(last)
        s = self.steps
        return torch.cat(
            [s[0](b) + b, s[1](a) + s[2](b), self.pool(b) + a, self.pool(a) + self.pool(a), s[3](a) + s[4](a)], 1
        )


class Cells(nn.Module):
    """Cells as in NASNet (Zoph et al., 2017): 3 x 4 normal ones and a reduction before each but the first four."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.cells, widths = Conv(3, 32, 3, 2), nn.ModuleList(), [32, 32]
        for i in range(14):
            stride = 2 if i in (4, 9) else 1
            width *= stride
            self.cells.append(Cell(widths[-2], widths[-1], width, stride))
            widths.append(5 * width)
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last.mean((2, 3)))


class Attention(nn.Module):
    """Additive, of every decoder step over every encoder step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(state), self.key(memory), memory)


class Lstm(nn.Module):
    def __init__(self, inputs: int, width: int, both_ways: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, batch_first=True, bidirectional=both_ways)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


class Gnmt(nn.Module):
    """Wu et al., 2016, with 8 LSTM layers on either side: the first of the encoder both ways, residuals from the third on,
    what attention finds beside the input of every layer of the decoder."""

    def __init__(self, width: int = 1024, words: int = 32000) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.encoder = nn.ModuleList([Lstm(width, width, True), Lstm(2 * width, width)])
        self.encoder.extend(Lstm(width, width) for _ in range(6))
        self.decoder = nn.ModuleList([Lstm(width, width), *(Lstm(2 * width, width) for _ in range(7))])
        self.attention, self.dropout = Attention(width), nn.ModuleList(nn.Dropout(0.2) for _ in range(16))
        self.words = nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.source(source), self.target(target)
        for i, layer in enumerate(self.encoder):
            out = layer(self.dropout[i](x))
            x = x + out if i > 1 else out
        y = self.decoder[0](self.dropout[8](y))
        found = self.attention(y, x)
        for i, layer in enumerate(self.decoder[1:]):
            out = layer(torch.cat([self.dropout[9 + i](y), found], 2))
            y = y + out if i else out
        return self.words(y)


def bert() -> nn.Module:
    """Devlin et al., 2018, base, with the masked language model's loss."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig())


def gpt2() -> nn.Module:
    """Radford et al., 2019, the smallest."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False))
