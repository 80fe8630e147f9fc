"""The model card of a run: what was trained on what, how well, and how to use it."""

from __future__ import annotations

from typing import Any, Mapping, Sequence


def model_card(
    name: str,
    parameters: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    data: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown. model, train and data are resolved configurations, data with train_tokens and train_bytes;
    history the run's rows."""
    validated = [row for row in history if row.get("val_loss") is not None]
    last = history[-1] if history else None
    lines = [
        f"# {name}",
        "",
        f"A sine-activated language model of psann-fast: base `{model['base']}`, {parameters:,} parameters, {model['n_layers']} "
        f"layers of width {model['d_model']}, {model['n_heads']} heads, vocabulary {model['vocab_size']}, window "
        f"{model['max_length']} tokens.",
        "",
        "## Training",
        "",
        f"- {data['train_tokens']:,} tokens ({data['train_bytes']:,} bytes of text) a pass, tokenizer `{data['tokenizer']}`",
    ]
    if last is not None:
        lines += [
            f"- {last['step']:,} optimizer steps, {last['tokens']:,} tokens, {last['seconds']:.0f} s; "
            f"optimizer `{train['optimizer']}`, learning rate {train['lr']:g}",
            f"- training loss {last['loss']:.4f} nats per token at the last step",
        ]
    if validated:
        best = min(validated, key=lambda row: row["val_loss"])
        lines.append(
            f"- validation loss {validated[-1]['val_loss']:.4f} at the last step; lowest {best['val_loss']:.4f} after step "
            f"{best['step']:,} (in `best/`)"
        )
    lines += [
        "",
        "It writes text like what it was trained on, with whatever errors and biases that holds; nothing else was done to it.",
        "`config.yaml` has every option, `metrics.csv` every row, `loss.png` the curves.",
        "",
        "## Use",
        "",
        "```python",
        "from psann_fast import psannLM",
        "",
        'model = psannLM.load("path/of/this/folder")',
        'print(model.generate("The ", max_new_tokens=100))',
        "```",
        "",
    ]
    return "\n".join(lines)
