"""Files of weights that other training code wrote: what is read, and one sentence for each that does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tiny import images, tiny_resnet, with_fsr
from torch import nn

import timm_fsr
from timm_fsr.models.saving import load
from timm_fsr.models.weight_files import explain_difference, load_weight_file, read_foreign


def trained(**args: Any) -> nn.Module:
    """With statistics and weights of its own."""
    model = with_fsr(tiny_resnet(), **args)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.01)
    return model.eval()


WRITTEN = {
    "a state dict": lambda model: model.state_dict(),
    "PixelModel": lambda model: timm_fsr.PixelModel(model).state_dict(),
    "PixelModel in timm's": lambda model: {
        "state_dict": timm_fsr.PixelModel(model).state_dict(),
        "args": argparse.Namespace(a=1),
    },
    "DataParallel": lambda model: nn.DataParallel(model).state_dict(),
    "torch.compile": lambda model: torch.compile(model, backend="eager").state_dict(),
    "Lightning with a metric": lambda model: {
        "state_dict": {**{f"model.{k}": v for k, v in model.state_dict().items()}, "metric.total": torch.zeros(1)},
        "pytorch-lightning_version": "2.4",
        "epoch": 3,
    },
    "Lightning around PixelModel": lambda model: {
        "state_dict": {f"net.model.{k}": v for k, v in model.state_dict().items()} | {"loss.weight": torch.ones(1)}
    },
    "averaged weights": lambda model: {"state_dict": {"x": torch.ones(1)}, "state_dict_ema": model.state_dict()},
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_the_weights_of_all_kinds_of_code_are_loaded(written, tmp_path):
    model = trained()
    torch.save(written(model), tmp_path / "a.pth")
    found = load("resnet_tiny_cifar_fsr", fsr_hidden=4, checkpoint_path=str(tmp_path / "a.pth")).eval()
    assert torch.equal(found(images()), model(images()))
    assert not hasattr(found, "_timm_fsr_origin")


def test_how_the_other_code_normalises_comes_with_it(tmp_path):
    model = tiny_resnet()
    other = {"mean": torch.tensor([0.1, 0.2, 0.3]), "std": torch.tensor([0.5, 0.5, 0.5])}
    torch.save({**other, **{f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pth")
    load_weight_file(model, tmp_path / "a.pth")
    assert model.pretrained_cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)


UNREADABLE = {
    "a text": (b"no checkpoint\n" * 9, "torch.save wrote no file that begins with b'no checkpoint"),
    "nothing": (b"", "it is empty"),
    "half an archive": (b"PK\x03\x04" + b"\0" * 99, "is damaged or no checkpoint"),
    "half a pickle": (b"\x80\x04\x95\x10", "or is damaged"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_checkpoint_is_named(content, message, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth") as caught:
        read_foreign(path)
    assert message in str(caught.value)


MISFITS = {
    "other arguments of the layer": (
        lambda: trained(hidden=8),
        "fsr_hidden=8 (on the command line --model-args fsr_hidden=8)",
    ),
    "other classes": (
        lambda: with_fsr(tiny_resnet(num_classes=7)),
        "num_classes=7 (on the command line --num-classes=7)",
    ),
    "grey images": (
        lambda: with_fsr(tiny_resnet(in_chans=1)),
        "in_chans=1 (on the command line --model-args in_chans=1)",
    ),
    "without the layer": (
        tiny_resnet,
        "they have no feature layer 'fsr'; name resnet_tiny_cifar, the network without it",
    ),
    "another layer": (
        lambda: timm_fsr.attach(tiny_resnet(), "cas"),
        "they have the feature layer 'cas'; name resnet_tiny_cifar_cas",
    ),
    "other places": (lambda: with_fsr(tiny_resnet(), at="layer3"), "at other places"),
    "another network": (lambda: nn.Sequential(nn.Linear(2, 2)), "none of its tensors is there"),
    "a wider network": (
        lambda: timm_fsr.attach(timm.create_model("resnet18_cifar"), layer_args={"hidden": 4}),
        "of another shape",
    ),
}


@pytest.mark.parametrize(("other", "message"), MISFITS.values(), ids=MISFITS)
def test_weights_of_another_model_name_the_difference(other, message, tmp_path: Path):
    torch.save(other().state_dict(), tmp_path / "a.pth")
    model = with_fsr(tiny_resnet())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"a\.pth are not those of this model") as caught:
        load_weight_file(model, tmp_path / "a.pth")
    assert message in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_the_model_lacks_is_named():
    assert "name resnet_tiny_cifar_fsr" in explain_difference(tiny_resnet(), with_fsr(tiny_resnet()).state_dict())
