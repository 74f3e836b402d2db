"""Prediction: names and probabilities of any picture by any model, masks drawn, and files that cannot be read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.tiny import images, tiny_resnet, tiny_vit, with_fsr

import timm_fsr
from timm_fsr.evaluation.prediction import Flip, Prediction, predict
from timm_fsr.models.saving import save_pretrained

TAG = "resnet_tiny_cifar_fsr.at_fashion_mnist"


def picture(seed: int = 0, mode: str = "RGB", size: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for index, mode in enumerate(("RGB", "L", "RGBA", "P", "1")):
        picture(index, mode).save(tmp_path / f"{index}.png")
    return tmp_path


class TestAnswers:
    def test_they_are_the_softmax_of_the_model_on_prepared_pictures(self, folder):
        model = timm.create_model("test_vit", num_classes=7)
        found = predict(model, folder, topk=3)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        with torch.no_grad():
            shares = model.eval()(transform(picture(0))[None]).softmax(dim=1)[0]
        expected, indices = shares.topk(3)
        assert [one.image for one in found] == [str(folder / f"{index}.png") for index in range(5)]
        assert found[0].indices == tuple(indices.tolist())
        assert found[0].classes == tuple(f"class {index}" for index in indices.tolist())
        assert found[0].probabilities == pytest.approx(expected.tolist(), rel=1e-4)

    def test_they_do_not_depend_on_the_batches(self, folder):
        model = tiny_resnet()
        one, three = (predict(model, folder, batch_size=size, topk=10) for size in (1, 3))
        for first, second in zip(one, three, strict=True):
            assert first.indices == second.indices
            assert first.probabilities == pytest.approx(second.probabilities, rel=1e-4)
            assert sum(first.probabilities) == pytest.approx(1)

    def test_tensors_and_pictures_are_taken_too(self):
        model = tiny_resnet(num_classes=3)
        assert [one.image for one in predict(model, images(2))] == ["image 1", "image 2"]
        assert [one.image for one in predict(model, picture())] == ["image 1"]
        assert len(predict(model, [picture(0), picture(1, "CMYK")])[1].classes) == 3

    def test_a_model_by_its_name_knows_its_classes_norm_and_size(self):
        given, labels = next(timm_fsr.load_data("fashion_mnist", "test", limit=20).batches(20))
        pictures = [Image.fromarray((image[0] * 255).byte().numpy()).convert("RGB") for image in given]
        found = predict(TAG, pictures, topk=1)
        names = timm_fsr.load_data("fashion_mnist", "test", limit=20).classes
        assert sum(one.classes[0] == names[label] for one, label in zip(found, labels, strict=True)) >= 15

    def test_the_model_is_left_as_it_was(self, folder):
        model = with_fsr(tiny_resnet()).train()
        predict(model, folder)
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_bf16_is_close(self, folder):
        model = tiny_resnet()
        full, half = (predict(model, folder, precision=precision) for precision in ("fp32", "bf16"))
        assert full != half
        assert half[0].probabilities == pytest.approx(full[0].probabilities, abs=0.05)

    def test_names_may_be_given(self, folder):
        names = [f"n{index}" for index in range(10)]
        found = predict(tiny_resnet(), folder, classes=names)
        assert found[0].classes == tuple(f"n{index}" for index in found[0].indices)


@pytest.fixture
def brief(monkeypatch):
    """Attacks of few steps: what is found does not matter here."""
    monkeypatch.setattr("timm_fsr.evaluation.flips.STEPS", 4)


@pytest.mark.usefixtures("brief")
class TestRobustness:
    def test_each_image_has_its_smallest_eps_and_the_other_answer(self):
        found = predict(TAG, [Image.fromarray(np.full((28, 28), 90, dtype=np.uint8))], robustness=True, topk=2)[0]
        assert found.flip is not None
        assert found.flip.norm == "linf"
        assert 0 < found.flip.eps < 0.5
        assert found.flip.to != found.classes[0]
        assert "flips to" in str(found)

    def test_another_norm(self):
        found = predict(tiny_resnet(), images(1), robustness=True, norm="l2")[0].flip
        assert found is not None
        assert found.norm == "l2"
        assert "DDN-4" in found.attacks


class TestMasks:
    def test_each_site_is_drawn_over_each_image(self, folder, tmp_path):
        model = with_fsr(tiny_resnet(), at="stages")
        found = predict(model, [folder / "0.png", folder / "1.png"], masks=tmp_path / "masks", topk=1)
        files = [tmp_path / "masks" / f"{index}_mask.png" for index in range(2)]
        assert [one.drawing for one in found] == list(map(str, files))
        with Image.open(files[0]) as drawn:
            wide = drawn.size[0]
            assert len(set(drawn.convert("L").tobytes())) > 50, "the picture is blank"
        predict(with_fsr(tiny_resnet()), folder / "0.png", masks=tmp_path / "one")
        with Image.open(tmp_path / "one" / "0_mask.png") as drawn:
            assert drawn.size[0] < wide, "one site takes less room than three"

    def test_images_of_equal_names_get_files_of_their_own(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            picture().save(tmp_path / name / "x.png")
        found = predict(with_fsr(tiny_vit()), tmp_path, masks=tmp_path / "masks")
        assert [one.drawing for one in found] == [str(tmp_path / "masks" / f"x_mask{end}.png") for end in ("", "_2")]

    def test_without_a_layer_or_without_a_mask_it_says_so(self, folder, tmp_path):
        with pytest.raises(ValueError, match="resnet_tiny_cifar has no feature layer, so there is no mask to draw"):
            predict(tiny_resnet(), folder, masks=tmp_path / "masks")
        with pytest.raises(ValueError, match="has no mask to draw"):
            predict(timm_fsr.attach(tiny_resnet(), "denoise"), folder, masks=tmp_path / "masks")


class TestMistakes:
    def test_what_cannot_be_read_is_an_error_or_left_out(self, folder):
        (folder / "2.png").write_text("text")
        with pytest.raises(ValueError, match=r"2\.png is no image"):
            predict(tiny_resnet(), folder)
        skipped: list[str] = []
        assert len(predict(tiny_resnet(), folder, skip=skipped.append)) == 4
        assert len(skipped) == 1

    def test_if_nothing_can_be_read_it_is_an_error(self, folder):
        (folder / "2.png").write_text("text")
        with pytest.raises(ValueError, match="none of the images could be read"):
            predict(tiny_resnet(), folder / "2.png", skip=[].append)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"topk": 0}, "must be 1 or more"),
            ({"precision": "fp8"}, "unknown precision 'fp8'"),
            ({"precision": "bf16", "robustness": True}, "in float32"),
            ({"norm": "l1", "robustness": True}, "use the norm 'linf' or 'l2'"),
            ({"classes": ["a"]}, "1 class names were given, but the model has 10"),
        ],
    )
    def test_arguments(self, folder, arguments, message):
        with pytest.raises(ValueError, match=message):
            predict(tiny_resnet(), folder, **arguments)

    def test_images(self):
        for given, message in (([], "no images were given"), ([3], "images has a int"), (images() * 9, "must lie in")):
            with pytest.raises(ValueError, match=message):
                predict(tiny_resnet(), given)
        with pytest.raises(ValueError, match="choose another size"):
            predict(tiny_vit(), picture(), size=30)
        with pytest.raises(ValueError, match="3 channels but the model takes 1"):
            predict(tiny_resnet(in_chans=1), images())


def test_a_prediction_is_one_line():
    flip = Flip("linf", 0.1, "dog", "FMN")
    one = Prediction("x.png", ("cat", "dog"), (0, 1), (0.9, 0.1), flip)
    assert str(one) == "x.png: cat 90.0 %, dog 10.0 %; flips to dog at Linf 0.1"
    assert str(Flip("l2", math.inf, None, "FMN")) == "no attack flips it"


def test_a_saved_model_with_an_l1_report_needs_a_norm(tmp_path):
    report = timm_fsr.Report(
        correct={"clean": torch.tensor([True])}, attacks={}, norm="l1", eps=12.0, seed=0, conditions={}
    )
    save_pretrained(tiny_resnet(), tmp_path / "saved", report=report)
    with pytest.raises(ValueError, match="the model's own norm, 'l1'"):
        predict(tmp_path / "saved", picture(), robustness=True)
