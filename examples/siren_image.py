"""Fits an image with a SIREN whose sines are one kernel each: `python examples/siren_image.py --out rings.png`.

The network maps a point (x, y) in [-1, 1]^2 to a color; the image is made here from formulas, so nothing is downloaded. Written is
the original on the left and the network's on the right. About 20 seconds on two cores at the default size.
"""

from __future__ import annotations

import argparse
import math

import torch
from matplotlib.image import imsave
from psann_kernels import DampedSine, explain
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY = 30.0  # radians per unit, SIREN's


def image(side: int) -> tuple[Tensor, Tensor]:
    """(points (side^2, 2), colors (side^2, 3) in 0 to 1): rings over a checkerboard, and a disc with a hard edge."""
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    rings = 0.5 + 0.5 * torch.cos(18 * radius)
    board = ((x * 4).floor() + (y * 4).floor()).remainder(2)
    disc = ((x - 0.35).square() + (y + 0.3).square() < 0.09).float()
    colors = torch.stack((rings * (1 - disc) + disc, 0.3 + 0.4 * board * (1 - disc), 0.9 - 0.6 * rings), -1)
    return torch.stack((x, y), -1).view(-1, 2), colors.view(-1, 3)


def siren(width: int, hidden_layers: int, backend: str) -> nn.Sequential:
    """Linear layers and damped sines in turns, with SIREN's initial weights (Sitzmann et al. 2020, arXiv:2006.09661)."""
    widths = [2] + [width] * (hidden_layers + 1) + [3]
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        linear = nn.Linear(inputs, outputs)
        limit = 1 / inputs if number == 0 else math.sqrt(6 / inputs) / FREQUENCY
        nn.init.uniform_(linear.weight, -limit, limit)
        layers += [linear, DampedSine(outputs, frequency=FREQUENCY, damping=0.01, backend=backend)]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128, help="pixels a side")
    parser.add_argument("--width", type=int, default=128, help="features of a hidden layer")
    parser.add_argument("--hidden-layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--backend", default="auto", help="auto, triton, native or torch")
    parser.add_argument("--out", default="siren.png")
    options = parser.parse_args()

    torch.manual_seed(0)
    points, colors = image(options.side)
    model = siren(options.width, options.hidden_layers, options.backend)
    print(*explain(model), sep="\n")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, options.steps + 1):
        loss = F.mse_loss(model(points), colors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"step {step:5}   PSNR {-10 * math.log10(loss.item()):.1f} dB")
    with torch.no_grad():
        fitted = model(points).clamp(0, 1)
    both = torch.cat([t.view(options.side, options.side, 3) for t in (colors, fitted)], 1)
    imsave(options.out, both.numpy())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
