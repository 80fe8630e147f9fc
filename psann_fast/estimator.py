"""psannLM: the model as its users hold it. Fit, generate, score, save, load; no mathematics here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import numbers
import os
import warnings
from pathlib import Path
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from psann_kernels import OPS, explain, self_test
from psann_kernels.registry import check_backend, for_model
from safetensors import SafetensorError
from torch import nn

from . import config as configuration
from .config import ModelConfig, TrainConfig
from .data import Examples, Tokenizer, pack, psannLMDataPrep, tokenizer_from_files
from .data.tokenizer import read_tokenizer_file
from .generate.engine import Request, run
from .generate.options import EngineOptions
from .generate.sampling import SamplingParams
from .generate.text import TextStream
from .integrations.upstream import convert
from .models import build_model, misfit
from .train import checkpoint
from .train import checkpoints as checkpoints_of_runs
from .train.checkpoint import Part
from .train.checkpoints import Checkpoints
from .train.distributed import is_launched
from .train.model_card import model_card
from .train.optim import default_optimizer, default_rate
from .train.precision import resolve_device
from .train.resumable import check_resumable
from .train.run_folder import RunFolder, logged_alone, one_run
from .train.snapshot import Snapshot
from .train.trainer import check, check_same_run, evaluate, train

_LOG = logging.getLogger("psann_fast")

# Fields that say where and how a model runs on this machine; they are not saved with it.
RUNTIME_FIELDS = ("backend", "device")


class psannLM:
    """A sine-activated causal language model.

    Keywords are the fields of ModelConfig (`psannLM(d_model=256, n_layers=4)`), with `rope=` for `positional_encoding=` and
    `sine_params=dict(freq_init=..., ...)` for the `sine_*` fields; or pass `config=ModelConfig(...)` alone.

    module      the nn.Module; built on first use, once vocab_size is known (given here, or taken from the data by fit)
    tokenizer   the tokenizer of the training data, or None
    history_    rows of metrics of the last fit

    Raises TypeError for an unknown option, ValueError for a value out of range.
    """

    def __init__(self, *, config: ModelConfig | None = None, **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"psannLM takes config= or options, not both; put {', '.join(sorted(options))} into the ModelConfig")
        self.config = config if config is not None else configuration.build(ModelConfig, "psannLM", options)
        self.tokenizer: Tokenizer | None = None
        self.history_: list[dict[str, Any]] = []
        self._module: nn.Module | None = None
        self._has_warned_length = False

    # -- the module ---------------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The nn.Module, on its device: `module(input_ids (B, T) int64, document_starts=None) -> logits (B, T, vocab_size)`.

        Initialised from torch's random state on first access (by fit from TrainConfig.seed).
        Raises ValueError while vocab_size is unknown.
        """
        if self._module is None:
            if self.config.vocab_size is None:
                raise ValueError("vocab_size is None; pass vocab_size= to psannLM, or call fit, which takes it from the data")
            device = resolve_device(self.config.device)
            self._module = _placed(build_model(self.config), device)
            self._say_what_runs_as_auto()
        return self._module

    def _say_what_runs_as_auto(self) -> None:
        backend = self.config.backend
        names = {row["op"] for row in explain(self._module)} if backend != "auto" else ()
        missing = sorted(name for name in names if for_model(backend, OPS[name]) == "auto")
        if missing:
            _LOG.info("backend=%r does not implement all of %s: there it is as under 'auto'", backend, ", ".join(missing))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The options, as psannLM(**params) takes them. `deep` is there for scikit-learn's callers; nothing is nested."""
        return {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}

    def set_params(self, **params: Any) -> psannLM:
        """Change options; returns self. Once the module is built, only `backend`, `device` and `max_length` can change; a new
        backend makes a new module with the same weights, the others keep the module.

        Raises TypeError for an unknown option, ValueError for one that would need other weights.
        """
        known = configuration.option_names(ModelConfig)
        for name in params:
            if name not in known:
                raise configuration.unknown_option("psannLM", name, known)
        config = configuration.changed(self.config, **params)
        if self._module is not None:
            differs = [
                f.name for f in dataclasses.fields(config)
                if getattr(config, f.name) != getattr(self.config, f.name) and f.name not in (*RUNTIME_FIELDS, "max_length")
            ]  # fmt: skip
            if differs:
                raise ValueError(f"set_params: {', '.join(differs)} cannot change once the module is built; make a new psannLM")
            self._reconfigure(self._module, config)
        self.config = config
        return self

    def _reconfigure(self, module: nn.Module, config: ModelConfig) -> None:
        device = resolve_device(config.device)
        if config.backend != self.config.backend:
            state, dtype = module.state_dict(), next(module.parameters()).dtype
            with torch.random.fork_rng(devices=[]):  # building draws initial weights, which must not move the caller's random state
                module = build_model(config)
            module.to(dtype).load_state_dict(state)
        # Otherwise the same object, which the caller may hold: hooks stay, and fit trains what he holds.
        module.config = config
        self._module = _placed(module, device)

    # -- training -----------------------------------------------------------------------------------------------------------

    def fit(
        self,
        data: psannLMDataPrep,
        val_data: psannLMDataPrep | None = None,
        *,
        train_config: TrainConfig | None = None,
        **options: Any,
    ) -> psannLM:
        """Train on `data`; returns self.

        data       psannLMDataPrep; its tokenizer becomes the model's, its vocabulary and window fill in what was not given
        val_data   validation data; default: data.val_dataset
        options    fields of TrainConfig (epochs, batch_tokens, lr, max_steps, amp, checkpoint_dir, ...), or train_config= alone

        Where the module is not built yet, fit draws its weights from TrainConfig.seed. The data's own seed (DataConfig) orders the
        examples. A second fit continues from the present weights with a new optimizer and a new schedule; to restart, make a new
        psannLM. history_ has a row for each log interval of this call, those before an interruption or divergence too.
        With checkpoint_dir the folder receives, every save_interval_steps and at the end, the model (readable by load) and a
        checkpoint to continue from; best/ at each new lowest validation loss; config.yaml, metrics.csv, metrics.jsonl, loss.png and
        README.md. The weights held afterwards are the last ones. resume="auto" continues the run that is in checkpoint_dir, if
        there is one: on a CPU bit for bit. SIGINT and SIGTERM save the last finished step and end in KeyboardInterrupt and
        SystemExit(143); a second signal ends at once. Under torchrun each process calls fit alike and process 0 writes.

        Raises TypeError for an unknown option or data of another type, ValueError for options that contradict the data, the
        device or the run to continue, TrainingDiverged at NaN or infinity, CheckpointError for damaged checkpoints, OSError where
        the folder cannot be written.
        """
        if train_config is not None and options:
            raise TypeError(f"fit takes train_config= or options, not both; put {', '.join(sorted(options))} into the TrainConfig")
        settings = train_config if train_config is not None else configuration.build(TrainConfig, "fit", options)
        for name, value in (("data", data), ("val_data", val_data)):
            if not isinstance(value, psannLMDataPrep) and (name == "data" or value is not None):
                raise TypeError(f"fit: {name} is a {type(value).__name__}; pass psannLMDataPrep(texts, ...)")
        fill = self._missing_for(data)
        if val_data is not None and not _is_same(val_data.tokenizer, data.tokenizer):
            raise ValueError("fit: val_data has another tokenizer than data; pass psannLMDataPrep(texts, tokenizer=data.tokenizer)")
        val_examples = val_data.dataset if val_data is not None else data.val_dataset
        config = configuration.changed(self.config, **fill)
        if settings.optimizer is None:
            settings = configuration.changed(settings, optimizer=default_optimizer(settings.amp))
        if settings.lr is None:
            settings = configuration.changed(settings, lr=default_rate(config.d_model, settings.optimizer))
        check(settings, resolve_device(config.device))
        module = self._module if self._module is not None else self._drawn(config, settings.seed)
        if settings.checkpoint_dir is not None:
            checkpoint.check_readable(_stored(config, module.state_dict()))
        resumed = self._resumed(settings, config, module, data.dataset)
        is_main = not (settings.ddp != "off" and is_launched()) or int(os.environ["RANK"]) == 0
        options = {
            name: configuration.to_dict(part) for name, part in (("model", config), ("train", settings), ("data", data.config))
        }
        run_folder = checkpoints = None
        with contextlib.ExitStack() as held:
            if settings.checkpoint_dir is not None and is_main:
                held.enter_context(one_run(settings.checkpoint_dir))
                checkpoints = Checkpoints(
                    settings.checkpoint_dir, self._parts, keep=settings.keep_checkpoints, is_async=settings.async_checkpoints,
                    is_resumed=resumed is not None,
                )  # fmt: skip
                run_folder = RunFolder(
                    settings.checkpoint_dir,
                    options,
                    after_step=None if resumed is None else resumed.step,
                    tensorboard=settings.tensorboard,
                )
            # From here on nothing is left to refuse, so the model may change.
            is_new, self._module, self.tokenizer, self.history_ = self._module is None, module, data.tokenizer, []
            self.config = module.config = config
            if is_new:
                self._say_what_runs_as_auto()
            if resumed is not None:
                module.load_state_dict(resumed.weights)
            _LOG.info("training %s parameters on %s tokens", f"{module.num_parameters():,}", f"{data.train_tokens:,}")
            is_over = False
            try:
                train(
                    module, data.dataset, settings, val_examples=val_examples, run=run_folder, history=self.history_,
                    resumed=resumed, save=None if settings.checkpoint_dir is None else checkpoints.save if is_main else _not_main,
                    sample=None if run_folder is None else lambda step: run_folder.add_sample(step, self._sampled(settings)),
                )  # fmt: skip
                is_over = True
            finally:
                if run_folder is not None:
                    described = {**options["data"], "train_tokens": data.train_tokens, "train_bytes": data.train_bytes}
                    name, size = run_folder.path.resolve().name, module.num_parameters()
                    try:
                        checkpoints.wait()
                    finally:
                        card = model_card(name, size, options["model"], options["train"], described, run_folder.rows)
                        with contextlib.nullcontext() if is_over else logged_alone():  # what ended the run is the error to see
                            run_folder.close(card)
        return self

    def _resumed(self, settings: TrainConfig, config: ModelConfig, module: nn.Module, examples: Examples) -> Snapshot | None:
        """The snapshot to continue from, checked to be one of this model; None to begin."""
        if settings.resume is None:
            return None
        if settings.resume != "auto":
            if not Path(settings.resume).is_dir():
                raise ValueError(
                    f"fit: resume is {str(settings.resume)!r}, and there is no such folder; pass 'auto' or a folder of checkpoints/"
                )
            resumed = checkpoints_of_runs.read(settings.resume)
        elif settings.checkpoint_dir is None:
            raise ValueError("fit: resume is 'auto' and checkpoint_dir is None; pass the checkpoint_dir of the run to continue")
        else:
            resumed = checkpoints_of_runs.newest(settings.checkpoint_dir)
        if resumed is None:
            _LOG.info("no checkpoint is in %s: the run begins", settings.checkpoint_dir)
            return None
        weights = dict(resumed.weights)
        try:
            _check_weights(config, weights)
        except ValueError as error:
            raise ValueError(
                f"resume: the model is not that of the run to continue ({error}); give the same model options, or start anew with "
                "resume=None in another checkpoint_dir"
            ) from error
        check_resumable(resumed, module)
        check_same_run(resumed.state, settings, examples)
        return dataclasses.replace(resumed, weights=weights)

    def _sampled(self, settings: TrainConfig) -> str:
        return settings.sample_prompt + self.generate(
            settings.sample_prompt, max_new_tokens=100, temperature=0.8, seed=settings.seed
        )

    @staticmethod
    def _drawn(config: ModelConfig, seed: int) -> nn.Module:
        """A new module on its device, its weights drawn from `seed`; the caller's random state does not move."""
        device = resolve_device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _placed(build_model(config), device)

    def _missing_for(self, data: psannLMDataPrep) -> dict[str, int]:
        """The options that the data decides because they were not given. Raises ValueError if the data does not fit the model."""
        if self.tokenizer is not None and not _is_same(self.tokenizer, data.tokenizer):
            raise ValueError(
                "fit: the model was trained with another tokenizer than this data has; "
                "pass psannLMDataPrep(texts, tokenizer=model.tokenizer), or make a new psannLM"
            )
        if self.config.vocab_size is not None and self.config.vocab_size < data.vocab_size:
            raise ValueError(
                f"fit: vocab_size is {self.config.vocab_size}, but the data has {data.vocab_size} token ids; "
                f"pass vocab_size={data.vocab_size} or more to psannLM"
            )
        found = {"vocab_size": data.vocab_size, "max_length": data.dataset.window}
        return {name: value for name, value in found.items() if getattr(self.config, name) is None}

    def score(self, texts: Iterable[str]) -> dict[str, float]:
        """How well the model predicts held-out texts: nats_per_token, bits_per_byte (UTF-8), perplexity, tokens, bytes.

        Every token of every text is predicted once, from the tokens of its own text in windows of max_length; a text's first
        token from the separator alone. Raises ValueError without texts or without a tokenizer.
        """
        tokenizer = self._needs_tokenizer("score")
        if isinstance(texts, str):
            raise ValueError("score: texts is one str; pass a list of texts")
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError("score: texts holds no text; pass at least one non-empty str")
        documents = tokenizer.encode_batch(texts)
        tokens, size = sum(map(len, documents)), sum(len(text.encode()) for text in texts)
        stream = pack(documents, tokenizer.eos_id, tokenizer.vocab_size)
        window = min(self.config.max_length or 256, len(stream) - 1)
        examples = Examples(stream, window, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        nats = evaluate(self.module, examples, max(1, 8192 // window), count_separators=False)
        return {
            "nats_per_token": nats,
            "bits_per_byte": nats * tokens / size / math.log(2),
            "perplexity": math.exp(min(nats, 700.0)),
            "tokens": tokens,
            "bytes": size,
        }

    # -- generation ---------------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, **options: Any) -> str:
        """The text that the model writes after `prompt` (without the prompt).

        Options: max_new_tokens=128, temperature=1.0, top_k=None, top_p=0.9, min_p=None, repetition_penalty=None, stop=None,
        seed=None; see SamplingParams. And weights="model", speculate=0, cuda_graphs="auto"; see EngineOptions. The text ends at
        max_new_tokens, a stop string or the end of the document. An empty prompt begins a document. Raises TypeError or ValueError
        for wrong options, and for a text that could become longer than memory has room for.
        """
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[str], *, seed: int | Sequence[int] | None = None, **options: Any) -> list[str]:
        """One text for each prompt, lengths mixed at will; options as generate.

        seed  for all prompts, or one for each: text i is the one that generate(prompts[i], seed=seed or seed[i]) gives, whatever
              its neighbours. None: a fresh one for each, from torch's random state
        """
        requests, engine_options = self._requests("generate_batch", prompts, options, seed)
        for _ in self._run(requests, engine_options):
            pass
        return [request.text.text for request in requests]

    def stream(self, prompt: str, *, seed: int | None = None, **options: Any) -> Iterator[str]:
        """The text of generate in pieces, as soon as each is certain (no character is split). Options as generate."""
        requests, engine_options = self._requests("stream", [prompt], options, seed)
        return (piece for _, piece in self._run(requests, engine_options) if piece)

    def _run(self, requests: Sequence[Request], options: EngineOptions) -> Iterator[tuple[Request, str]]:
        return run(self.module, requests, self.tokenizer.eos_id, self.tokenizer.vocab_size, options)

    def _requests(
        self, caller: str, prompts: Sequence[str], options: Mapping[str, Any], seed: int | Sequence[int] | None
    ) -> tuple[list[Request], EngineOptions]:
        tokenizer = self._needs_tokenizer(caller)
        known, of_engine = ([f.name for f in dataclasses.fields(kind)] for kind in (SamplingParams, EngineOptions))
        for name in options:
            if name not in known + of_engine:
                raise configuration.unknown_option(caller, name, known + of_engine)
        engine_options = EngineOptions(**{name: value for name, value in options.items() if name in of_engine})
        options = {name: value for name, value in options.items() if name in known}
        if isinstance(prompts, str):
            raise ValueError("generate_batch: prompts is one str; pass a list of prompts, or call generate")
        prompts = list(prompts)
        if seed is None:
            seeds = torch.randint(1 << 62, (len(prompts),)).tolist()  # so that torch.manual_seed decides
        else:
            seeds = [seed] * len(prompts) if isinstance(seed, (numbers.Number, str)) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(
                f"{caller}: seed has {len(seeds)} values for {len(prompts)} prompts; pass one for all, or one for each"
            )
        requests = []
        for index, (prompt, own_seed) in enumerate(zip(prompts, seeds)):
            if not isinstance(prompt, str):
                raise ValueError(f"{caller}: prompt {index} is a {type(prompt).__name__}; it must be a str")
            params = SamplingParams(**options, seed=own_seed)
            tokens = tokenizer.encode(prompt) or [tokenizer.eos_id]
            requests.append(Request(index, tokens, params, TextStream(tokenizer.decode_bytes, params.stop_strings)))
        self._warn_beyond_window(max((r.longest for r in requests), default=0))
        return requests, engine_options

    def _warn_beyond_window(self, longest: int) -> None:
        window = self.config.max_length
        if window is not None and longest > window and not self._has_warned_length:
            self._has_warned_length = True
            warnings.warn(
                f"generating up to {longest} tokens with a model trained on windows of {window}: the text may degrade beyond them "
                "(said once per model)",
                stacklevel=5,
            )

    def _needs_tokenizer(self, caller: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{caller}: the model has no tokenizer yet; call fit first, load a saved model, or set model.tokenizer"
            )
        return self.tokenizer

    # -- persistence --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write weights, configuration and tokenizer into the folder `path`, replacing a model saved there as a whole.

        Files: safetensors, JSON, the tokenizer's own; manifest.json with checksums comes last, so that an interrupted save leaves
        the old model. `backend` and `device` are not saved. Raises OSError where the folder cannot be written, ValueError for a
        model of more tensors than load reads.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
        checkpoint.write(path, self._parts(state))

    def _parts(self, state: Mapping[str, torch.Tensor]) -> dict[str, Part]:
        """The files of the model whose state dict is `state`."""
        weights = _stored(self.config, state)
        checkpoint.check_readable(weights)
        saved = {name: value for name, value in configuration.to_dict(self.config).items() if name not in RUNTIME_FIELDS}
        tokenizer_files = {} if self.tokenizer is None else self.tokenizer.to_files()
        described = json.dumps({"model": saved, "tokenizer": list(tokenizer_files)}, indent=2) + "\n"
        return {"model.safetensors": weights, "config.json": described.encode("utf-8"), **tokenizer_files}

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "auto", device: str = "auto") -> psannLM:
        """The model that save wrote into the folder `path`, verified before anything is built; nothing in it is executed.

        Raises CheckpointError for a missing, damaged or foreign folder.
        """
        resolve_device(device)
        check_backend(backend, "psannLM.load")
        files = checkpoint.read(path)
        try:
            described = checkpoint.read_json(files["config.json"])
            weights = checkpoint.read_tensors(files["model.safetensors"])
            model = cls(config=_saved_config(described["model"], weights, backend, device))
            with torch.random.fork_rng(devices=[]):  # building draws initial weights, which must not move the caller's random state
                module = model.module
            dtypes = {tensor.dtype for tensor in weights.values()}
            if len(dtypes) == 1:  # module.bfloat16() or .double() before save; a mixture runs in float32
                module.to(*dtypes)
            module.load_state_dict(weights)
            if described["tokenizer"]:
                model.tokenizer = tokenizer_from_files({name: read_tokenizer_file(files[name]) for name in described["tokenizer"]})
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise checkpoint.CheckpointError(f"{path} does not hold a usable model: {error}; load another checkpoint") from error
        return model

    @classmethod
    def from_psannlm(
        cls,
        source: Any,
        *,
        drop: Collection[str] = (),
        n_heads: int | None = None,
        positional_encoding: str | None = None,
        backend: str = "auto",
        device: str = "auto",
    ) -> psannLM:
        """A psannlm model as a psannLM with the same logits.

        source  path of a .pt file that psannlm 2.0.1 or 0.12 wrote (nothing in it is executed), or its transformer or fitted
                estimator in memory

        drop, n_heads and positional_encoding are those of integrations.upstream.convert, and so are the errors. What does not carry
        over is named in a UserWarning: a tokenizer comes along where every text gets the same ids here.
        """
        imported = convert(source, drop=drop, n_heads=n_heads, positional_encoding=positional_encoding)
        for note in imported.notes:
            warnings.warn(f"from_psannlm: {note}", stacklevel=2)
        model = cls(config=configuration.changed(imported.config, backend=backend, device=device))
        with torch.random.fork_rng(devices=[]):  # as in load
            model.module.load_state_dict(imported.state)
        model.tokenizer = imported.tokenizer
        return model


def _placed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on its device, in evaluation mode. A GPU's kernels are tested when it gets its first model; the answer is kept."""
    if device.type == "cuda":
        self_test(device)
    return module.to(device).eval()


def _saved_config(options: Mapping[str, Any], weights: dict[str, torch.Tensor], backend: str, device: str) -> ModelConfig:
    """The saved configuration, after making sure that it describes these weights, so that nothing absurd is built. A tied
    output projection is added to `weights`. Raises ValueError or TypeError."""
    config = configuration.build(ModelConfig, "the saved model", {**options, "backend": backend, "device": device})
    _check_weights(config, weights)
    return config


def _check_weights(config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless `config` describes `weights`; a tied output projection is added to them."""
    if config.tie_embeddings and "embed.weight" in weights:
        weights["lm_head.weight"] = weights["embed.weight"]
    wrong = misfit(config, weights)
    if wrong is not None:
        raise ValueError(wrong)


def _not_main(name: str, snapshot: Snapshot) -> None:
    """What the processes that do not write do with a checkpoint."""


def _stored(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is saved of a state dict: a tied projection is the embedding's own memory, and not stored a second time."""
    return {name: tensor for name, tensor in state.items() if not (config.tie_embeddings and name == "lm_head.weight")}


def _is_same(one: Tokenizer, other: Tokenizer) -> bool:
    return one is other or one.to_files() == other.to_files()
