"""Without a GPU the Triton kernels run in Triton's interpreter. The variable is read when a kernel is decorated,
so it is set first.

One OpenMP thread unless told otherwise: the tests' tensors are tiny, and on a busy machine two threads wait for each other longer
than they compute. Tests of threading ask for their own number.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 (reads the variable)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["campaign", "native_kernels", "quick_interpreter", "skips"]
