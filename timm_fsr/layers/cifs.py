"""Channel-wise Importance-based Feature Selection (Yan et al., ICML 2021, arXiv 2102.05311)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fsr.layers.base import Aux, FeatureLayer, check_weights, register_layer
from timm_fsr.layers.common import auxiliary_logits, prediction_losses, with_gradient_of
from timm_fsr.utils.errors import unknown

_PROBES = ("mixed", "mlp", "linear")
_SHARPNESS = 5.0  # beta of the softplus in the original probe


@register_layer
class CIFS(FeatureLayer):
    """Weighs the channels of a feature map by how much a probe's two most relevant logits depend on them.

    With f the feature map and z the logits of the probe, which sees the mean of f over H and W:

        r_c   = sum over h, w of d(z_a + z_b) / d f_chw     relevance; a, b the two largest logits' classes,
                                                            in training a = y (b stays the second largest)
        m     = softmax(r)                                  over the channels: positive, of sum 1
        out_c = m_c * f_c

    The probe is linear, z = M pool(f) + n, or has one hidden layer, z = M softplus_5(W pool(f) + w) + n. So r is known
    in closed form, row_a(M) + row_b(M) or ((row_a(M) + row_b(M)) * sigmoid(5 (W pool(f) + w))) W, and no gradient is
    computed in the forward pass. The probe learns by `weight` * CE(z, y); training attacks maximise the main
    loss and `attack_weight` * CE(z, y), or under TRADES the KL divergence of z from the clean image's.

    What the released code does otherwise: in it the mask is no function of f but of a detached copy. So it is here in
    training mode (the probe's weights do learn through the mask), but in eval mode the mask has its true gradient, so
    that attacks are not misled; the surrogate "detached_mask" is the released gradient. The choice of the two classes
    has no gradient: the surrogate "soft_rows" has that of twice the softmax of z in its place. The released code
    multiplies the sum of main and auxiliary loss by 3 / (1 + beta), which is 1 at its beta of 2. Masks are of the order
    of 1 / C, there as here, and nothing scales them up. In training without labels a is the largest logit's class;
    without classes (`num_classes` 0) the layer does nothing.

    Args:
        channels: C of the feature map.
        num_classes: of the probe.
        probe: "linear", "mlp" (one hidden layer) or "mixed", as on the two blocks of ResNet-18 in the original: linear
            at the last of the sites, with a hidden layer at those before.
        hidden: width of the probe's hidden layer; 128 in the original.
        weight: of the probe's loss (beta, 2 in the original).
        attack_weight: of its loss in training attacks; the original has the same as `weight`.

    Raises:
        ValueError: an unknown probe, a width below 1, or a negative weight.
    """

    name: ClassVar[str] = "cifs"
    default_at: ClassVar[tuple[int | str, ...]] = ("blocks:-1",)
    surrogates: tuple[str, ...] = ("detached_mask", "soft_rows")

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        probe: str = "mixed",
        hidden: int = 128,
        weight: float = 2.0,
        attack_weight: float = 2.0,
    ) -> None:
        super().__init__()
        if probe not in _PROBES:
            raise ValueError(unknown("probe", probe, list(_PROBES)))
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1: it is the width of the probe")
        check_weights(weight=weight, attack_weight=attack_weight)
        self.channels = channels
        self.probe = probe
        self.hidden = hidden
        self.weight = weight
        self.attack_weight = attack_weight
        self.is_linear = probe != "mlp"
        self.body: nn.Linear | None = None
        self.head: nn.Linear | None = None
        self.reset_classifier(num_classes)

    def take_place(self, index: int, count: int) -> None:
        """Build the probe that belongs to this site, if they are "mixed"."""
        self.is_linear = self.probe == "linear" or (self.probe == "mixed" and index == count - 1)
        self.reset_classifier(self.head.out_features if self.head else 0)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the probe's last layer by a fresh one for `num_classes` classes (0: no probe)."""
        if self.is_linear or not num_classes:
            self.body = None
        elif self.body is None:
            self.body = nn.Linear(self.channels, self.hidden)
        width = self.channels if self.is_linear else self.hidden
        self.head = nn.Linear(width, num_classes) if num_classes else None

    def forward(self, feature: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Weigh the channels of `feature` (N, C, H, W).

        Returns:
            The weighed feature map, and with `wants_aux` the probe's `logits` (N, classes) and the channels' `scale`
            (N, C), both float32.
        """
        if self.head is None:
            return feature, {}
        pooled = feature.mean(dim=(2, 3)).to(self.head.weight.dtype)
        logits = self.head(pooled if self.body is None else _softplus(self.body(pooled))).float()
        scale = self._relevance(pooled, self._rows(logits, labels)).softmax(dim=1)
        out = feature * scale[:, :, None, None].to(feature.dtype)
        return out, {"logits": logits, "scale": scale} if self.wants_aux else {}

    def aux_losses(self, aux: Aux, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The probe's cross-entropy, weighted."""
        return {"classification": self.weight * F.cross_entropy(auxiliary_logits(aux, logits), labels)}

    def attack_losses(self, aux: Aux, logits: Tensor, labels: Tensor, clean: Aux | None = None) -> Tensor | None:
        """The probe's cross-entropy, or its divergence from the clean images', weighted, (N,)."""
        found = auxiliary_logits(aux, logits)
        return self.attack_weight * prediction_losses(found, labels, None if clean is None else clean["logits"])

    def _rows(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """The sum of the last layer's rows of the two classes, (N, width); no function of the feature."""
        assert self.head is not None
        rows = self.head.weight.float()
        chosen = logits.topk(min(2, logits.shape[1]), dim=1).indices
        if self.training and labels is not None:
            chosen = torch.cat([labels[:, None], chosen[:, 1:]], dim=1)
        both = rows[chosen].sum(dim=1)
        if self.surrogate == "soft_rows":
            both = with_gradient_of(2 * logits.softmax(dim=1) @ rows, both)
        return both

    def _relevance(self, pooled: Tensor, rows: Tensor) -> Tensor:
        """The gradient of the chosen logits' sum with respect to the pooled feature, (N, C)."""
        if self.body is None:
            return rows
        if self.training or self.surrogate == "detached_mask":
            pooled = pooled.detach()
        slope = torch.sigmoid(_SHARPNESS * self.body(pooled).float())  # the derivative of the softplus
        return ((rows * slope) @ self.body.weight.float()).float()


def _softplus(hidden: Tensor) -> Tensor:
    return F.softplus(hidden.float(), beta=_SHARPNESS).to(hidden.dtype)
