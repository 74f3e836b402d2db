"""What timm_fsr saves and pushes, in transformers: loading, pipelines, fine-tuning, saving; logits equal timm's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.tiny import tiny_resnet, tiny_vit, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.layers import list_layers
from timm_fsr.models.description import class_names, describe
from timm_fsr.models.preprocessing import preprocessing
from timm_fsr.models.remote_code import MODELLING, modelling_code
from timm_fsr.models.weights import verify_folder

transformers = pytest.importorskip("transformers", minversion="5.24")

from timm_fsr.models.for_transformers import TimmFsrForImageClassification, TimmFsrImageProcessor  # noqa: E402

AutoModel = transformers.AutoModelForImageClassification

IN_A_NEW_PROCESS = """
import json, sys
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
import numpy as np, torch
from PIL import Image
assert "timm_fsr" not in sys.modules
found = []
for name in sys.argv[1:]:
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    classify = pipeline("image-classification", name, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
    picture = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))
    inputs = processor(picture)["pixel_values"]
    with torch.no_grad():
        logits = model(inputs).logits
    shares = {one["label"]: one["score"] for one in classify(picture)}
    found.append([inputs.tolist(), logits.tolist(), shares, model.config.timm_fsr.get("origin")])
print(json.dumps(found))
"""


def described(channels: int = 3, classes: tuple[str, ...] = ("b", "Z z", "a"), **args: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet_tiny_cifar_fsr", num_classes=len(classes), in_chans=channels, fsr_hidden=4, **args
    )
    describe(model, classes=classes, image_size=(channels, 24, 24))
    return model.eval()


def inputs(channels: int = 3, side: int = 24, batch: int = 3) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def picture(mode: str = "RGB", size: tuple[int, int] = (41, 33)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(pixels)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    found = model.eval()(images)
    return found if isinstance(found, Tensor) else found.logits


def by_all(folder: Path, images: Tensor) -> list[Tensor]:
    """Logits of a folder's model as timm, timm_fsr and transformers load it."""
    loaded = (timm.create_model(f"local-dir:{folder}", pretrained=True), timm_fsr.from_pretrained(folder))
    return [logits(model, images) for model in (*loaded, AutoModel.from_pretrained(folder))]


def trained(model: Any, output: Path, channels: int = 3) -> Any:
    """After two steps of transformers' own training."""
    images = inputs(channels, batch=8)
    data = [{"pixel_values": image, "labels": number % model.num_labels} for number, image in enumerate(images)]
    plan = transformers.TrainingArguments(
        output_dir=str(output), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True,
        report_to=[], save_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, plan, train_dataset=data)
    trainer.train()
    return trainer


