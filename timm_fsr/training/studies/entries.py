"""The models of a comparison: a method, a place, a seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_fsr.layers import layer_class
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies.study import TRAINING
from timm_fsr.utils.documents import read_yaml

PLAIN, OWN, SAME = "none", "own", "same"
SAME_PLACE = (-1,)


@dataclass(frozen=True)
class Entry:
    """One model of the comparison.

    Attributes:
        method: as given on the command line.
        place: "own" or "same"; the plain network has "own".
        seed: of everything random in its training and in its attacks.
    """

    method: str
    place: str
    seed: int

    @property
    def objective(self) -> str | None:
        """Name of the objective, if it is not the configuration's."""
        return self.method.partition(":")[0].rpartition("/")[0] or None

    @property
    def layer(self) -> str | None:
        """Name of the feature layer."""
        name = self.method.partition(":")[0].rpartition("/")[2]
        return None if name == PLAIN else name

    @property
    def layer_args(self) -> dict[str, Any]:
        """Arguments that the method's name gives."""
        pairs = [pair.partition("=") for pair in filter(None, self.method.partition(":")[2].split(","))]
        return {key: read_yaml(value) for key, _, value in pairs}

    def counterpart(self, method: str) -> Entry:
        """The training of another method with the same objective and seed, at its own place."""
        return Entry(f"{self.objective}/{method}" if self.objective and "/" not in method else method, OWN, self.seed)

    @property
    def plain(self) -> Entry:
        """The same training of the plain network."""
        return self.counterpart(PLAIN)

    @property
    def name(self) -> str:
        """Of the folder of its results."""
        return "_".join([re.sub("[:=,/]", "-", self.method), self.place, str(self.seed)])

    @property
    def title(self) -> str:
        """Method, place and seed in words."""
        return f"{self.method}, {self.place} place, seed {self.seed}"

    def recipe(self, base: Recipe, output: Path) -> Recipe:
        """The configuration with this method's layer, place and seed."""
        model = dataclasses.replace(base.model, layer=self.layer, at=None)
        if self.layer is not None:
            args = {
                **base.model.layer_args,
                self.layer: {**base.model.layer_args.get(self.layer, {}), **self.layer_args},
            }
            model = dataclasses.replace(model, layer_args=args)
        if self.place == SAME:
            model = dataclasses.replace(model, at=list(SAME_PLACE))
        if self.objective is not None:
            base = dataclasses.replace(base, objective=dataclasses.replace(base.objective, name=self.objective))
        folder = str(output / self.name / TRAINING)
        return dataclasses.replace(base, model=model, seed=self.seed, output=folder, resume=True, overwrite=False)


def entries(methods: Sequence[str], places: Sequence[str], seeds: Sequence[int]) -> Iterator[Entry]:
    """The models to be compared; a layer whose own place is the common one is trained once."""
    for seed in seeds:
        for method in methods:
            for place in places:
                entry = Entry(method, place, seed)
                if entry.layer is None or layer_class(entry.layer).default_at == SAME_PLACE:
                    entry = Entry(method, OWN, seed)
                yield entry
