"""The tape: what feature layers say about a forward pass, recorded on the side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from timm_fsr.hooks.site import LayerGroup, Site
from timm_fsr.layers.base import Aux
from timm_fsr.layers.scope import RECORDINGS, opened
from timm_fsr.utils.errors import UnsoundError


class Tape(Mapping[str, SimpleNamespace]):
    """What the sites had to say during the last forward pass inside `record`.

    A mapping from the site's name ("layer4") to its auxiliary tensors as attributes (`.mask`, (N, C, H, W)). Where
    two kinds of layer share a place, the name is qualified ("fsr.layer4"); where two models inside the recorded module
    do, also by the path of the model ("second.fsr.layer4").
    """

    def __init__(self, model: nn.Module, labels: Tensor | None) -> None:
        self.labels = labels
        named = [
            (path.rpartition(".")[0], site)
            for path, group in model.named_modules()
            if isinstance(group, LayerGroup)
            for site in group.sites
        ]
        short = Counter(_qualified(site) for _, site in named)
        self._names = {
            site: f"{root}.{_qualified(site)}" if root and short[_qualified(site)] > 1 else _qualified(site)
            for root, site in named
        }
        self._aux: dict[Site, Aux] = {}

    def write(self, site: Site, aux: Aux) -> None:
        """Keep what `site` says; a later forward pass replaces it."""
        self._aux[site] = aux

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
        return list(self._aux.items())

    def check_fired(self) -> None:
        """Raise UnsoundError, naming the remedy, when a site has not been heard since the tape began."""
        silent = [site for site in self._names if site not in self._aux]
        if silent:
            raise UnsoundError(
                f"the {silent[0].layer.name} site at {silent[0].path!r} did not fire; run a forward pass inside "
                "record(), and if a conversion (such as SyncBatchNorm's) replaced the module, call "
                "timm_fsr.reattach(model) after it"
            )

    def __getitem__(self, name: str) -> SimpleNamespace:
        matches = [aux for site, aux in self._aux.items() if name in (self._names[site], _qualified(site), site.name)]
        if len(matches) != 1:
            reason = "is ambiguous" if matches else "has recorded nothing"
            heard = ", ".join(self._names[site] for site in self._aux) or "none"
            raise KeyError(f"site {name!r} {reason}; recorded: {heard}")
        return SimpleNamespace(**matches[0])

    def __iter__(self) -> Iterator[str]:
        names = [site.name for site in self._aux]
        return iter(names if len(set(names)) == len(names) else [self._names[site] for site in self._aux])

    def __len__(self) -> int:
        return len(self._aux)


@contextmanager
def record(model: nn.Module, labels: Tensor | None = None) -> Iterator[Tape]:
    """Record what the sites say during forward passes, in training or eval mode.

    It belongs to the thread or task that opened it: passes of others are not on the tape.

    Under DDP leave `find_unused_parameters` False: it would take what only the tape holds for unused.

    Args:
        model: any module that contains a model with feature layers (compiled, DDP-wrapped, ...) or none.
        labels: (N,) true classes, for layers that use them and as the default of `Tape.losses`.

    Yields:
        The tape; of several forward passes it holds the last.
    """
    with opened(RECORDINGS, model.modules(), Tape(model, labels)) as scope:
        yield scope.value


def _qualified(site: Site) -> str:
    return f"{site.layer.name}.{site.name}"


def _check_gradients(site: Site, losses: dict[str, Tensor]) -> None:
    """Refuse losses from which a layer that is being trained would silently learn nothing."""
    trains = any(parameter.requires_grad for parameter in site.layer.parameters())
    if trains and losses and not any(loss.requires_grad for loss in losses.values()):
        raise UnsoundError(
            f"the auxiliary outputs of the {site.layer.name} site at {site.path!r} were recorded without gradients, "
            "as reentrant gradient checkpointing does; call timm.layers.set_reentrant_ckpt(False) and run it again"
        )
