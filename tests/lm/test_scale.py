"""Large data: tokenized by all workers, streamed in constant memory, each example once whoever reads it.

The everyday sizes are a few megabytes; the campaign row takes PSANN_CORPUS_MB, and 1024 is the figure to reach.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from psann_fast import TrainConfig
from psann_fast.data.packing import IGNORED
from psann_fast.data.shards import Shards
from psann_fast.data.tokenizing import tokenize
from psann_fast.train.feed import Plan, steps

WORDS = tuple(
    "the sea was calm and a boat went slowly home while rain fell all night over hill river street house clock letter".split()
)


def write_corpus(
    folder: Path, megabytes: float, kinds: tuple[str, ...] = ("txt", "jsonl", "parquet"), seed: int = 0
) -> tuple[int, int]:
    """Files of each kind with documents of up to 400 words, a text file's one a line; returns how many, and their bytes."""
    draw = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ren", "tas", "vu", "sho", "bel", "dra", "ing", "er", "on"]
    words = [*WORDS, *("".join(draw.choices(syllables, k=draw.randrange(2, 5))) for _ in range(30_000))]
    pool = " ".join(draw.choices(words, weights=[1 / (rank + 1) for rank in range(len(words))], k=500_000))
    total = documents = 0
    for kind in kinds:
        left, part = int(megabytes * (1 << 20) / len(kinds)), 0
        while left > 0:
            texts: list[str] = []
            held = 0
            while held < min(left, 32 << 20):
                start = pool.index(" ", draw.randrange(len(pool) - 10_000)) + 1
                texts.append(pool[start : pool.index(" ", start + draw.randrange(2500))] + ".")
                held += len(texts[-1])
            write_file(folder / f"{kind}-{part:03d}.{kind}", texts)
            left, part, total, documents = left - held, part + 1, total + held, documents + len(texts)
    return documents, total


def write_file(path: Path, texts: list[str]) -> None:
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path)


# Runs a command line and prints its status and the peak memory in MB: of the process beyond `import torch`, of its largest child
# beyond the same, and of `import torch`. (getrusage would count what the process that started this one held.)
MEASURED = """
import pathlib, re, sys, threading, time, torch

def peak(process="self"):
    try:
        return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path(f"/proc/{process}/status").read_text())[1]) / 1024
    except (OSError, TypeError):  # it has ended
        return 0.0

torch_alone, children = peak(), [0.0]

def watch():
    while True:
        for child in pathlib.Path("/proc/self/task").glob("*/children"):
            children.extend(map(peak, child.read_text().split()))
            children[:] = [max(children)]
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
if __name__ == "__main__":  # not in the workers, which import this module again
    from psann_fast.cli import main
    status = main(sys.argv[1:])
    print("MEASURED", status, peak() - torch_alone, max(children) - torch_alone, torch_alone)
"""


