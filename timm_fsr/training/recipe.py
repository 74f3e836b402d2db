"""A recipe: one training run as data, read from YAML and the command line, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from typing_extensions import TYPE_CHECKING  # noqa: UP035  (what stands under typing's own jsonargparse would run)

from timm_fsr.training.options import (
    AttackOptions,
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimOptions,
)
from timm_fsr.training.parsing import options_parser, read_options, read_values, write_options
from timm_fsr.utils.errors import unknown
from timm_fsr.utils.registry import import_extension, is_file_name, split_imports

if TYPE_CHECKING:  # as in options.py: a recipe is read without torch
    from timm_fsr.training.objectives.base import Objective

__all__ = [
    "AttackOptions",
    "CheckpointOptions",
    "DataOptions",
    "EvaluationOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimOptions",
    "Recipe",
    "parse_arguments",
    "recipe_parser",
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run as data.

    Attributes:
        output: folder of the results: `best/` and `last/` (models), `checkpoints/` (to resume from),
            `metrics.jsonl`, `recipe.yaml`, `report.json`, `training.png`, and `trackers/` if there are any.
        imports: Python files or modules that register layers, objectives or attacks of your own; they are imported
            before anything else. `--import FILE_OR_MODULE` adds one.
        overwrite: replace a run that `output` holds already; else that is an error.
        resume: go on with the run that `output` holds, from its newest checkpoint; start from the beginning if there is
            none.
        seed: decides weights, order, augmentation, attacks and noise.
        mixed_precision: "no" (float32; its convolutions use TF32 on GPUs that have it, torch's default), "bf16" or
            "fp16", by Accelerate. Validation and evaluation are always in float32 without TF32.
        channels_last: memory format of images and convolutions, usually faster; random numbers are drawn in memory
            order, so that the results differ as those of two seeds do.
        compile: torch.compile backend of the model, such as "inductor"; null runs it as it is.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them, as timm does.
        batch_norm: what processes do with their own BatchNorm running statistics after each step: "average" them,
            take those of the "first" process, or "sync" the statistics within each training pass (GPUs only).
        trackers: where metrics go besides `metrics.jsonl`: "tensorboard", "trackio", "wandb", by Accelerate.
        model: see `ModelOptions`.
        data: see `DataOptions`.
        attack: see `AttackOptions`.
        objective: see `ObjectiveOptions`.
        optim: see `OptimOptions`.
        evaluation: see `EvaluationOptions`.
        checkpoint: see `CheckpointOptions`.
    """

    output: str = "runs/latest"
    imports: list[str] = field(default_factory=list)
    overwrite: bool = False
    resume: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = True
    compile: str | None = None
    gradient_checkpointing: bool = False
    batch_norm: Literal["average", "first", "sync"] = "average"
    trackers: list[str] = field(default_factory=list)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    attack: AttackOptions = field(default_factory=AttackOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    @property
    def folder(self) -> Path:
        """`output` as a path."""
        return Path(self.output)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML recipe, then apply overrides such as "--optim.epochs=5".

        Raises:
            FileNotFoundError: no such file.
            ValueError: no YAML, an unknown key (the message names the nearest), or a value of another type.
        """
        config = [] if path is None else [f"--config={path}"]
        return parse_arguments([*config, *overrides])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from keys and values as YAML would hold them; what is left out has its default.

        Raises:
            ValueError: an unknown key (the message names the nearest), or a value of another type.
        """
        return read_values(cls, values, recipe_parser())

    def __str__(self) -> str:
        from timm_fsr.reports.report import format_eps

        model = self.model.name + (f" with {self.model.layer}" if self.model.layer else "")
        attack = f"{self.attack.name} ({self.attack.norm} {format_eps(self.attack.eps, self.attack.norm)})"
        return (
            f"{model} on {self.data.source} by {self.objective.name} against {attack}, {self.optim.epochs} epochs, "
            f"seed {self.seed}, in {self.output}"
        )

    def check(self) -> None:
        """Raise ValueError for anything that cannot work, in a second, before data is read or weights are made."""
        from timm_fsr.evaluation.registry import check_names

        for source in self.imports:
            self._import(source)
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is more than 64 bits hold; give a number from 0 to 2**64 - 1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other; leave one of them out")
        for options in (self.data, self.attack, self.optim, self.evaluation, self.checkpoint):
            options.check()
        objective = self.objective.build()
        objective.check_attack(self.attack.build())
        self._check_passes(twice=bool(getattr(objective, "grad_align", 0.0)))
        names = [*self.evaluation.attacks, self.evaluation.validation]
        check_names(names, self.attack.norm, self.attack.eps, sources=False)
        self._check_beginning(objective)
        channels = self.model.args.get("in_chans", self.data.channels)
        if self.data.channels is not None and channels != self.data.channels:
            raise ValueError(
                f"model.args.in_chans={channels} and data.channels={self.data.channels} contradict each other; leave "
                "out model.args.in_chans, as data.channels decides"
            )
        self.model.check()
        self._check_mixing(objective)

    def _import(self, source: str) -> None:
        try:
            import_extension(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the recipe imports {source}, which is not there; give its new place with --imports=[PATH]"
            ) from error

    def _check_beginning(self, objective: Objective) -> None:
        """Refuse a model that the objective cannot begin with."""
        if objective.layer is not None and self.model.layer != objective.layer:
            raise ValueError(
                f"objective.name={self.objective.name} needs the feature layer {objective.layer!r}, but model.layer is "
                f"{self.model.layer}; set model.layer={objective.layer}, or take another objective"
            )
        if self.optim.freeze and not self.model.is_trained:
            raise ValueError(
                f"optim.freeze={self.optim.freeze} keeps a trained backbone as it is, but {self.model.name} begins "
                "with random weights; give the folder or Hub name of a trained model as model.name, set "
                "model.pretrained, or leave out optim.freeze"
            )
        if objective.fine_tunes and not self.model.is_trained:
            raise ValueError(
                f"objective.name={self.objective.name} fine-tunes a trained model, but {self.model.name} begins with "
                "random weights; give the folder or Hub name of a trained model as model.name, or set model.pretrained"
            )

    def _check_mixing(self, objective: Objective) -> None:
        """Refuse mixed labels where the objective or the feature layer has no formula for them, and odd batches."""
        from timm_fsr.layers import layer_class
        from timm_fsr.training.objectives.base import check_soft_labels

        if not self.data.mixes:
            return
        layers = [] if self.model.layer is None else [layer_class(self.model.layer)]
        check_soft_labels(objective, layers, because="data.mixup and data.cutmix")
        if self.optim.batch_size % 2:
            raise ValueError(
                f"optim.batch_size={self.optim.batch_size} is odd, but mixup and CutMix mix images in pairs; make it "
                "even, or leave out data.mixup and data.cutmix"
            )

    def _check_passes(self, *, twice: bool) -> None:
        """Refuse what cannot run the model as asked; `twice`: the loss is differentiated twice."""
        if self.compile is not None:
            import torch

            known = torch.compiler.list_backends(exclude_tags=())
            if self.compile not in known:
                raise ValueError(unknown("torch.compile backend", self.compile, known))
        for key in ("compile", "gradient_checkpointing"):
            if twice and getattr(self, key):
                raise ValueError(
                    f"GradAlign differentiates twice, which does not work with {key}; leave one of them out"
                )

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `load` reads."""
        return write_options(self)


def recipe_parser() -> ArgumentParser:
    """The parser behind `timm-fsr train`: --config, and one flag per recipe key."""
    return options_parser(Recipe, prog="timm-fsr train", description="Train a model by a recipe.")


def parse_arguments(arguments: Sequence[str]) -> Recipe:
    """A recipe from command-line arguments; the errors are those of `Recipe.load`."""
    imports, others = split_imports(arguments)
    # Last, as a --config after them would replace what they add to; absolute, as a resumed run may start elsewhere.
    added = [f"--imports+={Path(name).expanduser().resolve() if is_file_name(name) else name}" for name in imports]
    recipe = read_options(Recipe, [*others, *added], recipe_parser())
    return replace(recipe, imports=list(dict.fromkeys(recipe.imports)))
