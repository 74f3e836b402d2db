"""A sweep: the same recipe with other values, every combination of a grid or the choices of a search."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_fsr.training.metrics import read_metrics
from timm_fsr.training.output import FAILURES, how_it_ended, note_end
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.studies.runs import ROBUST, best_of, find_runs, show_runs
from timm_fsr.training.studies.search import PrunedError, Search, Space, read_space
from timm_fsr.training.studies.study import TRAINING, Study, is_trained, say
from timm_fsr.training.trainer import train

_THE_STUDYS = ("output", "resume", "overwrite", "imports")
# What the trials are judged by: the easiest value would win.
_JUDGES = ("attack.norm", "attack.eps", "evaluation", "data.source", "data.held_out")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class SweepTrial:
    """One training of a sweep.

    Attributes:
        name: of its folder.
        changes: flags after the base recipe's; () if a search has yet to choose them.
    """

    name: str
    changes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Trainings that differ in some keys of a recipe.

    Attributes:
        flags: of the base recipe, as `Recipe.load` takes them, --config among them.
        output: folder of the results.
        grid: values by key, each combination of which is trained; {} for a search.
        search: where to look for values, by key; {} for a grid.
        trials: of a search.
        prune: whether a search gives up trials that are worse than the median of the others at the same epoch.
    """

    flags: Sequence[str]
    output: Path
    grid: Mapping[str, Sequence[str]]
    search: Mapping[str, Space]
    trials: int = 20
    prune: bool = True

    def check(self) -> list[SweepTrial]:
        """The trials, in their order.

        Raises:
            ValueError: a key or a value cannot work; raised before anything is trained.
            ModuleNotFoundError: a search without Optuna.
        """
        if bool(self.grid) == bool(self.search):
            raise ValueError(
                "give either --grid or --search: search with one seed, then train the best with several by --grid"
            )
        if self.search:
            return self._check_search()
        trials = [
            SweepTrial(_name(self.grid, values), tuple(map(_flag, self.grid, values)))
            for values in itertools.product(*self.grid.values())
        ]
        names = [trial.name for trial in trials]
        for trial in trials:
            if names.count(trial.name) > 1:
                raise ValueError(f"--grid has the combination {trial.name} twice; leave one of them out")
            recipe = self.recipe(trial.name, trial.changes)
            recipe.check()
            is_trained(recipe)
        return trials

    def run(self, width: int) -> None:
        """Train all that no other shell is at, and print and write the table of runs.

        Args:
            width: of the terminal, in characters.

        Raises:
            ValueError, ModuleNotFoundError: see `check`.
            InterruptedRunError: a training was told to stop, and is saved.
            StudyUnfinishedError: other shells have the rest.
        """
        trials = self.check()
        search = self._search() if self.search else None
        if search is not None:
            search.open()
        try:
            Study(
                folder=self.output,
                trials=trials,
                work=lambda trial: self._train(trial, search),
                after=lambda _: None,
            ).run()
        finally:  # also when the time is up
            if any(self.output.glob(f"*/{TRAINING}/metrics.jsonl")):
                runs = find_runs([self.output])
                show_runs(runs, width, csv_file=self.output / "runs.csv", page=self.output / "runs.html")

    def recipe(self, name: str, changes: Sequence[str]) -> Recipe:
        """The recipe of a trial.

        Raises:
            ValueError: one of the changes is none that a recipe can have.
        """
        try:
            recipe = Recipe.load(None, [*self.flags, *changes])
        except ValueError as error:
            raise ValueError(f"{' '.join(changes)}: {error}") from error
        return dataclasses.replace(recipe, output=str(self.output / name / TRAINING), resume=True, overwrite=False)

    def _train(self, trial: SweepTrial, search: Search | None) -> None:
        """Train a trial unless that is done; one that fails or is pruned is done too."""
        changes = trial.changes if search is None else search.values_of(trial.name)
        recipe = self.recipe(trial.name, changes)
        if not how_it_ended(recipe.folder) and not is_trained(recipe):
            say(" ".join(changes))
            watch = None if search is None or not self._prunes else search.watch(trial.name, last=recipe.optim.epochs)
            try:
                train(recipe, on_validation=watch)
            except FAILURES as error:
                say(f"{trial.name} failed: {error}")
            except PrunedError as error:
                note_end(recipe.folder, "pruned", str(error))
                say(f"{trial.name}: {error}")
        if search is not None:
            best = best_of(read_metrics(recipe.folder)).get(ROBUST)
            search.tell(trial.name, how_it_ended(recipe.folder).get("state", "finished"), best)

    @property
    def _prunes(self) -> bool:
        """Trainings of another length are not comparable at the same epoch."""
        return self.prune and "optim.epochs" not in self.search

    def _search(self) -> Search:
        return Search(self.output, self.search, Recipe.load(None, list(self.flags)))

    def _check_search(self) -> list[SweepTrial]:
        if self.trials < 1:
            raise ValueError(f"--trials={self.trials} leaves nothing to train; give 1 or more")
        for key, space in self.search.items():
            if any(f"{key}.".startswith(f"{judge}.") for judge in _JUDGES):
                raise ValueError(
                    f"--search {key} would change what the trials are judged by, so that the easiest value would win; "
                    "use --grid for it"
                )
            for value in space.ends:
                self.recipe("trial", [_flag(key, value)]).check()
        self._search().check()
        digits = max(3, len(str(self.trials - 1)))
        return [SweepTrial(f"trial-{index:0{digits}}") for index in range(self.trials)]


def read_grid(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values by key from "optim.lr=0.05,0.1" and the like; commas inside of brackets belong to a value.

    Raises:
        ValueError: this cannot be read, or is no key to vary.
    """
    return {key: _split(text) for key, text in _pairs(arguments, "--grid", "optim.lr=0.05,0.1").items()}


def read_search(arguments: Sequence[str]) -> dict[str, Space]:
    """Where to look, by key, from "optim.lr=0.01..0.5" (a range) or "attack.steps=3,5,10" (choices) and the like.

    Raises:
        ValueError: this cannot be read, or is no key to vary.
    """
    pairs = _pairs(arguments, "--search", "optim.lr=0.01..0.5")
    return {key: read_space(key, text, _split(text)) for key, text in pairs.items()}


def _pairs(arguments: Sequence[str], flag: str, example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not (key and equals and text):
            raise ValueError(f"{flag} {argument} is no key with values; write {flag} {example}")
        if key.partition(".")[0] in _THE_STUDYS:
            raise ValueError(f"{flag} {key} cannot be varied: each training has its own folder in --output")
        if key in found:
            raise ValueError(f"{flag} has {key} twice; write all its values behind one")
        found[key] = text
    return found


def _split(text: str) -> list[str]:
    """The parts between commas that are not inside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _flag(key: str, value: str) -> str:
    return f"--{key}={value}"


def _name(keys: Mapping[str, object], values: Sequence[str]) -> str:
    """Of a trial's folder: "lr=0.05_seed=0"."""
    last = [key.rpartition(".")[2] for key in keys]
    short = [part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)]
    text = "_".join(f"{key}={value}" for key, value in zip(short, values, strict=True))
    name = re.sub(r"[^\w.+=-]+", "-", text).strip("-")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"--grid makes folders with names of {len(name)} characters; vary fewer keys at once")
    return name
