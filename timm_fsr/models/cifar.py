"""CIFAR-size networks built from timm's own classes.

Those classes were made for 224x224 images: most of their stems shrink an image fourfold before the first block. Here
each stem is one 3x3 convolution without pooling, of stride 1 (2 in the tiny network), as is the custom in adversarial
training, and `feature_info` says so. All else is timm's: weights, `features_only`, `in_chans`, heads, checkpointing
and the export to the Hub behave as for every timm model. Pixels go in as they are, in [0, 1]: mean 0, std 1.

    network                 source                                                 last map of a 32x32 image
    resnet18_cifar          ResNet-18 (He et al. 2016, arXiv 1512.03385)                     512x4x4
    resnet18_half_cifar     the same of half width, 32 to 256                                        256x4x4
    resnet_tiny_cifar       the same with one block per stage and widths 16 to 64            64x4x4
    preact_resnet18_cifar   pre-activation ResNet (He et al. 2016, arXiv 1603.05027)         512x4x4
    wrn28_10_cifar          Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146)     640x8x8
    wrn34_10_cifar          the same, 34 layers                                              640x8x8
    vgg16_bn_cifar          VGG, configuration D (arXiv 1409.1556), with a head of width 512 512x1x1
    mobilenetv2_cifar       MobileNetV2 (arXiv 1801.04381) with three strides, not five      320x4x4
    vit_tiny_patch4_32      ViT (arXiv 2010.11929), DeiT-tiny width (arXiv 2012.12877)       192x8x8

ResNet-18, Wide ResNet 34-10 and VGG-16 are those of the FSR paper; ResNet-tiny is ours, for tests and
demonstrations, and so is ResNet-18 of half width, for training on CPUs. The last `feature_info` entry of
pre-activation and Wide ResNets is the final norm with its ReLU, so the place of index -1 is post-activation as in the
other networks; `forward_intermediates` gives that map with `norm=True`. Wide ResNets have four entries, but timm's
`forward_intermediates` counts five: count its indices from the front there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers.classifier import ClassifierHead
from timm.layers.create_conv2d import create_conv2d
from timm.layers.helpers import get_device_dtype
from timm.models import (
    VGG,
    EfficientNet,
    ResNet,
    ResNetV2,
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args
from timm.models.resnet import BasicBlock
from timm.models.vgg import ConvMlp
from timm.models.vision_transformer import _create_vision_transformer
from torch import nn

__all__: list[str] = []  # register_model adds the entrypoints

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

# Kernel, stride, expansion and width of each stage, in timm's notation. timm's own MobileNetV2 has stride 2
# in the second stage; with stride 1 there and in the stem, a 32x32 image ends as 4x4.
MOBILENETV2 = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s1_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]


def _cfg(first_conv: str, classifier: str, **entries: Any) -> dict[str, Any]:
    """What timm must know of a network; it reads `num_classes`, `in_chans` and `img_size` defaults from here.

    `first_conv` and `classifier` name the layers it adapts to weights of other `in_chans` or `num_classes`.
    """
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        **entries,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": _cfg("conv1", "fc", pool_size=(4, 4)),
        "resnet18_half_cifar": _cfg("conv1", "fc", pool_size=(4, 4)),
        "resnet_tiny_cifar": _cfg("conv1", "fc", pool_size=(4, 4)),
        "preact_resnet18_cifar": _cfg("stem.conv", "head.fc", pool_size=(4, 4)),
        "wrn28_10_cifar": _cfg("stem.conv", "head.fc", pool_size=(8, 8)),
        "wrn34_10_cifar": _cfg("stem.conv", "head.fc", pool_size=(8, 8)),
        "vgg16_bn_cifar": _cfg("features.0", "head.fc", pool_size=(1, 1)),
        "mobilenetv2_cifar": _cfg("conv_stem", "classifier", pool_size=(4, 4)),
        "vit_tiny_patch4_32": _cfg("patch_embed.proj", "head", fixed_input_size=True),
    }
)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18, 11.17 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10)."""
    args = {"layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(_resnet, "resnet18_cifar", pretrained, **args)


@register_model
def resnet18_half_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 of half width, 2.80 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10)."""
    # Only timm's deep stem has a free width, twice `stem_width`; `_resnet` puts one convolution in its place.
    widths = {"stem_type": "deep", "stem_width": 16, "channels": (32, 64, 128, 256)}
    return build_model_with_cfg(_resnet, "resnet18_half_cifar", pretrained, layers=(2, 2, 2, 2), **{**widths, **kwargs})


@register_model
def resnet_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Ten-layer ResNet, 0.15 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10).

    Trains adversarially in minutes on two CPU cores: its stem has stride 2, and to end as 64x4x4 all the same (also
    from 28x28 images), its last stage is dilated instead of strided.
    """
    widths = {"stem_type": "deep", "stem_width": 8, "channels": (16, 32, 64, 64)}
    args = {"layers": (1, 1, 1, 1), "stem_stride": 2, "output_stride": 16, **widths, **kwargs}
    return build_model_with_cfg(_resnet, "resnet_tiny_cifar", pretrained, **args)


