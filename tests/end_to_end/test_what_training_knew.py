"""What training knew travels with the model: real files, the commands of a user, and the truth by timm alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn

import timm_fsr
from timm_fsr.cli.main import main
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.report import Report

# In the order of code points, which is not timm's: class 9, Class 10, Zebra one.
COLOURS = {"Class 10": (200, 60, 60), "Zebra one": (60, 200, 60), "class 9": (60, 60, 200)}
OTHERS = {"apple": (200, 200, 40), "pear": (40, 200, 200)}
EPS = "1/255"


def write_folder(
    folder: Path, colours: dict[str, tuple[int, int, int]], *, count: int, seed: int, size: int = 24
) -> Path:
    """Noisy pictures of these colours, some of which look like another class."""
    generator = np.random.default_rng(seed)
    everything = list(colours.values())
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shown = np.array(everything[generator.integers(len(everything))] if number % 4 == 3 else colour)
            pixels = generator.normal(shown, 40, (24, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def train(output: Path, data: Path, *flags: object) -> Path:
    settings = {
        "data.source": data,
        "data.held_out": 6,
        "data.crop_padding": 0,
        "objective.name": "natural",
        "model.layer_args.fsr.hidden": 4,
        "attack.eps": EPS,
        "attack.steps": 1,
        "optim.epochs": 6,
        "optim.batch_size": 10,
        "optim.schedule": "constant",
        "optim.lr": 0.05,
        "evaluation.attacks": "[fgsm]",
        "evaluation.validation_steps": 1,
        "output": output,
    }
    run("train", *(f"--{key}={value}" for key, value in settings.items()), *flags)
    return output / "best"


def answers(model: nn.Module, pictures: Iterable[Image.Image]) -> list[int]:
    """The model's answers to pictures that timm's own transform has prepared, as its inference.py does."""
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    with torch.no_grad():
        return [int(model(transform(picture.convert("RGB"))[None]).argmax()) for picture in pictures]


def truth(model_folder: Path, data: Path) -> float:
    """The share of pictures whose folder has the name that the saved configuration gives to the model's answer."""
    model = timm.create_model(f"local-dir:{model_folder}", pretrained=True).eval()
    names = json.loads((model_folder / "config.json").read_text())["pretrained_cfg"]["label_names"]
    paths = sorted(data.glob("*/*.png"))
    found = answers(model, (Image.open(path) for path in paths))
    return sum(names[answer] == path.parent.name for answer, path in zip(found, paths, strict=True)) / len(paths)


