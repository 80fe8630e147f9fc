"""psann-fast inside transformers: importing this registers our attention, the activation and the model. Nothing else is touched.

attn_implementation="psann_triton" or "psann_torch"     for any causal model of transformers that takes an attention
hidden_act="psann_sine"                                 for any model that names its activation
AutoConfig, AutoModelForCausalLM                        know model_type "psann"
"""

from __future__ import annotations

from psann_kernels import DampedSine, damped_sine
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from .attention_transformers import continuous_batching_attention, register
from .configuration_psann import PSANNConfig
from .modeling_psann import PSANNForCausalLM

__all__ = ["PSANNConfig", "PSANNForCausalLM", "SharedDampedSine", "continuous_batching_attention"]


class SharedDampedSine(DampedSine):
    """A damped sine with one learnable triple for all features: transformers makes activations without telling them a width."""

    def __init__(self) -> None:
        super().__init__(1, frequency=3.0)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., F) -> (..., F) in z's dtype."""
        parameters = (t.expand(z.shape[-1]) for t in self.parameters_of_sine())
        return damped_sine(z, *parameters, mode=self.mode, backend=self.backend)


register()
ACT2FN["psann_sine"] = SharedDampedSine
AutoConfig.register(PSANNConfig.model_type, PSANNConfig, exist_ok=True)
AutoModelForCausalLM.register(PSANNConfig, PSANNForCausalLM, exist_ok=True)
# For save_pretrained: these two files go along, so that the folder loads where psann-fast is not installed.
PSANNConfig.register_for_auto_class()
PSANNForCausalLM.register_for_auto_class("AutoModelForCausalLM")
