"""How commands fail: one sentence each, in the words of the command line, with the trace in a file or on the screen."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_resnet, with_fsr

from timm_fsr.cli.failures import going_on, in_flags, reported, without_debug
from timm_fsr.cli.main import main
from timm_fsr.models.saving import save_pretrained
from timm_fsr.training.step import InterruptedRunError
from timm_fsr.utils.errors import UnsoundError


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def said(error: BaseException, capsys: pytest.CaptureFixture[str], command: str = "train") -> tuple[int, str]:
    """Exit status of a command that raises, and the one line that it prints."""
    status = reported(command, raising(error))
    (line,) = capsys.readouterr().err.splitlines()
    return status, line


def test_an_unforeseen_error_is_one_sentence_and_its_trace_is_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, line = said(RuntimeError("shape\n  mismatch " + "x" * 1000), capsys)
    assert status == 1
    assert line.startswith("timm-fsr train: error: RuntimeError, which timm-fsr did not foresee: shape mismatch ")
    assert len(line) < 600
    found = re.search(r"the full trace is in (\S+) \(--debug", line)
    assert found is not None
    trace = Path(found[1]).read_text()
    assert trace.startswith("timm_fsr ")
    assert "Traceback" in trace
    assert "x" * 1000 in trace


def test_a_trace_that_cannot_be_written_is_left_to_debug(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert said(KeyError("k"), capsys)[1].endswith(
        "KeyError, which timm-fsr did not foresee: 'k'; --debug shows the full trace"
    )


@pytest.mark.parametrize("arguments", [["--debug", "models"], ["models", "--debug"]], ids=" ".join)
def test_debug_prints_the_trace_wherever_it_stands(arguments, monkeypatch, capsys):
    def broken(_: object) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr("timm_fsr.cli.hub.models_command", broken)
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.splitlines()[-1] == "timm-fsr models: error: RuntimeError, which timm-fsr did not foresee: lost"


def test_debug_after_two_dashes_is_a_name():
    assert without_debug(["report", "--", "--debug"]) == (["report", "--", "--debug"], False)
    assert without_debug(["--debug", "report", "--", "a"]) == (["report", "--", "a"], True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_memory_names_the_flag_that_lowers_it(error, capsys):
    for command, flag in (("train", "--optim.accumulate=2"), ("evaluate", "--batch-size"), ("demo", "--limit")):
        status, line = said(error, capsys, command)
        assert status == 2
        assert "the memory is full" in line
        assert flag in line


def test_memory_that_is_really_exhausted_is_told(capsys):
    assert reported("evaluate", lambda: torch.empty(2**60) and None) == 2
    assert "the memory is full" in capsys.readouterr().err


def test_a_killed_worker_names_the_flags(capsys):
    text = "DataLoader worker (pid 71) is killed by signal: Killed. "
    status, line = said(RuntimeError(text), capsys)
    assert status == 2
    assert "pid 71" in line
    assert "--data.workers" in line


def test_a_silent_site_in_compiled_code_is_a_sentence(capsys):
    error = RuntimeError("InternalTorchDynamoError and a page of code")
    error.__cause__ = UnsoundError("the fsr layer was left out")
    assert said(error, capsys) == (2, "timm-fsr train: error: the fsr layer was left out")


class TestFlags:
    @pytest.mark.parametrize(
        ("command", "text", "expected"),
        [
            (
                "evaluate",
                "size=(0, 0) is no size; use 1 or more, or None to keep it",
                "--size=(0, 0) is no size; use 1 or more, or leave it out to keep it",
            ),
            ("evaluate", "batch_size=0 must be 1", "--batch-size=0 must be 1"),
            ("evaluate", "PGD(eps=3) with 'size=3' in a/size=4", "PGD(eps=3) with 'size=3' in a/size=4"),
            ("train", "set data.size, or --data.channels=1", "set --data.size, or --data.channels=1"),
            ("train", "seed=1 is in data/data.size.txt", "--seed=1 is in data/data.size.txt"),
            (
                "train",
                "unknown recipe key 'data.sice'; did you mean 'data.size'?",
                "unknown recipe key 'data.sice'; did you mean 'data.size'?",
            ),
            ("card", "size=1", "size=1"),
            ("evaluate", "seed=1 (on the command line --seed=1)", "seed=1 (on the command line --seed=1)"),
        ],
    )
    def test_arguments_become_flags(self, command, text, expected):
        assert in_flags(command, text) == expected


class TestStops:
    @pytest.mark.parametrize("rank", ["0", "1"])
    def test_a_training_says_how_it_goes_on_once(self, rank, monkeypatch, capsys):
        monkeypatch.setenv("RANK", rank)
        stopped = InterruptedRunError("stopped by Ctrl-C; go on with --resume=true", signal.SIGINT)
        assert reported("train", raising(stopped)) == 130
        expected = "timm-fsr train: stopped by Ctrl-C; go on with --resume=true\n" if rank == "0" else ""
        assert capsys.readouterr().err == expected

    @pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
    def test_an_evaluation_says_by_which_command_it_goes_on(self, number, name, capsys):
        before = signal.getsignal(signal.SIGTERM)
        arguments = ["a b", "--output", "out", "--overwrite"]
        assert reported("evaluate", lambda: signal.raise_signal(number), arguments) == 128 + number
        told = f"timm-fsr evaluate: stopped by {name}; go on with timm-fsr evaluate 'a b' --output out\n"
        assert capsys.readouterr().err == told
        assert signal.getsignal(signal.SIGTERM) is before

    def test_without_a_folder_nothing_is_kept(self, monkeypatch):
        assert "--output FOLDER" in going_on("evaluate", ["model"])
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert going_on("evaluate", ["model", "--output=x"]) == "the same command goes on from here"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_pretrained(with_fsr(tiny_resnet(in_chans=1)), tmp_path / "saved")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must fail prints: one line, or a usage and an error."""
    try:
        status: object = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.splitlines()[-1]


