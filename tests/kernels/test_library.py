"""What every library op shares: the GPU on which it runs, and autocast's dtype."""

import contextlib

import torch
from psann_kernels.library import cast_dtype, on_its_gpu


class OnGpu:
    """Stands for a tensor on the second GPU of a machine that has none."""

    is_cuda, device = True, torch.device("cuda", 1)


def test_an_op_runs_on_the_gpu_of_its_tensors_and_not_on_the_current_one(monkeypatch):
    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    found = on_its_gpu(lambda first, *others: (current[-1], others))
    assert found(OnGpu(), 1, None) == (OnGpu.device, (1, None)) and current == [torch.device("cuda", 0)]
    assert found(torch.ones(1)) == (torch.device("cuda", 0), ())


def test_the_dtype_that_autocast_asks_for():
    half, single, double = (torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert [cast_dtype(t) for t in (half, single, double)] == [torch.float16, torch.float32, torch.float64]
    with torch.autocast("cpu", torch.bfloat16):
        assert [cast_dtype(t) for t in (half, single, double)] == [torch.bfloat16, torch.bfloat16, torch.float64]
        assert cast_dtype(torch.ones(1, device="meta")) == torch.float32
