"""Without a GPU the Triton kernels run in Triton's interpreter. The variable is read when a kernel is decorated, so it is set first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["campaign", "skips"]
