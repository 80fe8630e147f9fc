"""A nanoGPT-style model over characters whose MLP is DampedSineMLP: `python examples/nanogpt_mlp.py --data input.txt`.

Everything but that one line is plain torch: what changes in a model of your own is `nn.Linear, nn.GELU, nn.Linear` becoming
`DampedSineMLP`. `--mlp gelu` trains the other one, to compare. Without --data it reads the prose that comes with Python.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from psann_fast.data import default_corpus
from psann_kernels import DampedSineMLP
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        # A frequency of 3 rather than psann's 1: it learns better (README, "How well it learns").
        self.mlp = (
            DampedSineMLP(width, 4 * width, frequency=3.0)
            if mlp == "sine"
            else nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, vocabulary); T is at most the window."""

    def __init__(self, vocabulary: int, window: int, layers: int, heads: int, width: int, mlp: str) -> None:
        super().__init__()
        self.window = window
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(window, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def write(self, ids: Tensor, count: int) -> Tensor:
        for _ in range(count):
            logits = self(ids[:, -self.window :])[:, -1]
            ids = torch.cat((ids, torch.multinomial((logits / 0.8).softmax(-1), 1)), 1)
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a text file")
    parser.add_argument("--mlp", choices=["sine", "gelu"], default="sine")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    text = "\n".join(default_corpus()) if options.data is None else Path(options.data).read_text(encoding="utf-8")
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    stream = torch.tensor([number[c] for c in text])
    training, validation = stream.tensor_split([int(0.9 * len(stream))])

    def batch(part: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(part) - options.window, (options.batch,))
        rows = torch.stack([part[start : start + options.window + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]

    def loss_of(part: Tensor) -> Tensor:
        inputs, targets = batch(part)
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    model = GPT(len(characters), options.window, options.layers, options.heads, options.width, options.mlp)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(characters)} characters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.1)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.steps - warmup), 0.1 * options.lr),
        ],
        [warmup],
    )
    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        loss = loss_of(training)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, options.steps // 5) == 0:
            with torch.no_grad():
                held_out = torch.stack([loss_of(validation) for _ in range(10)]).mean()
            print(f"step {step:5}   loss {loss.item():.3f}   held out {held_out.item():.3f}   {time.perf_counter() - began:.0f} s")
    print("".join(characters[i] for i in model.write(stream[None, : options.window], 200)[0].tolist()))


if __name__ == "__main__":
    main()
