"""A search for the best values of a recipe's keys by Optuna, whose storage lies in the output folder."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from timm_fsr.training.parsing import Number, parse_number
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import fixed_keys
from timm_fsr.training.studies.runs import ROBUST
from timm_fsr.utils.files import write_text

STORAGE, DEFINITION, CHOSEN = "optuna.log", "sweep.json", "trial.json"
_STARTUP = 5  # trials that are trained to their end before others are pruned
_DECADE = 10  # a range over this factor is searched by its logarithm


class PrunedError(Exception):
    """A trial is worse than the median of the others at the same epoch."""


@dataclass(frozen=True)
class Space:
    """Where to look for the value of a key.

    Attributes:
        kind: "float", "int" or "choice".
        low: of a range.
        high: of a range; included.
        log: whether each factor is as likely as another, not each difference.
        choices: as a flag has them; () for a range.
    """

    kind: Literal["float", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The values to check: both ends of a range, or all choices."""
        return self.choices or (self.written(self.low), self.written(self.high))

    def written(self, value: Any) -> str:
        """A value as a flag has it."""
        return str(value) if self.kind == "choice" else repr(int(value) if self.kind == "int" else float(value))

    def suggest(self, trial: Any, key: str) -> str:
        """What Optuna's trial tries, as a flag has it."""
        if self.kind == "choice":
            return str(trial.suggest_categorical(key, list(self.choices)))
        if self.kind == "int":
            return self.written(trial.suggest_int(key, int(self.low), int(self.high), log=self.log))
        return self.written(trial.suggest_float(key, self.low, self.high, log=self.log))


def read_space(key: str, text: str, choices: list[str]) -> Space:
    """A range "low..high", perhaps with ":log" or ":linear" behind it, or choices.

    Without either, a range of positive numbers over a decade or more is searched by its logarithm.

    Raises:
        ValueError: it is neither, or no range that the key can have.
    """
    if ".." not in text:
        if len(choices) < 2:
            raise ValueError(
                f"--search {key}={text} leaves no choice; write a range such as 0.01..0.5, or several values"
            )
        return Space("choice", choices=tuple(choices))
    ends, _, scale = text.partition(":")
    low, _, high = ends.partition("..")
    try:
        lowest, highest = parse_number(low), parse_number(high)
    except ValueError as error:
        raise ValueError(f"--search {key}={text}: {error}") from error
    if scale not in ("", "log", "linear"):
        raise ValueError(f"--search {key}={text} ends in {scale!r}; write :log, :linear or neither")
    if lowest >= highest:
        raise ValueError(f"--search {key}={text} is an empty range; write the lower end first")
    if scale == "log" and lowest <= 0:
        raise ValueError(f"--search {key}={text} has no logarithm at its lower end; begin above 0, or write :linear")
    kind = _kind(key, whole=all(end.strip().lstrip("-").isdigit() for end in (low, high)), text=text)
    log = scale == "log" or (scale == "" and lowest > 0 and highest / lowest >= _DECADE)
    return Space(kind, lowest, highest, log)


def _kind(key: str, *, whole: bool, text: str) -> Literal["float", "int"]:
    """Whether a recipe's key is a whole number; one that it leaves open is what the range is written as."""
    hint: Any = Recipe
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    kinds = typing.get_args(hint) or (hint,)
    if any(kind in kinds for kind in (float, *typing.get_args(Number))):
        return "float"
    if int in kinds and not whole:
        raise ValueError(f"--search {key}={text}: this key is a whole number; write a range such as 5..20")
    if any(kind in kinds for kind in (bool, str, list)):
        raise ValueError(f"--search {key}={text}: this key is no number; write its values with commas")
    return "int" if whole else "float"


