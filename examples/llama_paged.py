"""A Llama of transformers with our attention, decoding texts of mixed lengths through one paged cache:
`python examples/llama_paged.py`.

A small Llama over bytes is trained for some steps with attn_implementation="psann_triton" (on a GPU) or "psann_torch", since
nothing is downloaded; `--model FOLDER` takes a Llama that you have instead. Then its own weights run through RotaryAttention and
PagedKVCache: all prompts in one step, whatever their lengths, and the texts are those of transformers' generate.
"""

from __future__ import annotations

import argparse

import psann_fast.integrations.huggingface  # noqa: F401 (registers the attention)
import torch
from psann_fast.data import default_corpus
from psann_kernels import PagedKVCache, PagedStep, RotaryAttention
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


class PagedLlama(nn.Module):
    """The layers of a Llama, its parameters shared, with attention through a paged cache."""

    def __init__(self, llama: LlamaForCausalLM, max_position: int, backend: str) -> None:
        super().__init__()
        config, self.llama = llama.config, llama
        if config.rope_parameters["rope_type"] != "default" or config.head_dim * config.num_attention_heads != config.hidden_size:
            raise ValueError("PagedLlama: this example takes plain rotary positions, and heads that fill the hidden size")
        self.attentions = nn.ModuleList()
        for layer in llama.model.layers:
            attention = RotaryAttention(
                config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
                theta=config.rope_parameters["rope_theta"], max_position=max_position, interleaved=False,
                bias=config.attention_bias, backend=backend,
            )  # fmt: skip
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(attention, name, getattr(layer.self_attn, name))
            self.attentions.append(attention.to(llama.device))

    def forward(self, ids: Tensor, step: PagedStep) -> Tensor:
        """ids (T,), the new tokens of all sequences end to end -> logits (sequences, vocabulary) after the last token of each."""
        x = self.llama.model.embed_tokens(ids)
        for number, (layer, attention) in enumerate(zip(self.llama.model.layers, self.attentions)):
            x = x + attention(layer.input_layernorm(x), step=step, layer=number)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.llama.lm_head(self.llama.model.norm(x[step.cu_seqlens[1:].long() - 1]))


@torch.no_grad()
def write(model: PagedLlama, prompts: list[list[int]], new_tokens: int, block_size: int = 16) -> list[list[int]]:
    """The greedy continuation of each prompt, all in one batch that has no padding."""
    config = model.llama.config
    blocks = sum(-(-(len(prompt) + new_tokens) // block_size) for prompt in prompts)
    cache = PagedKVCache(
        blocks, block_size, config.num_key_value_heads, config.head_dim, num_layers=config.num_hidden_layers,
        dtype=model.llama.dtype, device=model.llama.device,
    )  # fmt: skip
    names, texts, new = range(len(prompts)), [[] for _ in prompts], prompts
    for _ in range(new_tokens):
        step = cache.extend(names, [len(ids) for ids in new])
        chosen = model(torch.tensor(sum(new, []), device=model.llama.device), step).argmax(-1).tolist()
        new = [[token] for token in chosen]
        for text, token in zip(texts, chosen):
            text.append(token)
    return texts


def trained(hidden_size: int, layers: int, steps: int, implementation: str) -> LlamaForCausalLM:
    """A Llama over bytes that has read `steps` batches of the corpus that comes with Python."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(implementation)
    stream = torch.frombuffer(bytearray("\n".join(default_corpus()).encode()), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1, max(1, steps // 8))
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - 128, (8,))
        ids = torch.stack([stream[start : start + 128] for start in starts]).long()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        if step % max(1, steps // 4) == 0:
            print(f"step {step:5}   loss {loss.item():.3f} nats per byte")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a Llama with its tokenizer; default: train a small one")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--prompts", nargs="+", default=["The value of ", "If ", "A function definition is"])
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    implementation = "psann_triton" if device == "cuda" else "psann_torch"
    if options.model is None:
        with torch.device(device):
            llama = trained(options.hidden_size, options.layers, options.steps, implementation)
        encode, decode = (lambda text: list(text.encode())), (lambda ids: bytes(ids).decode(errors="replace"))
    else:
        llama = AutoModelForCausalLM.from_pretrained(options.model).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        encode, decode = tokenizer.encode, tokenizer.decode
    prompts = [encode(prompt) for prompt in options.prompts]
    if not all(prompts):
        parser.error("an empty prompt has no token to begin with")

    longest = max(map(len, prompts)) + options.new_tokens
    texts = write(PagedLlama(llama, longest, backend="auto"), prompts, options.new_tokens)
    llama.set_attn_implementation(implementation)
    for prompt, ids, text in zip(options.prompts, prompts, texts):
        print(f"{prompt!r} -> {decode(text)!r}")
        alone = llama.generate(
            torch.tensor([ids], device=device), max_new_tokens=options.new_tokens, do_sample=False, eos_token_id=None
        )
        if alone[0, len(ids) :].tolist() != text:
            print(f"  but generate wrote {decode(alone[0, len(ids):].tolist())!r}: two tokens came too close for rounding")


if __name__ == "__main__":
    main()
