"""Gradient masking checks: does a model hide its weak spots from gradient attacks?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from timm_fsr.attacks.apgd import APGD
from timm_fsr.attacks.autoattack import Component
from timm_fsr.attacks.base import Attack, LossFunction, attack_mode, input_gradient, judged_loss, random_in_ball
from timm_fsr.attacks.losses import cross_entropy, dlr, margin
from timm_fsr.attacks.pgd import PGD
from timm_fsr.data.dataset import ImageData
from timm_fsr.evaluation.classes import match_classes
from timm_fsr.evaluation.inference import BATCH_SIZE, as_float, full_precision, predict
from timm_fsr.evaluation.model_checks import check_attacked, check_model, examine
from timm_fsr.evaluation.suites.adaptive import mean_gradient
from timm_fsr.hooks.surrogates import feature_layers, noisy
from timm_fsr.hooks.tape import record
from timm_fsr.models.pixel import as_pixel_model, device_of
from timm_fsr.reports.report import format_eps
from timm_fsr.utils.errors import check_images
from timm_fsr.utils.random import derive_generator, own_randomness

STEPS = (10, 50, 100, 1000)
RESTARTS = (1, 5, 10)
EPS_FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

_NOISE_DRAWS = 10
_SLICES = 4  # images whose loss surface is drawn
_SLICE_POINTS = 21
_BINS = 20
_SATURATED = 0.01  # a mask this near to 0 or 1 ...
_FLAT = 1e-4  # ... or with so small a product m (1 - m), which is the mask's gradient but for 1 / tau
_TOLERANCE = 0.01  # of robust accuracy: what stronger attacks may still break without a warning

Announce = Callable[[str], None]
Once = Callable[[str, Callable[[], Any]], Any]

ImageLoss = Callable[[Tensor, Tensor], Tensor]


def gather_evidence(
    model: nn.Module,
    images: Tensor | ImageData,
    labels: Tensor | None = None,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    restarts: Sequence[int] = RESTARTS,
    batch_size: int = BATCH_SIZE,
    classes: Sequence[str] | None = None,
    announce: Announce | None = None,
    advance: Callable[[str, float], None] | None = None,
    once: Once | None = None,
) -> dict[str, Any]:
    """Attack a model in many ways and say what that tells about its gradients.

    Args:
        model: a timm model or a pixel-space model; put into eval mode meanwhile.
        images: (N, C, H, W) in [0, 1]; a few hundred do. Or what `timm_fsr.load_data` returns, without `labels`: its
            labels are brought into the order of the model's classes by their names.
        labels: (N,) true classes.
        norm: "linf" or "l2".
        eps: radius, in pixels of [0, 1].
        seed: of everything random.
        steps: of PGD, rising.
        restarts: of PGD-20, rising.
        batch_size: images per pass; bounds the memory.
        classes: as in `timm_fsr.evaluate`.
        announce: called with the name of each part before it begins.
        advance: called with what is being done, in words, and how much of everything is done, in [0, 1].
        once: called with the name of each part and what gathers it, to give what it has kept of that part or to
            gather and keep it, as `timm_fsr.evaluation.benchmark.Cache.once` does; None keeps nothing.

    Returns:
        Plain JSON values: one entry per part, and "findings", sentences with a level "ok", "note" or "warning";
        docs/report.md lists them.

    Raises:
        ValueError: see `timm_fsr.evaluate`.
        ModuleNotFoundError: AutoAttack, which has Square, is not installed.
    """
    pixel_model = as_pixel_model(model)
    device = device_of(model)
    notes: tuple[str, ...] = ()
    if isinstance(images, ImageData):
        judged, notes = match_classes(model, images, classes)
        images, labels = next(judged.batches(len(judged)))
    if labels is None:
        raise ValueError("images without labels; give both, or what timm_fsr.load_data returns")
    images, labels = as_float(images).to(device), labels.to(device)
    check_images(images, labels)
    square = Component("square", norm, eps, seed)
    meter = _Meter(part_costs(steps, restarts), len(images), advance)
    subject = Subject(pixel_model, images, labels, norm, eps, seed, batch_size, meter.spend)
    survivors = torch.ones(len(images), dtype=torch.bool)  # of every white-box attack so far
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "eps": lambda: _eps_sweep(subject),
        "steps": lambda: _steps_sweep(subject, steps),
        "restarts": lambda: _restarts_sweep(subject, restarts),
        "noise": lambda: _noise(subject),
        "square": lambda: _square_gap(subject, square, survivors.to(device)),
        "noise_on": lambda: _noise_on(subject),
        "surface": lambda: {"slices": _surface(subject)},
        "masks": lambda: {"sites": _masks(subject)},
        "zero_gradients": lambda: _zero_gradients(subject),
        "repeatable": lambda: _repeatable(subject),
    }
    evidence: dict[str, Any] = {"images": len(images)}
    findings = [{"level": "note", "text": note} for note in notes]
    with ExitStack() as modes:
        modes.enter_context(attack_mode(pixel_model))
        modes.enter_context(full_precision(device))
        check_model(pixel_model)
        examine(pixel_model, images[:batch_size], labels[:batch_size])
        for name, part in parts.items():
            if announce is not None:
                announce(name)
            meter.begin(name)
            found: Any = part() if once is None else once(name, part)
            findings += found.pop("findings", [])
            survivors &= torch.tensor(found.pop("robust", [True]))
            found = next(iter(found.values())) if name in ("surface", "masks") else found
            if found:
                evidence[name] = found
    evidence["findings"] = findings
    return evidence


_WORDS = {
    "eps": "PGD-50 at growing eps",
    "steps": "more and more PGD steps",
    "restarts": "more and more restarts",
    "noise": "random noise",
    "square": "the black-box attack Square",
    "noise_on": "the layers' noise switched on",
    "surface": "the loss surface",
    "masks": "masks of the feature layers",
    "zero_gradients": "zero gradients",
    "repeatable": "the same twice",
}


def part_costs(steps: Sequence[int], restarts: Sequence[int]) -> dict[str, float]:
    """Gradients of each image that a part may take; two passes without gradient count as one."""
    return {
        "eps": 50.0 * (len(EPS_FACTORS) - 1),
        "steps": float(sum(steps)),
        "restarts": 20.0 * sum(restarts),
        "noise": 20.0 + _NOISE_DRAWS,
        "square": 2.0 * APGD().steps + 2500,
        "noise_on": 20.0 * 10,
        "surface": 5.0,
        "masks": 20.0,
        "zero_gradients": 2.0,
        "repeatable": 20.0,
    }


class _Meter:
    """How much of all parts is done, by what they cost."""

    def __init__(self, costs: dict[str, float], images: int, advance: Callable[[str, float], None] | None) -> None:
        self._costs, self._images, self._advance = costs, images, advance
        self._part, self._before, self._spent = "", 0.0, 0.0

    def begin(self, part: str) -> None:
        """A part begins; those before it are done, whatever they cost."""
        names = list(self._costs)
        self._part, self._before, self._spent = part, sum(self._costs[n] for n in names[: names.index(part)]), 0.0
        self.spend(0.0, 0)

    def spend(self, gradients: float, images: int) -> None:
        """So many images have taken so many gradients each."""
        self._spent += gradients * images / self._images
        if self._advance is not None:
            done = self._before + min(self._spent, self._costs[self._part])
            self._advance(_WORDS[self._part], done / sum(self._costs.values()))


def _eps_sweep(subject: Subject) -> dict[str, Any]:
    """Robust accuracy against a growing radius: it has to reach zero."""
    radii, accuracies, robust = [], [], None
    for factor in EPS_FACTORS:
        eps = factor * subject.eps if subject.norm == "l2" else min(factor * subject.eps, 1.0)
        attack = PGD(norm=subject.norm, eps=eps, steps=50)
        radii.append(eps)
        flags = subject.robust_to(attack, f"eps {factor}")
        robust = flags if factor == 1 else robust
        accuracies.append(_share(flags))
        if accuracies[-1] == 0 or (subject.norm == "linf" and eps >= 1):
            break
    curve = ", ".join(
        f"{100 * a:.1f} % at {format_eps(e, subject.norm)}" for e, a in zip(radii, accuracies, strict=True)
    )
    last = format_eps(radii[-1], subject.norm)
    rises = any(later > earlier + _TOLERANCE for earlier, later in itertools.pairwise(accuracies))
    if accuracies[-1] > 0:
        finding = _warn(f"PGD-50 does not reach 0 % accuracy even at eps {last}: suspect masking")
    elif rises:
        finding = _warn(f"accuracy rises with eps somewhere ({curve}): suspect masking")
    else:
        finding = _fine(f"PGD-50 brings accuracy to 0 % at eps {last}, as it must")
    at_eps = {} if robust is None else {"robust": robust.tolist()}  # none where a smaller radius has broken all
    return {"eps": radii, "accuracy": accuracies, **at_eps, "findings": [finding]}


def _steps_sweep(subject: Subject, steps: Sequence[int]) -> dict[str, Any]:
    """Robust accuracy against the number of PGD steps: more should hardly help after a hundred."""
    attack = PGD(norm=subject.norm, eps=subject.eps)
    flags = [subject.robust_to(replace(attack, steps=n), f"steps {n}") for n in steps]
    fewer, most = int(flags[len(flags) // 2].sum()), int(flags[-1].sum())
    finding = _finding(
        f"{steps[-1]} PGD steps instead of {steps[len(steps) // 2]} break {_more(fewer - most, len(flags[0]))}",
        fewer - most,
        len(flags[0]),
        fine="converged",
        note=f"PGD with {steps[len(steps) // 2]} steps overstates robust accuracy a little",
        warning="fewer have not converged",
    )
    return {"steps": list(steps), **_sweep(flags), "findings": [finding]}


def _restarts_sweep(subject: Subject, restarts: Sequence[int]) -> dict[str, Any]:
    """Robust accuracy against random restarts: they help much only on a rugged loss surface."""
    attack = PGD(norm=subject.norm, eps=subject.eps, steps=20)
    runs = [replace(attack, restarts=n) for n in restarts]
    flags = [subject.robust_to(run, "restarts") for run in runs]
    fall = int(flags[0].sum()) - int(flags[-1].sum())
    finding = _finding(
        f"{restarts[-1]} restarts of PGD-20 break {_more(fall, len(flags[0]))} than {restarts[0]}",
        fall,
        len(flags[0]),
        note="a single run overstates robust accuracy by as much; rely on attacks with restarts or on the worst case",
        warning="a rugged loss surface, on which single runs overstate robust accuracy; rely on the worst case",
        factor=2,
    )
    return {"restarts": list(restarts), **_sweep(flags), "findings": [finding]}


def _sweep(flags: list[Tensor]) -> dict[str, Any]:
    """Accuracies, and which images withstood all of these attacks."""
    return {"accuracy": [_share(one) for one in flags], "robust": torch.stack(flags).all(dim=0).tolist()}


def _more(count: int, of: int) -> str:
    """How many images more an attack breaks; a negative count is chance."""
    return f"{count} of {of} images ({100 * count / of:.1f} %) more" if count > 0 else "no more images"


def _finding(
    what: str, count: int, of: int, *, note: str, warning: str, fine: str = "", factor: int = 1
) -> dict[str, str]:
    """Fine up to a single image, which proves nothing; a note up to `factor` times the tolerance; else a warning.

    `fine`, `note` and `warning` say what follows from `what`, the figure.
    """
    if count <= 1:
        return _fine(f"{what}: {fine}" if fine else what)
    if count <= factor * _TOLERANCE * of:
        return {"level": "note", "text": f"{what}: {note}"}
    return _warn(f"{what}: {warning}")


def _noise(subject: Subject) -> dict[str, Any]:
    """Random points and random corners of the ball must be weaker than any gradient."""
    generator = derive_generator(subject.seed, 0, 0, 0, subject.images.device, stream="evidence noise")
    right = subject.right_on(subject.images, "clean")
    uniform, corners = right.clone(), right.clone()
    for _ in range(_NOISE_DRAWS):
        delta = random_in_ball(subject.images, subject.norm, subject.eps, generator)
        uniform &= subject.right_on((subject.images + delta).clamp(0, 1), "noisy")
        edge = _to_edge(delta, subject.norm, subject.eps)
        corners &= subject.right_on((subject.images + edge).clamp(0, 1), "noisy")
    attacked = subject.robust_to(PGD(norm=subject.norm, eps=subject.eps, steps=20), "noise")
    missed = int((attacked & ~(uniform & corners)).sum())
    finding = _finding(
        f"random noise breaks {missed} of {len(right)} images that PGD-20 missed",
        missed,
        len(right),
        note="a single run of PGD-20 is not the strongest attack; rely on the worst case",
        warning="its gradients are of little use",
    )
    shares = {"clean": right, "uniform": uniform, "corners": corners, "pgd": attacked}
    return {
        **{name: _share(flags) for name, flags in shares.items()},
        "robust": attacked.tolist(),
        "findings": [finding],
    }


def _to_edge(delta: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "linf":
        return eps * delta.sign()
    return eps * delta / delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def _square_gap(subject: Subject, square: Component, survivors: Tensor) -> dict[str, Any]:
    """What the black-box attack Square breaks beyond the white-box ones, those that `survivors` withstood included."""
    attack = APGD(norm=subject.norm, eps=subject.eps)
    loss = dlr if subject.model(subject.images[:1]).shape[1] >= 3 else margin
    white = subject.robust_to(attack, "white box") & subject.robust_to(attack, "white box ratio", loss) & survivors
    after = white.clone()
    for part in white.nonzero().flatten().split(subject.batch_size):
        images, labels = subject.images[part], subject.labels[part]
        classes = subject.model(images[:1]).shape[1]
        after[part] = predict(subject.model, square(subject.model, images, labels, classes), "Square's") == labels
        subject.spent(2500, len(part))
    count, broken = len(white), int((white & ~after).sum())
    share = f" ({100 * broken / count:.1f} %)" if broken else ""
    finding = _finding(
        f"Square broke {broken} of {count} images{share} that every white-box attack of this evidence missed",
        broken,
        count,
        note="robust accuracy without Square is overstated by as much; rely on attacks that include it",
        warning="suspect masking",
    )
    return {
        "white_box": _share(white),
        "after_square": _share(after),
        "broken_by_square_only": broken / count,
        "findings": [finding],
    }


def _noise_on(subject: Subject) -> dict[str, Any]:
    """The model with its layers' noise switched on, attacked by the mean gradient of several passes."""
    if not feature_layers(subject.model):
        return {}
    with noisy(subject.model), own_randomness(subject.images.device):
        torch.manual_seed(subject.seed)
        once, twice = (subject.model(subject.images[: subject.batch_size]) for _ in range(2))
        if torch.equal(once, twice):
            return {}
        clean = subject.right_on(subject.images, "clean")
        attack = PGD(norm=subject.norm, eps=subject.eps, steps=20)
        attacked = subject.images.clone()
        for number, part in enumerate(torch.arange(len(clean), device=clean.device).split(subject.batch_size)):
            generator = derive_generator(subject.seed, 0, number, 0, clean.device, stream="evidence noise on")
            loss_fn = mean_gradient(subject.loss_fn(cross_entropy, subject.labels[part]))
            attacked[part] = attack(loss_fn, subject.images[part], generator=generator)
            subject.spent(20 * 10, len(part))
        robust = clean & subject.right_on(attacked, "attacked")
    still = _share(subject.right_on(attacked, "attacked") & subject.right_on(subject.images, "clean"))
    text = (
        f"with the noise on, accuracy is {100 * _share(clean):.1f} % clean and {100 * _share(robust):.1f} % under "
        f"PGD-20 with the mean gradient of several passes; the same images without noise: {100 * still:.1f} %"
    )
    return {"clean": _share(clean), "pgd_eot": _share(robust), "findings": [{"level": "note", "text": text}]}


