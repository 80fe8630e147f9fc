"""The folder psann_kernels as a kernel of Hugging Face's `kernels`: loaded beside the installed copy,
and adopted by foreign layers."""

from __future__ import annotations

import copy
import functools
import json
import operator
from pathlib import Path

import psann_kernels
import pytest
import torch
from psann.activations import SineParam
from torch import nn

hub = pytest.importorskip("kernels", reason="kernels is not installed")
FOLDER = Path(psann_kernels.__file__).parent
EVERY_MODE = pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE", "TRAINING | TORCH_COMPILE", "INFERENCE | TORCH_COMPILE"])


@pytest.fixture(scope="module")
def loaded():
    return hub.get_local_kernel(FOLDER)


def sine_inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 7, generator=g).to(dtype).requires_grad_()
    return z, *(torch.rand(7, generator=g).add(0.5).requires_grad_() for _ in range(3))


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_both_copies_serve_in_one_process(loaded, backend):
    assert loaded is not psann_kernels and loaded.OPS.keys() == psann_kernels.OPS.keys()
    results = []
    for package in (psann_kernels, loaded):
        tensors = sine_inputs()
        y = package.damped_sine(*tensors, backend=backend)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in tensors)])
    for installed, second in zip(*results):
        torch.testing.assert_close(second, installed, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(loaded.damped_sine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*sine_inputs(), backend=backend).detach(), results[0][0])


def test_loading_again_gives_the_same_module(loaded):
    assert hub.get_local_kernel(FOLDER) is loaded
    assert type(loaded.DampedSine(3)) is not psann_kernels.DampedSine


def test_the_modules_of_the_second_copy_work(loaded):
    torch.manual_seed(0)
    ours = psann_kernels.RotaryAttention(16, 4, 2)
    theirs = loaded.RotaryAttention(16, 4, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(ours(x), theirs(x))


def kernelized(model: nn.Module, layer_class: type, layer: str, mode: str) -> nn.Module:
    """kernelize changes the instances in place, and the class by a mark, which is taken off again."""
    hub.replace_kernel_forward_from_hub(layer_class, layer)
    try:
        with hub.use_kernel_mapping({layer: {"cpu": hub.LocalLayerRepository(FOLDER, layer_name=layer)}}, inherit_mapping=False):
            return hub.kernelize(
                model, mode=functools.reduce(operator.or_, (hub.Mode[name] for name in mode.split(" | "))), use_fallback=False
            )
    finally:
        del layer_class.kernel_layer_name, layer_class.kernel_condition


def adopted_sine(**options):
    torch.manual_seed(0)
    sine = SineParam(6, decay_init=0.3, **options)
    with torch.no_grad():
        for parameter in sine.parameters():
            parameter.add_(torch.randn(6))
    return sine


@EVERY_MODE
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay_mode": "relu"},
        {"decay_mode": "none"},
        {"bounds": {"decay": (0.1, 0.4), "frequency": (None, 1.0)}},
        {"feature_dim": 1},
    ],
)
def test_psanns_sine_adopts_ours(mode, options):
    plain = adopted_sine(**options)
    fast = kernelized(copy.deepcopy(plain), SineParam, "DampedSine", mode)
    assert type(fast) is SineParam and fast.forward.__func__ is not SineParam.forward
    gradients = []
    for module in (plain, torch.compile(fast, fullgraph=True, backend="aot_eager") if "COMPILE" in mode and not options else fast):
        x = torch.linspace(-4, 4, 3 * 6 * 6).view(3, 6, 6).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        gradients.append([y.detach(), x.grad])
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for expected, found in zip(plain.parameters(), fast.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5)


@EVERY_MODE
def test_llamas_norm_adopts_ours(mode):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    plain = modeling.LlamaRMSNorm(8, eps=1e-5)
    nn.init.normal_(plain.weight)
    fast = kernelized(copy.deepcopy(plain), modeling.LlamaRMSNorm, "RMSNorm", mode)
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "psann" in fast.forward.__func__.__module__


def test_our_own_layers_adopt_ours_too():
    ours = psann_kernels.DampedSine(6, damping=0.2, mode="relu", bounds={"damping": (0.25, None)})
    fast = kernelized(copy.deepcopy(ours), psann_kernels.DampedSine, "DampedSine", "TRAINING")
    x = torch.randn(3, 6)
    torch.testing.assert_close(fast(x), ours(x))


def test_layers_for_kernelize_have_no_state():
    layers = [value for value in vars(psann_kernels.layers).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    assert {layer.__name__ for layer in layers} == {"DampedSine", "RMSNorm"}
    for layer in layers:
        assert layer.__init__ is nn.Module.__init__ and layer.has_backward and layer.can_torch_compile


def test_the_recipes_agree():
    metadata = json.loads((FOLDER / "metadata.json").read_text())
    recipe = (Path(__file__).parents[2] / "kernels" / "build.toml").read_text()
    assert (
        metadata["name"] == "psann-kernels"
        and f'name = "{metadata["name"]}"' in recipe
        and f"version = {metadata['version']}" in recipe
    )
    assert metadata["python-depends"] == []  # the loader refuses triton here; the package guards its import
