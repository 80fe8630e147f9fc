"""Does every Triton kernel compute the right numbers on this device? Asked once per device, versions and sources, not in a call.

Compilers have given wrong numbers without a word: Triton 3.4.0 up to 3.7.0 on Hopper, in a product whose left factor is the
transpose of another product (the shape of an attention backward); products of float32 that fall to TF32. A small call of each op,
forward and backward, is compared with the specification in float64 on the CPU. What fails refuses from then on, with that reason.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from .damped_sine import damped_sine
from .damped_sine_mlp import damped_sine_mlp, linear_damped_sine
from .linear_cross_entropy import linear_cross_entropy
from .paged_attention import FLOAT8, paged_append, paged_attention
from .registry import OPS
from .rms_norm import rms_norm
from .rope_attention import rope_attention, rotary_tables
from .wave_conv import wave_conv

_LOG = logging.getLogger("psann_fast")

# Largest |fast - truth| / |truth| in the Euclidean norm: far above rounding, far below what a wrong or a TF32 product gives.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 5e-5}

# (head_dim, queries, keys) with which the Gluon kernel is tried: one tile, edges, older keys, and rings that turn many times.
GLUON_SHAPES = tuple((d, *tokens) for d in (64, 128) for tokens in ((1, 1), (300, 300), (130, 643), (1024, 1024)))

# call(backend, *tensors) on tensors of one seed; how many of them, from the first, are differentiated.
Case = tuple[str, torch.dtype, Callable[..., Tensor], list[Tensor], int]


def self_test(device: str | torch.device | None = None, *, again: bool = False, gluon: bool = False) -> dict[str, str]:
    """Check the Triton kernels on a device, and make those that are wrong there refuse.

    device  default: the current GPU; the CPU where TRITON_INTERPRET=1 runs the kernels there
    again   whether to run it although the cache folder (XDG_CACHE_HOME or ~/.cache, psann-fast/self-test.json) has the answer
    gluon   whether to compare rope_attention's Gluon kernels with the Triton ones too, forward and gradients, on Hopper, and let
            backend "gluon" serve if they agree. Asked for by name, because no GPU has run those kernels yet: a wrong barrier in
            them would not fail but hang.

    Returns op -> "passed", or the reason with which backend "triton" refuses it on this device from now on; {"triton": why} where
    no kernel can run; with `gluon` also "rope_attention by gluon" -> the same. Takes about a second beyond compiling. Raises
    RuntimeError inside a trace or a graph capture.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError("self_test: it runs kernels and reads their results; call it before tracing or capturing a graph")
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    z, parameter = torch.empty((1, 1), device=device), torch.empty(1, device=device)
    if (reason := OPS["damped_sine"].refusal("triton", z, *[parameter] * 3)) is not None:
        if not OPS["damped_sine"].is_faulty("triton", device):
            return {"triton": reason}
    key, remembered = _key(device), _remembered()
    found = None if again else remembered.get(key)
    if found is None:
        found = _run(device)
        _remember({**remembered, key: found})
    for name, verdict in found.items():
        OPS[name].blame("triton", device, None if verdict == "passed" else verdict)
        if verdict != "passed":
            _LOG.warning("%s: %s", name, verdict)
    return {**found, "rope_attention by gluon": _test_gluon(device, again)} if gluon else found


def _test_gluon(device: torch.device, again: bool) -> str:
    """Whether the Gluon kernels give the Triton twin's o, log-sum-exp and gradients, and in five runs the same bits;
    as `self_test` says it."""
    kernels = importlib.import_module(".rope_attention_gluon", __package__)
    if (reason := kernels.refuses_device(device)) is not None:
        return reason
    if OPS["rope_attention"].is_faulty("triton", device):
        return f"the Triton kernel, with which the Gluon one is compared, failed its own self-test on {device}"
    key, remembered = f"{_key(device)}, gluon", _remembered()
    verdict = None if again else remembered.get(key, {}).get("rope_attention")
    if verdict is None:
        failures = (RuntimeError, importlib.import_module("triton.errors").TritonError)
        try:
            verdict = compare_gluon(device)
        except failures as error:
            verdict = f"the self-test on {device} ended with {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        _remember({**_remembered(), key: {"rope_attention": verdict}})
    kernels.VERDICTS[device] = verdict
    if verdict != "passed":
        _LOG.warning("rope_attention by gluon: %s", verdict)
    return verdict