@torch.no_grad()
def _surface(subject: Subject) -> list[dict[str, Any]]:
    """The margin (positive: misclassified) in the plane of the gradient's and of a random direction, in eps."""
    offsets = torch.linspace(-2, 2, _SLICE_POINTS, device=subject.images.device)
    generator = derive_generator(subject.seed, 0, 0, 0, subject.images.device, stream="evidence surface")
    slices = []
    for index in subject.right_on(subject.images, "clean").nonzero().flatten()[:_SLICES].tolist():
        image, label = subject.images[index : index + 1], subject.labels[index : index + 1]
        gradient = input_gradient(subject.loss_fn(cross_entropy, label), image)
        ahead = _to_edge(gradient, subject.norm, subject.eps)
        aside = _to_edge(random_in_ball(image, subject.norm, subject.eps, generator), subject.norm, subject.eps)
        grid = offsets.view(-1, 1, 1, 1, 1) * ahead + offsets.view(1, -1, 1, 1, 1) * aside
        points = (image + grid).clamp(0, 1).flatten(0, 1)
        values = [margin(subject.model(part), label.expand(len(part))) for part in points.split(subject.batch_size)]
        rows = torch.cat(values).view(_SLICE_POINTS, _SLICE_POINTS)
        axis = offsets.tolist()
        slices.append({"image": index, "gradient": axis, "random": axis, "margin": _rounded(rows)})
    return slices


