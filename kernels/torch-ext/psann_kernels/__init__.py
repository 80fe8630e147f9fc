"""psann_kernels: operations that any model can use, each with a plain-torch definition and faster implementations.

Every op takes `backend="auto" | "triton" | "native" | "torch"`; `explain("damped_sine", *args)` says which would serve.
"""

from . import damped_sine as _damped_sine
from . import damped_sine_mlp as _damped_sine_mlp
from . import layers
from . import linear as _linear
from . import linear_cross_entropy as _linear_cross_entropy
from . import linear_cross_entropy_chunks as _linear_cross_entropy_chunks  # noqa: F401 (backend "torch" registers itself)
from . import paged_attention as _paged_attention
from . import rms_norm as _rms_norm
from . import rope_attention as _rope_attention
from . import scaled_add as _scaled_add
from . import wave_conv as _wave_conv
from .damped_sine import damped_sine
from .damped_sine_mlp import damped_sine_mlp, linear_damped_sine
from .paged_attention import paged_append, paged_attention
from .modules import DampedSine, DampedSineMLP, LinearCrossEntropy, RMSNorm, RotaryAttention, WaveConv
from .paged_cache import PagedKVCache, PagedStep
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .native import attach as attach_native
from .registry import BACKENDS, OPS, BackendError, attach, explain
from .rms_norm import rms_norm
from .rope_attention import rope_attention, rotary_tables, rotate
from .scaled_add import scaled_add
from .self_test import self_test
from .wave_conv import wave_conv, wave_state

attach(
    __name__,
    "triton",
    "triton",
    {
        "damped_sine_triton": (_damped_sine.OP,),
        "damped_sine_mlp_triton": (_damped_sine_mlp.LINEAR, _damped_sine_mlp.MLP),
        "linear_cross_entropy_triton": (_linear_cross_entropy.OP,),
        "paged_attention_triton": (_paged_attention.APPEND, _paged_attention.ATTENTION),
        "rms_norm_triton": (_rms_norm.OP,),
        "rope_attention_triton": (_rope_attention.OP,),
        "wave_conv_triton": (_wave_conv.OP,),
    },
)
attach(__name__, "gluon", "triton", {"rope_attention_gluon": (_rope_attention.OP,)})
attach_native(
    {
        "damped_sine_native": _damped_sine.OP,
        "linear_cross_entropy_native": _linear_cross_entropy.OP,
        "linear_native": _linear.OP,
        "paged_append_native": _paged_attention.APPEND,
        "paged_attention_native": _paged_attention.ATTENTION,
        "rms_norm_native": _rms_norm.OP,
        "rope_attention_native": _rope_attention.OP,
        "scaled_add_native": _scaled_add.OP,
        "wave_conv_native": _wave_conv.OP,
    }
)

__all__ = [
    "BACKENDS",
    "BackendError",
    "DampedSine",
    "DampedSineMLP",
    "LinearCrossEntropy",
    "OPS",
    "PagedKVCache",
    "PagedStep",
    "RMSNorm",
    "RotaryAttention",
    "WaveConv",
    "damped_sine",
    "damped_sine_mlp",
    "explain",
    "layers",
    "linear",
    "linear_cross_entropy",
    "linear_damped_sine",
    "paged_append",
    "paged_attention",
    "rms_norm",
    "rope_attention",
    "rotary_tables",
    "rotate",
    "scaled_add",
    "self_test",
    "wave_conv",
    "wave_state",
]
