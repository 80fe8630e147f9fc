"""The command line: psann-fast train | generate | chat | serve | eval | import | export | doctor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn, Sequence

import torch
from psann_kernels import BackendError

from . import config as configuration
from . import settings as presets
from .config import DataConfig, ModelConfig, TrainConfig
from .data import default_corpus, psannLMDataPrep
from .data.documents import read_paths
from .data.shards import is_shards
from .data.tokenizing import SHARD_TOKENS, tokenize
from .doctor import report
from .estimator import psannLM
from .generate import commands as writing
from .integrations.export import export, import_exported
from .train.checkpoints import newest_step
from .train.runs import differences, find_runs, summary
from .version import __version__

COLUMNS_OF_RUNS = {
    "step": ">7,d", "loss": ">7.4f", "val_loss": ">7.4f", "best_val_loss": ">7.4f", "tokens_per_second": ">9,.0f", "mfu": ">5.0%",
}  # fmt: skip
USER_ERRORS = (ValueError, TypeError, OSError, BackendError, FloatingPointError, ModuleNotFoundError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error that its message explains, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        return options.run(options)
    except USER_ERRORS as error:
        print(f"psann-fast {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"psann-fast {options.command}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Flags in full, as YAML and keywords have them; an error is one sentence, and an unknown flag names the nearest right one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        for flag in unknown:
            if flag.startswith("--"):
                self.error(str(configuration.unknown_option("it", flag.partition("=")[0], self._option_string_actions)))
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="psann-fast", description="Sine-activated language models on fused kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model and let it write", description="Train a model. Without arguments: the "
                                "quickstart preset on an embedded corpus. Options below override --config, "
                                "which overrides --preset.")  # fmt: skip
    train.set_defaults(run=_train)
    train.add_argument("--preset", default="quickstart", help=f"one of {', '.join(presets.presets())} (default: quickstart)")
    train.add_argument("--config", metavar="FILE", help="YAML file with the sections model, data, train")
    train.add_argument("--data", nargs="+", metavar="PATH", help="text files, folders of .txt files, or one folder that "
                       "`psann-fast tokenize` wrote (default: embedded corpus)")  # fmt: skip
    train.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/<preset>-<date>-<time>)")
    train.add_argument("--prompt", default="The ", help="what the trained model continues at the end")
    for title, kind in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        _add_fields(train, title, kind, skip={"checkpoint_dir", "max_length" if kind is ModelConfig else ""})

    writing.add_to(commands, _add_model)

    evaluate = commands.add_parser("eval", help="nats per token and bits per byte on text")
    evaluate.set_defaults(run=_eval)
    _add_model(evaluate)
    evaluate.add_argument("--data", nargs="+", metavar="PATH", required=True, help="text files, or folders of .txt files")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    importer = commands.add_parser("import", help="bring in a model of psannlm, or one that was exported")
    importer.set_defaults(run=_import)
    importer.add_argument("path", help=".pt file of psannlm 2.0.1 or 0.12, or an exported folder; nothing in it is executed")
    importer.add_argument("--out", metavar="FOLDER", required=True, help="folder for the model")
    importer.add_argument(
        "--drop", action="append", default=[], metavar="PART", help="leave a part behind: wave, psannlm's wave branch"
    )
    importer.add_argument("--n-heads", type=int, metavar="N", help="for psannlm files that do not say it")
    importer.add_argument(
        "--positional-encoding", metavar="NAME", help="rope, alibi or sinusoidal, for psannlm files that do not say it"
    )

    tokenizing = commands.add_parser("tokenize", help="turn a large corpus into token shards to train from")
    tokenizing.set_defaults(run=_tokenize)
    add = tokenizing.add_argument
    add("--data", nargs="+", metavar="PATH", required=True, help=".txt, .jsonl or .parquet files, or folders of them")
    add("--out", metavar="FOLDER", required=True, help="folder for the shards; `psann-fast train --data FOLDER` reads it")
    add("--tokenizer", default="auto", help="auto, simple, sentencepiece or tokenizers, trained on a sample of the corpus")
    add("--tokenizer-model-path", metavar="PATH", help="a prebuilt tokenizer instead: .model, .json, or a saved folder")
    add("--vocab-size", type=int, metavar="N", help=f"of a tokenizer that is trained (default: {DataConfig.tokenizer_vocab_size})")
    add("--field", default="text", help="where JSON lines and Parquet rows have their text (default: text)")
    add("--by-line", action="store_true", help="each line of a text file is a document (default: each file)")
    add("--val-split", type=float, default=0.0, metavar="SHARE", help="share of the documents for validation (default: 0)")
    add("--workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help=f"tokens of a shard, about (default: {SHARD_TOKENS})")
    add("--seed", type=int, default=DataConfig.seed, help="of the tokenizer's sample and the split")

    lister = commands.add_parser("runs", help="list and compare run folders")
    lister.set_defaults(run=_runs)
    lister.add_argument(
        "folders", nargs="*", default=["runs"], metavar="FOLDER", help="run folders, or a folder of them (default: runs)"
    )
    lister.add_argument("--json", action="store_true", help="print JSON")

    exporter = commands.add_parser("export", help="write a model for another library")
    exporter.set_defaults(run=_export)
    exporter.add_argument("model", help="folder that save() or `psann-fast train` wrote")
    exporter.add_argument("--to", choices=["hf"], required=True, help="hf: a folder that transformers loads without psann-fast")
    exporter.add_argument("--out", metavar="FOLDER", required=True, help="folder for the exported model")

    doctor = commands.add_parser("doctor", help="versions, devices, and which backend would serve each op")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_fields(parser: argparse.ArgumentParser, title: str, kind: type, skip: set[str]) -> None:
    group = parser.add_argument_group(f"{title} options")
    for f in dataclasses.fields(kind):
        if f.name in skip or _flag(f.name) in parser._option_string_actions:
            continue  # a name that two classes share (seed) is one flag and goes to both
        text = f.metadata["help"].replace("%", "%%")
        default = "" if f.default is None else f" (default: {f.default})"
        if f.type == "bool":
            group.add_argument(_flag(f.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text + default)
        else:
            group.add_argument(_flag(f.name), default=argparse.SUPPRESS, metavar="VALUE", help=text + default)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder that save() or `psann-fast train` wrote")
    parser.add_argument("--backend", default="auto", help="auto, triton, native or torch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _given(options: argparse.Namespace) -> presets.Settings:
    """The options of the three configuration classes that stood on the command line."""
    return {
        section: {
            f.name: configuration.coerced(kind, f.name, getattr(options, f.name))
            for f in dataclasses.fields(kind)
            if hasattr(options, f.name) and not (kind is ModelConfig and f.name == "max_length")
        }
        for section, kind in presets.SECTIONS.items()
    }


def _train(options: argparse.Namespace) -> int:
    layers = [presets.load_preset(options.preset)]
    if options.config is not None:
        layers.append(presets.load_file(options.config))
    chosen = presets.merged(*layers, _given(options))
    given = options.out or chosen["train"].pop("checkpoint_dir", None)
    if given is None and chosen["train"].get("resume") == "auto":
        raise ValueError("resume is auto, but no run folder is given; name the one to continue with --out")
    folder = Path(given or time.strftime(f"runs/{options.preset}-%Y%m%d-%H%M%S"))
    settings = configuration.build(TrainConfig, "train", {**chosen["train"], "checkpoint_dir": folder})
    torch.manual_seed(settings.seed)
    data = _data(options, chosen["data"])
    model = psannLM(**chosen["model"])
    try:
        model.fit(data, train_config=settings)
    except (KeyboardInterrupt, SystemExit):
        if int(os.environ.get("RANK", 0)) == 0 and newest_step(folder) is not None:
            print(f"to go on: the same line with --out {folder} --resume auto", file=sys.stderr)
        raise
    if int(os.environ.get("RANK", 0)) > 0:
        return 0  # process 0 speaks for all
    if not model.history_:
        print(f"{folder} holds a finished run: nothing was left to train")
        return 0

    print(f"\n{options.prompt}", end="", flush=True)
    for piece in model.stream(options.prompt, max_new_tokens=120, temperature=0.8, seed=settings.seed):
        print(piece, end="", flush=True)
    last = model.history_[-1]
    validation = "" if last["val_loss"] is None else f", validation {last['val_loss']:.3f}"
    print(f"\n\nloss {last['loss']:.3f}{validation} after {last['step']} steps, {last['tokens']:,} tokens, {last['seconds']:.0f} s")
    print(f"run folder: {folder} (weights, config.yaml, tokenizer, metrics.csv, loss.png)")
    print(f"more text:  psann-fast generate {folder} --prompt 'The '")
    return 0


def _data(options: argparse.Namespace, chosen: dict[str, Any]) -> psannLMDataPrep:
    """The training data that --data names."""
    if options.data is None:
        return psannLMDataPrep(default_corpus(), **chosen)
    if not any(map(is_shards, options.data)):
        return psannLMDataPrep(paths=options.data, **chosen)
    if len(options.data) > 1:
        raise ValueError(f"--data names {len(options.data)} paths, one of them token shards; name one folder of shards alone")
    decided = [name for name in _given(options)["data"] if name not in ("max_length", "seed")]
    if decided:
        raise ValueError(f"{_flag(decided[0])} was decided when {options.data[0]} was tokenized; leave it out, or tokenize anew")
    return psannLMDataPrep.from_shards(options.data[0], **{name: chosen[name] for name in ("max_length", "seed") if name in chosen})


def _tokenize(options: argparse.Namespace) -> int:
    names = ("tokenizer", "tokenizer_model_path", "vocab_size", "field", "by_line", "val_split", "workers", "shard_tokens", "seed")
    parts = tokenize(options.data, options.out, **{name: getattr(options, name) for name in names})
    for part, found in parts.items():
        if found["shards"]:
            sizes = ", ".join(f"{found[name]:,} {name}" for name in ("documents", "bytes", "tokens"))
            print(f"{part}: {sizes} in {len(found['shards'])} shards")
    print(f"train on them:  psann-fast train --data {options.out}")
    return 0


def _runs(options: argparse.Namespace) -> int:
    runs = find_runs(options.folders)
    rows, differing = [summary(run) for run in runs], differences(runs)
    if options.json:
        print(json.dumps({"runs": rows, "differences": differing}, indent=2))
        return 0
    if not rows:
        print(f"no run in {', '.join(options.folders)}")
        return 0
    width = max(len(row["run"]) for row in rows)
    print(f"{'run':{width}}  {'step':>7}  {'loss':>7}  {'val':>7}  {'best':>7}  {'tokens/s':>9}  {'MFU':>5}")
    show = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731 (one line's worth)
    for row in sorted(rows, key=lambda row: row["best_val_loss"] or float("inf")):
        print(
            f"{row['run']:{width}}  "
            + "  ".join(show(row[name], form).rjust(int(form[1])) for name, form in COLUMNS_OF_RUNS.items())
        )
    for name, values in differing.items():
        print(f"{name}: " + ", ".join(f"{run} {value}" for run, value in values.items()))
    return 0


def _eval(options: argparse.Namespace) -> int:
    model = psannLM.load(options.model, backend=options.backend, device=options.device)
    result = model.score(read_paths(options.data))
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:16} {value:,}" if isinstance(value, int) else f"{name:16} {value:.4f}")
    return 0


def _import(options: argparse.Namespace) -> int:
    if Path(options.path).resolve() == Path(options.out).resolve():
        raise ValueError(f"--out is {options.out}, which is what is imported; pass another folder")
    if Path(options.path).is_dir():
        model = import_exported(options.path, device="cpu")
    else:
        model = psannLM.from_psannlm(
            options.path, drop=options.drop, n_heads=options.n_heads, positional_encoding=options.positional_encoding, device="cpu"
        )
    model.save(options.out)
    tokenizer = "without a tokenizer" if model.tokenizer is None else f"with its {model.tokenizer.name} tokenizer"
    print(f"{model.module.num_parameters():,} parameters of {options.path}, {tokenizer}, are in {options.out}")
    return 0


def _export(options: argparse.Namespace) -> int:
    notes = export(psannLM.load(options.model, device="cpu"), options.out)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{options.out}: AutoModelForCausalLM.from_pretrained({options.out!r}, trust_remote_code=True)")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    found = report()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for title in ("versions", "devices", "self-test"):
        print(title if found[title] else f"{title}: no GPU to ask")
        for name, value in found[title].items():
            print(f"  {name:14} {value}")
    print("backends, in the order in which backend='auto' asks them")
    previous = None
    for row in found["ops"]:
        name = f"{row['op']} on {row['device']}"
        print(f"  {name if name != previous else '':26} {row['backend']:7} {row['serves']:4} {row['reason']}")
        previous = name
    return 0


if __name__ == "__main__":
    sys.exit(main())
