"""The command line: train, generate, eval, doctor; errors are one sentence on stderr and exit status 2."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch
import yaml
from psann_fast import DataConfig, ModelConfig, TrainConfig, psannLM
from psann_fast.cli import main
from psann_fast.generate.sampling import SamplingParams
from psann_kernels import OPS
from tiny import SENTENCES

TEXT = "\n".join(SENTENCES) + "\n"
SETTINGS = {
    "model": {"base": "waveresnet", "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 24, "device": "cpu"},
    "data": {"tokenizer": "simple", "max_length": 16, "val_split": 0.2},
    "train": {"epochs": 9, "max_steps": 5, "batch_tokens": 64, "lr": "5e-3", "eval_interval_steps": 2, "amp": "fp32"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text and a configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert (
        main(["train", "--config", str(folder / "tiny.yaml"), "--data", str(folder / "text.txt"), "--out", str(folder / "run")])
        == 0
    )
    return folder / "run"


def run(capsys, *arguments: str, status: int = 0) -> tuple[str, str]:
    """stdout and stderr of one command, which must end with `status`."""
    try:
        got = main(list(arguments))
    except SystemExit as exit:
        got = exit.code
    out, err = capsys.readouterr()
    assert got == status, err
    return out, err


def refused(capsys, *arguments: str) -> str:
    """The one sentence of a command that must fail."""
    out, err = run(capsys, *arguments, status=2)
    assert out == "" and err.count("\n") == 1 and err.startswith("psann-fast") and "Traceback" not in err
    return err


# -- train ----------------------------------------------------------------------------------------------------------------------


def test_train_leaves_a_run_folder_and_writes_text(folder, capsys):
    out, err = run(
        capsys, "train", "--config", "tiny.yaml", "--data", "text.txt", "--out", "run", "--prompt", "The sea ", "--max-steps", "4"
    )
    assert out.startswith("\nThe sea ") and "run folder: run " in out and "psann-fast generate run --prompt" in out
    assert "after 4 steps" in out and "validation" in out
    with open(folder / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == "4" and float(rows[-1]["val_loss"]) > 0
    assert {"manifest.json", "config.yaml", "metrics.csv", "loss.png", "best"} <= {path.name for path in (folder / "run").iterdir()}
    lm = psannLM.load(folder / "run", device="cpu")
    assert lm.config.d_model == 16 and lm.tokenizer.name == "simple"
    resolved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert resolved["train"]["max_steps"] == 4 and resolved["train"]["lr"] == 5e-3 and resolved["model"]["d_mlp"] == 24


def test_the_resolved_configuration_can_be_run_again(folder, capsys):
    texts = []
    for number in ("1", "2"):
        source = ["--config", "tiny.yaml"] if number == "1" else ["--config", "run1/config.yaml"]
        out, _ = run(capsys, "train", *source, "--data", "text.txt", "--out", f"run{number}", "--no-progress")
        texts.append(out.split("\n\nloss")[0])
    assert texts[0] == texts[1]


def test_flags_override_the_file_which_overrides_the_preset(folder, capsys):
    run(
        capsys,
        "train",
        "--config",
        "tiny.yaml",
        "--data",
        "text.txt",
        "--out",
        "run",
        "--lr",
        "1e-4",
        "--max-steps",
        "2",
        "--base",
        "respsann",
        "--wave-dilations",
        "1,3",
        "--no-progress",
        "--seed",
        "7",
    )
    resolved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert resolved["train"]["lr"] == 1e-4 and resolved["train"]["epochs"] == 9 and resolved["train"]["progress"] is False
    assert resolved["model"]["base"] == "respsann" and resolved["model"]["wave_dilations"] == [1, 3]
    assert resolved["train"]["seed"] == resolved["data"]["seed"] == 7
    assert resolved["train"]["save_interval_steps"] == 300, "from the preset"


def test_the_bar_shows_loss_speed_and_time_left(folder, capsys):
    common = ("train", "--config", "tiny.yaml", "--data", "text.txt", "--max-steps", "2", "--out", "run")
    _, shown = run(capsys, *common)
    _, silent = run(capsys, *common, "--no-progress")
    last = shown.split("\r")[-1]
    assert "100%" in last and "2/2" in last and "loss=" in last and "tokens/s=" in last and "<" in last
    assert "loss=" not in silent


def test_a_folder_of_texts(folder, capsys):
    (folder / "texts").mkdir()
    for name, text in zip("ab", SENTENCES):
        (folder / "texts" / f"{name}.txt").write_text(text)
    run(capsys, "train", "--config", "tiny.yaml", "--data", "texts", "--max-steps", "1", "--out", "run")


# -- generate, eval -------------------------------------------------------------------------------------------------------------


def test_generate_continues_a_prompt(trained, capsys):
    options = ("--device", "cpu", "--max-new-tokens", "12", "--seed", "3")
    out, err = run(capsys, "generate", str(trained), "--prompt", "The sea", *options)
    expected = psannLM.load(trained, device="cpu").generate("The sea", max_new_tokens=12, seed=3)
    assert out == f"The sea{expected}" and "tokens/s" in err
    again, _ = run(capsys, "generate", str(trained), "--prompt", "The sea", *options)
    assert again == out


def test_generate_takes_every_sampling_option(trained, capsys, monkeypatch):
    options = {
        "max_new_tokens": "9",
        "temperature": "0.5",
        "top_k": "7",
        "top_p": "none",
        "min_p": "0.01",
        "repetition_penalty": "1.2",
        "seed": "3",
    }
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    assert set(options) | {"stop"} == {f.name for f in dataclasses.fields(SamplingParams)}
    out, _ = run(capsys, "generate", str(trained), "--device", "cpu", "--prompt", "A", *flags, "--stop", "e", "zz")
    expected = psannLM.load(trained, device="cpu").generate(
        "A", max_new_tokens=9, temperature=0.5, top_k=7, top_p=None, min_p=0.01, repetition_penalty=1.2, seed=3, stop=["e", "zz"]
    )
    assert out == "A" + expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run(capsys, "generate", str(trained), "--prompt", "-", "--max-new-tokens", "1")[0].startswith("from a pipe")


def test_eval_gives_the_score(trained, folder, capsys):
    expected = psannLM.load(trained, device="cpu").score([TEXT])
    out, _ = run(capsys, "eval", str(trained), "--data", "text.txt", "--device", "cpu", "--json")
    assert json.loads(out) == pytest.approx(expected)
    out, _ = run(capsys, "eval", str(trained), "--data", "text.txt", "--device", "cpu")
    assert f"{expected['bits_per_byte']:.4f}" in out and f"{expected['tokens']:,}" in out


# -- doctor, help ---------------------------------------------------------------------------------------------------------------


def test_doctor_says_which_backend_serves_each_op_and_why_not(capsys):
    out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["psann-fast"] and found["devices"]["cpu"]
    rows = [row for row in found["ops"] if row["device"] == "cpu"]
    used = {"damped_sine", "rms_norm", "rope_attention", "paged_append", "paged_attention", "wave_conv"}
    assert used <= {row["op"] for row in rows} <= set(OPS)
    for op in used:
        answers = {row["backend"]: row for row in rows if row["op"] == op}
        gluon = {"gluon"} if op == "rope_attention" else set()
        assert set(answers) == {"native", "torch", "triton"} | gluon and answers["torch"]["serves"] == "yes"
        assert all((row["serves"] == "yes") != bool(row["reason"]) for row in answers.values())
    text, _ = run(capsys, "doctor")
    assert all(op in text for op in used) and torch.__version__ in text


def test_help_names_every_option(capsys):
    out, _ = run(capsys, "train", "--help")
    skipped = {"checkpoint_dir"}  # --out
    for kind in (ModelConfig, DataConfig, TrainConfig):
        for f in dataclasses.fields(kind):
            assert f.name in skipped or f"--{f.name.replace('_', '-')}" in out, f.name
    assert "(default: 3.0)" in out and "--no-progress" in out
    for command in ("generate", "eval", "doctor"):
        assert command in run(capsys, command, "--help")[0]
    assert run(capsys, "--version")[0].strip()


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "psann_fast.cli", "train", "--preset", "none"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr == "psann-fast train: preset is 'none'; choose one of 'quickstart', or write a YAML file for --config\n"


# -- errors ---------------------------------------------------------------------------------------------------------------------

BAD_YAML = {
    "warmup": ("train: {warmup: 1}", "section train, has no option 'warmup'; did you mean 'warmup_steps'?"),
    "modle": ("modle: {d_model: 1}", "has no option 'modle'; did you mean 'model'?"),
    "number": ("model: 7", "section model, holds a int; it must hold options"),
    "odd": ("model: {d_model: 30, n_heads: 2}", "head_dim is 15"),
    "ddp": ("train: {ddp: 'on'}", "ddp is 'on'"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_configuration_file_that_is_wrong(folder, capsys, name):
    text, message = BAD_YAML[name]
    (folder / "bad.yaml").write_text(text)
    assert message in refused(capsys, "train", "--config", "bad.yaml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train --config missing.yaml", "missing.yaml"),
        ("train --config text.txt", "text.txt holds a str; it must hold the sections model, data, train"),
        ("train --data missing.txt", "missing.txt does not exist"),
        ("train --preset fast", "preset is 'fast'; choose one of 'quickstart'"),
        ("train --d-modle 8", "has no option '--d-modle'; did you mean '--d-model'?"),
        ("train --d-mod 8", "has no option '--d-mod'; did you mean '--d-model'?"),
        ("train --max-step=8", "has no option '--max-step'; did you mean '--max-steps'?"),
        ("train --d-model eight", "ModelConfig: d_model is 'eight'; it must be a whole number of at least 1"),
        ("train --lr 0", "TrainConfig: lr is 0; it must be a number above 0"),
        (
            "train --amp fp16 --device cpu --config tiny.yaml",
            "amp is 'fp16', which torch does not train with on a CPU; use amp='bf16'",
        ),
        ("train --device cuda:77", "device is 'cuda:77'"),
        ("generate missing", "missing is not a folder; pass the folder that save() wrote"),
        ("generate . --prompt x", "has no manifest.json, so it is not a saved psann-fast model"),
        ("generate MODEL --temperature -1", "temperature is -1; it must be a number at least 0"),
        ("generate MODEL --top-p 2", "top_p is 2; it must be a number above 0 and at most 1"),
        ("generate MODEL --topk 2", "has no option '--topk'; did you mean '--top-k'?"),
        ("generate MODEL --backend cuda", "backend is 'cuda'; choose one of"),
        ("generate MODEL --device gpu", "device is 'gpu'; it must be 'auto', 'cpu', 'cuda'"),
        ("eval MODEL --data missing.txt", "missing.txt does not exist"),
        ("eval MODEL", "the following arguments are required: --data"),
        ("fly", "invalid choice: 'fly'"),
        ("", "the following arguments are required: command"),
    ],
)
def test_wrong_commands(folder, trained, capsys, arguments, message):
    assert message in refused(capsys, *arguments.replace("MODEL", str(trained)).split())


def test_a_text_that_is_not_utf_8(folder, capsys):
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 3" in refused(capsys, "train", "--data", "latin.txt")


def test_an_interrupt_ends_with_130(folder, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(psannLM, "fit", interrupted)
    _, err = run(capsys, "train", "--config", "tiny.yaml", "--data", "text.txt", status=130)
    assert err.endswith("psann-fast train: interrupted\n")
