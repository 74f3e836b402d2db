"""The comparison of feature layers: each is trained and attacked at an equal budget, in one table and one plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from timm_fsr.data.dataset import ImageData
from timm_fsr.evaluation.benchmark import assess
from timm_fsr.evaluation.registry import check_names, expand_names
from timm_fsr.layers import layer_class, list_layers
from timm_fsr.reports.report import Report
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies.entries import OWN, PLAIN, Entry, entries
from timm_fsr.training.studies.study import EVALUATION, Study, is_trained, say
from timm_fsr.training.studies.tables import render
from timm_fsr.training.trainer import train

NOT_TRAINED_FROM_SCRATCH = ("afd",)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods, each trained and attacked with everything else equal.

    Attributes:
        base: what they have in common.
        output: folder of the results.
        methods: "none" (the plain network) and feature layers, perhaps with arguments ("fsr:tau=1.0,noise=false") and
            with an objective in front ("trades/fsr").
        places: "own" puts each layer where its paper does, "same" all of them behind the last stage.
        seeds: each method is trained with each.
        images: balanced test images that are attacked.
        attacks: by which every model is judged.
        against: methods that each model is set against.
        part: this shell's share of the models, as (1, 2) for the first half.
        device: to attack on.
    """

    base: Recipe
    output: Path
    methods: Sequence[str]
    places: Sequence[str] = (OWN,)
    seeds: Sequence[int] = (0, 1)
    images: int = 1000
    attacks: Sequence[str] = ("pgd20", "standard", "adaptive")
    against: Sequence[str] = (PLAIN,)
    part: tuple[int, int] = (1, 1)
    device: str = "cpu"

    def check(self) -> list[Entry]:
        """The models that are asked for, in the order of the tables.

        Raises:
            ValueError: one of them, or what is to be done with them, cannot work.
        """
        share, shares = self.part
        if not 1 <= share <= shares:
            raise ValueError(
                f"--part={share}/{shares} is no share of the work; write 1/2 in one shell and 2/2 in another"
            )
        if self.images < 1:
            raise ValueError(f"--images={self.images} leaves nothing to attack; give 1 or more")
        if self.base.data.streamed:
            raise ValueError("a comparison needs its test images in memory; leave out data.streamed")
        _check_methods(self.methods)
        for method in self.against:
            if method not in {part for one in self.methods for part in (one, one.rpartition("/")[2])} | {PLAIN}:
                raise ValueError(f"--against {method} is none of --methods ({' '.join(self.methods)}); add it there")
        check_names(self.attacks, self.base.attack.norm, self.base.attack.eps, sources=False)
        wanted = list(dict.fromkeys(entries(self.methods, self.places, self.seeds)))
        for entry in wanted:
            recipe = entry.recipe(self.base, self.output)
            recipe.check()
            is_trained(recipe)
        return wanted

    def run(self) -> dict[Entry, Report]:
        """Train and attack what is not yet finished, draw all that is after each model, and return this part's reports.

        Raises:
            ValueError: something in the recipe cannot work with a method; raised before any is trained.
            InterruptedRunError: a training was told to stop, and is saved.
            StudyUnfinishedError: other shells have the rest.
        """
        wanted, (share, shares) = self.check(), self.part
        return Study(
            folder=self.output,
            trials=wanted[share - 1 :: shares],
            work=self._judge,
            after=lambda found: self._draw(wanted, found),
        ).run()

    def test_images(self, model: Any) -> ImageData:
        """The balanced test images that every model is attacked on."""
        classes = model.pretrained_cfg["label_names"]
        test = dataclasses.replace(self.base.data, limit_test=self.images).build_test(classes, progress=False)
        assert isinstance(test, ImageData)  # see check
        return test

    def _judge(self, entry: Entry) -> Report:
        """Train the entry's model unless that is done, attack it unless that is done, and return the report."""
        recipe = entry.recipe(self.base, self.output)
        report = recipe.folder / "report.json"
        if not is_trained(recipe):
            train(recipe)
        model: Any = timm.create_model(f"local-dir:{recipe.folder / 'best'}", pretrained=True)
        method = entry.method.replace("/", " with ")  # a slash would make a path of it
        return assess(
            model.to(self.device),
            self.test_images(model),
            self.output / entry.name / EVALUATION,
            norm=self.base.attack.norm,
            eps=self.base.attack.eps,
            attacks=self.attacks,
            seed=entry.seed,
            name=f"{self.base.model.name}, {method} ({entry.place} place), seed {entry.seed}",
            trained=Report.load(report) if report.exists() else None,
            announce=say,
        )

    def _draw(self, wanted: Sequence[Entry], found: Mapping[Entry, Report]) -> None:
        """The tables and the plot of what is finished, here or in other shells."""
        everything = {**self._others(wanted, found), **found}
        order = sorted(everything, key=lambda one: (self.methods.index(one.method), one.place, one.seed))
        render({one: everything[one] for one in order}, self.output, self.against)

    def _others(self, wanted: Sequence[Entry], found: Mapping[Entry, Report]) -> dict[Entry, Report]:
        """What other shells have finished: all attacks asked for, on the same images and in the same ball."""
        images = {report.conditions.get("data_fingerprint") for report in found.values()}
        asked = (self.images, self.base.attack.norm, self.base.attack.eps)
        result = {}
        for entry in wanted:
            path = self.output / entry.name / EVALUATION / "report.json"
            if entry in found or not path.exists():
                continue
            report = Report.load(path)
            same = {report.conditions.get("data_fingerprint")} == images and asked == (
                report.count,
                report.norm,
                report.eps,
            )
            if same and set(expand_names(self.attacks)) <= set(report.correct):
                result[entry] = report
        return result


def all_methods() -> list[str]:
    """The plain network and every feature layer that is trained from scratch."""
    return [PLAIN, *(name for name in list_layers() if name not in NOT_TRAINED_FROM_SCRATCH)]


def _check_methods(methods: Sequence[str]) -> None:
    for method in methods:
        entry = Entry(method, OWN, 0)
        for name in (entry.layer, entry.objective):
            if name in NOT_TRAINED_FROM_SCRATCH:
                raise ValueError(
                    f"{name} fine-tunes a trained model; train it by --objective.name={name} and evaluate it"
                )
        if entry.layer is not None:
            layer_class(entry.layer)
