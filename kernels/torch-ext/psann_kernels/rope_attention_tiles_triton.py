"""What both directions of rope_attention's Triton twin share: the layout of a head's features, rotation, the range of keys that
a tile of queries needs, and how a call becomes compile-time constants.

ROTARY is "none", "pairs" (features 2m and 2m + 1 turn together) or "halves" (m and m + D / 2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .descriptor_triton import described, has_tma, is_describable
from .triton_support import INTERPRET, Configuration, narrow, widen


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x (float32) rounded to `dtype`, as an operand of tl.dot. The interpreter's products take float32, not bits of bfloat16."""
    if INTERPRET:
        return widen(narrow(x, dtype))
    return x.to(dtype)


@triton.jit
def load_operand(pointers, mask):
    """A tile of a tensor as an operand of tl.dot, 0 outside the mask."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRET:
        return widen(x)
    return x


@triton.jit
def load_rows(
    memory, b, h, first, rows, row_stride, c, inside, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_DESCRIBED: tl.constexpr
):  # fmt: skip
    """Rows first to first + BLOCK of one head, (BLOCK, BLOCK_D), as an operand of tl.dot; 0 from `rows` on.

    memory   a pointer to the head's first row; with IS_DESCRIBED, a descriptor of the whole tensor, where b and h place the head
    """
    if IS_DESCRIBED:
        x = tl.reshape(memory.load([b.to(tl.int32), first, h.to(tl.int32), 0]), (BLOCK, BLOCK_D))
        return widen(x) if INTERPRET else x
    else:
        r = first + tl.arange(0, BLOCK)
        return load_operand(memory + r.to(tl.int64)[:, None] * row_stride + c[None, :], (r < rows)[:, None] & inside[None, :])


@triton.jit
def features(D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr):
    """The feature in each of a tile's BLOCK_D columns, and whether it exists."""
    column = tl.arange(0, BLOCK_D)
    if ROTARY == "halves" and D != BLOCK_D:
        # Each half is padded apart, so that the partner of a column is always BLOCK_D / 2 away.
        m = column % (BLOCK_D // 2)
        return column // (BLOCK_D // 2) * (D // 2) + m, m < D // 2
    return column, column < D


@triton.jit
def angles(cos_ptr, sin_ptr, position, exists, max_position, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin of the rows that exist, each (rows, BLOCK_D / 2) float32. A position past the tables gives NaN, no stray read."""
    m = tl.arange(0, BLOCK_D // 2)
    mask = (exists & (position >= 0) & (position < max_position))[:, None] & (m < D // 2)[None, :]
    offset = position.to(tl.int64)[:, None] * (D // 2) + m[None, :]
    missing = tl.where(exists & (position >= max_position), float("nan"), 0.0)[:, None]
    return tl.load(cos_ptr + offset, mask=mask, other=0.0) + missing, tl.load(sin_ptr + offset, mask=mask, other=0.0)


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr):
    """x (ROWS, BLOCK_D) float32, its pairs turned by the angle; -sin turns them back."""
    if ROTARY == "pairs":
        a, b = tl.split(tl.reshape(x, (ROWS, BLOCK_D // 2, 2)))
        return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, BLOCK_D))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, BLOCK_D // 2)), (0, 2, 1)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, BLOCK_D))


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, start_ptr, y_ptr, rows, tokens, heads, shift, max_position, x_b, x_t, x_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y, a contiguous copy of x (B, T, H, D), each row turned by its position: t + shift, or that in its document."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = r // heads
    b, t = token // tokens, token % tokens
    position = t + shift
    if HAS_DOCUMENTS:
        position = token - tl.load(start_ptr + token, mask=r < rows, other=0)
    c, inside = features(D, BLOCK_D, ROTARY)
    here = (r < rows)[:, None] & inside[None, :]

    x = widen(tl.load(x_ptr + (b * x_b + t * x_t + r % heads * x_h)[:, None] + c[None, :], mask=here, other=0.0))
    cos, sin = angles(cos_ptr, sin_ptr, position, r < rows, max_position, D, BLOCK_D)

    y = turn(x, cos, sin, BLOCK_R, BLOCK_D, ROTARY)

    tl.store(y_ptr + r[:, None] * D + c[None, :], narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def whole_tiles(tokens, BLOCK: tl.constexpr):
    """`tokens` rounded down to a multiple of BLOCK, 0 if negative. No product, which in 32 bits would look like an overflow."""
    tokens = tl.maximum(tokens, 0)
    return tokens - tokens % BLOCK


@triton.jit
def document_start(i, b, tokens, start_ptr, mask, HAS_DOCUMENTS: tl.constexpr):
    """Index in row b of the first token of token i's document (a block of tokens or one), int32."""
    if HAS_DOCUMENTS:
        return (tl.load(start_ptr + b * tokens + i, mask=mask, other=0) - b * tokens).to(tl.int32)
    return (i * 0).to(tl.int32)


@triton.jit
def first_key(start, position, window, HAS_WINDOW: tl.constexpr):
    """Index of the first key seen from `position` in a document that begins at `start`."""
    if HAS_WINDOW:
        return tl.maximum(start, position - window + 1)
    return start


@triton.jit
def key_range(
    tile, b, queries, keys, start_ptr, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The keys that a tile of queries needs, as four bounds: no query sees a key outside low to high, every query sees those
    from full_low to full_high, the rest needs masks. Steps of BLOCK_N from low meet full_low, and from there full_high.
    """
    i = tile * BLOCK_M
    last_i = tl.minimum(i + BLOCK_M, queries) - 1
    position = (i + keys - queries).to(tl.int32)
    last_position = (last_i + keys - queries).to(tl.int32)
    start = document_start(i, b, keys, start_ptr, i < queries, HAS_DOCUMENTS)
    last_start = document_start(last_i, b, keys, start_ptr, last_i < queries, HAS_DOCUMENTS)
    low = tl.maximum(first_key(start, position, window, HAS_WINDOW), 0)
    seen_by_all = first_key(last_start, last_position, window, HAS_WINDOW)
    full_low = low + whole_tiles(seen_by_all - low + BLOCK_N - 1, BLOCK_N)
    full_high = full_low + whole_tiles(position + 1 - full_low, BLOCK_N)
    return low, full_low, full_high, last_position + 1


@triton.jit
def query_tile(
    queries, keys, rows, heads, start_ptr, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """What a program that owns a tile of one head's queries starts from. rows is B * H; the last queries see most keys, so their
    tiles come first.

    Its row b * heads + h, b and h; of each query its index, position in the row, document's first token and first key that it sees;
    the position of the tile's first query; key_range's four bounds.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = tl.cdiv(queries, BLOCK_M) - 1 - program // rows
    row = program % rows
    b, h = row // heads, row % heads
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position = (i + keys - queries).to(tl.int32)
    origin = (tile * BLOCK_M).to(tl.int32) + keys - queries
    start = document_start(i, b, keys, start_ptr, i < queries, HAS_DOCUMENTS)
    first = first_key(start, position, window, HAS_WINDOW)
    low, full_low, full_high, high = key_range(
        tile, b, queries, keys, start_ptr, window, BLOCK_M, BLOCK_N, HAS_DOCUMENTS, HAS_WINDOW
    )
    return row, b, h, i, position, start, first, origin, low, full_low, full_high, high


@triton.jit
def skipping(step, skip_low, skip_high):
    """Where a walk is that leaves out skip_low to skip_high: one loop, so one copy of its body, for the ranges on both sides."""
    return step + tl.where(step >= skip_low, skip_high - skip_low, 0)


@triton.jit
def distance(n, position, origin):
    """n - position of keys and queries that broadcast, float32: exact for those below 2^24 tokens from `origin`, in the program's
    tile. Two vectors are converted, not every pair; taking the slope times each vector would cost float32 a digit.
    """
    return (n - origin).to(tl.float32) - (position - origin).to(tl.float32)


class Tile(NamedTuple):
    """Queries and keys that a program holds at a time, and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return dict(BLOCK_M=self.queries, BLOCK_N=self.keys, num_warps=self.num_warps, num_stages=self.num_stages)


Tiles = dict[tuple[int, bool], Tile]  # by BLOCK_D and whether the tensors are float32


def chosen(tiles: Tiles, warp_tiles: Tiles, described_tiles: Tiles, rotary: str, *tensors: Tensor) -> tuple[Tile, bool]:
    """The tile for tensors like the first, (B, T, H, D), on its device, and whether the kernel's loop reads them by descriptors.

    warp_tiles        rows that differ where warps multiply matrices one by one
    described_tiles   rows of which descriptors are made, if all `tensors`, what the loop reads, can have one
    """
    t = tensors[0]
    columns = block_d(t.shape[-1])
    row = columns, t.dtype == torch.float32
    # Halves that are padded apart (see `features`) are no one piece of memory.
    is_whole = rotary != "halves" or t.shape[-1] == columns
    if row in described_tiles and is_whole and has_tma(t.device) and all(map(is_describable, tensors)):
        return described_tiles[row], True
    # On sm_90 and sm_100 groups of four warps do, from shared memory; elsewhere operands take registers, so tiles are smaller.
    is_by_warp = t.device.type == "cuda" and torch.cuda.get_device_capability(t.device)[0] not in (9, 10)
    return (warp_tiles.get(row, tiles[row]) if is_by_warp else tiles[row]), False


def memory(rows: int, is_described: bool, *tensors: Tensor) -> tuple[list[Any], list[int]]:
    """Tensors (B, T, H, D) as load_rows takes them in tiles of `rows`, and their strides of B, T and H: 0 beside descriptors."""
    if is_described:
        return [described(t, [1, rows, 1, block_d(t.shape[-1])]) for t in tensors], [0] * (3 * len(tensors))
    return list(tensors), [stride for t in tensors for stride in t.stride()[:3]]


def block_d(head_dim: int) -> int:
    """Columns of a tile: tl.dot needs 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))


def variant(
    head_dim: int, cos: Tensor | None, interleaved: bool, start: Tensor | None, window: int, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    """The compile-time constants that a call's arguments fix. window is 0 where there is none."""
    return dict(
        D=head_dim, BLOCK_D=block_d(head_dim), ROTARY="none" if cos is None else "pairs" if interleaved else "halves",
        HAS_DOCUMENTS=start is not None, HAS_WINDOW=window > 0, HAS_ALIBI=alibi_slopes is not None,
    )  # fmt: skip


def narrowing(window: int | None, keys: int) -> int:
    """The window in tokens, 0 if it leaves no key out."""
    return 0 if window is None or window >= keys else window


def with_unit_stride(t: Tensor) -> Tensor:
    """t, copied if its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rows_per_program(head_dim: int) -> int:
    """Rows of head_dim features for kernels that only stream: 16 elements a thread."""
    return 2048 // block_d(head_dim)


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, start: Tensor | None, shift: int, interleaved: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """x (B, T, H, D), each token turned by its position in its document, or by t + shift; contiguous, in x's dtype or `dtype`."""
    batch, tokens, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows, block_r = batch * tokens * heads, rows_per_program(head_dim)
    constants = variant(head_dim, cos, interleaved, start, 0, None)
    rotate_kernel[(triton.cdiv(rows, block_r),)](
        x, cos, sin, start, y, rows, tokens, heads, shift, cos.shape[0], *x.stride()[:3],
        **{name: constants[name] for name in ("D", "BLOCK_D", "ROTARY", "HAS_DOCUMENTS")}, BLOCK_R=block_r,
    )  # fmt: skip
    return y


def configuration(
    kernel: Any, name: str, dtype: str, head_dim: int, tile: Tile | None, constants: dict[str, Any],
    targets: tuple[str, ...] | None = None, described: dict[str, int] | None = None,
) -> Configuration:  # fmt: skip
    """The form of `kernel` that its launcher compiles for contiguous tensors of `dtype` ("bf16", "fp16" or "fp32").

    described   the arguments that are descriptors, and the rows of their tiles
    """
    constants = constants | dict(D=head_dim, BLOCK_D=block_d(head_dim))
    if tile is not None:
        constants |= dict(BLOCK_M=tile.queries, BLOCK_N=tile.keys)
    absent = {
        "cos_ptr": constants.get("ROTARY") == "none",
        "sin_ptr": constants.get("ROTARY") == "none",
        "start_ptr": not constants.get("HAS_DOCUMENTS"),
        "end_ptr": not constants.get("HAS_DOCUMENTS"),
        "slope_ptr": not constants.get("HAS_ALIBI"),
    }
    types = {"softmax_scale": "fp32", "start_ptr": "*i32:16", "end_ptr": "*i32:16"}
    types |= {f"{table}_ptr": "*fp32:16" for table in ("cos", "sin", "slope", "lse", "delta")}
    signature = {}
    for argument, rows in (described or {}).items():
        types[argument] = f"tensordesc<{dtype}[1,{rows},1,{block_d(head_dim)}]>"
    if "IS_DESCRIBED" in kernel.arg_names:
        constants["IS_DESCRIBED"] = described is not None
    for argument in kernel.arg_names:
        if absent.get(argument, False):
            constants[argument] = None
        elif argument not in constants:
            is_stride = argument[-2:] in ("_b", "_t", "_h") and head_dim % 16 == 0
            other = f"*{dtype}:16" if argument.endswith("_ptr") else "i32:16" if is_stride else "i32"
            signature[argument] = types.get(argument, other)
    warps_and_stages = {} if tile is None else dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    name = f"rope_attention {kernel.__name__.strip('_').removesuffix('_kernel')} {name} {dtype} D={head_dim}"
    return Configuration(kernel, signature, constants, name=name, targets=targets, **warps_and_stages)