RECIPE_MISTAKES = {
    "--optim.lr=abc": "--optim.lr=abc is no number; write 0.03, 1e-3 or 8/255",
    "--optim.epochs=1.5": "--optim.epochs=1.5 is no whole number",
    "--resume=maybe": "--resume=maybe is neither true nor false",
    "--mixed_precision=fp8": "--mixed_precision=fp8 is none of the choices; use no, bf16, fp16",
    "--evaluation.attacks=fgsm": "--evaluation.attacks=fgsm is no list",
    "--model.args=abc": "--model.args=abc is no keys and values",
    "recipe.yaml": "give a recipe by --config=recipe.yaml",
    "optim.lr=0.1": "write --optim.lr=0.1",
    "--seed=99999999999999999999999": "--seed=99999999999999999999999 is more than 64 bits hold",
    "--model.args.act_layer=rellu": "unknown act_layer 'rellu'; did you mean 'relu'",
    "--model.args.norm_layer=foo": "unknown norm_layer 'foo'",
}


@pytest.mark.parametrize(("argument", "message"), RECIPE_MISTAKES.items(), ids=RECIPE_MISTAKES)
def test_mistakes_in_a_recipe(argument, message, tmp_path, capsys):
    line = error_of(["train", argument, f"--output={tmp_path / 'run'}"], capsys)
    assert message in line
    assert "weights" not in line


def test_a_mistake_in_a_recipe_file_is_told_as_one(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("optim: {lr: abc}\n")
    line = error_of(["train", "--config", str(tmp_path / "a.yaml")], capsys)
    assert "optim.lr: abc in the recipe is no number" in line


EVALUATE_MISTAKES: dict[str, tuple[list[str], str]] = {
    "the model after a list": (["--attacks", "fgsm", "MODEL"], "no MODEL is given; write it first"),
    "a device without numbers": (["MODEL", "--device=meta"], "use cpu"),
    "a tag with a typo": (
        ["resnet_tiny_cifar_fsr.at_fashion_mist"],
        "did you mean 'resnet_tiny_cifar_fsr.at_fashion_mnist'",
    ),
    "a tag of an architecture without": (["resnet_tiny_cifar.x"], "leave out .x"),
    "an architecture without weights": (["resnet_tiny_cifar"], "--checkpoint"),
    "arguments of a saved model": (["MODEL", "--model-args", "fsr_hidden=5"], "do not fit the feature layer"),
    "a size of none": (["MODEL", "--size=0", "--limit=5"], "--size="),
}


@pytest.mark.parametrize(("arguments", "message"), EVALUATE_MISTAKES.values(), ids=EVALUATE_MISTAKES)
def test_mistakes_in_an_evaluation(arguments, message, saved, capsys):
    line = error_of(["evaluate", *(str(saved) if part == "MODEL" else part for part in arguments)], capsys)
    assert message in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args", [1]),
        ("pretrained_cfg", None),
        ("num_classes", "ten"),
        ("label_names", 5),
        ("pretrained_cfg.input_size", "abc"),
        ("pretrained_cfg.mean", "abc"),
        ("timm_fsr", "x"),
        ("timm_fsr.origin", 5),
        ("timm_fsr.imports", 5),
    ],
)
def test_a_broken_configuration_names_the_file_and_the_key(key, value, saved, capsys):
    config: dict[str, Any] = json.loads((saved / "config.json").read_text())
    head, _, rest = key.partition(".")
    if rest:
        config[head][rest] = value
    else:
        config[head] = value
    (saved / "config.json").write_text(json.dumps(config))
    line = error_of(["evaluate", str(saved), "--limit=5", "--attacks", "fgsm"], capsys)
    assert f"{saved}/config.json is damaged ('{key}' is {value!r})" in line


def test_weights_of_other_arguments_are_evaluated_with_these(tmp_path, capsys):
    torch.save(
        {
            "state_dict": {
                f"model.{key}": value for key, value in with_fsr(tiny_resnet(in_chans=1)).state_dict().items()
            }
        },
        tmp_path / "a.ckpt",
    )
    command = ["evaluate", "resnet_tiny_cifar_fsr", "--checkpoint", str(tmp_path / "a.ckpt"), "--limit=10", "--attacks"]
    assert "--model-args" in error_of(command, capsys)
    for wrong in ("fsr_hidden", "pretrained=true", "fsr_hidden=[4"):
        assert "--model-args" in error_of([*command, "--model-args", wrong], capsys)
    assert main([*command, "--model-args", "fsr_hidden=4", "in_chans=1"]) == 0


def test_an_error_that_is_its_own_cause_is_told_too(capsys):
    """`raise error from error` makes one, and a search among causes must end."""
    error = ValueError("taken")
    error.__cause__ = error
    assert said(error, capsys)[1] == "timm-fsr train: error: taken"
