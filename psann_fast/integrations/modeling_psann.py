"""A PSANN language model for transformers. Self-contained: exported models carry this file, and need psann-fast no more.

Where psann_kernels is installed, its fused sine and norm run; otherwise the same formulas in torch.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from .configuration_psann import PSANNConfig

try:
    from psann_kernels import damped_sine, rms_norm
except ImportError:

    def damped_sine(z, amplitude, frequency, damping, *, mode):
        """amplitude * exp(-damping * g(z)) * sin(frequency * z); the phase is computed wide, bfloat16 has too few digits for it."""
        x = z.to(amplitude.dtype)
        y = amplitude * torch.sin(frequency * x)
        if mode != "none":
            y = y * torch.exp(-damping * (x.abs() if mode == "abs" else x.relu()))
        return y.to(z.dtype)

    def rms_norm(x, weight, *, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


class PSANNRMSNorm(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.eps = 1e-6

    def forward(self, x):
        return rms_norm(x, self.scale, eps=self.eps)


class PSANNSine(nn.Module):
    """Damped sine; `_A`, `_f`, `_d` hold inverse softplus values, one for each feature."""

    def __init__(self, config, features):
        super().__init__()
        self.mode = config.sine.get("mode", "abs")
        self.bounds = config.sine.get("bounds", {})
        self.initial = config.sine
        learnable = config.sine.get("learnable", ("amplitude", "frequency", "damping"))
        for name, parameter in (("amplitude", "_A"), ("frequency", "_f"), ("damping", "_d")):
            setattr(self, parameter, nn.Parameter(torch.zeros(features), requires_grad=name in learnable))

    def reset_parameters(self):
        for name, raw, default in (("amplitude", self._A, 1.0), ("frequency", self._f, 3.0), ("damping", self._d, 0.01)):
            mean, std = self.initial.get(name, default), self.initial.get(f"{name}_std", 0.0)
            value = (mean + std * torch.randn(raw.shape, dtype=torch.float64)).clamp_min(0.01 * mean)
            value = value - (1e-6 if name == "frequency" else 0.0)
            with torch.no_grad():
                raw.copy_(value + torch.log(-torch.expm1(-value)))

    def parameters_of_sine(self):
        wide = torch.promote_types(self._A.dtype, torch.float32)
        values = {
            name: F.softplus(t.to(wide)) for name, t in (("amplitude", self._A), ("frequency", self._f), ("damping", self._d))
        }
        values["frequency"] = values["frequency"] + 1e-6
        for name, (least, largest) in self.bounds.items():
            values[name] = values[name].clamp(least, largest)
        return values["amplitude"], values["frequency"], values["damping"]

    def forward(self, z):
        return damped_sine(z, *self.parameters_of_sine(), mode=self.mode)


class PSANNMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = PSANNSine(config, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class PSANNWave(nn.Module):
    """Causal depthwise dilated convolution of norm(x), the sine, a projection. A tap that would reach before its document's first
    token, by position_ids, reads 0."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.kernel_size = config.wave_kernel
        self.dilation = config.wave_dilations[layer_idx % len(config.wave_dilations)]
        self.norm = PSANNRMSNorm(config.hidden_size)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.act = PSANNSine(config, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, position_ids, past_key_values):
        x = self.norm(x)
        tokens, reach = x.shape[1], (self.kernel_size - 1) * self.dilation
        before = x.new_zeros(x.shape[0], reach, x.shape[2])
        if past_key_values is not None and reach > 0:
            # The cache gives its last inputs and these; a gradient must not run into what it overwrites.
            states = past_key_values.update_conv_state(x.detach().transpose(1, 2), self.layer_idx, conv_kernel_size=reach)
            past = states[..., : states.shape[-1] - tokens].transpose(1, 2)[:, -reach:]
            before = F.pad(past, (0, 0, reach - past.shape[1], 0))
        wide = torch.promote_types(x.dtype, torch.float32)
        padded, weight = torch.cat((before, x), 1).to(wide), self.weight.to(wide)
        c = self.bias.to(wide)
        for j in range(self.kernel_size):
            distance = (self.kernel_size - 1 - j) * self.dilation
            tap = padded[:, reach - distance : reach - distance + tokens]
            c = c + weight[:, j] * torch.where((position_ids >= distance).unsqueeze(-1), tap, 0.0)
        y = damped_sine(c, *self.act.parameters_of_sine(), mode=self.act.mode).to(x.dtype)
        return self.dropout(self.out_proj(y))


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def turn_pairs(x, cos, sin):
    """x (B, H, T, D), cos and sin (B, 1, T, D / 2): adjacent features turn together."""
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


class PSANNAttention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, position_embeddings, attention_mask, past_key_values, **kwargs):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if position_embeddings is not None:
            q, k = turn_pairs(q, *position_embeddings), turn_pairs(k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.dropout(self.o_proj(y.flatten(-2))), weights


class PSANNBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm1 = PSANNRMSNorm(config.hidden_size)
        self.attn = PSANNAttention(config, layer_idx)
        self.norm2 = PSANNRMSNorm(config.hidden_size)
        self.mlp = PSANNMLP(config)
        self.alpha = nn.Parameter(torch.ones(1))
        if config.base == "waveresnet":
            self.wave = PSANNWave(config, layer_idx)

    def forward(self, x, position_ids, position_embeddings, attention_mask, past_key_values, **kwargs):
        if hasattr(self, "wave"):
            x = x + self.wave(x, position_ids, past_key_values)
        x = x + self.attn(self.norm1(x), position_embeddings, attention_mask, past_key_values, **kwargs)[0]
        return x + self.alpha * self.mlp(self.norm2(x))


def alibi_slopes(num_heads):
    """(num_heads,) float32: geometric, as in BLOOM (Press et al. 2021, arXiv:2108.12409)."""
    power = 1 << int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return torch.tensor(slopes + [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)])