def evaluated(model: object, data: Path, folder: Path, *flags: object) -> Report:
    run("evaluate", model, "--data", data, "--eps", EPS, "--attacks", "fgsm", "--output", folder, *flags)
    return Report.load(folder / "report.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "data" / "train", COLOURS, count=14, seed=0)
    write_folder(folder / "data" / "test", COLOURS, count=8, seed=1)
    lacking = {name: colour for name, colour in COLOURS.items() if name != "Zebra one"}
    write_folder(folder / "lacking" / "test", lacking, count=8, seed=2)
    write_folder(folder / "others" / "train", OTHERS, count=14, seed=3)
    write_folder(folder / "others" / "test", OTHERS, count=8, seed=4)
    return folder


@pytest.fixture(scope="module")
def best(place: Path) -> Path:
    """Trained at a size that is neither the architecture's nor the files'."""
    return train(place / "run", place / "data", "--data.size=20")


@pytest.fixture(scope="module")
def tuned(place: Path, best: Path) -> Path:
    """Fine-tuned to two other classes at another size."""
    return train(place / "tuned", place / "others", f"--model.name={best}", "--model.layer_args={}", "--data.size=28")


def test_the_saved_configuration_says_it_all(best, tuned):
    for folder, colours, size in ((best, COLOURS, 20), (tuned, OTHERS, 28)):
        config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        assert config["label_names"] == sorted(colours)
        assert config["input_size"] == [3, size, size]
        assert (config["crop_pct"], config["interpolation"]) == (1.0, "bicubic")
        assert "test_input_size" not in config
        assert Report.load(folder / "report.json").conditions["classes"] == sorted(colours)


def test_the_report_of_the_training_is_the_truth(place, best, tuned):
    for folder, data in ((best, "data"), (tuned, "others")):
        figure = truth(folder, place / data / "test")
        assert Report.load(folder / "report.json").accuracy["clean"] == figure
        assert figure > 0.6, "or a wrong order would not show"


def test_evaluate_with_nothing_typed_again(place, best, tmp_path, capsys):
    report = evaluated(best, place / "data", tmp_path)
    assert report.accuracy["clean"] == truth(best, place / "data" / "test")
    assert report.conditions["image_size"] == [3, 20, 20]
    assert "images are shown to the model as 3x20x20; the first is 3x24x24" in capsys.readouterr().out
    other = evaluated(best, place / "data", tmp_path / "other", "--size", 24)
    assert other.conditions["image_size"] == [3, 24, 24]
    assert "the images are 3x24x24 (channels, height, width); the model was made for 3x20x20" in other.notes


def test_folders_in_another_order(place, best, tmp_path, capsys):
    report = evaluated(best, place / "data", tmp_path, "--class-order", "timm", "--save-images")
    assert report.accuracy["clean"] == truth(best, place / "data" / "test")
    (note,) = report.notes
    assert "in another order: 'class 9' is label 0 there and output 2 of the model" in note
    assert capsys.readouterr().out.count(note) == 1
    run("evaluate", best, "--attacked", tmp_path)
    assert f"fgsm: {100 * report.accuracy['fgsm']:.2f} % right" in capsys.readouterr().out


def test_a_folder_that_lacks_a_class(place, best, tmp_path):
    report = evaluated(best, place / "lacking", tmp_path)
    assert report.accuracy["clean"] == truth(best, place / "lacking" / "test")
    assert "does not have 1 of the model's 3 classes: 'Zebra one'" in report.notes[0]
    assert report.per_class("clean")[1] is None
    assert report.conditions["classes"] == sorted(COLOURS)


def write_parquet(folder: Path, file: Path) -> None:
    """The pictures of a folder with their classes in another order."""
    names = ["class 9", "Class 10", "Zebra one"]
    paths = sorted(folder.glob("*/*.png"))
    columns = {"image": [str(path) for path in paths], "label": [names.index(path.parent.name) for path in paths]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


def test_parquet_with_the_classes_in_another_order(place, best, tmp_path):
    write_parquet(place / "data" / "test", tmp_path / "test.parquet")
    report = evaluated(best, tmp_path / "test.parquet", tmp_path / "out")
    assert report.accuracy["clean"] == truth(best, place / "data" / "test")


def test_plain_numbers_are_read_by_position_with_a_word_or_by_the_names_given(place, best, tmp_path, capsys):
    names = ["class 9", "Class 10", "Zebra one"]
    paths = sorted((place / "data" / "test").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.savez(tmp_path / "test.npz", image=pixels, label=[names.index(path.parent.name) for path in paths])
    report = evaluated(best, tmp_path / "test.npz", tmp_path / "numbers")
    assert "plain numbers and were read as positions among the model's classes: 0 is 'Class 10'" in report.notes[0]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    named = evaluated(best, tmp_path / "test.npz", tmp_path / "named", "--classes", tmp_path / "names.txt")
    assert named.accuracy["clean"] == truth(best, place / "data" / "test") != report.accuracy["clean"]


def test_other_classes_are_refused_before_any_attack(place, best, capsys):
    assert main(["evaluate", str(best), "--data", str(place / "others")]) == 2
    error = capsys.readouterr().err
    assert "has images of classes that the model does not know: 'apple', 'pear'; its classes are 'Class 10'" in error


def test_fine_tuning_takes_the_size_from_the_model(place, best, tmp_path, capsys):
    flags = (f"--model.name={best}", "--model.layer_args={}", "--optim.epochs=1")
    again = train(tmp_path / "run", place / "others", *flags)
    assert "data.size=20, data.channels=3, as" in capsys.readouterr().out
    assert json.loads((again / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 20, 20]
    assert Report.load(again / "report.json").accuracy["clean"] == truth(again, place / "others" / "test")


def test_fine_tuning_on_the_same_classes_in_another_order_goes_on_with_the_head(
    place, best, tmp_path, capsys, monkeypatch
):
    for split in ("train", "test"):
        write_parquet(place / "data" / split, tmp_path / f"{split}-0.parquet")
    flags = [
        f"--model.name={best}",
        "--model.layer_args={}",
        "--optim.epochs=1",
        "--optim.lr=1e-6",
        "--checkpoint.keep=9",
    ]
    again = train(tmp_path / "run", tmp_path, *flags)
    printed = capsys.readouterr().out
    assert "has the model's classes in another order: 'class 9' is label 0 there and output 2 of the model" in printed
    assert json.loads((again / "config.json").read_text())["pretrained_cfg"]["label_names"] == sorted(COLOURS)
    before, after = truth(best, place / "data" / "test"), truth(again, place / "data" / "test")
    assert Report.load(again / "report.json").accuracy["clean"] == after
    assert after > before - 0.2, "the head was taken for one of other classes"
    train(tmp_path / "run", tmp_path, *flags, "--resume=true")
    with monkeypatch.context() as patch:  # as runs began before
        patch.setattr("timm_fsr.training.prepare.class_names", lambda _: None)
        train(tmp_path / "old", tmp_path, *flags)
    old = train(tmp_path / "old", tmp_path, *flags, "--resume=true")
    assert json.loads((old / "config.json").read_text())["pretrained_cfg"]["label_names"][0] == "class 9"


def test_a_folder_as_people_have_it(place, tmp_path, capsys):
    """Splits by other names, photographs of all sizes, an empty class, hidden files, and broken ones."""
    for split, name in (("train", "Training"), ("test", "Testing")):
        for path in sorted((place / "data" / split).glob("*/*.png")):
            file = tmp_path / "data" / name / path.parent.name / path.name
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.open(path)
            picture.resize((20 + int(path.stem) % 3, 24)).save(file)
            (file.parent / f"._{path.name}").write_bytes(b"resources of macOS")
        (tmp_path / "data" / name / "new").mkdir()
    (tmp_path / "data" / "__MACOSX" / "Training").mkdir(parents=True)
    (tmp_path / "data" / "Training" / "class 9" / "1.png").write_bytes(b"x")
    (tmp_path / "data" / "Testing" / "class 9" / "2.png").write_bytes(b"x")
    (tmp_path / "data" / "Testing" / "Zebra one" / "3.png").write_bytes(b"")
    common = ["train", f"--data.source={tmp_path / 'data'}", "--data.held_out=null", "--optim.epochs=1"]
    common += [
        "--optim.batch_size=16",
        "--attack.steps=1",
        "--evaluation.attacks=[fgsm]",
        f"--output={tmp_path / 'run'}",
    ]
    common += ["--evaluation.validation_steps=1", "--model.layer_args.fsr.hidden=4"]
    assert main(common) == 2
    error = capsys.readouterr().err
    assert "[train] has 1 image that cannot be used" in error
    assert f"{tmp_path}/data/Training/class 9/1.png (not an image); replace them, or set --data.on_error=skip" in error
    (tmp_path / "data" / "Training" / "class 9" / "1.png").unlink()
    assert main(common) == 2, "what the final evaluation would meet is known before the training"
    error = capsys.readouterr().err
    assert "Testing/Zebra one/3.png (not an image), " in error
    assert "Testing/class 9/2.png (not an image); replace them" in error
    run(*common, "--data.on_error=skip")
    printed = capsys.readouterr().out
    assert "[train] has no images of 'new' (an empty folder)" in printed
    assert (
        "[train] has images of different sizes, 24x20 to 24x22: all were scaled and centre-cropped to 32x32" in printed
    )
    assert "without held-out (4 of 41, seed 0)" in printed
    report = Report.load(tmp_path / "run" / "report.json")
    assert (report.count, report.conditions["skipped_images"]) == (22, 2)
    assert "was read without 2 images that cannot be used: Zebra one/3.png (not an image), class 9/2.png" in str(
        report.notes
    )
    best = tmp_path / "run" / "best"
    assert main(["evaluate", str(best), "--data", str(tmp_path / "data"), "--attacks", "fgsm"]) == 2
    assert "class 9/2.png (not an image); replace them, or add --on-error skip" in capsys.readouterr().err
    again = evaluated(best, tmp_path / "data", tmp_path / "out", "--on-error", "skip", "--eps", "8/255")
    assert again.accuracy == report.accuracy
    assert again.conditions["skipped_images"] == 2


def test_weights_of_timm_are_read_in_its_order(place, best, tmp_path, capsys):
    """As timm's train.py leaves them: a file of weights without names, its classes numbered by timm's reader."""
    reader = create_dataset("", root=str(place / "data" / "test"))
    order = sorted(reader.reader.class_to_idx, key=reader.reader.class_to_idx.get)
    assert order == ["class 9", "Class 10", "Zebra one"]
    model = timm_fsr.from_pretrained(best).eval()
    state, places = load_file(best / "model.safetensors"), [sorted(COLOURS).index(n) for n in order]
    state = {key: value for key, value in state.items() if not key.startswith("fsr.")}
    state |= {f"fc.{kind}": state[f"fc.{kind}"][places] for kind in ("weight", "bias")}
    plain = timm.create_model("resnet_tiny_cifar", num_classes=3)
    plain.load_state_dict(state)
    plain.eval().pretrained_cfg |= {"mean": model.pretrained_cfg["mean"], "std": model.pretrained_cfg["std"]}
    torch.save(state, tmp_path / "weights.pth")
    paths, targets = zip(*reader.reader.samples, strict=True)
    pictures = [Image.open(path) for path in paths]
    plain.pretrained_cfg["input_size"] = (3, 20, 20)
    figure = np.mean([a == b for a, b in zip(answers(plain, pictures), targets, strict=True)])
    flags = ("--checkpoint", tmp_path / "weights.pth", "--num-classes", 3, "--size", 20)
    report = evaluated("resnet_tiny_cifar", place / "data", tmp_path / "timm", *flags)
    assert report.accuracy["clean"] == figure > 0.5
    printed = capsys.readouterr().out
    assert "class folders are numbered in the order of timm (class 9, Class 10, Zebra one)" in printed
    assert "--class-order codepoint would be Class 10, Zebra one, class 9" in printed
    other = evaluated("resnet_tiny_cifar", place / "data", tmp_path / "own", *flags, "--class-order", "codepoint")
    assert other.accuracy["clean"] != figure
    (tmp_path / "names.txt").write_text("\n".join(order))
    named = evaluated(
        "resnet_tiny_cifar", place / "data", tmp_path / "named", *flags, "--classes", tmp_path / "names.txt"
    )
    assert named.accuracy["clean"] == figure


def test_weights_of_timm_are_shown_its_own_crop(place, tmp_path, capsys):
    """A folder that timm wrote: its crop is no leftover of an architecture, but what its own scripts use."""
    model = timm.create_model("resnet_tiny_cifar", num_classes=3)
    config = {"input_size": (3, 20, 20), "crop_pct": 0.6, "interpolation": "bilinear", "label_names": sorted(COLOURS)}
    model.pretrained_cfg |= {**config, "num_classes": 3}
    save_for_hf(model, tmp_path / "timms")
    figure = truth(tmp_path / "timms", place / "data" / "test")
    report = evaluated(tmp_path / "timms", place / "data", tmp_path / "out")
    assert report.accuracy["clean"] == figure
    assert report.conditions["crop"] == "crop_pct 0.6, center, bilinear"
    assert "as the model's configuration says (crop_pct 0.6, center, bilinear); --size" in capsys.readouterr().out
    whole = evaluated(tmp_path / "timms", place / "data", tmp_path / "whole", "--size", 20)
    assert "were scaled whole, but the model's configuration crops them" in whole.notes[0]
    assert whole.conditions["data_fingerprint"] != report.conditions["data_fingerprint"]


def test_a_thousand_classes_on_three_folders_is_said_first(place, tmp_path, capsys):
    folder = save_pretrained(timm.create_model("resnet_tiny_cifar", num_classes=1000), tmp_path / "model")
    run("evaluate", folder, "--data", place / "data", "--attacks", "fgsm", "--limit", 3)
    first = capsys.readouterr().out.splitlines()
    said = next(n for n, line in enumerate(first) if "the model has 1000 classes and knows no names of them" in line)
    assert said < next(n for n, line in enumerate(first) if "fgsm" in line)


@pytest.mark.parametrize("name", ["vit_tiny_patch4_32", "vit_tiny_patch4_32_fsr", "vgg11"])
def test_a_size_that_a_network_does_not_take(place, tmp_path, capsys, name):
    flags = (f"--data.source={place / 'data'}", "--data.held_out=6", "--data.size=16", f"--output={tmp_path}")
    more = ("--model.layer=null", "--optim.batch_size=10", "--optim.epochs=1")
    saved = tmp_path / "model"
    if name.startswith("vit"):  # timm builds a new one for any size
        save_pretrained(timm.create_model(name, num_classes=3), saved)
        assert main(["evaluate", str(saved), "--data", str(place / "data"), "--size", "16"]) == 2
        error = capsys.readouterr().err
        assert "does not take images of 3x16x16" in error
        assert "choose another side with --size" in error
    assert main(["train", f"--model.name={saved if saved.exists() else name}", *more, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not take images of 3x16x16" in error
    assert "set --data.size to a side that it takes" in error


def test_a_published_model_knows_the_same(place, best, hub, client, repo, tmp_path):
    code, printed = client.do("command", "push", str(best), repo, "--license", "mit")
    assert code == 0, printed
    files = hub.repos[repo].commits[-1].files
    for name in COLOURS:
        assert name in files["README.md"].decode()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    figure = truth(best, place / "data" / "test")
    assert truth(tmp_path, place / "data" / "test") == figure
    flags = ("--data", str(place / "data"), "--eps", EPS, "--attacks", "fgsm", "--class-order", "timm")
    code, printed = client.do("command", "evaluate", f"hf-hub:{repo}", *flags)
    assert code == 0, printed
    assert f"clean   {100 * figure:.2f} %" in printed
    assert "another order" in printed
