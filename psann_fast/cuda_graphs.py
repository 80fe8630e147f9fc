"""Functions as CUDA graphs: all the kernels that one launches, launched again as one, on the same memory.

The capture has not run on a device yet; see generate/graphs.py and train/graphs.py for what uses it,
and how that is tested without one.
"""

from __future__ import annotations

from typing import Callable

import torch


class CaptureError(RuntimeError):
    """A step could not be captured, or its graph gave other results than it."""


class CUDACapture:
    """Captures functions on one device into graphs that share their memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """What runs `function` once more on the same memory. Raises CaptureError where it cannot be captured."""
        try:
            with torch.cuda.device(self._device):
                # Once outside a capture: it compiles, tunes, and makes the libraries' workspaces, which a capture may not.
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    function()
                torch.cuda.current_stream().wait_stream(self._stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads of a server may use the device meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    function()
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)  # raises again if the device is lost, and not only the capture
            raise CaptureError(f"the capture ended with {type(error).__name__}: {str(error).splitlines()[0]}") from error
        return graph.replay
