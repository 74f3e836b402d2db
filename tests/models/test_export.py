"""Exported models: the same function without timm and timm_fsr, or a sentence that says why not."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.backbones import TINY_BACKBONES
from support.tiny import images, layers_registered, tiny_resnet, tiny_vit, with_fsr
from torch import Tensor, nn

import timm_fsr
from timm_fsr.layers import FeatureLayer, list_layers
from timm_fsr.models.export import check_exported, exported_bytes, exported_facts
from timm_fsr.models.pixel import PixelModel
from timm_fsr.models.saving import weights_digest

BACKBONES = {backbone.id: backbone for backbone in TINY_BACKBONES}
SHARED = [("resnet", "vit-cls-reg4", "swin")[number % 3] for number in range(len(list_layers()))]
TABLE = [*zip(list_layers(), SHARED, strict=True), *(("fsr", name) for name in ("convnext-oblong", "deit-distilled"))]

ALONE = """
import sys

class Blocker:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("timm", "timm_fsr", "torchvision"):
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Blocker())
import torch
for folder in sys.argv[1:]:
    expected = torch.load(folder + "/expected.pt")
    model = torch.export.load(folder + "/model.pt2").module()
    for images, logits, gradient in expected:
        images.requires_grad_()
        found = model(images)
        assert torch.equal(found, logits), "logits"
        assert torch.equal(torch.autograd.grad(found.logsumexp(1).sum(), images)[0], gradient), "gradient"
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
for images, logits, _ in torch.load(sys.argv[1] + "/expected.pt"):
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert (found - logits).abs().max() <= 1e-5, (found - logits).abs().max()
assert not {"timm", "timm_fsr"} & set(sys.modules)
print("equal")
"""


def grey_resnet() -> nn.Module:
    """One channel, and mean and std that a program without the normalisation would miss."""
    model = with_fsr(tiny_resnet(in_chans=1))
    model.pretrained_cfg |= {"mean": (0.3,), "std": (0.2,), "label_names": [f"class {n}" for n in range(10)]}
    return model


def expected(model: nn.Module, channels: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, logits and gradients for several batch sizes."""
    found = []
    pixel_model = PixelModel(model).eval()
    for count in (1, 2, 7):
        given = images(count)[:, :channels].clone().requires_grad_()
        logits = pixel_model(given)
        (gradient,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), given)
        found.append((given.detach(), logits.detach(), gradient))
    return found