@register_model
def preact_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Pre-activation ResNet-18, 11.17 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10)."""
    args = {"layers": (2, 2, 2, 2), "channels": (64, 128, 256, 512), **kwargs}
    return build_model_with_cfg(_resnetv2, "preact_resnet18_cifar", pretrained, feature_cfg=_levels(5), **args)


@register_model
def wrn28_10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Wide ResNet 28-10, 36.48 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10)."""
    args = {"layers": (4, 4, 4), "channels": (160, 320, 640), "stem_chs": 16, **kwargs}
    return build_model_with_cfg(_resnetv2, "wrn28_10_cifar", pretrained, feature_cfg=_levels(4), **args)


@register_model
def wrn34_10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Wide ResNet 34-10, 46.16 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10)."""
    args = {"layers": (5, 5, 5), "channels": (160, 320, 640), "stem_chs": 16, **kwargs}
    return build_model_with_cfg(_resnetv2, "wrn34_10_cifar", pretrained, feature_cfg=_levels(4), **args)


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-16 with batch norm, 15.25 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10).

    The paper's place for FSR is `feature_info` index 3: the fourth block, before its max-pool (512x4x4).
    """
    args = {"model_cfg": VGG16, "norm_layer": nn.BatchNorm2d, **kwargs}
    return build_model_with_cfg(_vgg, "vgg16_bn_cifar", pretrained, feature_cfg=_levels(6), **args)


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2, 2.24 M parameters; images (N, 3, H, W) in [0, 1] -> logits (N, 10)."""
    return build_model_with_cfg(_mobilenetv2, "mobilenetv2_cifar", pretrained, feature_cfg=_levels(4), **kwargs)


@register_model
def vit_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-tiny without class token, 5.36 M parameters; images (N, 3, 32, 32) in [0, 1] -> logits (N, 10).

    Other sizes need `img_size=` or `dynamic_img_size=True`, as for every timm ViT.
    """
    widths = {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    args = {**widths, "class_token": False, "global_pool": "avg", **kwargs}
    return _create_vision_transformer("vit_tiny_patch4_32", pretrained, **args)


def _levels(count: int) -> dict[str, Any]:
    """For `features_only`: modules inside Sequentials can be taken, and all `count` levels are by default."""
    return {"flatten_sequential": True, "out_indices": tuple(range(count))}


def _resnet(*, stem_stride: int = 1, **kwargs: Any) -> ResNet:
    """A timm ResNet of basic blocks (post-activation) for small images."""
    model: Any = ResNet(**{"block": BasicBlock, **kwargs})
    model.conv1 = _stem_conv(model, stem_stride)
    model.maxpool = nn.Identity()
    _set_reductions(model.feature_info, stem=2 // stem_stride, stages=4 // stem_stride)
    return model


def _resnetv2(**kwargs: Any) -> ResNetV2:
    """A timm ResNetV2 of basic blocks with batch norm (pre-activation) for small images."""
    layers = {"conv_layer": create_conv2d, "norm_layer": nn.BatchNorm2d}
    model: Any = ResNetV2(**{"basic": True, "bottle_ratio": 1.0, **layers, **kwargs})
    model.stem.conv = _stem_conv(model)
    model.stem.pool = nn.Identity()
    _set_reductions(model.feature_info, stem=2, stages=4)
    model.feature_info[-1]["module"] = "norm"
    return model


def _vgg(*, mlp_ratio: float = 1.0, **kwargs: Any) -> VGG:
    """A timm VGG whose head is three linear layers of width 512, made for one 512x1x1 feature map."""
    # timm's head is 4096 wide with a 7x7 kernel, 100 M weights: make it one unit wide, then replace it.
    model: Any = VGG(mlp_ratio=1 / 4096, **kwargs)
    dropout, like = model.drop_rate, get_device_dtype(model)
    width = model.num_features
    act_layer = kwargs.get("act_layer", nn.ReLU)
    model.pre_logits = ConvMlp(width, width, 1, mlp_ratio, dropout, act_layer, **like)
    pool = model.head.global_pool.pool_type
    model.head = ClassifierHead(width, model.num_classes, pool_type=pool, drop_rate=dropout, **like)
    model.head_hidden_size = model.head.num_features
    model._initialize_weights()
    return model


def _mobilenetv2(**kwargs: Any) -> EfficientNet:
    """A timm MobileNetV2 with a stem of stride 1."""
    norm_layer = kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
    act_layer = resolve_act_layer(kwargs, "relu6")
    blocks = decode_arch_def(MOBILENETV2)
    model: Any = EfficientNet(blocks, norm_layer=norm_layer, act_layer=act_layer, **kwargs)
    model.conv_stem.stride = (1, 1)  # the padding of a 3x3 kernel is 1 at either stride
    _set_reductions(model.feature_info, stem=2, stages=2)
    return model


def _stem_conv(model: Any, stride: int = 1) -> nn.Conv2d:
    """The 3x3 convolution that takes the place of a stem, initialised as timm does there."""
    width = model.feature_info[0]["num_chs"]
    conv = nn.Conv2d(model.in_chans, width, 3, stride, padding=1, bias=False, **get_device_dtype(model))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _set_reductions(feature_info: list[dict[str, Any]], *, stem: int, stages: int) -> None:
    """Divide each level's `reduction` (image size / map size) by the stride the stem has lost."""
    for level, info in enumerate(feature_info):
        info["reduction"] //= stages if level else stem
