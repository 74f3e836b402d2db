"""Where sites may sit: what `at` means, what is refused and why, and the families that need a path of their own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_fsr
from timm_fsr.hooks.layout import measure
from timm_fsr.hooks.placement import At, Place, _check_reach, find_places, run_probe

# Families whose `feature_info` names no module with one spatial output: architecture, what makes it small,
# and the hooked module with the layout of its output.
BY_PATH: dict[str, tuple[dict[str, Any], tuple[str, str, int, tuple[int, int]]]] = {
    "coat_lite_tiny": ({}, ("serial_blocks4.0", "NLC", 1, (7, 7))),
    "coat_tiny": (
        {"serial_depths": (1, 1, 1, 1), "parallel_depth": 2},
        ("parallel_blocks.1.norm14", "NLC", 1, (7, 7)),
    ),
    "crossvit_9_240": ({}, ("blocks.2.blocks.1.2", "NLC", 1, (14, 14))),
    "efficientvim_m1": ({}, ("norm.3", "NCHW", 0, (4, 4))),
    "efficientvim_m1_dist": ({}, ("norm.3", "NCHW", 0, (4, 4))),
    "gemma4_vit_167m": ({"depth": 2, "img_size": 96}, ("encoder.blocks.1", "NLC", 0, (6, 6))),
    "hrnet_w18_small": ({}, ("final_layer.2", "NCHW", 0, (7, 7))),
    "mvitv2_small_cls": ({}, ("stages.3.blocks.1.norm1", "NLC", 1, (7, 7))),
    "mvitv2_tiny": ({}, ("norm", "NLC", 0, (7, 7))),
    "pit_ti_224": ({}, ("transformers.2.blocks.2", "NLC", 1, (7, 7))),
    "pit_ti_distilled_224": ({}, ("transformers.2.blocks.2", "NLC", 2, (7, 7))),
    "tnt_s_patch16_224": ({"depth": 2}, ("blocks.1.norm_out", "NLC", 1, (14, 14))),
    "twins_svt_small": ({"depths": (1, 1, 1, 2)}, ("blocks.3.1", "NLC", 0, (7, 7))),
}
# Ways to a prediction from a sequence with prefix tokens, and whether the last block's spatial tokens count.
POOLINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "token": ({}, False),
    "token-reg4": ({"reg_tokens": 4}, False),
    "avg": ({"global_pool": "avg"}, True),
    "avg-reg4": ({"global_pool": "avg", "reg_tokens": 4}, True),
    "max": ({"global_pool": "max"}, True),
    "map": ({"global_pool": "map"}, True),
    "dynamic": ({"dynamic_img_size": True}, False),
}


def weightless(name: str, **kwargs: Any) -> nn.Module:
    """A timm model on the meta device: probing needs no weights."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def places(model: nn.Module, at: At = None, default_at: tuple[int | str, ...] = (-1,)) -> list[Place]:
    return find_places(model, at, default_at)[0]


def paths(model: nn.Module, at: At = None, default_at: tuple[int | str, ...] = (-1,)) -> list[str]:
    return [place.path for place in places(model, at, default_at)]


class Odd(nn.Module):
    """A small network with everything in it that a site cannot use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.pair = Pair()
        self.aside = nn.Conv2d(4, 4, 1)
        self.hidden = nn.Identity()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), Doubling(nn.Conv2d(4, 4, 1)))
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Identity()))
        self.unused = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.act(self.stem(images)))
        x, _ = self.pair(x)
        self.aside(x)
        self.hidden(x)  # its output is another name of x, and is dropped
        return self.fc(self.tail(self.body(x)).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Doubling(nn.Sequential):
    """No plain Sequential: its own forward does more than its last child."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (None, ["layer4.0"]),
        (-1, ["layer4.0"]),
        ((-1,), ["layer4.0"]),
        ([4], ["layer4.0"]),
        (-2, ["layer3.0"]),
        ("layer3", ["layer3.0"]),
        ("layer4.0.conv1", ["layer4.0.conv1"]),
        ("blocks:-1", ["layer4.0"]),
        ("blocks:1", ["layer1.0"]),
        ("stages", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ((2, "layer4"), ["layer2.0", "layer4.0"]),
        (("act1", "blocks:2", -1), ["act1", "layer2.0", "layer4.0"]),
    ],
    ids=repr,
)
def test_at_names_modules(at, expected):
    assert paths(weightless("test_resnet"), at) == expected


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("test_convnext", ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("test_byobnet", ["stages.0", "stages.1", "stages.2", "final_conv"]),
    ],
)
def test_stages_leave_the_stem_out(name, stages):
    assert [place.name for place in places(weightless(name), "stages")] == stages


