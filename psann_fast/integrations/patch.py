"""Puts our kernels into other people's models: on one instance, never at import, with a list of what was done and a way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import torch
from psann_kernels import OPS, damped_sine, rms_norm
from psann_kernels.layers import sine_parameters
from psann_kernels.registry import Op, check_backend, for_model
from torch import Tensor, nn

# What a patched module remembers: the forward that it had on the instance (None: its class's).
ORIGINAL = "_psann_original_forward"


class PatchError(RuntimeError):
    """patch(strict=True) found modules that it knows and cannot replace. Nothing was changed; the message lists them."""


@dataclass(frozen=True)
class Row:
    """One module that patch looked at.

    name      its name in the model, "" for the model itself
    old       what it is: a class, "torch.sin", ...
    new       the op that takes its place, None if it stays
    backend   the one that would serve the module's parameters on their device now, None if it stays
    reason    why it stays, or what to know
    """

    name: str
    old: str
    new: str | None
    backend: str | None
    reason: str


@dataclass
class Report:
    """What patch did, row by row; print it. `undo()` gives the model back as it was."""

    rows: list[Row]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.new is not None]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row.new is None]

    def undo(self) -> None:
        """Restore every module that this call of patch changed. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        table = [("module", "old", "new", "backend", "why")]
        table += [(row.name or "(model)", row.old, row.new or "-", row.backend or "-", row.reason) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip() for line in table)


def patch(model: nn.Module, *, backend: str = "auto", strict: bool = False, dry_run: bool = False) -> Report:
    """Replace what our kernels compute in `model`, this instance alone, by our kernels. Parameters, names, hooks and state dict stay.

    backend   "auto", "triton", "native" or "torch"; an op that the backend does not implement at all runs as under "auto"
    strict    raise PatchError, changing nothing, if a module of a known kind cannot be replaced
    dry_run   change nothing, and return what would be done

    Known kinds: psann's SineParam and DampedSine modules; SIREN's sin(w0 * z) in modules named Sine with `w0` or `omega_0`; RMS norms
    with `weight` or `scale`; and for models of transformers, the attention (attn_implementation becomes psann_triton on a GPU,
    psann_torch elsewhere). Patching again does nothing. Raises TypeError for what is no nn.Module; ValueError for a backend that does
    not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}; pass an nn.Module")
    check_backend(backend, "patch")
    plans = list(_plans(model, backend))
    rows = [row for row, _ in plans]
    stuck = [row for row in rows if row.new is None and row.reason != "patched already"]
    if strict and stuck:
        listed = "; ".join(f"{row.name or '(model)'} ({row.old}): {row.reason}" for row in stuck)
        raise PatchError(f"patch(strict=True): {len(stuck)} modules of a known kind cannot be replaced, so nothing was: {listed}")
    report = Report(rows)
    if not dry_run:
        report._undo = [undo for _, apply in plans if apply is not None for undo in [apply()]]
    return report


Plan = tuple[Row, "Callable[[], Callable[[], None]] | None"]


def _plans(model: nn.Module, backend: str) -> Iterator[Plan]:
    for name, module in model.named_modules():
        for kind in (_sine_parameters, _siren, _norm):
            plan = kind(name, module, backend)
            if plan is not None:
                yield plan
                break
    attention = _attention(model, backend)
    if attention is not None:
        yield attention


def _replacement(
    name: str,
    module: nn.Module,
    op: Op,
    backend: str,
    example: tuple[Any, ...],
    options: dict[str, Any],
    forward: Callable[..., Any],
) -> Plan:
    """Give `module` the forward, if the backend serves its parameters where they are."""
    old = type(module).__name__
    if ORIGINAL in module.__dict__:
        return Row(name, old, None, None, "patched already"), None
    if "forward" in module.__dict__:
        return Row(name, old, None, None, "its forward was replaced by someone else; undo that first"), None
    chosen = for_model(backend, op)
    answers = dict(op.explain(*example, **options))
    serving = next(candidate for candidate, refusal in answers.items() if refusal is None) if chosen == "auto" else chosen
    if answers.get(serving) is not None:
        return Row(name, old, None, None, f"{serving}: {answers[serving]}"), None

    def apply() -> Callable[[], None]:
        module.__dict__[ORIGINAL] = type(module).forward
        module.forward = forward.__get__(module)  # found before the class's; its hooks and parameters are untouched

        def undo() -> None:
            module.__dict__.pop(ORIGINAL)
            module.__dict__.pop("forward")

        return undo

    return Row(name, old, op.name, serving, ""), apply


def _sine_parameters(name: str, module: nn.Module, backend: str) -> Plan | None:
    """psann's SineParam: `_A`, `_f`, `_d`, decay_mode, bounds, feature_dim."""
    if not all(isinstance(getattr(module, raw, None), nn.Parameter) for raw in ("_A", "_f", "_d")) or not hasattr(
        module, "decay_mode"
    ):
        return None
    old, extra = type(module).__name__, sorted(n for n, _ in module.named_parameters() if n not in ("_A", "_f", "_d"))
    if extra:
        return Row(name, old, None, None, f"it has more parameters than a damped sine: {', '.join(extra)}"), None
    mode, dim, chosen = module.decay_mode, module.feature_dim, for_model(backend, OPS["damped_sine"])

    def forward(self: nn.Module, z: Tensor) -> Tensor:
        return damped_sine(z.movedim(dim, -1), *sine_parameters(self), mode=mode, backend=chosen).movedim(-1, dim)

    def last(self: nn.Module, z: Tensor) -> Tensor:
        return damped_sine(z, *sine_parameters(self), mode=mode, backend=chosen)

    example = (module._A.new_empty((1, module._A.numel())), *sine_parameters(module))
    return _replacement(name, module, OPS["damped_sine"], backend, example, {"mode": mode}, last if dim == -1 else forward)


