"""The journal of an evaluation: what was noted is found again, also after a kill in the middle of a line."""

from __future__ import annotations

import pytest
import torch
from support.tiny import images, labels, tiny_resnet, with_fsr
from torch import nn

from timm_fsr.evaluation.outcomes import Journal, KnownSuite, batch_key, suite_key
from timm_fsr.evaluation.registry import Stage, Suite
from timm_fsr.models.pixel import as_pixel_model
from timm_fsr.models.weights import model_digest

KEY = {"model": "abc", "eps": 8 / 255}
FLAGS = torch.tensor([True, False, True])


class TestJournal:
    def test_what_was_put_is_found_by_the_next(self, tmp_path):
        journal = Journal(tmp_path, KEY)
        assert journal.get("0", "fgsm", "fgsm") is None
        journal.put(FLAGS, "0", "fgsm", "fgsm")
        for found in (journal, Journal(tmp_path, KEY)):
            assert torch.equal(found.get("0", "fgsm", "fgsm"), FLAGS)
            assert found.get("1", "fgsm", "fgsm") is None

    def test_a_line_cut_off_counts_for_nothing(self, tmp_path):
        journal = Journal(tmp_path, KEY)
        journal.put(FLAGS, "0", "a", "a")
        journal.put(~FLAGS, "1", "a", "a")
        path = tmp_path / "outcomes" / "0.jsonl"
        whole = path.read_bytes()
        second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
        for end in range(second, len(whole)):  # every place where a kill may have cut the last line
            path.write_bytes(whole[:end])
            again = Journal(tmp_path, KEY)
            assert torch.equal(again.get("0", "a", "a"), FLAGS)
            assert again.get("1", "a", "a") is None
            again.put(FLAGS, "1", "a", "a")
            assert torch.equal(Journal(tmp_path, KEY).get("1", "a", "a"), FLAGS)

    def test_processes_read_each_others_lines(self, tmp_path):
        Journal(tmp_path, KEY, rank=1).put(FLAGS, "1", "a", "a")
        found = Journal(tmp_path, KEY, rank=0)
        found.put(~FLAGS, "0", "a", "a")
        assert torch.equal(Journal(tmp_path, KEY, rank=5).get("1", "a", "a"), FLAGS)
        assert len(Journal(tmp_path, KEY, rank=1)) == 2

    def test_suites_are_introduced_once_and_known_to_the_next(self, tmp_path):
        stages = tuple(Stage(name, "detail", lambda *_: images()) for name in ("one", "two"))
        suite = Suite("chain", stages, note="a note")
        key = suite_key(suite)
        for _ in range(2):
            Journal(tmp_path, KEY).introduce(suite)
        assert len((tmp_path / "outcomes" / "0.jsonl").read_text().splitlines()) == 2
        journal = Journal(tmp_path, KEY, rank=1)
        assert journal.suites == {key: KnownSuite("chain", suite.detail, ("one", "two"), "a note")}
        journal.put(FLAGS, "0", key, "one")
        assert journal.stages("0", key) is None, "one stage is missing"
        journal.put(~FLAGS, "0", key, "two")
        assert {name: flags.tolist() for name, flags in journal.stages("0", key).items()} == {
            "one": FLAGS.tolist(),
            "two": (~FLAGS).tolist(),
        }

    def test_another_evaluation_is_refused_or_replaced(self, tmp_path):
        Journal(tmp_path, KEY).put(FLAGS, "0", "a", "a")
        other = {**KEY, "model": "xyz"}
        with pytest.raises(ValueError, match=r"another evaluation: its model is 'abc', this one's 'xyz'.*--overwrite"):
            Journal(tmp_path, other)
        assert len(Journal(tmp_path, KEY)) == 1
        assert len(Journal(tmp_path, other, overwrite=True)) == 0
        assert len(Journal(tmp_path, other)) == 0

    def test_the_same_evaluation_is_kept_by_overwrite(self, tmp_path):
        Journal(tmp_path, KEY).put(FLAGS, "0", "a", "a")
        assert len(Journal(tmp_path, KEY, overwrite=True)) == 1

    def test_without_a_folder_nothing_is_written(self):
        journal = Journal(None, KEY)
        journal.put(FLAGS, "0", "a", "a")
        assert torch.equal(journal.get("0", "a", "a"), FLAGS)


class TestKeys:
    def test_a_batch_is_known_by_its_images_and_labels(self):
        key = batch_key(0, images(), labels())
        assert batch_key(0, images().clone(), labels()) == key
        changed = images()
        changed[0, 0, 0, 0] += 1e-6
        others = [
            batch_key(1, images(), labels()),
            batch_key(0, changed, labels()),
            batch_key(0, images(), labels() + 1),
        ]
        assert len({key, *others}) == 4

    def test_a_suite_is_known_by_its_parameters(self):
        suites = [Suite("pgd", (Stage("pgd", detail, lambda *_: images()),)) for detail in ("eps 1", "eps 2")]
        assert suite_key(suites[0]) != suite_key(suites[1])

    def test_a_model_is_known_by_weights_arguments_and_normalisation(self):
        def digest(model: nn.Module) -> str:
            return model_digest(as_pixel_model(model))

        model = with_fsr(tiny_resnet())
        before = digest(model)
        assert digest(with_fsr(tiny_resnet())) == before
        seen = {before, digest(with_fsr(tiny_resnet(), tau=0.2)), digest(tiny_resnet())}
        with torch.no_grad():
            model.bn1.running_mean[0] += 1e-6
        seen.add(digest(model))
        normalised = with_fsr(tiny_resnet())
        normalised.pretrained_cfg["mean"] = (0.5, 0.5, 0.5)
        seen.add(digest(normalised))
        assert len(seen) == 5

    def test_buffers_that_are_views_count(self):
        model = tiny_resnet(in_chans=1)
        model.register_buffer("one", torch.zeros(1, 1).expand(1, 1)[:, :1].as_strided((1, 1), (1, 0)))
        model.register_buffer("many", torch.zeros(1).expand(5))
        assert len(model_digest(as_pixel_model(model))) == 16

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64])
    def test_buffers_of_every_kind_count(self, dtype):
        model = tiny_resnet()
        digests = []
        for value in (0, 1):
            model.register_buffer("extra", torch.tensor(value).to(dtype))
            digests.append(model_digest(model))
        assert digests[0] != digests[1]