def test_blocks_of_a_stage_that_keeps_them_in_a_list():
    assert paths(weightless("test_convnext"), "blocks:-1") == ["stages.3.blocks.0", "stages.3.blocks.1"]


def test_a_place_keeps_the_name_it_was_given():
    assert places(weightless("test_resnet"))[0].name == "layer4"


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((), "names no place"),
        ([], "names no place"),
        ("layr4", "unknown module of ResNet 'layr4'; did you mean 'layer4'"),
        ("", "unknown module of ResNet ''"),
        (5, r"at index 5 is not in the feature_info of ResNet \(0: act1, .*4: layer4\)"),
        (-6, "at index -6 is not in the feature_info"),
        ("blocks:5", "at='blocks:5' does not name a stage; write 'blocks:' and an index"),
        ("blocks:last", "at='blocks:last' does not name a stage"),
        ("blocks:0", "'act1' of ResNet has no list of blocks"),
        (("layer4", -1), "names the module 'layer4.0' twice"),
        (("layer4", "layer4.0"), "names the module 'layer4.0' twice"),
        (("stages", "layer2"), "names the module 'layer2.0' twice"),
        (True, "at contains True; give feature_info indices"),
        (1.5, "at contains 1.5"),
        ((None,), "at contains None"),
        ("fc", r"'fc' of ResNet gives an output of shape \(2, 1000\), not one spatial feature map"),
    ],
    ids=repr,
)
def test_at_that_cannot_be_is_refused(at, message):
    with pytest.raises(ValueError, match=message):
        places(weightless("test_resnet"), at)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("act", "'act' of Odd is called 2 times in a forward pass; choose a module that runs exactly once"),
        ("unused", "'unused' of Odd is not used"),
        ("pair", "'pair' of Odd gives an output of type tuple, not one spatial feature map"),
        ("aside", "'aside' of Odd has no influence on the logits; choose an earlier module"),
        ("hidden", "'hidden' of Odd has no influence on the logits"),
        ("fc", "'fc' of Odd gives an output of shape"),
        (-1, "at index -1 is not in the feature_info of Odd .it has none; name modules instead"),
        ("stages", "Odd has no feature_info; name modules instead of 'stages'"),
        (None, "it has none; name modules instead"),
    ],
    ids=repr,
)
def test_modules_that_a_site_cannot_use_are_refused(at, message):
    with pytest.raises(ValueError, match=message):
        places(Odd(), at)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("body", "body.1"),  # an own forward may do anything with what its children give
        ("body.0", "body.0.1"),
        ("tail", "tail.1.1"),
        ("stem", "stem"),
    ],
)
def test_plain_sequentials_are_descended(name, path):
    (place,) = places(Odd(), name)
    assert (place.name, place.path) == (name, path)


def test_a_model_that_does_not_take_its_images_is_refused():
    with pytest.raises(ValueError, match=r"Linear does not run on images of its input size \(3, 224, 224\)"):
        places(nn.Linear(3, 3), "weight")


