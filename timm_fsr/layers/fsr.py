"""Feature Separation and Recalibration (Kim et al., CVPR 2023, arXiv 2303.13846)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, check_choice, check_temperature, check_weights, register_layer
from timm_fsr.layers.common import logistic_noise, soft_mask, three_convolutions, wrong_class_loss

_MASK_SURROGATES = ("wide_tau", "straight_through", "detached_mask")
"""Those that change the gradient of the mask."""
_MODES: dict[str, tuple[str, ...]] = {
    "both": (*_MASK_SURROGATES, "robust_part"),
    "separation": _MASK_SURROGATES,
    "recalibration": (),
}
"""What of the layer is there, and the surrogates that then mean something."""


@register_layer
class FSR(FeatureLayer):
    """Splits a feature map by a learned mask and recalibrates its non-robust part.

    With S the separation network, R the recalibration network, f the feature map (paper, equations 1 to 7):

        m   = Gumbel-sigmoid(S(f); tau)     one value in [0, 1] per element of (C, H, W)
        f+  = m * f                         robust part
        f-  = (1 - m) * f                   non-robust part
        f~  = f- + (1 - m) * R(f-)          recalibrated part
        out = f+ + f~

    The mask is noisy exactly when `self.training` (and `noise`), else it is sigmoid(S(f) / tau). A mask near 0 or 1 has
    almost no gradient, so attacks may select a surrogate: "wide_tau", "straight_through" and "detached_mask" change
    the mask's gradient alone (that of a ten times larger tau, of the mask's logits, or none); "robust_part" gives out
    f+, the paper's "deactivation", for attacks that are then transferred. One linear head
    on the pooled f+, f- and f~ gives the auxiliary logits of the losses. The mask, its logits and the auxiliary
    logits are float32 also under autocast.

    Two ablations, which the released code does not have, leave one half out, with its network and its losses:

        mode "separation"       out = m * f        the non-robust part is deactivated
        mode "recalibration"    out = f + R(f)     nothing is separated: with a mask of 0 all of f is recalibrated

    Args:
        channels: C of the feature map.
        num_classes: classes of the auxiliary head; 0 builds none (then there are no auxiliary losses).
        hidden: width of S and R between their three 3x3 convolutions; 64 in the paper.
        tau: temperature of the Gumbel softmax, > 0; 0.1 in the paper.
        separation_weight: weight of the separation loss (lambda_sep, 1 in the paper).
        recalibration_weight: weight of the recalibration loss (lambda_rec, 1 in the paper).
        noise: draw Gumbel noise while training.
        feature_norm: normalise what S and R see over C, H, W (GroupNorm with one group), for backbones that hand
            over signed, un-normalised features; not in the paper.
        mode: "both" (the paper's), "separation" or "recalibration".

    Raises:
        ValueError: a width, temperature or weight out of range, or an unknown mode.
    """

    name: ClassVar[str] = "fsr"
    soft_labels: ClassVar[bool] = True
    surrogates: tuple[str, ...] = _MODES["both"]

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 64,
        tau: float = 0.1,
        separation_weight: float = 1.0,
        recalibration_weight: float = 1.0,
        noise: bool = True,
        feature_norm: bool = False,
        mode: str = "both",
    ) -> None:
        super().__init__()
        check_choice(type(self), "mode", mode, _MODES)
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1: it is the width of two convolutions")
        check_temperature(tau)
        check_weights(separation_weight=separation_weight, recalibration_weight=recalibration_weight)
        self.channels = channels
        self.hidden = hidden
        self.tau = tau
        self.separation_weight = separation_weight
        self.recalibration_weight = recalibration_weight
        self.noise = noise
        self.feature_norm = feature_norm
        self.mode = mode
        self.surrogates = _MODES[mode]
        self.norm = nn.GroupNorm(1, channels) if feature_norm else nn.Identity()
        self.separation = None if mode == "recalibration" else three_convolutions(channels, hidden)
        self.recalibration = None if mode == "separation" else three_convolutions(channels, hidden)
        self.head: nn.Linear | None = None
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the auxiliary head by a fresh one for `num_classes` classes (0: none)."""
        weight = next(module.weight for module in self.modules() if isinstance(module, nn.Conv2d))
        self.head = nn.Linear(self.channels, num_classes).to(weight.device, weight.dtype) if num_classes else None

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Separate and recalibrate `feature` (N, C, H, W).

        Returns:
            The recalibrated feature map, and with `wants_aux` the `mask` (N, C, H, W) in [0, 1] and the
            `robust_logits`, `nonrobust_logits`, `recalibrated_logits` (N, classes), all float32; of these only what
            the mode has.
        """
        aux: Aux = {}
        if self.separation is None:
            out = self._recalibrate(feature)
            self._classify(aux, "recalibrated", out)
            return out, aux
        mask_logits = self.separation(self.norm(feature)).float()
        if self.training and self.noise:
            mask_logits = mask_logits + logistic_noise(mask_logits)
        mask = self._mask(mask_logits)
        keep = mask.to(feature.dtype)
        robust = keep * feature
        nonrobust = feature - robust
        if self.wants_aux:
            aux["mask"] = mask
        self._classify(aux, "robust", robust)
        self._classify(aux, "nonrobust", nonrobust)
        if self.recalibration is None:
            return robust, aux
        recalibrated = self._recalibrate(nonrobust, 1 - keep)
        self._classify(aux, "recalibrated", recalibrated)
        return robust if self.surrogate == "robust_part" else robust + recalibrated, aux

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Separation loss (paper, equation 4) and recalibration loss (equation 6), weighted, means over the batch.

        The non-robust part is taught the strongest wrong class of the main `logits`. A mode without one of the
        networks is without its loss.
        """
        if self.head is None:
            raise ValueError(
                "this FSR layer has no auxiliary head because the model has num_classes=0; "
                "call model.reset_classifier(number_of_classes) before training"
            )
        if logits.shape[1] != self.head.out_features:
            raise ValueError(
                f"the model gives {logits.shape[1]} logits but FSR's auxiliary head {self.head.out_features}; "
                "change the number of classes with model.reset_classifier(), which resets both"
            )
        losses = {}
        if self.separation is not None:
            robust = F.cross_entropy(aux["robust_logits"], labels)
            nonrobust = wrong_class_loss(aux["nonrobust_logits"], logits, labels)
            losses["separation"] = self.separation_weight * (robust + nonrobust)
        if self.recalibration is not None:
            losses["recalibration"] = self.recalibration_weight * F.cross_entropy(aux["recalibrated_logits"], labels)
        return losses

    def _mask(self, logits: Tensor) -> Tensor:
        return soft_mask(logits, self.tau, self.surrogate)

    def _recalibrate(self, nonrobust: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        assert self.recalibration is not None
        return nonrobust + gate * self.recalibration(self.norm(nonrobust)).to(nonrobust.dtype)

    def _classify(self, aux: Aux, name: str, feature: Tensor) -> None:
        """Add the auxiliary logits of a part of the feature map to `aux`, if they are wanted."""
        if self.wants_aux and self.head is not None:
            dtype = getattr(self.head.weight, "dtype", torch.float32)  # a quantised layer's weight is no tensor
            aux[f"{name}_logits"] = self.head(feature.mean(dim=(2, 3)).to(dtype)).float()