@dataclass(eq=False)
class Search:
    """Optuna's study of a sweep, shared by all shells that work on it.

    Its journal is a file to which each shell appends under a lock of its own, which works on network folders too, where
    SQLite does not.

    Attributes:
        output: folder of the sweep.
        spaces: where to look, by key.
        base: the recipe whose keys are varied.
    """

    output: Path
    spaces: Mapping[str, Space]
    base: Recipe

    def check(self) -> None:
        """Refuse a search that cannot go on in its folder.

        Raises:
            ModuleNotFoundError: Optuna is not installed.
            ValueError: the folder holds a search by another recipe or in other ranges.
        """
        _optuna()
        path = self.output / DEFINITION
        if path.exists():
            before, now = json.loads(path.read_text(encoding="utf-8")), self._definition()
            both = {**before, **now}
            changed = [
                f"{key} ({before.get(key)} -> {now.get(key)})" for key in both if before.get(key) != now.get(key)
            ]
            if changed:
                raise ValueError(f"{self.output} holds another search: {', '.join(changed)}; take another --output")

    def open(self) -> None:
        """Make the folder, and write down what is searched."""
        write_text(self.output / DEFINITION, json.dumps(self._definition(), indent=1) + "\n")

    def values_of(self, name: str) -> list[str]:
        """The flags of a trial: those that it began with, or new ones."""
        path = self.output / name / CHOSEN
        if not path.exists():
            trial = self._study(seed=hash_of(name, self.base.seed)).ask()
            flags = [f"--{key}={space.suggest(trial, key)}" for key, space in self.spaces.items()]
            write_text(path, json.dumps({"number": trial.number, "flags": flags}) + "\n")
        return [str(flag) for flag in json.loads(path.read_text(encoding="utf-8"))["flags"]]

    def watch(self, name: str, *, last: int) -> Callable[[int, Mapping[str, float]], None]:
        """What `train` calls after each validation: it reports the robust accuracy, and may raise PrunedError.

        Args:
            name: of the trial.
            last: epoch, after which there is nothing to give up.
        """
        study, number = self._study(), self._number(name)

        def report(epoch: int, metrics: Mapping[str, float]) -> None:
            frozen = study.trials[number]
            trial = _optuna().trial.Trial(study, frozen._trial_id)
            if epoch not in frozen.intermediate_values:  # else it is that of before a kill
                trial.report(metrics[ROBUST], epoch)
            if epoch < last and trial.should_prune():
                robust = f"{100 * metrics[ROBUST]:.1f} %"
                raise PrunedError(f"pruned after epoch {epoch}: {robust} robust is less than the median of the others")

        return report

    def tell(self, name: str, state: str, value: float | None) -> None:
        """Give Optuna the result of a trial, unless it knows it already.

        Args:
            name: of the trial.
            state: "finished", "pruned" or "failed".
            value: the best robust accuracy on held-out images.
        """
        study, number, states = self._study(), self._number(name), _optuna().trial.TrialState
        if study.trials[number].state.is_finished():
            return
        if state == "finished" and value is not None:
            study.tell(number, value)
        else:
            study.tell(number, state=states.PRUNED if state == "pruned" else states.FAIL)

    def _definition(self) -> dict[str, Any]:
        spaces = {f"--search {key}": dataclasses.asdict(space) for key, space in self.spaces.items()}
        known = {key: value for key, value in fixed_keys(self.base).items() if key not in self.spaces}
        found: dict[str, Any] = json.loads(json.dumps({**spaces, **known}))
        return found

    def _number(self, name: str) -> int:
        return int(json.loads((self.output / name / CHOSEN).read_text(encoding="utf-8"))["number"])

    def _study(self, seed: int = 0) -> Any:
        optuna = _optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        path = str(self.output / STORAGE)
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))),
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP),
        )


def hash_of(name: str, seed: int) -> int:
    """A seed for a trial's choice: shells that took the same would try the same values."""
    return seed * 100_003 + int("".join(filter(str.isdigit, name)) or 0)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ModuleNotFoundError(
            "--search needs Optuna, which is not installed; run `pip install 'timm-fsr[sweep]'`, or use --grid"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