@pytest.mark.parametrize(("layer", "backbone"), TABLE)
def test_every_layer_and_layout(layer: str, backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm_fsr.attach(BACKBONES[backbone].create(), layer)
    height, width = BACKBONES[backbone].input_size[1:]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, height, width)}
    (found,) = timm_fsr.export(model, tmp_path)
    assert found.difference == 0
    run, pixel_model = torch.export.load(found.path).module(), PixelModel(model).eval()
    for count in (1, 3):
        given = images(count, height, width)
        torch.testing.assert_close(run(given), pixel_model(given), rtol=0, atol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    files = timm_fsr.export(grey_resnet(), folder, ("pt2", "onnx"))
    assert [file.path.name for file in files] == ["model.pt2", "model.onnx"]
    return folder


def test_a_process_without_timm_and_timm_fsr(exported: Path, tmp_path: Path) -> None:
    vit = with_fsr(tiny_vit(depth=1))
    timm_fsr.export(vit, tmp_path)
    for folder, model, channels in ((exported, grey_resnet(), 1), (tmp_path, vit, 3)):
        torch.save(expected(model, channels), folder / "expected.pt")
    command = [sys.executable, "-c", ALONE, str(exported), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr


class TestFiles:
    @pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
    def test_they_know_the_model_and_no_path_of_the_machine(self, name, exported):
        content = (exported / name).read_bytes()
        facts = exported_facts(name, content)
        assert facts["weights_sha256"] == weights_digest(grey_resnet())
        assert facts["input_size"] == [1, 32, 32]
        assert facts["classes"] == [f"class {n}" for n in range(10)]
        for package in (timm, timm_fsr, torch):
            assert str(Path(package.__file__).parents[1]).encode() not in content, package.__name__

    def test_the_same_model_gives_the_same_bytes(self, exported, tmp_path):
        (again,) = timm_fsr.export(grey_resnet(), tmp_path)
        assert again.path.read_bytes() == (exported / "model.pt2").read_bytes()
        assert again.sha256 == hashlib.sha256(again.path.read_bytes()).hexdigest()

    def test_the_model_is_left_as_it_was(self, tmp_path):
        model = with_fsr(tiny_resnet()).train()
        model.set_grad_checkpointing(True)
        model.layer4.eval()
        before = [(module.training, len(module._forward_hooks)) for module in model.modules()]
        timm_fsr.export(model, tmp_path)
        assert [(module.training, len(module._forward_hooks)) for module in model.modules()] == before
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.grad_checkpointing

    def test_another_image_size(self, tmp_path):
        (file,) = timm_fsr.export(tiny_resnet(), tmp_path, size=24)
        assert torch.export.load(file.path).module()(images(3, 24, 24)).shape == (3, 10)

    def test_new_weights_in_the_folder_remove_what_was_exported_from_the_old_ones(self, tmp_path):
        model = with_fsr(tiny_resnet())
        timm_fsr.save_pretrained(model, tmp_path)
        saved = sorted(tmp_path.iterdir())
        timm_fsr.export(model, tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([*saved, tmp_path / "model.pt2"])
        timm_fsr.save_pretrained(model, tmp_path)
        assert sorted(tmp_path.iterdir()) == saved


class TestFilesOfOthers:
    def test_other_weights(self, tmp_path):
        model = with_fsr(tiny_resnet())
        (file,) = timm_fsr.export(model, tmp_path)
        check_exported(file.path, model)
        assert exported_bytes(tmp_path, model) == {"model.pt2": file.path.read_bytes()}
        with torch.no_grad():
            model.fc.bias += 1
        with pytest.raises(ValueError, match=r"model\.pt2 was made from other weights; export this model again"):
            exported_bytes(tmp_path, model)

    def test_another_program(self, tmp_path):
        program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, tmp_path / "model.pt2")
        with pytest.raises(ValueError, match=r"model\.pt2 was not written by timm_fsr; take it away, or"):
            exported_bytes(tmp_path, tiny_resnet())

    def test_a_damaged_file(self, tmp_path):
        for name in ("model.pt2", "model.onnx"):
            with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\); export the model again"):
                exported_facts(name, b"\x00not a model")


class Moody(FeatureLayer):
    """Depends on its input's values in the flow of control."""

    name = "moody"

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        return (feature if feature.mean() > 0 else -feature), {}

    def aux_losses(self, aux: Any, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {}


class Dice(Moody):
    name = "dice"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        return feature + torch.randn_like(feature), {}


class Guest(Moody):
    name = "guest"

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        return torch.ops.timm_fsr_tests.guest(feature), {}


@torch.library.custom_op("timm_fsr_tests::guest", mutates_args=())
def guest(feature: Tensor) -> Tensor:
    """An operator that only this test has."""
    return feature + 1


@guest.register_fake
def _(feature: Tensor) -> Tensor:
    return torch.empty_like(feature)


class TestRefused:
    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (Moody, "resnet_tiny_cifar_moody cannot be exported to pt2: GuardOnDataDependentSymNode: .*"),
            (Dice, "resnet_tiny_cifar_dice cannot be exported: in eval mode it answers differently each time"),
            (Guest, "resnet_tiny_cifar_guest cannot be exported: it uses timm_fsr_tests.guest.default, which torch "),
        ],
    )
    def test_a_model_with_its_name_and_the_reason(self, layer, reason, tmp_path):
        (tmp_path / "model.pt2").write_bytes(b"old")
        with layers_registered(layer):
            model = timm_fsr.attach(tiny_resnet(), layer.name)
            with pytest.raises(ValueError, match=reason):
                timm_fsr.export(model, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
        assert (tmp_path / "model.pt2").read_bytes() == b"old"

    @pytest.mark.parametrize(
        ("formats", "error", "text"),
        [
            ("pt2", ValueError, "formats='pt2' is one format where a list belongs; use \\['pt2'\\]"),
            ((), ValueError, "there is no format to export to; name one or more of pt2, onnx"),
            (("pt",), ValueError, "unknown format 'pt'; did you mean 'pt2'\\?"),
            (("pt2", "onnx"), ModuleNotFoundError, 'needs onnxruntime, which .* `pip install "timm-fsr\\[onnx\\]"`'),
        ],
    )
    def test_formats(self, formats, error, text, tmp_path, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
        with pytest.raises(error, match=text):
            timm_fsr.export(tiny_resnet(), tmp_path / "out", formats)
        assert not (tmp_path / "out").exists()

    def test_sizes(self, tmp_path):
        with pytest.raises(ValueError, match="size=0 must be 1 or more"):
            timm_fsr.export(tiny_resnet(), tmp_path, size=0)
        with pytest.raises(ValueError, match="does not take images of 3x20x20"):
            timm_fsr.export(tiny_vit(), tmp_path, size=20)
        with pytest.raises(ValueError, match=r"does not say the size of its images; give .* size=224"):
            timm_fsr.export(nn.Flatten(), tmp_path)