def _siren(name: str, module: nn.Module, backend: str) -> Plan | None:
    """sin(w0 * z) of SIREN networks: a module called Sine without parameters, with its frequency in `w0` or `omega_0`."""
    if type(module).__name__.lower() not in ("sine", "sin", "siren_sine"):
        return None
    old = type(module).__name__
    frequency = next(
        (getattr(module, n) for n in ("w0", "omega_0", "omega") if isinstance(getattr(module, n, None), (int, float))), None
    )
    if next(module.parameters(), None) is not None or frequency is None:
        return Row(name, old, None, None, "its frequency is no number named w0 or omega_0"), None
    probe = torch.linspace(-2, 2, 9)
    if not _equals(type(module).forward, module, probe, torch.sin(frequency * probe)):
        return Row(name, old, None, None, "its forward does not compute sin(w0 * z)"), None
    chosen, constants = for_model(backend, OPS["damped_sine"]), {}

    def forward(self: nn.Module, z: Tensor) -> Tensor:
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        key = (z.shape[-1], z.device, wide)
        if key not in constants:
            value = lambda number: torch.full((z.shape[-1],), float(number), dtype=wide, device=z.device)  # noqa: E731
            constants[key] = (value(1.0), value(frequency), value(0.0))
        return damped_sine(z, *constants[key], mode="none", backend=chosen)

    example = (torch.empty(1, 1), *(torch.empty(1) for _ in range(3)))
    return _replacement(name, module, OPS["damped_sine"], backend, example, {"mode": "none"}, forward)


def _norm(name: str, module: nn.Module, backend: str) -> Plan | None:
    """RMS norms by whatever name their parts have, if they give what ours gives."""
    old = type(module).__name__
    if "rmsnorm" not in old.lower():
        return None
    found = [n for n, _ in module.named_parameters(recurse=False)]
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(module, n, None), float)), None)
    if isinstance(module, nn.RMSNorm) and epsilon is None:
        epsilon = torch.finfo(module.weight.dtype).eps if module.weight is not None else None
    if len(found) != 1 or found[0] not in ("weight", "scale") or epsilon is None or getattr(module, found[0]).dim() != 1:
        return Row(name, old, None, None, "it has no single weight vector and epsilon that we know"), None
    weight_name, chosen = found[0], for_model(backend, OPS["rms_norm"])
    weight = getattr(module, weight_name)
    probe = torch.linspace(-1.5, 2, weight.numel(), dtype=weight.dtype, device=weight.device).view(1, -1)
    if weight.device.type != "meta" and not _equals(
        type(module).forward, module, probe, rms_norm(probe, weight.detach(), eps=epsilon, backend="torch")
    ):
        return Row(name, old, None, None, "its forward does not compute x / sqrt(mean(x^2) + eps) * weight"), None

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, getattr(self, weight_name), eps=epsilon, backend=chosen)

    example = (weight.new_empty((1, weight.numel())), weight)
    return _replacement(name, module, OPS["rms_norm"], backend, example, {"eps": epsilon}, forward)


def _equals(forward: Callable[..., Any], module: nn.Module, probe: Tensor, expected: Tensor) -> bool:
    """Whether the module computes what we take it for: on one row, so that a class of the same name is not misread."""
    try:
        with torch.no_grad():
            found = forward(module, probe)
    except (TypeError, ValueError, RuntimeError):
        return False
    tolerance = 4 * torch.finfo(probe.dtype).eps * max(1.0, expected.abs().max().item())
    return isinstance(found, Tensor) and found.shape == expected.shape and bool(((found - expected).abs() <= tolerance).all())


def _attention(model: nn.Module, backend: str) -> Plan | None:
    """The attention of a transformers model, which takes it by name from its own configuration."""
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or not hasattr(config, "_attn_implementation"):
        return None
    from .attention_transformers import BACKENDS, register

    old = config._attn_implementation
    if old in BACKENDS:
        return Row("", f"attention {old}", None, None, "patched already"), None
    row = lambda reason: (Row("", f"attention {old}", None, None, reason), None)  # noqa: E731
    if not getattr(model, "_supports_attention_backend", False):
        return row("this model does not take another attention (_supports_attention_backend)")
    if getattr(config, "attention_dropout", 0.0):
        return row(f"attention_dropout is {config.attention_dropout}, and the kernels have none")
    if backend == "native":
        return row("native does not implement rope_attention")
    device = next((p.device.type for p in model.parameters()), "cpu")
    chosen = {"auto": "triton" if device == "cuda" else "torch"}.get(backend, backend)
    refusal = OPS["rope_attention"].refusal(chosen, *(torch.empty(1, 1, 1, 16, device=device),) * 3)
    if refusal is not None:
        return row(f"{chosen}: {refusal}")
    new = f"psann_{chosen}"

    def apply() -> Callable[[], None]:
        register()
        model.set_attn_implementation(new)
        return lambda: model.set_attn_implementation(old)

    return (Row("", f"attention {old}", "rope_attention, paged_attention", chosen, "rotation stays in the model's own code"), apply)
