"""The contract of `FeatureLayer`, checked on every registered layer, and the registry."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from support.tiny import layers_registered
from torch import Tensor, nn

import timm_fsr
from timm_fsr.layers import FeatureLayer, layer_class
from timm_fsr.layers.base import LAYERS, check_layer_args, layer_defaults

CHANNELS, CLASSES = 8, 5
PLAIN = (bool, int, float, str, type(None))


@pytest.fixture(params=timm_fsr.list_layers())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def layer(name: str) -> FeatureLayer:
    torch.manual_seed(0)
    return layer_class(name)(CHANNELS, CLASSES)


def features(batch: int = 4, height: int = 6, width: int = 6) -> Tensor:
    return torch.randn(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(1))


def labels(batch: int = 4) -> Tensor:
    return torch.arange(batch) % CLASSES


def logits(batch: int = 4, classes: int = CLASSES) -> Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(2))


def move_weights(layer: FeatureLayer) -> None:
    """Away from where they start: behind a scale that starts at 0 no weight has a gradient before the first step."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 6, 6), (2, 5, 9), (3, 2, 2)])
@pytest.mark.parametrize("with_labels", [True, False])
def test_the_shape_stays(layer: FeatureLayer, training: bool, shape: tuple[int, int, int], with_labels: bool) -> None:
    feature = features(*shape)
    out, aux = layer.train(training)(feature, labels(shape[0]) if with_labels else None)
    assert out.shape == feature.shape
    assert out.dtype == feature.dtype
    assert out.isfinite().all()
    assert all(isinstance(value, Tensor) for value in aux.values())


def test_one_image_alone_passes_in_eval_mode(layer: FeatureLayer) -> None:
    feature = features(4)
    together = layer.eval()(feature)[0]
    alone = torch.cat([layer(image[None])[0] for image in feature])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_it_is_deterministic_in_eval_mode(layer: FeatureLayer) -> None:
    layer.eval()
    state = torch.get_rng_state()
    first, again = (layer(features())[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state()), "eval mode draws random numbers"


def test_it_leaves_its_input_alone(layer: FeatureLayer) -> None:
    feature = features()
    for training in (True, False):
        layer.train(training)(feature)
        assert torch.equal(feature, features())


def test_labels_are_no_part_of_the_answer_in_eval_mode(layer: FeatureLayer) -> None:
    layer.eval()
    assert torch.equal(layer(features(), labels())[0], layer(features())[0])


@pytest.mark.parametrize("training", [True, False])
def test_it_works_without_gradients(layer: FeatureLayer, training: bool) -> None:
    layer.train(training)
    with torch.no_grad():
        out, _ = layer(features())
    assert not out.requires_grad
    with torch.inference_mode():
        layer(features())


def test_gradients_reach_the_feature_and_every_parameter(layer: FeatureLayer) -> None:
    move_weights(layer)
    feature = features().requires_grad_()
    out, aux = layer.train()(feature, labels())
    main = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum()
    (main + sum(layer.aux_losses(aux, logits(), labels()).values())).backward()
    assert feature.grad is not None
    assert feature.grad.abs().max() > 0
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


def test_gradients_reach_the_feature_in_eval_mode(layer: FeatureLayer) -> None:
    feature = features().requires_grad_()
    (gradient,) = torch.autograd.grad(layer.eval()(feature)[0].sum(), feature)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_auxiliary_losses_are_named_scalars(layer: FeatureLayer) -> None:
    _, aux = layer(features(), labels())
    for key, value in layer.aux_losses(aux, logits(), labels()).items():
        assert key.isidentifier()
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value.requires_grad


def test_unwanted_auxiliary_outputs_are_left_out(layer: FeatureLayer) -> None:
    layer.eval()
    expected = layer(features())[0]
    layer.wants_aux = False
    out, aux = layer(features())
    assert aux == {}
    assert torch.equal(out, expected)


def test_another_number_of_classes(layer: FeatureLayer) -> None:
    layer.reset_classifier(3)
    _, aux = layer(features(), labels() % 3)
    layer.aux_losses(aux, logits(classes=3), labels() % 3)


def test_it_works_without_classes(name: str) -> None:
    layer = layer_class(name)(CHANNELS, 0)
    assert layer(features())[0].shape == features().shape
    layer.reset_classifier(CLASSES)
    layer.reset_classifier(0)
    assert layer(features())[0].shape == features().shape


def test_a_deepcopy_is_independent(layer: FeatureLayer) -> None:
    layer.eval()
    expected = layer(features())[0]
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(features())[0], expected)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    assert torch.equal(clone(features())[0], expected)


def test_a_pickle_is_equal(layer: FeatureLayer) -> None:
    layer.eval()
    clone = pickle.loads(pickle.dumps(layer))
    assert torch.equal(clone(features())[0], layer(features())[0])


def test_weights_survive_a_file(layer: FeatureLayer, name: str) -> None:
    layer.train()(features(), labels())  # moves whatever running statistics there are
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_class(name)(CHANNELS, CLASSES, **layer.resolved_args())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(features())[0], layer.eval()(features())[0])


def test_arguments_are_plain_and_survive_json(layer: FeatureLayer, name: str) -> None:
    defaults = layer_defaults(layer_class(name))
    assert layer.resolved_args() == defaults
    assert all(isinstance(value, PLAIN) for value in defaults.values())
    assert json.loads(json.dumps(layer.resolved_args())) == defaults


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    """By the layer itself, whoever builds it, and by whoever checks arguments beforehand."""
    cls = layer_class(name)
    for key in [key for key, default in layer_defaults(cls).items() if isinstance(default, float)]:
        with pytest.raises(ValueError, match=f"{key}={value}"):
            cls(CHANNELS, CLASSES, **{key: value})
        with pytest.raises(ValueError, match=f"{key}={value} of the feature layer '{name}' must be a finite number"):
            check_layer_args(cls, {key: value})


def test_the_paper_s_place_is_a_tuple(name: str) -> None:
    assert isinstance(layer_class(name).default_at, tuple)
    assert layer_class(name).default_at


def test_channels_last_stays(layer: FeatureLayer) -> None:
    layer = layer.eval().to(memory_format=torch.channels_last)
    feature = features().to(memory_format=torch.channels_last)
    out = layer(feature)[0]
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(features())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(layer: FeatureLayer, training: bool) -> None:
    layer.train(training)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            out, aux = layer(features().to(dtype), labels())
            losses = layer.aux_losses(aux, logits(), labels())
        assert out.dtype == dtype
        assert all(value.dtype == torch.float32 for value in losses.values())


def test_half_precision_weights(layer: FeatureLayer) -> None:
    for training in (True, False):
        out, aux = layer.bfloat16().train(training)(features().bfloat16(), labels())
        assert out.dtype == torch.bfloat16
        losses = layer.aux_losses(aux, logits(), labels())
        assert all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_a_break(layer: FeatureLayer, training: bool) -> None:
    """Both with gradients, of which the tracing is the same under each backend that computes as eager mode does."""
    layer.train(training)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for runner in (compiled, layer):
        torch.manual_seed(0)
        feature = features().requires_grad_()
        out, aux = runner(feature, labels())
        (gradient,) = torch.autograd.grad(out.square().sum(), feature)
        found.append((out, gradient, *aux.values()))
    torch.compiler.reset()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_exports(layer: FeatureLayer) -> None:
    layer.eval().wants_aux = False
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (features(),), dynamic_shapes=({0: batch},))
    for count in (2, 5):
        out, _ = program.module()(features(count))
        torch.testing.assert_close(out, layer(features(count))[0], rtol=1e-4, atol=1e-5)


def test_attack_losses_are_one_weighted_value_per_image(layer: FeatureLayer) -> None:
    layer.eval()
    (_, aux), (_, clean) = layer(features().requires_grad_()), layer(features() + 0.1)
    for before in (None, clean):
        found = layer.attack_losses(aux, logits(), labels(), before)
        if found is None or not layer.attack_weight:
            assert not layer.attack_weight
            continue
        assert found.shape == (4,)
        assert found.dtype == torch.float32
        assert found.requires_grad
        layer.attack_weight *= 2
        torch.testing.assert_close(layer.attack_losses(aux, logits(), labels(), before), 2 * found)
        layer.attack_weight /= 2


def test_surrogates_change_gradients_and_not_values(layer: FeatureLayer) -> None:
    """But for those that attacks are only transferred from, as FSR's robust part."""
    layer.eval()
    expected = layer(features())[0]
    for layer_surrogate in set(layer.surrogates) - {"robust_part"}:
        layer.surrogate = layer_surrogate
        torch.testing.assert_close(layer(features())[0], expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_argument_names_the_nearest(name: str) -> None:
    for key in layer_defaults(layer_class(name)):
        with pytest.raises(ValueError, match=f"{name!r} '{key}x'; did you mean .*'{key}'"):
            check_layer_args(layer_class(name), {f"{key}x": 1})


def test_an_argument_of_another_type_is_refused(name: str) -> None:
    for key, default in layer_defaults(layer_class(name)).items():
        if default is not None:
            with pytest.raises(ValueError, match=f"takes {key} as {type(default).__name__}"):
                check_layer_args(layer_class(name), {key: [default]})


@pytest.mark.parametrize("args", [{"tau": "1e-1"}, {"tau": True}, {"hidden": 8.0}, {"noise": 1}, {"hidden": None}])
def test_yaml_s_favourite_mistakes_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'fsr' takes \w+ as (float|int|bool) \(default "):
        check_layer_args(timm_fsr.FSR, args)
    check_layer_args(timm_fsr.FSR, {"tau": 1, "hidden": 8, "noise": False})


def test_an_unknown_layer_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown feature layer 'fsrr'; did you mean 'fsr'"):
        layer_class("fsrr")


def test_the_layers_are_sorted_by_name() -> None:
    assert timm_fsr.list_layers() == LAYERS.names() == sorted(LAYERS.names())
    assert "fsr" in timm_fsr.list_layers()
    assert layer_class("fsr") is timm_fsr.FSR


class Named(FeatureLayer):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()


@pytest.mark.parametrize("bad", [None, "no-identifier", "", 3])
def test_a_layer_needs_a_name(bad: Any) -> None:
    with pytest.raises(ValueError, match="give it a class attribute `name` that is an identifier"):
        timm_fsr.register_layer(type("Nameless", (Named,), {"name": bad}))


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"name 'fsr' is taken by FSR in timm_fsr\.layers\.fsr"):
        timm_fsr.register_layer(type("Impostor", (Named,), {"name": "fsr"}))
    assert layer_class("fsr") is timm_fsr.FSR


def test_a_registered_layer_is_listed() -> None:
    newcomer = type("Newcomer", (Named,), {"name": "newcomer"})
    with layers_registered(newcomer):
        assert "newcomer" in timm_fsr.list_layers()
        assert timm_fsr.register_layer(newcomer) is newcomer  # a second import changes nothing
    assert "newcomer" not in timm_fsr.list_layers()


def test_the_bare_contract_refuses_to_run() -> None:
    with pytest.raises(NotImplementedError):
        FeatureLayer()(features())
    assert FeatureLayer().aux_losses({}, logits(), labels()) == {}
    assert isinstance(FeatureLayer(), nn.Module)
