"""The command line: each command end to end, and one sentence for each thing a user may get wrong."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from support.tiny import tiny_resnet, with_fsr
from torch import nn

import timm_fsr.run
from timm_fsr.cli.demo import verdict
from timm_fsr.cli.main import main
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.report import Report
from timm_fsr.training.recipe import Recipe

TRAIN_SCRIPT = Path(__file__).parents[2] / "recipes" / "train.py"
TINY = [
    "--model.layer_args.fsr.hidden=4",
    "--data.limit_train=60",
    "--data.limit_test=20",
    "--data.held_out=20",
    "--attack.steps=1",
    "--optim.epochs=1",
    "--optim.batch_size=32",
    "--evaluation.attacks=[fgsm]",
    "--evaluation.validation_steps=1",
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of an untrained network for the embedded images."""
    return save_pretrained(with_fsr(tiny_resnet(in_chans=1)), tmp_path / "saved")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; gives its one line on stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    lines = printed.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"timm-fsr {arguments[0]}: error: ")
    return lines[0]


class TestTrain:
    def test_by_recipe_and_flags(self, tmp_path, capsys):
        (tmp_path / "recipe.yaml").write_text("seed: 3\nattack: {eps: 8/255}\n")
        assert main(["train", "--config", str(tmp_path / "recipe.yaml"), *TINY, f"--output={tmp_path / 'run'}"]) == 0
        recipe = Recipe.load(tmp_path / "run" / "recipe.yaml")
        assert (recipe.seed, recipe.attack.eps, recipe.optim.epochs) == (3, 8 / 255, 1)
        assert Report.load(tmp_path / "run" / "report.json").count == 20
        assert f"results in {tmp_path / 'run'}" in capsys.readouterr().out

    def test_the_script_for_accelerate_does_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"--output={tmp_path / 'run'}"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
        assert caught.value.code == 0
        assert (tmp_path / "run" / "best" / "model.safetensors").is_file()

    def test_importing_the_script_starts_nothing(self, monkeypatch):
        """Data workers that spawn import the main script again."""
        monkeypatch.setattr(sys, "argv", ["train.py", "--no.such.flag"])
        runpy.run_path(str(TRAIN_SCRIPT), run_name="not_main")

    def test_help_explains_every_key(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--help-all"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for key in ("--config", "--optim.epochs", "--attack.eps", "--model.layer_args", "--data.held_out"):
            assert key in text
        assert re.search(r"radius in pixels of \[0,\s+1\]", text)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--optim.epoch=5"], "unknown recipe key 'optim.epoch'; did you mean 'optim.epochs'"),
            (["--config=nowhere.yaml"], "there is no recipe nowhere.yaml"),
            (["--model.name=resnet_tiny_cifra"], "did you mean 'resnet_tiny_cifar'"),
            (["--model.layer=none"], "model.layer=none is no layer; write null"),
            (["--attack.name=fgsm", "--attack.steps=5"], "over a recipe that has it: --attack.steps=null"),
            (["--model.layer=frs"], "unknown feature layer 'frs'; did you mean 'fsr'"),
            (["--model.name=test_vit", "--model.at=[-1]"], "cannot reach the logits"),
            (["--attack.eps=-8/255"], "must be 0 or more"),
            (["--attack.eps=much"], "attack.eps"),
            (["--data.source=nowhere/train.parquet"], "there is no file or folder nowhere/train.parquet"),
            (["--optim.batch_size=1000"], "do not fill a batch of 1000"),
            (["--optim.lr=1e30"], "became NaN or infinite in step 2 of epoch 1"),
            (["--config"], "config"),
            (["stray"], "stray"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_mistakes(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        # Three steps, so that a huge rate shows in the loss.
        tiny = [flag for flag in TINY if "limit_train" not in flag] + ["--data.limit_train=120", "--output=run"]
        assert message in error_of(["train", *tiny, *arguments], capsys)
        assert not (tmp_path / "run" / "best").exists()

    def test_the_whole_recipe_is_printed_and_nothing_trained(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main(["train", "--optim.epochs=3", "--print_config"])
        assert caught.value.code == 0
        (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
        assert Recipe.load("recipe.yaml") == Recipe.load(overrides=["--optim.epochs=3"])
        assert not (tmp_path / "runs").exists()

    def test_a_finished_run_is_kept(self, tmp_path, capsys):
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        assert "--overwrite=true" in error_of(["train", *TINY, f"--output={tmp_path}"], capsys)


class TestEvaluate:
    def test_a_saved_model_gives_a_report(self, saved, tmp_path, capsys):
        report = tmp_path / "results" / "report.json"
        attacks = ["--attacks", "fgsm", "pgd2", "--norm", "l2", "--eps", "1/2", "--seed", "4"]
        assert main(["evaluate", str(saved), "--limit", "30", *attacks, "--output", str(report.parent)]) == 0
        found = Report.load(report)
        assert list(found.correct) == ["clean", "fgsm", "pgd2"]
        assert (found.count, found.norm, found.eps, found.seed) == (30, "l2", 0.5, 4)
        assert found.summary() in capsys.readouterr().out

    def test_it_is_what_evaluate_gives_in_python(self, saved, tmp_path):
        main(["evaluate", str(saved), "--limit", "30", "--attacks", "pgd2", "--output", str(tmp_path / "out")])
        model = timm.create_model(f"local-dir:{saved}", pretrained=True)
        data = timm_fsr.load_data("fashion_mnist", "test", limit=30)
        expected = timm_fsr.evaluate(model, data.batches(250), attacks=["pgd2"])
        assert Report.load(tmp_path / "out" / "report.json").to_dict()["correct"] == expected.to_dict()["correct"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "unknown model 'nowhere'"),
            (["runs/nowhere"], "there is no folder runs/nowhere"),
            (["local-dir:nowhere"], "nowhere has no config.json"),
            (["SAVED", "--data=nowhere.parquet"], "there is no file or folder nowhere.parquet"),
            (["SAVED", "--split=tset"], "no split 'tset'; use one of: train, test"),
            (["SAVED", "--eps=-1/255"], "must be 0 or more"),
            (["SAVED", "--attacks", "pdg20"], "did you mean 'pgd20'"),
            (["SAVED", "--limit=0"], "limit=0 leaves no images"),
            (["resnet_tiny_cifar"], "knows no trained weights"),
            (["resnet_tiny_cifar_fsr"], "no weights of the whole model"),
            (["RGB", "--channels=1"], "images have 1 channels but the model takes 3"),
            (["SAVED", "--norm=l1"], "'fgsm' has no L1 ball; use AutoAttack ('standard')"),
            (["SAVED", "--attacks", "transfer"], "needs other models to transfer from"),
            (["SAVED", "--evidence=10"], "--evidence needs a folder to write to; add --output"),
            (["SAVED", "--device=gpu"], "--device=gpu is no device of this machine; use cpu"),
            (["SAVED", "--batch-size=0"], "--batch-size=0 must be 1 or more"),
            (["SAVED", "--save-images"], "--save-images needs a folder"),
            (["SAVED", "--output=report.json"], "--output takes a folder"),
            (["SAVED", "--num-classes=10"], "--num-classes belongs to --checkpoint"),
            (["resnet_tiny_cifar", "--checkpoint=nowhere.pth"], "there is no file nowhere.pth"),
            (["SAVED", "--attacked=nowhere"], "nowhere holds no attacked images"),
            (["SAVED", "--attacked=nowhere", "--eps=8/255"], "--eps means nothing with --attacked"),
            (["SAVED", "--attacked=nowhere", "--batch-size=7"], "--batch-size means nothing with --attacked"),
            (["SAVED", "--transfer-from=SAVED"], "--transfer-from is for the attacks 'adaptive' and 'transfer'"),
            (["SAVED", "--evidence=2", "--norm=l1", "--attacks", "--output=out"], "no evidence of honest gradients"),
            (["SAVED", "--corruptions=-1", "--output=out"], "must be 0 or more"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_mistakes(self, saved, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        if arguments[0] == "RGB":
            save_pretrained(with_fsr(tiny_resnet()), tmp_path / "RGB")
        named = [str(saved) if argument == "SAVED" else argument for argument in arguments]
        assert message in error_of(["evaluate", *named], capsys)

    @pytest.mark.parametrize("command", [["evaluate"], ["push"], ["card"]], ids=" ".join)
    def test_the_folder_of_a_run_points_to_the_model_in_it(self, tmp_path, capsys, command):
        save_pretrained(with_fsr(tiny_resnet(in_chans=1)), tmp_path / "run" / "best")
        names = ["user/name"] if command != ["evaluate"] else []
        message = error_of([*command, str(tmp_path / "run"), *names], capsys)
        assert f"give {tmp_path / 'run' / 'best'}, " in message

    def test_a_damaged_checkpoint(self, saved, capsys):
        (saved / "model.safetensors").write_bytes(b"x" * 100)
        assert "damaged" in error_of(["evaluate", str(saved)], capsys)

    def test_a_report_that_cannot_be_written(self, saved, tmp_path, monkeypatch, capsys):
        """Known before the attacks run: they may take hours."""
        monkeypatch.setattr("timm_fsr.cli.evaluate.assess", lambda *_, **__: pytest.fail("the attacks ran"))
        (tmp_path / "file").write_text("")
        arguments = ["evaluate", str(saved), "--limit=20", "--attacks", "fgsm", f"--output={tmp_path}/file/results"]
        assert "could not write to" in error_of(arguments, capsys)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demonstration cut short: the folder of its results, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "results"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--epochs", "1", "--limit", "300", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


class TestDemo:
    def test_it_prints_one_table_a_verdict_and_where_everything_is(self, demo):
        folder, text = demo
        row = (
            r"│ (?:without|with) FSR +" + r"│ +\d+\.\d % " * 4 + r"│ +\d+ s │\n" + r"│ +" + r"│ +\d+\.\d - \d+\.\d " * 4
        )
        assert len(re.findall(row, text)) == 2
        assert "this is a demonstration, not a result" in text
        assert text.count("Linf 0.1, 300 test images, 95 % intervals") == 1
        for path in ("with_fsr/best", "attack.png"):
            assert str(folder / path) in text

    def test_both_networks_are_trained_and_judged_on_the_same_images(self, demo):
        folder, _ = demo
        reports = {name: Report.load(folder / name / "report.json") for name in ("without_fsr", "with_fsr")}
        recipes = {name: Recipe.load(folder / name / "recipe.yaml") for name in reports}
        for report in reports.values():
            assert report.count == 300
            assert list(report.correct) == ["clean", "fgsm", "pgd20"]
            assert report.conditions["data_fingerprint"] == reports["with_fsr"].conditions["data_fingerprint"]
        assert recipes["without_fsr"].model.layer is None
        with_layer = recipes["with_fsr"].to_yaml().replace("layer: fsr", "layer: null").replace("with_", "without_")
        assert with_layer == recipes["without_fsr"].to_yaml(), "the budgets differ"

    def test_the_picture_opens(self, demo):
        with Image.open(demo[0] / "attack.png") as picture:
            picture.load()
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").tobytes())) > 50, "the picture is blank"

    def test_the_saved_model_loads_as_the_last_lines_say(self, demo):
        (call,) = re.findall(r"timm\.create_model\(.*\)", demo[1])
        model = eval(call, {"timm": timm}).eval()
        assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
        assert hasattr(model, "fsr")

    def test_the_verdict_counts_the_images_that_differ(self):
        def report(correct: str) -> Report:
            flags = {"pgd20": torch.tensor([flag == "1" for flag in correct])}
            return Report(correct={**flags, "clean": flags["pgd20"]}, attacks={}, norm="linf", eps=0.1, seed=0)

        assert "+10.0 points" in verdict(report("1" * 4 + "0" * 6), report("0001110000"[::-1]))
        close = verdict(report("1110000000"), report("0001000000"))
        assert "3 images gained, 1 lost" in close
        assert "no more than chance" in close
        clear = verdict(report("0" * 30), report("1" * 30))
        assert "-100.0 points" in clear
        assert ": more than chance" in clear

    def test_a_network_that_does_not_work_is_compared_with_nothing(self):
        labels = torch.arange(200) % 2
        broken, works = (
            Report(correct={"clean": right, "pgd20": right}, attacks={}, norm="linf", eps=0.1, seed=0, labels=labels)
            for right in (labels == 0, torch.arange(200) < 150)
        )
        for pair, name in (((broken, works), "with FSR"), ((works, broken), "without FSR")):
            said = verdict(*pair)
            assert said.startswith(f"The network trained {name} cannot be compared: the model does not work")
            assert "points" not in said
        assert "points" in verdict(works, works)

    def test_mistakes(self, tmp_path, capsys):
        for arguments, message in ((["--epochs=0"], "epochs=0"), (["--limit=0"], "limit=0"), (["--limit=150"], "200")):
            assert message in error_of(["demo", "--output", str(tmp_path / "new"), *arguments], capsys)
            assert not (tmp_path / "new").exists()


class TestEntryPoints:
    def test_the_package_runs_as_a_module(self, monkeypatch, capsys):
        """`python -m timm_fsr --help`, in this process: another one takes seconds to import torch."""
        monkeypatch.setattr(sys, "argv", ["timm_fsr", "--help"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("timm_fsr", run_name="__main__")
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith("usage: timm-fsr")
        names = (
            "train",
            "evaluate",
            "report",
            "runs",
            "sweep",
            "compare",
            "release",
            "models",
            "card",
            "push",
            "convert",
            "demo",
        )
        assert all(re.search(rf"^  {name} +\w+", printed, re.MULTILINE) for name in names)

    def test_the_version_is_the_packages(self, capsys):
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == f"timm_fsr {timm_fsr.__version__}\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["tarin"],
            ["evaluate"],
            ["evaluate", "x", "--eps=much"],
            ["demo", "--epoch=x"],
        ],
        ids=" ".join,
    )
    def test_a_wrong_usage_shows_the_right_one(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("usage: timm-fsr")
        assert "error: " in printed

    def test_the_installed_command_is_this_one(self):
        from importlib.metadata import entry_points

        (command,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "timm-fsr"]
        assert command.value == "timm_fsr.cli.main:main"

    def test_a_script_that_knows_timm_alone_gets_the_variants(self, tmp_path, monkeypatch):
        """Its arguments, its own folder and its name are those of a plain run."""
        (tmp_path / "beside.py").write_text("LAYER = 'fsr'\n")
        script = tmp_path / "script.py"
        script.write_text(
            "import json, sys, timm, beside\n"
            "model = timm.create_model(sys.argv[1], num_classes=3)\n"
            "known = [__name__, sys.argv, hasattr(model, beside.LAYER)]\n"
            "with open(sys.argv[2], 'w') as file:\n    file.write(json.dumps(known))\n"
        )
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        arguments = [str(script), "resnet_tiny_cifar_fsr", str(tmp_path / "out.json")]
        assert timm_fsr.run.main(arguments) == 0
        assert json.loads((tmp_path / "out.json").read_text()) == ["__main__", arguments, True]

    def test_a_layer_left_out_in_such_a_script_is_a_sentence(self, tmp_path, monkeypatch, capsys):
        script = tmp_path / "script.py"
        script.write_text("from timm_fsr.utils.errors import UnsoundError\nraise UnsoundError('left out')\n")
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert timm_fsr.run.main([str(script)]) == 2
        assert capsys.readouterr().err == f"{script}: error: left out\n"

    @pytest.mark.parametrize("arguments", [[], ["nowhere.py"]])
    def test_without_a_script_it_says_what_it_wants(self, arguments, capsys):
        assert timm_fsr.run.main(arguments) == 2
        assert "usage: python -m timm_fsr.run SCRIPT.py" in capsys.readouterr().err


def test_a_layer_that_is_not_reached_is_no_traceback(saved, monkeypatch, capsys):
    def load(*args: Any, **kwargs: Any) -> nn.Module:
        model = timm.create_model(f"local-dir:{saved}", pretrained=True)
        for module in model.modules():
            module._forward_hooks.clear()
        return model

    monkeypatch.setattr("timm_fsr.cli.loading.load", load)
    assert "did not fire" in error_of(["evaluate", str(saved), "--limit=10"], capsys)


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_fsr.cli.hub.models_command", interrupted)
    assert main(["models"]) == 130
    assert "timm-fsr models: stopped by Ctrl-C; what was written so far is whole" in capsys.readouterr().err
