"""What is recorded, for how long, and what becomes of it: tapes, their losses, sites that fall silent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tiny import (
    CLASSES,
    images,
    label_scale_registered,
    labels,
    same_state,
    state,
    tiny_resnet,
    tiny_vit,
    traces,
    with_fsr,
)
from torch import nn

import timm_fsr
from timm_fsr.hooks.site import layer_groups
from timm_fsr.utils.errors import UnsoundError


@pytest.fixture
def label_scale() -> Iterator[None]:
    with label_scale_registered():
        yield


# Several sites and layers.


def test_losses_are_averaged_over_the_sites() -> None:
    model = with_fsr(tiny_resnet(), at="stages").eval()
    with timm_fsr.record(model, labels()) as tape:
        logits = model(images())
    single = [site.layer.aux_losses(vars(tape[site.name]), logits, labels()) for site in model.fsr.sites]
    assert len(single) == 4
    for name, value in tape.losses(logits).items():
        expected = torch.stack([terms[name.removeprefix("fsr.")] for terms in single]).mean()
        torch.testing.assert_close(value, expected)


@pytest.mark.usefixtures("label_scale")
def test_two_kinds_of_layer_share_a_place() -> None:
    model = tiny_resnet().eval()
    before, expected = state(model), model(images())
    with_fsr(model)
    alone = model(images())
    timm_fsr.attach(model, "label_scale", layer_args={"start": 2.0})
    assert not torch.equal(model(images()), alone)
    with timm_fsr.record(model, labels()) as tape:
        logits = model(images())
    assert set(tape) == {"fsr.layer4", "label_scale.layer4"}
    assert tape["label_scale.layer4"].rows.shape == (4, 64)
    assert set(tape.losses(logits)) == {"fsr.separation", "fsr.recalibration", "label_scale.size"}
    with pytest.raises(KeyError, match="ambiguous"):
        tape["layer4"]
    timm_fsr.detach(model)
    assert same_state(model, before)
    assert torch.equal(model(images()), expected)
    assert model.pretrained_cfg["architecture"] == "resnet_tiny_cifar"
    assert model._model_args == {}
    assert traces(model) == []


@pytest.mark.usefixtures("label_scale")
def test_labels_reach_the_layers_of_a_recorded_pass_only() -> None:
    model = timm_fsr.attach(tiny_resnet(), "label_scale").eval()
    with torch.no_grad():
        model.label_scale["layer4"].rows[4].mul_(3)  # the row of class 3
    unlabelled = model(images())
    with timm_fsr.record(model, labels()):
        labelled = model(images())
    torch.testing.assert_close(labelled[:3], unlabelled[:3])
    assert not torch.allclose(labelled[3], unlabelled[3])
    assert torch.equal(model(images()), unlabelled)


# The tape.


@pytest.fixture
def model() -> nn.Module:
    return with_fsr(tiny_resnet()).eval()


def test_an_exception_ends_the_recording(model: nn.Module) -> None:
    with contextlib.suppress(ZeroDivisionError), timm_fsr.record(model, labels()) as tape:
        model(images())
        raise ZeroDivisionError
    heard = tape["layer4"].mask
    model(images() / 2)
    assert tape["layer4"].mask is heard
    assert all(group.tape is None for group in layer_groups(model))
    assert model.fsr["layer4"].wants_aux is False


def test_an_exception_in_the_forward_pass_ends_the_recording(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="channels"), timm_fsr.record(model, labels()):
        model(images()[:, :1])
    assert model.fsr.tape is None
    with timm_fsr.record(model, labels()) as tape:
        tape.losses(model(images()))


def test_an_inner_recording_takes_over_for_its_while(model: nn.Module) -> None:
    with timm_fsr.record(model, labels()) as outer:
        model(images())
        first = outer["layer4"].mask
        with timm_fsr.record(model) as inner:
            model(images() / 2)
        assert outer["layer4"].mask is first
        assert not torch.equal(inner["layer4"].mask, first)
        model(images() / 4)
        assert outer["layer4"].mask is not first
    assert model.fsr.tape is None


def test_the_last_pass_counts(model: nn.Module) -> None:
    with timm_fsr.record(model) as tape:
        model(images())
        model(images(2) / 2)
    with timm_fsr.record(model) as other:
        model(images(2) / 2)
    assert torch.equal(tape["layer4"].mask, other["layer4"].mask)


def test_labels_are_needed_and_may_come_late(model: nn.Module) -> None:
    with timm_fsr.record(model) as tape:
        logits = model(images())
    with pytest.raises(ValueError, match=r"record\(model, labels\)"):
        tape.losses(logits)
    late = tape.losses(logits, labels())
    with timm_fsr.record(model, labels().flip(0)) as tape:
        logits = model(images())
    assert late == tape.losses(logits, labels())
    assert late != tape.losses(logits)


def test_losses_before_a_pass_are_refused(model: nn.Module) -> None:
    with timm_fsr.record(model, labels()) as tape:
        assert dict(tape) == {}
        with pytest.raises(RuntimeError, match=r"'layer4.0' did not fire; run a forward pass inside"):
            tape.losses(torch.zeros(4, CLASSES))
    with pytest.raises(KeyError, match="'layer4' has recorded nothing"):
        tape["layer4"]


def test_an_unknown_site_is_named(model: nn.Module) -> None:
    with timm_fsr.record(model) as tape:
        model(images())
    with pytest.raises(KeyError, match=r"'layer9' has recorded nothing; recorded: fsr\.layer4"):
        tape["layer9"]
    assert tape["fsr.layer4"] == tape["layer4"]


def test_a_model_without_layers_records_nothing() -> None:
    model = tiny_resnet().eval()
    with timm_fsr.record(model, labels()) as tape:
        logits = model(images())
    assert dict(tape) == {}
    assert tape.losses(logits) == {}
    assert timm_fsr.detach(model) is model


def test_wrappers_are_looked_through(model: nn.Module) -> None:
    wrapped = nn.Sequential(nn.Identity(), timm_fsr.PixelModel(model))
    with timm_fsr.record(wrapped, labels()) as tape:
        tape.losses(wrapped(images()))
    timm_fsr.detach(wrapped)
    assert traces(wrapped) == []


@pytest.mark.parametrize("rows", [slice(2, None), slice(0, 3), slice(1, 6, 2)], ids=str)
def test_losses_of_some_rows_are_those_of_recording_them_alone(rows: slice) -> None:
    model = with_fsr(tiny_resnet(), at="stages").eval()
    given, classes = images(6), labels(6)
    with timm_fsr.record(model, classes) as tape:
        logits = model(given)
    with timm_fsr.record(model, classes[rows]) as alone:
        expected = alone.losses(model(given[rows]))
    found = tape.losses(logits[rows], classes[rows], rows=rows)
    assert list(found) == list(expected) == ["fsr.separation", "fsr.recalibration"]
    whole = tape.losses(logits)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert abs(whole[name] - value).item() > 1e-4, "the rows cannot be told from the whole"
    tape.losses(logits)["fsr.separation"].backward()  # the tape itself is still whole


def test_gradients_of_some_rows_are_theirs_alone() -> None:
    model = with_fsr(tiny_resnet()).eval()
    given = images(4).requires_grad_()
    with timm_fsr.record(model, labels(4)) as tape:
        logits = model(given)
    sum(tape.losses(logits[2:], labels(4)[2:], rows=slice(2, None)).values()).backward()
    assert given.grad[2:].flatten(1).any(dim=1).all()
    assert not given.grad[:2].any()


# Modules that a conversion replaces.

CONVERSIONS = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": timm.layers.convert_sync_batchnorm,
    "timm, split": lambda model: timm.layers.convert_splitbn_model(model, 2),
    "timm, frozen": timm.layers.freeze_batch_norm_2d,
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("recording", [False, True])
def test_a_conversion_that_replaces_the_module_is_noticed_and_healed(
    convert: Any, recording: bool, tmp_path: Path
) -> None:
    model = with_fsr(tiny_resnet(), at="bn1").eval()
    expected = model(images())
    model = convert(model).eval()
    with (
        pytest.raises(UnsoundError, match=r"'bn1' was left out .* timm_fsr\.reattach\(model\)"),
        timm_fsr.record(model) if recording else contextlib.nullcontext(),
    ):
        model(images())
    with pytest.raises(UnsoundError, match=r"timm_fsr\.reattach\(model\)"):
        timm_fsr.save_pretrained(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # a second time changes nothing
        assert timm_fsr.reattach(model) is model
        with timm_fsr.record(model, labels()) as tape:
            logits = model(images())
        tape.losses(logits)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["preact_resnet18_cifar", "densenet121"])
@pytest.mark.parametrize("convert", [CONVERSIONS["timm"], CONVERSIONS["timm, frozen"]], ids=["sync", "frozen"])
def test_conversions_leave_default_sites_on_norms_in_place(name: str, convert: Any) -> None:
    widths: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8)}
    if name == "densenet121":
        widths = {"growth_rate": 4, "block_config": (1, 1)}
    model = with_fsr(timm.create_model(name, num_classes=CLASSES, **widths)).eval()
    (site,) = model.fsr.sites
    assert (site.name, site.path) in [("norm", "norm.act"), ("features.norm5", "features.norm5.act")]
    expected = model(images())
    model = convert(model)
    torch.testing.assert_close(model(images()), expected)
    with timm_fsr.record(model, labels()) as tape:
        tape.losses(model(images()))


def test_a_conversion_that_forgets_the_activation_is_noticed() -> None:
    """Torch's own knows nothing of timm's norms with an activation: what it makes never calls that."""
    model = with_fsr(timm.create_model("densenet121", growth_rate=4, block_config=(1, 1))).eval()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(UnsoundError, match=r"'features\.norm5\.act' was left out"):
        model(images())


def test_the_check_of_silent_sites_leaves_partial_passes_alone() -> None:
    model = with_fsr(tiny_resnet()).eval()
    with timm_fsr.record(model) as tape:
        model.forward_head(model.forward_features(images()))
        assert list(tape) == ["layer4"]
    model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(images())))))
    with pytest.raises(RuntimeError, match="channels"):
        model(images()[:, :1])
    model(images())  # an exception leaves nothing behind


@pytest.mark.parametrize("what", ["block", "root", "function"])
def test_compiled_parts_raise_no_false_alarm(what: str) -> None:
    model = with_fsr(tiny_resnet()).eval()
    expected = model(images())
    if what == "block":
        model.layer4 = torch.compile(model.layer4, backend="eager")
    elif what == "root":
        model.compile(backend="eager")
    else:
        model.forward_features = torch.compile(model.forward_features, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(images()), expected)
    torch.compiler.reset()


def test_reattach_keeps_weights_and_other_sites() -> None:
    model = with_fsr(tiny_vit(), at=(0, 1)).eval()
    before, expected = state(model), model(images())
    timm_fsr.reattach(model)
    assert same_state(model, before)
    assert torch.equal(model(images()), expected)
