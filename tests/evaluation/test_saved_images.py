"""Attacked images on disk: only those of the very batch, attack and stage are taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny import images, labels

from timm_fsr.evaluation.saved_images import (
    AttackedBatch,
    attacked_batches,
    attacked_suites,
    forget_attacked,
    keep_attacked,
    load_attacked,
    perturbed,
    save_attacked,
)

CHANGED = torch.tensor([True, False, True, True])


def save(folder: Path, suite: str, index: int, scale: float = 1.0, of: str = "this") -> None:
    save_attacked(folder, suite, index, AttackedBatch(images() * scale, labels(), CHANGED), of=of, stages=2)


def test_round_trip_in_order(tmp_path):
    for index in (1, 0):
        save(tmp_path, "transfer from a/b", index, (index + 1) / 2)
    (suite,) = attacked_suites(tmp_path)
    batches = list(attacked_batches(tmp_path, suite))
    assert torch.equal(batches[0].images, images() / 2)
    assert torch.equal(batches[1].images, images())
    assert torch.equal(batches[1].labels, labels())
    assert torch.equal(batches[1].perturbed, CHANGED)


def test_only_what_is_asked_for_is_found(tmp_path):
    save(tmp_path, "fgsm", 1)
    found, stages = load_attacked(tmp_path, "fgsm", 1, of="this")
    assert torch.equal(found, images())
    assert stages == 2
    assert load_attacked(tmp_path, "fgsm", 1, of="another batch") is None
    assert load_attacked(tmp_path, "fgsm", 0, of="this") is None


def test_later_batches_and_all_can_be_removed(tmp_path):
    for index in range(4):
        save(tmp_path, "fgsm", index)
    keep_attacked(tmp_path, "fgsm", 2)
    assert len(list(attacked_batches(tmp_path, "fgsm"))) == 2
    forget_attacked(tmp_path)
    with pytest.raises(FileNotFoundError, match="--save-images"):
        attacked_suites(tmp_path)
    forget_attacked(tmp_path)


def test_damaged_files(tmp_path):
    save(tmp_path, "fgsm", 0)
    path = tmp_path / "attacked" / "fgsm" / "000000.safetensors"
    save_file({"images": images(), "labels": labels(3), "perturbed": CHANGED}, path)
    with pytest.raises(ValueError, match=r"is damaged \(4 images have 3 labels\); remove the folder"):
        next(attacked_batches(tmp_path, "fgsm"))
    for content in (b"x" * 50, b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            load_attacked(tmp_path, "fgsm", 0, of="this")
    save_file({"images": images()}, path)
    with pytest.raises(ValueError, match="is damaged"):
        next(attacked_batches(tmp_path, "fgsm"))


def test_what_an_attack_has_changed():
    attacked = images()
    attacked[1] += 1e-6
    assert perturbed(attacked, images()).tolist() == [False, True, False, False]