def compare_gluon(device: torch.device) -> str:
    """"passed", or what differs between rope_attention_gluon and rope_attention_triton on a device."""
    by_gluon = importlib.import_module(".rope_attention_gluon", __package__).rope_attention_gluon
    by_triton = importlib.import_module(".rope_attention_triton", __package__).rope_attention_triton
    g = torch.Generator().manual_seed(0)
    for head_dim, queries, keys in GLUON_SHAPES:
        sizes = ((queries, 4), (keys, 2), (keys, 2), (queries, 4))
        q, k, v, do = (torch.randn(2, tokens, heads, head_dim, generator=g).to(device, torch.bfloat16) for tokens, heads in sizes)
        cos, sin = rotary_tables(keys, head_dim, device=device)
        scale = head_dim**-0.5

        def run(op: Callable[..., Any], options: tuple[Any, ...], *tensors: Tensor) -> dict[str, Tensor]:
            leaves = [t.requires_grad_() for t in tensors[:3]]
            with torch.enable_grad():
                o, lse, _ = op(*leaves, *options)
                gradients = torch.autograd.grad(o, leaves, tensors[3])
            names = ("result", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v")
            return dict(zip(names, (o.detach(), lse.detach(), *gradients)))

        def by_gluon_once() -> dict[str, Tensor]:
            return run(by_gluon, (cos, sin, True, scale), *(t.detach() for t in (q, k, v, do)))

        where = f"the self-test on {device}, {queries} queries, {keys} keys, head_dim {head_dim}: the Gluon kernels'"
        truth = run(by_triton, (cos, sin, None, None, None, True, scale, None), *(t.float() for t in (q, k, v, do)))
        first = by_gluon_once()
        for name, expected in truth.items():
            # The gradients of q and k vanish where a query sees one key: what is left of them is the rounding of dO's products.
            size = torch.linalg.vector_norm(expected.double()).clamp_min(1e-2 * torch.linalg.vector_norm(do.double()))
            error = (torch.linalg.vector_norm(first[name].double() - expected.double()) / size).item()
            if not error <= TOLERANCES[torch.bfloat16]:
                return f"{where} {name} is wrong: relative error {error:.2g}, at most {TOLERANCES[torch.bfloat16]:g} is rounding"
        for _ in range(4):
            for name, again in by_gluon_once().items():
                if not torch.equal(again, first[name]):
                    return f"{where} {name} has other bits in another run"
    return "passed"


def _run(device: torch.device) -> dict[str, str]:
    failures = (RuntimeError, importlib.import_module("triton.errors").TritonError)
    found: dict[str, str] = {}
    for name, dtype, call, tensors, count in _cases():
        OPS[name].blame("triton", device, None)
        try:
            verdict = _judge(dtype, call, tensors, count, device)
        except failures as error:
            verdict = f"the self-test on {device} ended with {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if found.get(name, "passed") == "passed":
            found[name] = verdict
    return found


def _judge(dtype: torch.dtype, call: Callable[..., Tensor], tensors: list[Tensor], count: int, device: torch.device) -> str:
    fast = _outputs(lambda *a: call("triton", *a), [t.to(device) for t in tensors], count)
    truth = _outputs(lambda *a: call("torch", *a), [t.double() if t.is_floating_point() else t for t in tensors], count)
    for place, (got, expected) in enumerate(zip(fast, truth)):
        error = (torch.linalg.vector_norm(got.cpu().double() - expected) / torch.linalg.vector_norm(expected)).item()
        if not error <= TOLERANCES[dtype]:
            what = "its result" if place == 0 else f"the gradient of its argument {place}"
            return (
                f"the self-test on {device} found {what} wrong in {dtype}: relative error {error:.2g}, at most "
                f"{TOLERANCES[dtype]:g} is rounding; another Triton version may be right, and psann_kernels.self_test(again=True) "
                "asks again"
            )
    return "passed"


def _outputs(function: Callable[..., Tensor], tensors: list[Tensor], count: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() if place < count else t for place, t in enumerate(tensors)]
    with torch.enable_grad():
        y = function(*leaves)
        if not count:
            return [y]
        # Random ones, so that gradients that changed places are seen; quarters, which every dtype holds exactly.
        weights = torch.randint(-4, 5, y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype) / 2 + 0.25
        return [y.detach(), *torch.autograd.grad(y, leaves[:count], weights)]


def _through_a_float8_cache(
    backend: str, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, offsets: Tensor, slots: Tensor
) -> Tensor:
    """paged_append and paged_attention; a scale of a power of two, so that what is written does not depend on the dtype of k and
    v."""
    caches = [torch.zeros((4, 16, 1, 64), device=q.device).to(FLOAT8) for _ in range(2)]
    scales = {name: torch.full((1,), 2.0**-6, device=q.device) for name in ("k_scale", "v_scale")}
    paged_append(k, v, *caches, slots, **scales, backend=backend)
    return paged_attention(q, *caches, table, lengths, offsets, **scales, backend=backend)


def _cases() -> list[Case]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    def sine(features: int) -> list[Tensor]:
        return [torch.rand(features, generator=g) * scale + 0.1 for scale in (1.0, 4.0, 0.3)]

    def attention(dtype: torch.dtype) -> Case:
        tensors = [draw(1, 70, heads, 64, dtype=dtype) for heads in (2, 1, 1)]
        inputs = [*tensors, *rotary_tables(70, 64)]
        return "rope_attention", dtype, lambda backend, *a: rope_attention(*a, backend=backend), inputs, 3

    def through_pointers(backend: str, *wide: Tensor) -> Tensor:
        # Rows of no whole 16 bytes, so that sm_90 and sm_100 take the kernels without tensor descriptors.
        return rope_attention(*(t[..., :64] for t in wide), backend=backend)

    def from_repeated_rows(backend: str, x: Tensor, w1: Tensor, b1: Tensor, a: Tensor, f: Tensor, d: Tensor, w2: Tensor) -> Tensor:
        # A stride of 0, so that sm_90 and sm_100 take both fused kernels without tensor descriptors.
        x, w2 = x[:1].expand(x.shape), w2[:1].expand(w2.shape)
        return damped_sine_mlp(x, w1, b1, a, f, d, w2, None, fused=backend == "triton", backend=backend)

    half = torch.bfloat16
    table, lengths, offsets = (torch.tensor(t, dtype=torch.int32) for t in ([[2, 0], [1, 3]], [9, 25], [0, 1, 4]))
    mlp = [draw(40, 32, dtype=half), draw(64, 32, dtype=half, scale=0.2), draw(64, dtype=half), *sine(64)]
    mlp += [draw(32, 64, dtype=half, scale=0.2)]
    targets = torch.randint(70, (20,), generator=g)
    return [
        *(
            (
                "damped_sine", dtype, lambda backend, *a: damped_sine(*a, backend=backend),
                [draw(33, 80, dtype=dtype, scale=3.0), *sine(80)], 4,
            )
            for dtype in TOLERANCES
        ),
        ("rms_norm", half, lambda backend, *a: rms_norm(*a, backend=backend), [draw(20, 96, dtype=half), draw(96, dtype=half)], 2),
        (
            "wave_conv", half, lambda backend, *a: wave_conv(*a, dilation=2, backend=backend),
            [draw(2, 40, 48, dtype=half), draw(48, 4, dtype=half), *sine(48)], 5,
        ),
        *(attention(dtype) for dtype in TOLERANCES),
        ("rope_attention", half, through_pointers, [draw(1, 70, heads, 66, dtype=half) for heads in (2, 1, 1)], 3),
        (
            "paged_attention", half, lambda backend, *a: paged_attention(*a, backend=backend),
            [
                draw(4, 2, 64, dtype=half), draw(4, 16, 1, 64, dtype=half), draw(4, 16, 1, 64, dtype=half),
                table, lengths, offsets,
            ], 0,
        ),
        (
            "paged_attention", half, _through_a_float8_cache,
            [
                draw(4, 2, 64, dtype=half), draw(4, 1, 64, dtype=half), draw(4, 1, 64, dtype=half), table,
                torch.tensor([1, 3]).int(), offsets, torch.tensor([32, 16, 17, 18]),
            ], 0,
        ),
        (
            "linear_cross_entropy", half, lambda backend, *a: linear_cross_entropy(*a, backend=backend),
            [draw(20, 32, dtype=half), draw(70, 32, dtype=half, scale=0.3), targets], 2,
        ),
        (
            "damped_sine_mlp", half, lambda backend, *a: damped_sine_mlp(*a, None, fused=backend == "triton", backend=backend),
            mlp, 7,
        ),
        ("damped_sine_mlp", half, from_repeated_rows, mlp, 7),
        (
            "linear_damped_sine", half, lambda backend, *a: linear_damped_sine(*a, fused=backend == "triton", backend=backend),
            mlp[:6], 6,
        ),
    ]  # fmt: skip


def _key(device: torch.device) -> str:
    """Device, versions and sources: whatever could change the answer."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.endswith(("_triton", "_gluon")) or path.stem in ("triton_support", "self_test"):
            digest.update(path.read_bytes())
    name = (
        "interpreter"
        if device.type == "cpu"
        else f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    )
    return f"{name}, Triton {importlib.metadata.version('triton')}, torch {torch.__version__}, sources {digest.hexdigest()[:16]}"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psann-fast" / "self-test.json"


def _remembered() -> dict[str, dict[str, str]]:
    try:
        found: Any = json.loads(_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOG.warning("self_test: %s cannot be read (%s); the kernels are tested anew", _file(), error)
        return {}
    ours = isinstance(found, dict) and all(isinstance(verdicts, dict) and set(verdicts) <= set(OPS) for verdicts in found.values())
    return found if ours else {}


def _remember(verdicts: dict[str, dict[str, str]]) -> None:
    path = _file()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(verdicts, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        _LOG.warning("self_test: the answer cannot be kept in %s (%s); the next process tests anew", path, error)
