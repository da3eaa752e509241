"""Models that are trained with compressed saves, for ``bench_quality.py``: a character GPT, and a CNN on digits."""

import json
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from saved_gradients import bits, by_eager_operators, setting
from torch import Tensor, nn
from torch.nn import functional as F

from fxpipe.demos import text

BATCH, LENGTH, WIDTH = 32, 64, 96
"""Of the text task."""
PARTITIONER = "recompute-attention"

Batch = tuple[tuple[Tensor, ...], dict[str, Tensor]]


class Block(nn.Module):
    """Attention and MLP of a transformer, each behind a LayerNorm and around a skip."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (
            part.view(batch, length, self.n_heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharGpt(nn.Module):
    """A causal language model of characters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(text.VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, 4) for _ in range(3)))
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, text.VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.tokens(input_ids) + self.places.weight)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Digits(nn.Module):
    """Three convolutions with BatchNorm and ReLU, for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 32)
        blocks = []
        for i, (narrow, wide) in enumerate(pairwise(widths)):
            blocks += [nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)] if i == 1 else []
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.features(images).flatten(1)), labels)


def digits_batches(batch: int, seed: int, part: str) -> Iterator[Batch]:
    """Random batches of scikit-learn's digits; every fifth image is for validation, in one batch."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    if part == "validation":
        yield (images[held_out], labels[held_out]), {}
        return
    images, labels = images[~held_out], labels[~held_out]
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        yield (images[chosen], labels[chosen]), {}


def text_batches(seed: int, part: text.Part) -> Iterator[Batch]:
    """Windows of the pages; sixteen batches of fixed ones for validation."""
    batches = text.text_batches(BATCH, LENGTH, seed=seed if part == "train" else 10**6, part=part)
    for index, batch in enumerate(batches):
        if part == "validation" and index == 16:
            return
        yield (), batch


def task(name: str, seed: int) -> tuple[nn.Module, Iterator[Batch], Iterator[Batch], int, float]:
    """A fresh model, its training and validation batches, the number of steps, and the learning rate."""
    torch.manual_seed(seed)
    if name == "digits":
        return Digits(), digits_batches(64, seed, "train"), digits_batches(64, seed, "validation"), 300, 2e-3
    return CharGpt(), text_batches(seed, "train"), text_batches(seed, "validation"), 1000, 3e-3


def train(name: str, seed: int, setting_name: str) -> dict[str, Any]:
    """The validation loss after training with saves as the setting says."""
    torch._dynamo.reset()
    model, training, validation, steps, learning_rate = task(name, seed)
    partitioner, patched, plans = setting(setting_name, PARTITIONER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    with patched:
        compiled = torch.compile(model.train(), backend=by_eager_operators(partitioner))
        for _ in range(steps):
            args, kwargs = next(training)
            optimizer.zero_grad()
            compiled(*args, **kwargs).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        losses = [model(*args, **kwargs).item() for args, kwargs in validation]
    return {"task": name, "seed": seed, "setting": setting_name, "loss": statistics.mean(losses), "bits": bits(plans)}


class Runs:
    """Finished runs, in a file if one is given: a line of JSON each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.done = {(r["task"], r["seed"], r["setting"]): r for r in map(json.loads, lines)}

    def __call__(self, name: str, seed: int, setting_name: str) -> dict[str, Any]:
        key = name, seed, setting_name
        if key not in self.done:
            self.done[key] = train(*key)
            if self.path is not None:
                with self.path.open("a") as file:
                    print(json.dumps(self.done[key]), file=file)
        return self.done[key]