def test_class_token_message():
    message = (
        "test_vit pools its class token, so a site on its last block cannot reach the logits; "
        "use at=(-2,) or global_pool='avg'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        places(weightless("test_vit"), -1)
    with pytest.raises(ValueError, match="a site at 'norm' cannot reach the logits; use an earlier module"):
        places(weightless("test_vit"), "norm")


@pytest.mark.parametrize(("kwargs", "reached"), POOLINGS.values(), ids=POOLINGS)
def test_default_is_the_last_block_that_counts(kwargs, reached):
    assert paths(weightless("test_vit", **kwargs)) == ["blocks.5" if reached else "blocks.4"]


@pytest.mark.parametrize(("kwargs", "reached"), POOLINGS.values(), ids=POOLINGS)
def test_refused_places_have_no_effect_and_the_others_have_one(kwargs, reached):
    model = noisy(timm.create_model("test_vit", img_size=64, num_classes=4, **kwargs))
    assert effect(model, "blocks.5") is reached
    verdicts = agreement(model)
    assert True in verdicts
    assert (False in verdicts) is not reached


@pytest.mark.parametrize("name", ["crossvit_9_240", "pit_ti_distilled_224"])
def test_verdicts_of_other_designs_are_those_of_the_numbers(name):
    assert agreement(noisy(timm.create_model(name, num_classes=4)), last=20) == {True, False}


def noisy(model: nn.Module) -> nn.Module:
    """Random weights throughout: LayerScale and zero-initialised branches would hide an effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


def agreement(model: nn.Module, last: int = 40) -> set[bool]:
    """Verdicts on the last modules whose output has prefix tokens, each checked against what the numbers say."""
    probe = run_probe(model)
    verdicts = set()
    for name in [name for name, outputs in probe.outputs.items() if len(outputs) == 1][-last:]:
        (output,) = probe.outputs[name]
        layout = measure(output.shape, probe.image_size) if isinstance(output, Tensor) else None
        if layout is None or not layout.prefix_tokens:
            continue
        try:
            _check_reach(model, probe, name, layout, output)
            verdict = True
        except ValueError:
            verdict = False
        assert effect(model, name, layout.prefix_tokens) is verdict, name
        verdicts.add(verdict)
    return verdicts


@torch.no_grad()
def effect(model: nn.Module, name: str, prefix: int | None = None) -> bool:
    """Whether noise on the spatial tokens of a module's output changes the logits."""
    prefix = getattr(model, "num_prefix_tokens", 0) if prefix is None else prefix
    config = model.pretrained_cfg
    size = getattr(model, "_traits", {}).get("img_size") or config["input_size"][1:]
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))

    def add_noise(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        spatial = output[:, prefix:]
        noise = torch.randn(spatial.shape, generator=torch.Generator().manual_seed(2))
        return torch.cat([output[:, :prefix], spatial + noise], dim=1)

    before = model(images)
    handle = model.get_submodule(name).register_forward_hook(add_noise)
    try:
        return not torch.equal(model(images), before)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", BY_PATH)
def test_families_that_need_a_path(name):
    kwargs, expected = BY_PATH[name]
    model = weightless(name, **kwargs)
    (place,) = places(model)
    assert (place.path, place.layout.kind, place.layout.prefix_tokens, place.layout.grid) == expected
    assert paths(model, -1) == [place.path]


@pytest.mark.parametrize("name", ["efficientvim_m1", "hrnet_w18_small"])
def test_their_other_stages_are_refused_in_words(name):
    with pytest.raises(ValueError, match=r"choose another module by name|name modules instead"):
        places(weightless(name), -2)


def test_classes_that_pool_the_average_keep_their_last_place():
    assert paths(weightless("tnt_s_patch16_224", depth=2, global_pool="avg")) == ["norm"]
    assert paths(weightless("coat_lite_tiny", global_pool="avg")) == ["serial_blocks4.1"]


def test_a_layer_may_prefer_other_places():
    assert paths(weightless("test_resnet"), default_at=("stages",)) == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]


def test_a_layer_for_each_stage_is_put_where_it_can_be():
    assert paths(weightless("test_vit"), default_at=("stages",)) == [f"blocks.{index}" for index in range(5)]
    assert len(paths(weightless("test_vit", global_pool="avg"), default_at=("stages",))) == 6
    (last,) = places(weightless("tnt_s_patch16_224", depth=2, global_pool="avg"))
    assert paths(weightless("tnt_s_patch16_224", depth=2, global_pool="avg"), default_at=("stages",)) == [last.path]
    with pytest.raises(ValueError, match="pools its class token"):
        places(weightless("test_vit"), "stages")  # who asks for them by name hears why one is impossible


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("hiera_tiny_224", -2, "'blocks.9' of Hiera gives tokens in another order than the image's"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", "not one spatial feature map for images"),
    ],
)
def test_tokens_out_of_the_images_order_are_refused(name, at, message):
    with pytest.raises(ValueError, match=message):
        places(weightless(name), at)


def test_oblong_images():
    (place,) = places(weightless("test_vit2", img_size=(64, 96)))
    assert (place.layout.grid, place.layout.prefix_tokens) == ((4, 6), 1)


def test_checkpointing_does_not_hide_the_way_to_the_logits():
    model = weightless("test_vit")
    model.set_grad_checkpointing()
    assert paths(model) == ["blocks.4"]
    assert model.grad_checkpointing


def test_probing_leaves_the_model_alone():
    model = timm.create_model("test_resnet").train().requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    places(model, "stages")
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_that_has_run_can_be_probed():
    model = weightless("levit_128s").eval()
    model(torch.rand(1, 3, 224, 224, device="meta"))  # LeViT keeps its attention biases, which have a grad_fn
    assert paths(model) == ["stages.2"]


def test_a_refused_attach_leaves_the_model_alone():
    model = weightless("test_vit")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="pools its class token"):
        timm_fsr.attach(model, at=-1)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "fsr")