def measured(folder: Path, *arguments: str) -> tuple[float, float, float, float, str]:
    """Of a command line: MB beyond torch, MB of its largest child beyond torch, seconds, seconds of work,
    what it wrote to stderr."""
    (folder / "measured.py").write_text(MEASURED)
    began, worked = time.perf_counter(), work()
    done = subprocess.run(
        [sys.executable, str(folder / "measured.py"), *arguments], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    line = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    assert line and line[0].split()[1] == "0", done.stderr
    grown, child = map(float, line[0].split()[2:4])
    return grown, child, time.perf_counter() - began, work() - worked, done.stderr


def work() -> float:
    """Seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


SMALL = "--d-model 16 --n-layers 1 --n-heads 2 --max-length 256 --batch-tokens 2048 --device cpu --amp fp32 --no-progress".split()


def check_a_corpus(folder: Path, megabytes: float, workers: int, train_steps: int = 30) -> dict[str, float]:
    """Tokenize a corpus of three kinds of file and train on it; the figures."""
    source, out = folder / "corpus", folder / "tokens"
    source.mkdir()
    documents, size = write_corpus(source, megabytes)
    grown, child, seconds, worked, log = measured(
        folder, "tokenize", "--data", str(source), "--out", str(out), "--workers", str(workers), "--by-line", "--val-split", "0.01"
    )
    assert "tokenizing" in log, "no progress was shown"
    index = json.loads((out / "index.json").read_text())
    assert sum(part["bytes"] for part in index["parts"].values()) == size
    assert documents == sum(part["documents"] for part in index["parts"].values())
    training, _, train_seconds, _, _ = measured(
        folder, "train", "--data", str(out), "--out", str(folder / "run"), "--max-steps", str(train_steps), *SMALL
    )
    assert 0 < grown < 1024 and child < 1024, f"tokenizing took {grown:.0f} MB, a worker {child:.0f} MB"
    assert 0 < training < 1024, f"training took {training:.0f} MB"
    tokens = sum(part["tokens"] for part in index["parts"].values())
    return {
        "text MB": size / 2**20, "tokens": tokens, "tokenize s": seconds, "MB/s": size / 2**20 / seconds,
        "cores busy": worked / seconds, "main MB": grown, "worker MB": child, "train MB": training, "train s": train_seconds,
    }  # fmt: skip


def test_a_corpus_of_three_kinds(tmp_path):
    pytest.importorskip("pyarrow")
    check_a_corpus(tmp_path, 3, workers=1, train_steps=3)


@pytest.mark.campaign(weight=1)
def test_a_large_corpus(tmp_path):
    pytest.importorskip("pyarrow")
    found = check_a_corpus(tmp_path, float(os.environ.get("PSANN_CORPUS_MB", "64")), workers=len(os.sched_getaffinity(0)))
    print(", ".join(f"{name} {value:,.1f}" for name, value in found.items()))


# -- each example once ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    write_file(folder / "a.jsonl", [" ".join(random.Random(i).choices(WORDS, k=i % 60 + 1)) for i in range(400)])
    tokenize([folder / "a.jsonl"], folder / "tokens", tokenizer="simple", workers=1, shard_tokens=9000, progress=False)
    return Shards(folder / "tokens")


def seen_by(examples, ranks: int, config: TrainConfig) -> Counter[bytes]:
    """The rows of one epoch that the processes see, padding rows left out."""
    plan = Plan.of(examples, config, ranks)
    seen: Counter[bytes] = Counter()
    for rank in range(ranks):
        for step in steps(examples, plan, config, rank=rank, processes=ranks):
            for batch in step.batches:
                is_real = (batch["targets"] != IGNORED).any(1)
                seen += rows_of({name: rows[is_real] for name, rows in batch.items()})
    return seen


def rows_of(batch: dict[str, torch.Tensor]) -> Counter[bytes]:
    return Counter(i.numpy().tobytes() + t.numpy().tobytes() for i, t in zip(batch["input_ids"], batch["targets"]))


def check_loading(shards: Shards, workers: int) -> None:
    """The same examples through torch's own loader, for those who train with a loop of theirs."""
    examples = shards.examples("train", 32, seed=3)
    seen: Counter[bytes] = Counter()
    for batch in torch.utils.data.DataLoader(examples, batch_size=16, shuffle=True, num_workers=workers):
        seen += rows_of(batch)
    assert seen == rows_of(examples.batch(np.arange(len(examples)))), f"{workers} workers"


def test_any_number_of_ranks_sees_the_same_examples_once(shards):
    examples = shards.examples("train", 32, seed=3)
    assert len(shards.parts["train"]["shards"]) > 3 and len(examples) > 300
    wanted = rows_of(examples.batch(np.arange(len(examples)), examples.offset(0)))
    for ranks in (1, 2, 4):
        assert seen_by(examples, ranks, TrainConfig(batch_tokens=32 * 7, grad_accum_steps=2)) == wanted, f"{ranks} ranks"


def test_loading_workers_see_the_same_examples_once(shards):
    for workers in (0, 2):
        check_loading(shards, workers)


@pytest.mark.campaign(weight=0.1)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers(shards, tmp_path):
    """Workers that load, and workers that encode."""
    write_corpus(tmp_path, 0.3, kinds=("txt", "jsonl"))
    written = []
    for workers in (1, 2, 4):
        check_loading(shards, workers)
        tokenize([tmp_path], tmp_path / str(workers) / "out", tokenizer="simple", workers=workers, by_line=True, progress=False)
        written.append({path.name: path.read_bytes() for path in (tmp_path / str(workers) / "out").iterdir()})
    assert written[0] == written[1] == written[2]
