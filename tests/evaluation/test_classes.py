"""Labels in the order of a model's outputs: matched by name, read by position with a word, or refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import timm_fsr
from timm_fsr.data.dataset import ImageData
from timm_fsr.data.streaming import stream_data
from timm_fsr.evaluation.classes import in_order_of, judged_data, match_classes, match_names, read_classes
from timm_fsr.evaluation.corruptions import corruption_accuracy
from timm_fsr.models.description import own_crop

SIZE = 32


class Brightness(nn.Module):
    """Tells images by their brightness; output k is the class of brightness (k + 1) / 20."""

    def __init__(self, classes: int, names: list[str] | None = None, order: list[int] | None = None) -> None:
        super().__init__()
        self.num_classes = classes
        self.scale = nn.Parameter(torch.tensor(400.0))
        self.order = order or list(range(classes))
        self.pretrained_cfg = {"label_names": names, "input_size": (3, SIZE, SIZE)}

    def forward(self, images: Tensor) -> Tensor:
        levels = (torch.tensor(self.order) + 1) / 20
        return -self.scale * (images.mean(dim=(1, 2, 3))[:, None] - levels).square()


def pictures(levels: list[int], classes: list[str], labels: list[int], *, named: bool = True) -> ImageData:
    """Plain images of these brightnesses."""
    values = torch.tensor(levels, dtype=torch.float32).add(1).div(20).mul(255).round().byte()
    images = values.view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE).contiguous()
    return ImageData(images, torch.tensor(labels), tuple(classes), "it", named)


KNOWN = ["cat", "dog", "emu"]


class TestWhatAReaderHasToKnow:
    def test_of_how_the_images_were_read(self):
        data = replace(pictures([0, 1, 2], KNOWN, [0, 1, 2]), notes=("one was broken",), skipped=1)
        judged = judged_data(Brightness(3, KNOWN), data)
        assert (judged.notes, judged.conditions["skipped_images"]) == (("one was broken",), 1)
        report = timm_fsr.evaluate(Brightness(3, KNOWN), data, attacks=[])
        assert "one was broken" in report.notes
        assert report.conditions["skipped_images"] == 1

    def test_of_a_crop_that_the_model_had_in_training(self):
        model = Brightness(3, KNOWN)
        model.pretrained_cfg["crop_pct"] = 0.875
        data = pictures([0, 1, 2], KNOWN, [0, 1, 2])
        scaled = replace(data, stored=(3, 50, 50))
        (note,) = judged_data(model, scaled).notes
        assert "were scaled whole, but the model's configuration crops them (crop_pct 0.875, center, bicubic)" in note
        assert judged_data(model, data).notes == ()
        assert judged_data(model, replace(data, stored=data.image_size)).notes == ()
        cropped = judged_data(model, replace(scaled, crop=own_crop(model)))
        assert (cropped.notes, cropped.conditions["crop"]) == ((), "crop_pct 0.875, center, bicubic")


class TestMatching:
    @pytest.mark.parametrize(
        ("known", "classes", "labels", "named", "found", "said"),
        [
            (KNOWN, KNOWN, [0, 1, 2], True, [0, 1, 2], ""),
            (KNOWN, ["emu", "cat", "dog"], [0, 1, 2], True, [2, 0, 1], "in another order: 'emu' is label 0 there"),
            (KNOWN, ["dog", "emu"], [0, 1, 1], True, [1, 2, 2], "does not have 1 of the model's 3 classes: 'cat'"),
            (KNOWN, ["cat", "dog", "emu", "fox"], [0, 1, 2], True, [0, 1, 2], ""),
            (KNOWN, ["0", "1", "2"], [0, 1, 2], False, [0, 1, 2], "plain numbers.* 0 is 'cat', 1 is 'dog', 2 is 'emu'"),
            (["0", "1", "2"], ["2", "0", "1"], [0, 1, 2], True, [2, 0, 1], "in another order: '2' is label 0"),
            (["7", "3"], ["3", "7"], [0, 1], True, [1, 0], "in another order"),
            (["7", "3"], [str(n) for n in range(8)], [3, 7, 7], False, [1, 0, 0], "in another order"),
            (["0", "1", "2"], ["0", "1", "2"], [0, 2, 1], False, [0, 2, 1], ""),
            (["0", "1", "2"], KNOWN, [0, 1, 2], True, [0, 1, 2], "knows no names"),
            (None, KNOWN, [0, 1, 2], True, [0, 1, 2], ""),
            (["100", "200"], ["100", "200"], [1, 0], False, [1, 0], ""),
            (["100", "200"], ["200"], [0, 0], False, [1, 1], "does not have 1 of the model's 2 classes: '100'"),
            ([*map(str, range(30))], ["5", "25"], [0, 1], False, [5, 25], "does not have 28"),
            (
                [f"c{n}" for n in range(30)],
                ["5", "25"],
                [0, 1],
                False,
                [5, 25],
                "plain numbers.* 5 is 'c5', 25 is 'c25'",
            ),
            (None, ["2", "1"], [0, 1], False, [2, 1], "label 2 .'2'. was read as the model's output 2"),
            (None, ["100", "200", "300"], [0, 2], False, [0, 2], "label 100 .'100'. was read as the model's output 0"),
            (None, ["0", "1"], [0, 1, 1], False, [0, 1, 1], "the model has 3 classes and knows no names.* has 2"),
        ],
    )
    def test_by_name(self, known, classes, labels, named, found, said):
        model = Brightness(3 if known is None else len(known), known)
        data = pictures([0] * len(labels), classes, labels, named=named)
        judged, notes = match_classes(model, data)
        assert judged.labels.tolist() == found
        assert len(notes) == bool(said)
        assert re.search(said, " ".join(notes))
        if known is not None and "knows no names" not in said:
            assert judged.classes == tuple(known)
        assert (judged is data) == (found == labels and judged.classes == data.classes)

    @pytest.mark.parametrize(
        ("known", "classes", "labels", "named", "message"),
        [
            (
                KNOWN,
                ["kat", "dog", "emu"],
                [0, 1, 2],
                True,
                r"'kat' \(did you mean 'cat'\?\); its classes are 'cat'",
            ),
            (KNOWN, ["0", "1", "2"], [0, 1, 2], True, r"does not know: '0', '1', '2'"),
            (["0", "1", "2"], ["0", "1", "cat"], [0, 1, 2], True, r"does not know: 'cat'"),
            (["1", "10", "2"], ["0", "1", "2"], [0, 1, 2], False, r"does not know: '0'"),
            (KNOWN, [str(n) for n in range(4)], [0, 3], False, r"label 3, but the model has 3 classes"),
            (None, [*KNOWN, "fox"], [0, 3], True, r"label 3 \('fox'\), but the model has 3 classes"),
        ],
    )
    def test_what_is_refused(self, known, classes, labels, named, message):
        with pytest.raises(ValueError, match=message):
            match_classes(Brightness(3, known), pictures([0] * len(labels), classes, labels, named=named))

    def test_a_thousand_outputs_and_four_folders(self):
        data = pictures([0], ["ape", "bee", "cow", "doe"], [0])
        judged, (note,) = match_classes(Brightness(1000), data)
        assert "the model has 1000 classes and knows no names of them; it has 4, and label 0 ('ape')" in note
        assert judged.classes[:5] == ("ape", "bee", "cow", "doe", "4")
        assert len(judged.classes) == 1000

    def test_names_that_nobody_knows_are_given(self):
        data = pictures([0] * 3, ["emu", "cat", "dog"], [0, 1, 2])
        assert match_classes(Brightness(3), data, KNOWN)[0].labels.tolist() == [2, 0, 1]
        assert match_classes(Brightness(3, ["x", "y", "z"]), data, KNOWN)[0].labels.tolist() == [2, 0, 1]
        numbers = pictures([0] * 3, ["0", "1", "2"], [0, 1, 2], named=False)
        judged, _ = match_classes(Brightness(3, KNOWN), numbers, ["emu", "cat", "dog"])
        assert (judged.labels.tolist(), judged.classes) == ([2, 0, 1], tuple(KNOWN))
        assert match_classes(Brightness(3), numbers, KNOWN)[0].classes == tuple(KNOWN)

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (["cat", "dog"], "has 2 names for 3 outputs"),
            (["cat", "cat", "dog"], "'cat' twice"),
            ([], "no list of names"),
            ("cat", "no list of names"),
            (["cat", "", "dog"], "no list of names"),
        ],
    )
    def test_given_names_that_do_not_fit(self, classes, message):
        with pytest.raises(ValueError, match=message):
            match_classes(Brightness(3), pictures([0], KNOWN, [0]), classes)

    def test_a_class_map_of_timm(self, tmp_path):
        (tmp_path / "map.txt").write_text("tench, Tinca\n great white \ngoldfish\n\n", encoding="utf-8")
        assert read_classes(tmp_path / "map.txt") == ("tench, Tinca", "great white", "goldfish")
        with pytest.raises(FileNotFoundError, match="one class in each line"):
            read_classes(tmp_path / "none.txt")
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="no text in UTF-8"):
            read_classes(tmp_path / "bytes")
        (tmp_path / "gap.txt").write_text("a\n\nb\n", encoding="utf-8")
        with pytest.raises(ValueError, match="no list of names"):
            read_classes(tmp_path / "gap.txt")

    def test_a_model_that_does_not_count_its_classes(self):
        match = match_names(None, KNOWN, [0], named=True, outputs=None, source="it")
        assert (match.positions, match.notes) == (None, ())


class TestFigures:
    """All of them for a model that is right on every image, shown in another order and without one class."""

    @pytest.fixture
    def model(self) -> Brightness:
        return Brightness(3, KNOWN)

    @pytest.fixture
    def data(self) -> ImageData:
        return pictures([2, 1, 1, 2, 1], ["emu", "dog"], [0, 1, 1, 0, 1])

    def test_evaluate(self, model, data):
        report = timm_fsr.evaluate(model, data, eps=1e-4, attacks=["fgsm"], batch_size=2)
        assert report.accuracy == {"clean": 1, "fgsm": 1}
        assert report.labels.tolist() == [2, 1, 1, 2, 1]
        assert report.conditions["classes"] == KNOWN
        assert report.conditions["data"] == "it"
        assert report.conditions["batch_size"] == 2
        assert report.conditions["data_fingerprint"] == data.fingerprint
        assert "'cat'" in report.notes[0]
        wrong = timm_fsr.evaluate(model, next(data.batches(5)), eps=1e-4, attacks=["fgsm"])
        assert wrong.accuracy["clean"] < 1, "tensors are taken as they are"
        with pytest.raises(ValueError, match="the labels of tensors are taken as the model's outputs"):
            timm_fsr.evaluate(model, next(data.batches(5)), attacks=[], classes=KNOWN)

    def test_images_that_are_decoded_as_they_are_needed(self, model, tmp_path):
        """Their folders stand in another order than the model's outputs, and one class is missing."""
        for name, level in (("emu", 2), ("cat", 0)):
            (tmp_path / "test" / name).mkdir(parents=True)
            grey = round(255 * (level + 1) / 20)
            for number in range(2):
                Image.new("RGB", (SIZE, SIZE), (grey,) * 3).save(tmp_path / "test" / name / f"{number}.png")
        for data in (stream_data(tmp_path, "test", size=SIZE, workers=0), timm_fsr.load_data(tmp_path, "test")):
            report = timm_fsr.evaluate(Brightness(3, KNOWN), data, attacks=[], batch_size=3)
            assert report.accuracy["clean"] == 1.0
            assert report.labels.tolist() == [0, 0, 2, 2]
            assert any("does not have 1 of the model's 3 classes: 'dog'" in note for note in report.notes)

    def test_the_same_as_before_where_nothing_is_to_be_matched(self, model):
        data = pictures([0, 1, 2], KNOWN, [0, 1, 2])
        matched = timm_fsr.evaluate(model, data, attacks=["fgsm"])
        plain = timm_fsr.evaluate(model, data.batches(250), attacks=["fgsm"])
        assert matched.notes == plain.notes
        assert matched.accuracy == plain.accuracy
        assert "labels_fingerprint" not in matched.conditions

    def test_assess_and_what_it_has_kept(self, model, data, tmp_path):
        report = timm_fsr.assess(model, data, tmp_path, eps=1e-4, attacks=["fgsm"], batch_size=5)
        assert (report.accuracy["clean"], report.calibration["clean"]["accuracy"]) == (1, 1)
        assert report.per_class("clean") == [None, 1, 1]
        assert report.conditions["labels_fingerprint"] != data.fingerprint
        assert timm_fsr.assess(model, data, tmp_path, eps=1e-4, attacks=["fgsm"], batch_size=5).notes == report.notes

    def test_rescore_on_a_model_with_another_order(self, model, data, tmp_path):
        timm_fsr.evaluate(model, data, eps=1e-4, attacks=["fgsm"], folder=tmp_path, save_images=True)
        other = Brightness(3, ["emu", "dog", "cat"], [2, 1, 0])
        outcome = timm_fsr.rescore(other, tmp_path)["fgsm"]
        assert outcome.correct.all()
        assert "in another order" in outcome.notes[0]
        nameless = Brightness(3, None, [2, 1, 0])
        assert not timm_fsr.rescore(nameless, tmp_path)["fgsm"].correct.all()
        assert timm_fsr.rescore(nameless, tmp_path, classes=["emu", "dog", "cat"])["fgsm"].correct.all()
        with pytest.raises(ValueError, match="classes that the model does not know"):
            timm_fsr.rescore(Brightness(3, ["x", "y", "z"]), tmp_path)
        with pytest.raises(ValueError, match="2 names for 3 outputs"):
            timm_fsr.rescore(nameless, tmp_path, classes=["emu", "dog"])

    def test_corruptions(self, model, data):
        pytest.importorskip("imagecorruptions")
        found = corruption_accuracy(model, data, names=["pixelate"], severities=[1])
        assert found == {"pixelate": {1: 1.0}}

    def test_corruptions_say_how_labels_were_read(self, model, data):
        pytest.importorskip("imagecorruptions")
        found = corruption_accuracy(model, data, names=["pixelate"], severities=[1])
        assert any("its labels were matched by name" in note for note in found.notes)
        images, labels = next(data.batches(2))
        assert corruption_accuracy(model, (images, labels), names=["pixelate"], severities=[1]).notes == ()

    def test_evidence(self, model, data):
        pytest.importorskip("pyautoattack")
        found = timm_fsr.gather_evidence(model, data, eps=1e-4, steps=(1, 2, 3), restarts=(1, 2))
        assert found["noise"]["clean"] == 1
        assert found["findings"][0]["level"] == "note"
        with pytest.raises(ValueError, match="images without labels"):
            timm_fsr.gather_evidence(model, torch.rand(1, 3, SIZE, SIZE))

    def test_transfer(self):
        """The source has the classes in another order, and one more; its gradients are those of the right class."""
        source = Brightness(4, ["emu", "fox", "dog", "cat"], [2, 3, 1, 0])
        images = next(pictures([0, 1, 2], KNOWN, [0, 1, 2]).batches(3))[0]
        ordered = in_order_of(KNOWN, source, "source")
        assert ordered(images).argmax(dim=1).tolist() == [0, 1, 2]
        assert in_order_of(["emu", "fox", "dog", "cat"], source, "source") is source
        assert in_order_of(None, source, "source") is source
        assert in_order_of(["0", "1", "2", "3"], source, "source") is source
        with pytest.raises(ValueError, match=r"cannot be transferred from source: .*'gnu'"):
            in_order_of(["gnu", "dog"], source, "source")
        near = Brightness(3, KNOWN)
        data = pictures([0, 1, 2], KNOWN, [0, 1, 2])
        report = timm_fsr.evaluate(near, data, eps=0.05, attacks=["transfer"], transfer_from={"source": source})
        same = timm_fsr.evaluate(
            near, data, eps=0.05, attacks=["transfer"], transfer_from={"source": Brightness(3, KNOWN)}
        )
        assert report.accuracy["transfer from source"] == same.accuracy["transfer from source"] == 0