@torch.no_grad()
def _masks(subject: Subject) -> list[dict[str, Any]]:
    """How the masks of the feature layers are spread over [0, 1], clean and attacked."""
    part = slice(0, subject.batch_size)
    attacked = subject.attacked(PGD(norm=subject.norm, eps=subject.eps, steps=20), "masks")[part]
    clean, after = (_recorded_masks(subject.model, images) for images in (subject.images[part], attacked))
    found = []
    for site, mask in clean.items():
        both = torch.cat([mask.flatten(), after[site].flatten()])
        found.append(
            {
                "site": site,
                "edges": [bin / _BINS for bin in range(_BINS + 1)],
                "clean": _histogram(mask),
                "attacked": _histogram(after[site]),
                "saturated": _share((both < _SATURATED) | (both > 1 - _SATURATED)),
            }
        )
    return found


def _recorded_masks(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with record(model) as tape:
        model(images)
    return {name: tape[name].mask for name in tape if hasattr(tape[name], "mask")}


def _histogram(mask: Tensor) -> list[float]:
    counts = torch.histc(mask.flatten().float().cpu(), bins=_BINS, min=0, max=1)
    return [float(count) for count in counts / counts.sum()]


def _zero_gradients(subject: Subject) -> dict[str, Any]:
    """Images with no gradient at all, and mask elements with next to none."""
    none = []
    for part in torch.arange(len(subject.images), device=subject.images.device).split(subject.batch_size):
        gradient = input_gradient(subject.loss_fn(cross_entropy, subject.labels[part]), subject.images[part])
        none.append((gradient.flatten(1) == 0).all(dim=1))
    share = _share(torch.cat(none))
    found: dict[str, Any] = {"images": share}
    what = f"{100 * share:.1f} % of the images have a gradient of exactly zero"
    findings = [_warn(f"{what}: white-box attacks cannot move them") if share else _fine(what)]
    with torch.no_grad():
        masks = _recorded_masks(subject.model, subject.images[: subject.batch_size])
    if masks:
        values = torch.cat([mask.flatten() for mask in masks.values()])
        found["mask_elements"] = flat = _share(values * (1 - values) < _FLAT)
        text = f"{100 * flat:.1f} % of the mask's elements are within {_FLAT:g} of 0 or 1 and pass next to no gradient"
        findings.append({"level": "note", "text": f"{text}; 'adaptive' attacks work around the mask"})
    return {**found, "findings": findings}


@torch.no_grad()
def _repeatable(subject: Subject) -> dict[str, Any]:
    part = replace(subject, images=subject.images[: subject.batch_size], labels=subject.labels[: subject.batch_size])
    logits = torch.equal(part.model(part.images), part.model(part.images))
    attack = PGD(norm=subject.norm, eps=subject.eps, steps=10)
    attacks = torch.equal(part.attacked(attack, "repeat"), part.attacked(attack, "repeat"))
    same = logits and attacks
    text = "logits and attacked images are the same when computed twice"
    finding = _fine(text) if same else _warn(f"not repeatable: it is not so that {text}")
    return {"logits": logits, "attack": attacks, "findings": [finding]}


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / flags.numel()


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in values]