def document_positions(input_ids, attention_mask, separator, past=0):
    """Position of each token in its document, (B, T) int64, so that a text gives the same wherever it stands.

    input_ids        (B, T), or embeddings (B, T, F), in which no separator is seen
    attention_mask   (B, past + T) or None; padding has no position
    separator        id that is a document of its own: the text after it begins at 0, as it did in training; None: there is none
    past             tokens before these
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    if attention_mask is None or attention_mask.dim() != 2:
        positions = index + past
    else:
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past : past + index.shape[1]]
    if input_ids.dim() != 2 or separator is None:
        return positions
    is_separator = input_ids == separator
    begin = torch.where(is_separator | F.pad(is_separator[:, :-1], (1, 0)), index, -1).cummax(1).values
    return torch.where(begin >= 0, index - begin, positions)


def causal_mask(config, x, attention_mask, past_key_values, position_ids):
    """Who sees whom, in the form that the attention in use takes: a token at position p sees itself and the p tokens before it."""
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    first = torch.arange(x.shape[1], device=x.device) + past - position_ids
    inside = None
    if attention_mask is None or attention_mask.dim() == 2:
        if torch.compiler.is_compiling() or bool((first > 0).any()):
            first = first.expand(x.shape[0], -1)
            inside = lambda row, head, query, key: key >= first[row, query - past]  # noqa: E731
    # ALiBi adds its biases to the mask, so there must be one even where all is plainly causal. transformers is not told the
    # positions: it would look for packed documents itself, and renumber the queries and keys that `inside` gets.
    return create_causal_mask(
        config, x, attention_mask, past_key_values, and_mask_function=inside,
        allow_is_causal_skip=config.positional_encoding != "alibi",
    )  # fmt: skip


class PSANNPreTrainedModel(PreTrainedModel):
    config_class = PSANNConfig
    base_model_prefix = "model"
    _no_split_modules = ["PSANNBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    # What output_hidden_states and output_attentions give.
    _can_record_outputs = {"hidden_states": PSANNBlock, "attentions": PSANNAttention}

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, PSANNWave):
            nn.init.uniform_(module.weight, -(self.config.wave_kernel**-0.5), self.config.wave_kernel**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PSANNSine):
            module.reset_parameters()
        elif isinstance(module, PSANNRMSNorm):
            nn.init.ones_(module.scale)
        elif isinstance(module, PSANNBlock):
            nn.init.ones_(module.alpha)


class PSANNModel(PSANNPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PSANNBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.ln_f = PSANNRMSNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("PSANNModel: pass input_ids or inputs_embeds, and not both")
        has_own_state = self.config.positional_encoding == "alibi" or self.config.base == "waveresnet"
        if kwargs.get("cache") is not None and has_own_state:
            raise ValueError(
                "PSANNModel: continuous batching keeps keys and values alone, so it serves no ALiBi (whose masks do not show "
                "positions) and no wave branch (whose last inputs have no place there); use generate"
            )
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            source = x if input_ids is None else input_ids
            position_ids = document_positions(source, attention_mask, self.config.separator_token_id, past)
        mask = causal_mask(self.config, x, attention_mask, past_key_values, position_ids)
        wide = torch.promote_types(x.dtype, torch.float32)
        rotary = None
        if self.config.positional_encoding == "alibi":
            mask, kwargs = self._alibi(mask, past, x, kwargs)
        elif self.config.positional_encoding == "sinusoidal":
            width = x.shape[-1]
            rate = torch.exp(torch.arange(0, width, 2, device=x.device, dtype=torch.float32) * (-math.log(10000.0) / width))
            angle = position_ids.unsqueeze(-1).to(torch.float32) * rate
            x = x + torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).to(x.dtype)
        else:
            head_dim = x.shape[-1] // self.config.num_attention_heads
            # In float64: at position 1e5 a float32 angle is wrong in the third digit of its sine.
            rate = self.config.rotary_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=x.device) / head_dim)
            angle = (position_ids.unsqueeze(-1).double() * rate).unsqueeze(1)
            rotary = (angle.cos().to(wide), angle.sin().to(wide))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(
                x,
                position_ids=position_ids,
                position_embeddings=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None)

    def _alibi(self, mask, past, x, kwargs):
        """ALiBi as the attention in use takes it: our kernels take slopes, the others a mask of biases."""
        slopes = alibi_slopes(self.config.num_attention_heads).to(x.device)
        if self.config._attn_implementation.startswith("psann_"):
            return mask, {**kwargs, "alibi_slopes": slopes.to(torch.promote_types(x.dtype, torch.float32))}
        key, query = torch.arange(mask.shape[-1], device=x.device), torch.arange(x.shape[1], device=x.device) + past
        bias = slopes.view(-1, 1, 1) * (key - query.unsqueeze(1))
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return torch.where(seen, bias.to(x.dtype), torch.finfo(x.dtype).min), kwargs


class PSANNForCausalLM(PSANNPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = PSANNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        # The newest document's beginning may lie among the cached tokens, which forward does not see.
        separator = self.config.separator_token_id
        is_whole = inputs_embeds is None and (attention_mask is None or attention_mask.shape == input_ids.shape)
        if is_whole and separator is not None and bool((input_ids == separator).any()):
            kwargs["position_ids"] = document_positions(input_ids, attention_mask, separator)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """What generate makes beforehand for a static cache: one mask for all layers, since a wave branch needs none."""
        return causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
        use_cache=None, logits_to_keep=0, return_dict=None, **kwargs,
    ):  # fmt: skip
        """Logits (B, T, vocab_size), and with labels (B, T) the mean loss of the next tokens;
        arguments as of other causal models."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip
