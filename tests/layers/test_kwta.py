"""k-winners-take-all against a sort of each image's activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny import images, tiny_resnet
from torch import Tensor

import timm_fsr
from timm_fsr.hooks.surrogates import list_surrogates, surrogate
from timm_fsr.layers.kwta import KWTA
from timm_fsr.models.variants import build_variant


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def winners(feature: np.ndarray, ratio: float) -> np.ndarray:
    """Which of each image's values are among its k largest, one image and one value at a time."""
    kept = np.zeros(feature.shape, dtype=bool)
    for image, mask in zip(feature, kept, strict=True):
        count = max(1, int(ratio * image.size))
        threshold = sorted(image.ravel().tolist(), reverse=True)[count - 1]
        for index in np.ndindex(image.shape):
            mask[index] = image[index] >= threshold
    return kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (2, 7, 1, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("ratio", [0.1, 0.37, 1.0])
def test_it_keeps_the_k_largest_of_each_image(training: bool, shape: tuple[int, ...], ratio: float) -> None:
    feature = features(*shape)
    out, aux = KWTA(shape[1], 10, ratio=ratio).train(training)(feature)
    kept = winners(feature.numpy(), ratio)
    np.testing.assert_array_equal(out.numpy(), np.where(kept, feature.numpy(), 0))
    np.testing.assert_array_equal(aux["mask"].numpy(), kept)
    assert (aux["mask"].flatten(1).sum(dim=1) == max(1, int(ratio * feature[0].numel()))).all()


def test_the_gradient_is_that_of_what_is_kept() -> None:
    feature, direction = features(3, 4, 5, 3).requires_grad_(), features(3, 4, 5, 3).flip(0)
    (found,) = torch.autograd.grad((KWTA(4, 10, ratio=0.2)(feature)[0] * direction).sum(), feature)
    kept = torch.from_numpy(winners(feature.detach().numpy(), 0.2))
    assert torch.equal(found, direction * kept)


def test_the_values_are_compared_within_an_image_alone() -> None:
    feature = features(2, 4, 3, 3)
    scaled = feature * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    layer = KWTA(4, 10)
    assert torch.equal(layer(scaled)[1]["mask"], layer(feature)[1]["mask"])


def test_ties_are_all_kept() -> None:
    feature = torch.tensor([3.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)
    assert torch.equal(KWTA(1, 10, ratio=0.5)(feature)[0], torch.tensor([3.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2))
    flat = torch.zeros(1, 3, 2, 2)
    assert torch.equal(KWTA(3, 10)(flat)[0], flat)


def test_infinite_losers_leave_no_nan() -> None:
    feature = torch.tensor([1.0, float("-inf"), 0.5, 0.0]).view(1, 1, 2, 2)
    assert torch.equal(KWTA(1, 10, ratio=0.25)(feature)[0].flatten(), torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_the_soft_mask_changes_the_gradient_alone() -> None:
    layer, feature = KWTA(4, 10, ratio=0.2), features(2, 4, 5, 3).requires_grad_()
    plain = layer(feature)[0]
    layer.surrogate = "soft_mask"
    soft = layer(feature)[0]
    torch.testing.assert_close(soft, plain)
    (found,) = torch.autograd.grad(soft.sum(), feature)
    values = feature.detach().numpy().astype(np.float64)
    expected = np.empty_like(values)
    for image, slope in zip(values, expected, strict=True):
        threshold = np.sort(image.ravel())[::-1][int(0.2 * image.size) - 1]
        gate = 1 / (1 + np.exp(-(image - threshold) / image.std()))
        slope[:] = gate + image * gate * (1 - gate) / image.std()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert found.count_nonzero() == found.numel(), "losers have a gradient, too"


def test_the_soft_mask_of_a_constant_image_is_finite() -> None:
    layer, feature = KWTA(4, 10), torch.ones(2, 4, 1, 1, requires_grad=True)
    layer.surrogate = "soft_mask"
    (found,) = torch.autograd.grad(layer(feature)[0].sum(), feature)
    assert found.isfinite().all()


def test_attacks_find_the_surrogate_on_a_model() -> None:
    model = timm_fsr.attach(tiny_resnet(), "kwta").eval()
    assert list_surrogates(model) == ("identity", "soft_mask", "bypass")
    given = images().requires_grad_()
    gradients = [torch.autograd.grad(model(given).logsumexp(dim=1).sum(), given)[0]]
    with surrogate(model, "soft_mask"):
        gradients.append(torch.autograd.grad(model(given).logsumexp(dim=1).sum(), given)[0])
    assert not torch.allclose(*gradients, rtol=1e-2, atol=0)


def test_it_has_no_weights_and_is_loaded_all_the_same(tmp_path) -> None:
    model = timm_fsr.attach(tiny_resnet(), "kwta", layer_args={"ratio": 0.3}).eval()
    assert not [key for key in model.state_dict() if key.startswith("kwta")]
    assert model._model_args["kwta_ratio"] == 0.3
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = build_variant(
        "resnet_tiny_cifar",
        "kwta",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors"), "num_classes": 10},
        kwta_ratio=0.3,
    )
    assert torch.equal(again.eval()(images()), model(images()))


def test_it_is_compiled_and_exported_in_one_graph() -> None:
    torch.compiler.reset()
    layer, feature = KWTA(4, 10).eval(), features(2, 4, 5, 3)
    expected = layer(feature)[0]
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(feature)[0], expected)
    assert torch.equal(torch.export.export(layer, (feature,)).module()(feature)[0], expected)
    torch.compiler.reset()


def test_on_the_meta_device_and_in_half_precision() -> None:
    feature = features(2, 4, 3, 3)
    assert KWTA(4, 10)(feature.to("meta"))[0].shape == feature.shape
    for dtype in (torch.float16, torch.bfloat16):
        half = feature.to(dtype)
        out = KWTA(4, 10)(half)[0]
        assert torch.equal(out, half * torch.from_numpy(winners(half.float().numpy(), 0.1)))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio=.* must be above 0 and at most 1: it is the share"):
        KWTA(4, 10, ratio=ratio)