def test_from_the_hub_and_from_a_folder_with_no_import_before(hub, client, repo, saved, home, tmp_path):
    """By the modelling file alone: the process imports nothing of ours itself."""
    client.do("push", str(saved), repo)
    grey = timm_fsr.save_pretrained(described(1, ("no", "yes")), tmp_path / "grey")
    environment = {**hub.environment(home, None), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, repo, str(grey)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [answer.pop() for answer in answers] == [{"name": repo, "hub_id": repo}, None]
    for folder, (images, expected, shares) in zip((saved, grey), answers, strict=True):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        found = logits(model, torch.tensor(images))
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
        names = class_names(model) or [f"LABEL_{number}" for number in range(model.num_classes)]
        of_class = dict(zip(names, found.softmax(1)[0].tolist(), strict=True))
        assert shares == pytest.approx({name: of_class[name] for name in shares}, abs=1e-5)


class TestLoading:
    @pytest.mark.parametrize("layer", list_layers())
    def test_each_layer(self, tmp_path, layer):
        """Constants that no file has among them, which transformers' way of loading leaves out."""
        model = timm.create_model(f"resnet_tiny_cifar_{layer}", num_classes=3)
        timm_fsr.save_pretrained(model, tmp_path)
        for found in by_all(tmp_path, inputs()):
            assert torch.equal(found, logits(model, inputs()))

    @pytest.mark.parametrize("model", [tiny_resnet(), with_fsr(tiny_vit())], ids=["plain", "vit"])
    def test_other_networks(self, tmp_path, model):
        timm_fsr.save_pretrained(model, tmp_path)
        for found in by_all(tmp_path, inputs(side=32)):
            torch.testing.assert_close(found, logits(model, inputs(side=32)), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("count", [2, 3, 10, 1000])
    def test_names_of_any_number_of_classes(self, tmp_path, count):
        names = tuple(f"kind {number}" for number in reversed(range(count)))
        timm_fsr.save_pretrained(described(classes=names), tmp_path)
        config = AutoModel.from_pretrained(tmp_path).config
        assert (tuple(config.id2label.values()), config.label2id[names[1]]) == (names, 1)

    def test_half_precision_is_float32_again(self, tmp_path):
        model = timm_fsr.round_weights(described(), torch.float16)
        timm_fsr.save_pretrained(model, tmp_path, dtype=torch.float16)
        assert AutoModel.from_pretrained(tmp_path).dtype == torch.float32
        assert all(torch.equal(found, logits(model, inputs())) for found in by_all(tmp_path, inputs()))

    def test_damaged_weights(self, tmp_path):
        path = timm_fsr.save_pretrained(described(), tmp_path) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or were exchanged"):
            AutoModel.from_pretrained(tmp_path)

    def test_a_layer_that_nobody_has_registered(self, tmp_path):
        path = timm_fsr.save_pretrained(described(), tmp_path) / "config.json"
        config = json.loads(path.read_text())
        config["timm_fsr"]["imports"] = ["my_layers.py"]
        path.write_text(json.dumps({**config, "architecture": "resnet_tiny_cifar_mine"}))
        with pytest.raises(ValueError, match=r"my_layers\.py registers: import that first"):
            AutoModel.from_pretrained(tmp_path)

    def test_no_code_of_the_folder_is_run_without_being_asked_for(self, tmp_path):
        timm_fsr.save_pretrained(described(), tmp_path)
        (tmp_path / MODELLING).write_text("raise SystemExit('run')")
        assert type(AutoModel.from_pretrained(tmp_path)) is TimmFsrForImageClassification


class TestImages:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
    def test_pictures_are_seen_as_in_training_and_evaluation(self, tmp_path, channels, mode):
        model = described(channels)
        timm_fsr.save_pretrained(model, tmp_path)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert type(processor) is TimmFsrImageProcessor
        as_seen = picture(mode)
        if mode == "RGBA":  # put on white
            as_seen = Image.alpha_composite(Image.new("RGBA", as_seen.size, "white"), as_seen)
        prepare, _ = preprocessing(model)
        expected = prepare(as_seen.convert("RGB").convert("L" if channels == 1 else "RGB")).float() / 255
        torch.testing.assert_close(processor(picture(mode))["pixel_values"][0], expected, rtol=0, atol=0.01)

    def test_a_pipeline_feeds_a_grey_model(self, tmp_path):
        timm_fsr.save_pretrained(described(1, ("no", "yes")), tmp_path)
        classify = transformers.pipeline("image-classification", str(tmp_path))
        assert {one["label"] for one in classify(picture())} == {"no", "yes"}

    def test_tensors_become_grey_and_are_normalised(self, tmp_path):
        model = timm.create_model("resnet18", num_classes=2, in_chans=1)
        timm_fsr.save_pretrained(model, tmp_path)
        processor = TimmFsrImageProcessor.from_pretrained(tmp_path)
        white = processor(torch.ones(2, 3, 224, 224))["pixel_values"]
        pixels = timm_fsr.PixelModel(model)
        assert white.shape == (2, 1, 224, 224)
        torch.testing.assert_close(white[0, 0, 5, 5], ((1 - pixels.mean) / pixels.std).flatten()[0])
        with pytest.raises(ValueError, match="2 channels are neither grey nor RGB"):
            processor(torch.ones(2, 2, 224, 224))

    def test_the_size_that_the_network_was_built_with(self, tmp_path):
        timm_fsr.save_pretrained(tiny_vit(img_size=48), tmp_path)
        assert TimmFsrImageProcessor.from_pretrained(tmp_path)(picture())["pixel_values"].shape == (1, 3, 48, 48)

    def test_neither_grey_nor_rgb(self, tmp_path):
        timm_fsr.save_pretrained(timm.create_model("resnet_tiny_cifar", in_chans=5), tmp_path)
        with pytest.raises(ValueError, match="takes images of 5 channels"):
            TimmFsrImageProcessor.from_pretrained(tmp_path)


class TestFineTuning:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_train_and_save_by_transformers_then_load_by_all(self, tmp_path, channels):
        source = timm_fsr.save_pretrained(described(channels), tmp_path / "source", license="mit")
        trainer = trained(AutoModel.from_pretrained(source), tmp_path / "run", channels)
        trainer.save_model(str(tmp_path / "tuned"))
        images = inputs(channels)
        expected = logits(trainer.model, images)
        assert not torch.equal(expected, logits(timm_fsr.from_pretrained(source), images))
        for folder in (tmp_path / "tuned", tmp_path / "run" / "checkpoint-2"):
            assert all(torch.equal(found, expected) for found in by_all(folder, images))
            assert verify_folder(folder) == folder / "model.safetensors", "its checksum is the new file's"
            assert (folder / MODELLING).read_bytes() == modelling_code()
        again = timm_fsr.from_pretrained(tmp_path / "tuned")
        assert class_names(again) == ("b", "Z z", "a")
        timm_fsr.save_pretrained(again, tmp_path / "ours")
        assert all(torch.equal(found, expected) for found in by_all(tmp_path / "ours", images))
        assert json.loads((tmp_path / "ours" / "config.json").read_text())["timm_fsr"]["license"] == "mit"

    def test_for_other_classes(self, tmp_path):
        source = timm_fsr.save_pretrained(described(), tmp_path / "source")
        model = AutoModel.from_pretrained(source, id2label={0: "on", 1: "off"}, ignore_mismatched_sizes=True)
        trained(model, tmp_path / "run").save_model(str(tmp_path / "tuned"))
        assert all(torch.equal(found, logits(model, inputs())) for found in by_all(tmp_path / "tuned", inputs()))
        assert class_names(timm_fsr.from_pretrained(tmp_path / "tuned")) == ("on", "off")

    @pytest.mark.parametrize("classes", [5, 1000])
    def test_names_that_transformers_makes_up_are_not_saved(self, tmp_path, classes):
        """Else an evaluation would look for images of "LABEL_0"."""
        source = timm_fsr.save_pretrained(described(), tmp_path / "source")
        model = AutoModel.from_pretrained(source, num_labels=classes, ignore_mismatched_sizes=True)
        model.save_pretrained(tmp_path / "tuned")
        again = timm_fsr.from_pretrained(tmp_path / "tuned")
        assert (again.num_classes, class_names(again)) == (classes, None)

    def test_the_loss_has_the_layers_own_in_training_alone(self, tmp_path):
        source = timm_fsr.save_pretrained(described(fsr_noise=False), tmp_path)
        model, labels = AutoModel.from_pretrained(source), torch.tensor([0, 1, 2])
        plain = timm_fsr.from_pretrained(source).train()
        with timm_fsr.record(plain, labels) as tape:
            found = plain(inputs())
        expected = nn.functional.cross_entropy(found, labels)
        own = sum(tape.losses(found).values())
        torch.testing.assert_close(model.train()(inputs(), labels=labels).loss, expected + own)
        again = AutoModel.from_pretrained(source).train()
        torch.testing.assert_close(again(inputs(), labels=labels, return_dict=False)[0], expected + own)
        given = logits(AutoModel.from_pretrained(source), inputs())
        evaluated = AutoModel.from_pretrained(source).eval()(inputs(), labels=labels).loss
        torch.testing.assert_close(evaluated, nn.functional.cross_entropy(given, labels))

    def test_what_was_said_of_the_weights_before_goes(self, tmp_path):
        source = timm_fsr.save_pretrained(described(), tmp_path, recipe="by hand")
        AutoModel.from_pretrained(source).save_pretrained(source)
        assert not (source / "recipe.yaml").exists()

    def test_it_is_pushed_when_it_is_complete(self, tmp_path, monkeypatch):
        model = AutoModel.from_pretrained(timm_fsr.save_pretrained(described(), tmp_path / "source"))
        pushed = []

        def push(self: Any, repo_id: str, **options: Any) -> None:
            pushed.append((repo_id, verify_folder(tmp_path / "tuned").name, options))

        monkeypatch.setattr(TimmFsrForImageClassification, "push_to_hub", push)
        nn.init.zeros_(model.timm_model.fc.bias)
        model.save_pretrained(tmp_path / "tuned", push_to_hub=True, repo_id="me/tuned", private=True)
        assert pushed == [("me/tuned", "model.safetensors", {"private": True})]

    def test_weights_in_several_files(self, tmp_path):
        model = AutoModel.from_pretrained(timm_fsr.save_pretrained(described(), tmp_path / "source"))
        with pytest.raises(ValueError, match="several files, which timm does not read"):
            model.save_pretrained(tmp_path / "split", max_shard_size="100KB")
