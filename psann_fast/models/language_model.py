"""The language model around the blocks: embedding, blocks, final norm, output projection."""

from __future__ import annotations

import math
from typing import Callable

import torch
from psann_kernels import OPS, linear_cross_entropy
from psann_kernels.documents import are_values_known
from psann_kernels.registry import for_model
from torch import Tensor, nn

from ..config import ModelConfig
from .layers import CacheView, ExampleCalls, RMSNorm, RotaryTables, WaveBranch, Window

Block = Callable[[ModelConfig, int], nn.Module]


class LanguageModel(nn.Module):
    """Tokens in, logits out; causal: a later token never changes an earlier logit.

    config  ModelConfig with vocab_size set
    block   block(config, layer) -> nn.Module whose forward takes (x, Window or CacheView, layer) and returns x's shape
    """

    def __init__(self, config: ModelConfig, block: Block) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("LanguageModel: config.vocab_size is None; give the number of token ids")
        self.config = config
        # Drawn in reset_parameters alone: nn.Embedding's own draw is thrown away,
        # and without memory it imports torch's compiler (2 s).
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.backend)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._rotary = RotaryTables(config.head_dim, config.rope_theta) if config.rope else None
        self.reset_parameters()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """Linear weights Xavier-uniform, biases zero, embedding normal(0, 0.02), wave taps as a depthwise Xavier."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WaveBranch):
                bound = 1 / math.sqrt(module.kernel_size)
                nn.init.uniform_(module.weight, -bound, bound)
        if not self.embed.weight.is_meta:
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self, input_ids: Tensor, document_starts: Tensor | None = None, targets: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Logits (B, T, vocab_size) of input_ids (B, T) int64, each 0 to vocab_size - 1; or with targets the sum of their losses.

        document_starts  (B, T) bool, True at the first token of each document: attention, positions and the wave branch begin
                         anew there. A row always begins one. None: each row is one document.
        targets          (B, T) int64, or -100 where there is none. Then their cross-entropy in nats, summed, is returned: ()
                         float32 (float64 for a float64 model), without ever holding all logits
        label_smoothing  weight of the uniform distribution in the target

        Raises ValueError for other shapes or dtypes, and on a CPU for ids out of range.
        """
        hidden = self.hidden(input_ids, document_starts)
        if targets is None:
            return self.lm_head(hidden)
        return linear_cross_entropy(
            hidden, self.lm_head.weight, targets, label_smoothing=label_smoothing, reduction="sum", backend=self._loss_backend
        )

    @property
    def _loss_backend(self) -> str:
        return for_model(self.config.backend, OPS["linear_cross_entropy"])

    def example_calls(self) -> ExampleCalls:
        """The call of training; the blocks' modules describe their own."""
        weight = self.lm_head.weight
        targets = torch.zeros(1, dtype=torch.int64, device=weight.device)
        yield (
            OPS["linear_cross_entropy"],
            self._loss_backend,
            (weight.new_empty(1, weight.shape[1]), weight, targets),
            {"reduction": "sum"},
        )

    def hidden(self, input_ids: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """What the output projection takes, (B, T, d_model); arguments as forward."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; "
                "it must be (batch, tokens) of torch.int64"
            )
        if document_starts is not None and (document_starts.shape != input_ids.shape or document_starts.dtype != torch.bool):
            raise ValueError(
                f"document_starts has shape {tuple(document_starts.shape)} and dtype {document_starts.dtype}; it must be bool of "
                f"input_ids' shape {tuple(input_ids.shape)}, True at the first token of each document"
            )
        self._check_ids(input_ids)
        batch, tokens = input_ids.shape
        cu_seqlens = None if document_starts is None else document_offsets(document_starts)
        x = self.embed(input_ids)
        if self.config.positional_encoding == "sinusoidal":
            x = x + sinusoidal(window_positions(input_ids, document_starts), self.config.d_model).to(x.dtype)
        cos, sin = self._tables(tokens, x)
        return self._run(x, Window(cos, sin, cu_seqlens))

    def decode(self, input_ids: Tensor, view: CacheView) -> Tensor:
        """What the output projection takes, (tokens, d_model), for new tokens (tokens,) int64 laid end to end as `view` says.

        Writes their keys, values and wave state into the cache. Raises ValueError for an id that is no row of the embedding, on a
        CPU, where looking at them costs no wait.
        """
        self._check_ids(input_ids)
        x = self.embed(input_ids)
        if self.config.positional_encoding == "sinusoidal":
            x = x + sinusoidal(view.positions, self.config.d_model).to(x.dtype)
        return self._run(x, view)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.numel() == 0 or not are_values_known(input_ids):
            return
        for worst in input_ids.aminmax():
            if not 0 <= worst < self.config.vocab_size:
                raise ValueError(
                    f"input_ids holds {int(worst)}, but the model's vocab_size is {self.config.vocab_size}: ids are 0 to "
                    f"{self.config.vocab_size - 1}; encode with the tokenizer that the model was trained with"
                )

    def wave_state_lengths(self) -> list[int]:
        """For each layer, the past inputs that its wave branch remembers while decoding; 0 without a branch."""
        return [block.wave.state_length if isinstance(getattr(block, "wave", None), WaveBranch) else 0 for block in self.blocks]

    def rotary_tables(self, length: int) -> tuple[Tensor | None, Tensor | None]:
        """The tables that a CacheView carries for sequences of up to `length` tokens."""
        return self._tables(length, self.embed.weight)

    def _tables(self, length: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self._rotary is None else self._rotary.get(length, like.device, like.dtype)

    def _run(self, x: Tensor, where: Window | CacheView) -> Tensor:
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, where, layer)
        return self.ln_f(x)

    def num_parameters(self) -> int:
        """Numbers that the state dict holds; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())


def document_offsets(document_starts: Tensor) -> Tensor:
    """cu_seqlens (B * T + 1,) int32 of document_starts (B, T) bool, padded at the end with documents of no tokens.

    A fixed size, so that nothing has to be read on the host and a compiled graph fits every batch.
    """
    starts = document_starts.clone()
    starts[:, :1].fill_(True)
    flat = starts.flatten()
    total = flat.numel()
    index = torch.where(flat, torch.arange(total, device=flat.device), total)
    return torch.cat((index.sort().values, index.new_full((1,), total))).to(torch.int32)


def window_positions(input_ids: Tensor, document_starts: Tensor | None) -> Tensor:
    """(B, T) int64: each token's position in its document."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    if document_starts is None:
        return index
    return index - torch.where(document_starts, index, 0).cummax(1).values


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """positions (...) -> (..., width) float32: sin at even features, cos at odd ones.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    rate = torch.exp(torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) * (-math.log(10000.0) / width))
    angle = positions.unsqueeze(-1).to(torch.float32) * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
