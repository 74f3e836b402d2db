"""The tape: what the sites of feature layers do and say in a forward pass, recorded on the side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from timm_fsr.faults import UnsoundError
from timm_fsr.layers import FeatureLayer
from timm_fsr.layers.base import Aux
from timm_fsr.layout import Layout, Size


@dataclass(eq=False)
class Site:
    """One feature layer at one module: converts the layout once each way and writes to the group's tape.

    A plain object kept in the hooked module's `__dict__`, so that copies of the model own copies of it, while its
    layer is registered once, at the model's root.
    """

    name: str
    path: str
    layout: Layout
    layer: FeatureLayer
    group: LayerGroup
    labels: Tensor | None = None  # of the last pass, for its recomputation

    def __call__(self, output: Tensor) -> Tensor:
        """Replace the hooked module's `output`, in its own layout, by the feature layer's."""
        tape = self.group.tape
        recomputing = _in_backward()
        if not recomputing:
            self.labels = None if tape is None else tape.labels
        # A recomputation (gradient checkpointing) must do what its pass did, though the tape is gone by then.
        wanted = self.layer.wants_aux if recomputing else tape is not None
        self.layer.wants_aux = self.layer.training or wanted
        if self.group.surrogate == "bypass":
            return output
        feature = self.layout.to_nchw(output, self.group.image_size)
        new, aux = self.layer(feature, self.labels)
        if self.group.surrogate == "identity":  # its value, and the gradient of doing nothing
            new = feature + (new - feature).detach()
        if tape is not None and not recomputing:
            tape.write(self, aux)
        return self.layout.from_nchw(new, output)


class LayerGroup(nn.ModuleDict):
    """The layers of one `attach`, registered at the model's root under the layer's name.

    Attributes:
        sites: where each layer sits.
        stem: path of the module that first sees the image.
        tape: who is recording, if anybody.
        image_size: (height, width) of the current input, kept only for models with token sequences.
        base_architecture: what the model was called before.
        surrogate: "bypass" or "identity" while an attack works around the layers; see `timm_fsr.surrogates`.
    """

    sites: list[Site]
    stem: str
    tape: Tape | None = None
    image_size: Size | None = None
    base_architecture: str | None = None
    surrogate: str | None = None

    def reset_classifier(self, num_classes: int) -> None:
        """Give every layer's auxiliary classifier `num_classes` classes."""
        for site in self.sites:
            site.layer.reset_classifier(num_classes)

    def __prepare_scriptable__(self) -> None:
        """Called by `torch.jit.script`, which would fail on the hooks with an error that names no remedy."""
        raise ValueError("feature layers use forward hooks, which torch.jit.script does not support; use torch.export")


class Tape(Mapping[str, SimpleNamespace]):
    """What the sites had to say during the last forward pass inside `record`.

    A mapping from the site's name ("layer4") to its auxiliary tensors as attributes (`.mask`, (N, C, H, W)). Where
    two kinds of layer share a place, the name is qualified ("fsr.layer4").
    """

    def __init__(self, groups: list[LayerGroup], labels: Tensor | None) -> None:
        self.labels = labels
        self._sites = [site for group in groups for site in group.sites]
        self._aux: dict[str, tuple[Site, Aux]] = {}

    def write(self, site: Site, aux: Aux) -> None:
        """Keep what `site` says; a later forward pass replaces it."""
        self._aux[f"{site.layer.name}.{site.name}"] = (site, aux)

    def losses(self, logits: Tensor, labels: Tensor | None = None, *, rows: slice | None = None) -> dict[str, Tensor]:
        """Auxiliary loss terms, each averaged over the sites of its layer: {"fsr.separation": scalar, ...}.

        Args:
            logits: (N, classes), the model's output of the recorded pass.
            labels: (N,) true classes; those given to `record` when left out. Empty result without feature layers.
            rows: the part of the recorded batch that `logits` and `labels` are of, where it is not the whole.

        Raises:
            ValueError: no labels, or auxiliary heads of another width than the logits.
            UnsoundError: a site did not fire, or its layer would learn nothing from these losses.
        """
        labels = self.labels if labels is None else labels
        if labels is None:
            raise ValueError("auxiliary losses need labels; give them to record(model, labels) or to losses()")
        terms: dict[str, list[Tensor]] = {}
        for site, recorded in self.recorded():
            aux = recorded if rows is None else {name: value[rows] for name, value in recorded.items()}
            losses = site.layer.aux_losses(aux, logits.float(), labels)
            if logits.requires_grad:
                _check_gradients(site, losses)
            for name, value in losses.items():
                terms.setdefault(f"{site.layer.name}.{name}", []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def recorded(self) -> list[tuple[Site, Aux]]:
        """Each site with its auxiliary tensors; UnsoundError as from `check_fired`."""
        self.check_fired()
        return list(self._aux.values())

    def check_fired(self) -> None:
        """Raise UnsoundError, naming the remedy, when a site has not been heard since the tape began."""
        silent = [s for s in self._sites if f"{s.layer.name}.{s.name}" not in self._aux]
        if silent:
            raise UnsoundError(
                f"the {silent[0].layer.name} site at {silent[0].path!r} did not fire; run a forward pass inside "
                "record(), and if a conversion (such as SyncBatchNorm's) replaced the module, call "
                "timm_fsr.reattach(model) after it"
            )

    def __getitem__(self, name: str) -> SimpleNamespace:
        matches = [aux for key, (site, aux) in self._aux.items() if name in (key, site.name)]
        if len(matches) != 1:
            reason = "is ambiguous" if matches else "has recorded nothing"
            raise KeyError(f"site {name!r} {reason}; recorded: {', '.join(self._aux) or 'none'}")
        return SimpleNamespace(**matches[0])

    def __iter__(self) -> Iterator[str]:
        names = [site.name for site, _ in self._aux.values()]
        return iter(names if len(set(names)) == len(names) else list(self._aux))

    def __len__(self) -> int:
        return len(self._aux)


@contextmanager
def record(model: nn.Module, labels: Tensor | None = None) -> Iterator[Tape]:
    """Record what the sites say during forward passes, in training or eval mode.

    Under DDP leave `find_unused_parameters` False: it would take what only the tape holds for unused.

    Args:
        model: any module that contains a model with feature layers (compiled, DDP-wrapped, ...) or none.
        labels: (N,) true classes, for layers that use them and as the default of `Tape.losses`.

    Yields:
        The tape; of several forward passes it holds the last.
    """
    groups = layer_groups(model)
    tape = Tape(groups, labels)
    with ExitStack() as undo:
        for group in groups:
            undo.callback(setattr, group, "tape", group.tape)
            group.tape = tape
        yield tape


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """The groups of feature layers anywhere inside `model`, in the order they were attached."""
    return [module for module in model.modules() if isinstance(module, LayerGroup)]


def _check_gradients(site: Site, losses: dict[str, Tensor]) -> None:
    """Refuse losses from which a layer that is being trained would silently learn nothing."""
    trains = any(parameter.requires_grad for parameter in site.layer.parameters())
    if trains and losses and not any(loss.requires_grad for loss in losses.values()):
        raise UnsoundError(
            f"the auxiliary outputs of the {site.layer.name} site at {site.path!r} were recorded without gradients, "
            "as reentrant gradient checkpointing does; call timm.layers.set_reentrant_ckpt(False) and run it again"
        )


def _in_backward() -> bool:
    """Whether this forward pass is a recomputation inside a backward pass, as gradient checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