def _fine(text: str) -> dict[str, str]:
    return {"level": "ok", "text": text}


def _warn(text: str) -> dict[str, str]:
    return {"level": "warning", "text": text}


@dataclass(frozen=True)
class Subject:
    """What the evidence is about.

    Attributes:
        model: in pixel space, in eval mode.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        norm: "linf" or "l2".
        eps: radius, in pixels of [0, 1].
        seed: of everything random.
        batch_size: images per pass.
        spent: is told after each attack on a batch how many gradients it took, and of how many images.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    norm: str
    eps: float
    seed: int
    batch_size: int
    spent: Callable[[float, int], None] = lambda _, __: None

    def robust_to(self, attack: Attack, name: str, loss: ImageLoss = cross_entropy) -> Tensor:
        """(N,) bool: is the image right clean and under the attack? Images that are wrong already are not attacked."""
        right = self.right_on(self.images, name)
        attacked = self.attacked(attack, name, loss, right)
        return right & self.right_on(attacked, name)

    def attacked(
        self,
        attack: Attack,
        name: str,
        loss: ImageLoss = cross_entropy,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The images, those `chosen` (N,) of them attacked."""
        result = self.images.clone()
        indices = torch.arange(len(self.images), device=self.images.device)
        indices = indices if chosen is None else indices[chosen]
        gradients = getattr(attack, "steps", 1) * getattr(attack, "restarts", 1)
        for number, part in enumerate(indices.split(self.batch_size) if len(indices) else ()):
            generator = derive_generator(self.seed, 0, number, 0, self.images.device, stream=f"evidence {name}")
            labels = self.labels[part]
            result[part] = attack(self.loss_fn(loss, labels), self.images[part], generator=generator)
            check_attacked(result[part], name)
            self.spent(gradients, len(part))
        return result

    def loss_fn(self, loss: ImageLoss, labels: Tensor) -> LossFunction:
        """What an attack maximises on the images with these labels."""
        return judged_loss(self.model, loss, labels)

    def right_on(self, images: Tensor, kind: str) -> Tensor:
        """(N,) bool: is the image classified correctly?"""
        return torch.cat([predict(self.model, part, kind) for part in images.split(self.batch_size)]) == self.labels
