"""timm's own scripts on our models: the calls that its validate.py, train.py, onnx_export.py and hub upload make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tiny import images, tiny_resnet, tiny_vit, with_fsr
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf
from timm.utils import CheckpointSaver, accuracy
from timm.utils.onnx import onnx_export
from torch import nn
from torchvision.transforms.functional import to_pil_image

import timm_fsr

ARCHITECTURES = {
    "resnet_tiny_cifar_fsr": {"fsr_hidden": 4, "fsr_tau": 0.3},
    "vit_tiny_patch4_32_fsr": {"fsr_hidden": 4, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2},
}
TAG = "resnet_tiny_cifar_fsr.at_fashion_mnist"


@pytest.fixture(params=ARCHITECTURES)
def made(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, ARCHITECTURES[request.param]


def create(made: tuple[str, dict[str, Any]], **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(made[0], **made[1], **arguments).eval()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_validate_sees_the_images_that_we_evaluate_on(tmp_path: Path) -> None:
    data = timm_fsr.load_data("fashion_mnist", "test", limit=20)
    for number, (image, label) in enumerate(zip(*data.batch(torch.arange(20)), strict=True)):
        folder = tmp_path / "images" / "validation" / f"class{int(label)}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{number:03}.png")
    timm_fsr.save_pretrained(timm_fsr.from_pretrained(TAG), tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, in_chans=1).eval()
    dataset = create_dataset("", root=str(tmp_path / "images"), split="validation", input_img_mode="L")
    config = resolve_data_config({"in_chans": 1}, model=model)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    loader = create_loader(dataset, batch_size=20, use_prefetcher=False, num_workers=0, **{n: config[n] for n in names})
    ((given, _),) = loader
    own, _ = timm_fsr.load_data(str(tmp_path / "images"), "validation").batch(torch.arange(20))
    torch.testing.assert_close(given, own, rtol=0, atol=1e-6)
    numbers = torch.tensor([int(Path(name).parent.name.removeprefix("class")) for name in dataset.filenames()])
    with torch.no_grad():
        (top1,) = accuracy(model(given), numbers)
    assert float(top1) == pytest.approx(100 * timm_fsr.evaluate(model, (own, numbers), attacks=[]).accuracy["clean"])
    assert top1 > 50


def test_a_checkpoint_of_train(made, tmp_path):
    model = create(made)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    again = create(made, checkpoint_path=str(tmp_path / "model_best.pth.tar"))
    assert torch.equal(again(images()), model(images()))
    with torch.no_grad():
        next(again.parameters()).zero_()
    load_checkpoint(again, str(tmp_path / "model_best.pth.tar"))
    assert torch.equal(again(images()), model(images()))


def test_what_its_hub_upload_writes(made, tmp_path):
    """Without our record of the weights, and complete."""
    model = create(made, num_classes=4)
    save_for_hf(model, str(tmp_path))
    for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), timm_fsr.from_pretrained(tmp_path)):
        assert torch.equal(again.eval()(images()), model(images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("network", [tiny_resnet, lambda: tiny_vit(depth=1)], ids=["resnet", "vit"])
def test_its_onnx_export(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = with_fsr(network()).eval()
    file = str(tmp_path / "model.onnx")
    onnx_export(model, file, opset=17, input_size=(3, 32, 32), batch_size=2)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images(2)).detach(), rtol=1e-4, atol=1e-5)


class TestFeatures:
    def test_of_a_saved_model(self, made, tmp_path):
        model = create(made)
        timm_fsr.save_pretrained(model, tmp_path)
        features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
        found, expected = features(images()), create(made, features_only=True)(images())
        assert len(found) > 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        last = model.forward_intermediates(images(), intermediates_only=True, norm=False)[-1]
        assert torch.equal(found[-1], last)

    def test_their_own_weights(self, made, tmp_path):
        features = create(made, features_only=True)
        torch.save(features.state_dict(), tmp_path / "features.pth")
        torch.manual_seed(1)
        again = timm.create_model(made[0], **made[1], features_only=True).eval()
        again.load_state_dict(torch.load(tmp_path / "features.pth"))
        assert torch.equal(again(images())[-1], features(images())[-1])

    def test_saved_as_a_model_they_are_refused(self, made, tmp_path):
        with pytest.raises(ValueError, match=r"is a feature extractor .*; save the whole model and load that with"):
            timm_fsr.save_pretrained(create(made, features_only=True), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_without_a_classifier(self, made, tmp_path):
        model = create(made)
        timm_fsr.save_pretrained(model, tmp_path)
        headless = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
        expected = model.forward_head(model.forward_features(images()), pre_logits=True)
        assert torch.equal(headless(images()), expected)
