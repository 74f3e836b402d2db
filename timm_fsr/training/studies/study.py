"""A study: named trials in one folder, done one after the other, shared by several shells, and gone on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console

from timm_fsr.training.lock import FolderInUseError, locked
from timm_fsr.training.output import is_concluded
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.state import fixed_keys
from timm_fsr.training.step import InterruptedRunError

TRAINING, EVALUATION = "training", "evaluation"
"""Folders of a trial: its training run, and what it was judged by afterwards."""

UNFINISHED = 75  # what sysexits.h calls a temporary failure: to be tried again


class Trial(Protocol):
    """One training of a study."""

    @property
    def name(self) -> str:
        """Of its folder in the study."""

    @property
    def title(self) -> str:
        """What is printed when it begins."""


AnyTrial = TypeVar("AnyTrial", bound=Trial)
Result = TypeVar("Result")


class StopNowError(BaseException):
    """A signal that ends a study came outside of a training; no `except Exception` is to swallow it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class StudyUnfinishedError(InterruptedRunError):
    """Something of a study is left to do; the message says how to go on.

    Attributes:
        status: for the shell: 75 if the time was up or other shells have the rest, 143 after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, message: str, status: int = UNFINISHED) -> None:
        super().__init__(message)
        self._status = status

    @property
    def status(self) -> int:
        """See the class."""
        return self._status


@dataclass(frozen=True, eq=False, kw_only=True)
class Study(Generic[AnyTrial, Result]):
    """Trials, and what is to be done with each.

    Attributes:
        folder: of the study; each trial has a folder in it.
        trials: in their order.
        work: trains and judges a trial as far as that is left to do, and returns its result.
        after: called after each trial with all results so far.
    """

    folder: Path
    trials: Sequence[AnyTrial]
    work: Callable[[AnyTrial], Result]
    after: Callable[[dict[AnyTrial, Result]], None]

    def run(self) -> dict[AnyTrial, Result]:
        """Do every trial that no other shell or machine is at, by the lock in its folder.

        Trials of others are looked at again when all the rest is done, by which time they may be finished or given up.

        Returns:
            The results, in the order of the trials.

        Raises:
            StudyUnfinishedError: all that is left belongs to other shells.
        """
        os.environ.setdefault("TRACKIO_DIR", str(self.folder.resolve() / "trackers" / "trackio"))  # one for all trials
        found: dict[AnyTrial, Result] = {}
        left = list(self.trials)
        while left:
            taken: dict[AnyTrial, FolderInUseError] = {}
            for trial in left:
                try:
                    with locked(self.folder / trial.name):
                        say(f"== {trial.title}")
                        found[trial] = self.work(trial)
                except FolderInUseError as error:
                    taken[trial] = error
                else:
                    self.after(found)
            if len(taken) == len(left):
                raise StudyUnfinishedError(_elsewhere(taken))
            left = list(taken)
        return {trial: found[trial] for trial in self.trials}


def say(text: str) -> None:
    """Print a line as it is, however long."""
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(text)


def _elsewhere(taken: dict[Any, FolderInUseError]) -> str:
    first = next(iter(taken.values()))
    names = ", ".join(trial.name for trial in taken)
    return (
        f"the rest is being done by others: {names} ({first.holder}); the same command shows all results when they are "
        f"done. If that process is gone for certain, delete {first.path}"
    )


def is_trained(recipe: Recipe) -> bool:
    """Whether the recipe's folder holds its finished training, the report of its own attacks included.

    Raises:
        ValueError: what is finished there was trained by another recipe.
    """
    kept = recipe.folder / "recipe.yaml"
    if not kept.exists() or not (recipe.folder / "best" / "config.json").exists():
        return False
    before, now = fixed_keys(Recipe.load(kept)), fixed_keys(recipe)
    changed = [f"{key} ({before.get(key)} -> {now.get(key)})" for key in now if before.get(key) != now.get(key)]
    if changed:
        raise ValueError(
            f"{recipe.folder} holds a training by another recipe: {', '.join(changed)}; take another --output"
        )
    return is_concluded(recipe.folder, epochs=recipe.optim.epochs, evaluated=bool(recipe.evaluation.attacks))


@contextmanager
def stoppable(minutes: float | None, again: str) -> Iterator[None]:
    """End what runs in it when the minutes are over, or SIGTERM or Ctrl-C came: a training saves first.

    Args:
        minutes: None sets no limit.
        again: the command that goes on.

    Raises:
        StudyUnfinishedError: it ended early.
    """
    time_up = False

    def end(number: int, _frame: FrameType | None) -> None:
        raise StopNowError(number)

    def end_in_time(*_: Any) -> None:
        nonlocal time_up
        time_up = True
        signal.raise_signal(signal.SIGTERM)  # which a training takes for the wish to save and stop

    handlers: dict[int, Any] = {signal.SIGTERM: end}
    if hasattr(signal, "SIGALRM"):  # not on Windows, where check_minutes refuses a limit
        handlers[signal.SIGALRM] = end_in_time
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if minutes:
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except StudyUnfinishedError:
        raise
    except (StopNowError, InterruptedRunError, KeyboardInterrupt) as stop:
        number = getattr(stop, "number", signal.SIGINT)
        why = "the time is up" if time_up else f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}"
        raise StudyUnfinishedError(
            f"{why}; what was done is saved, go on with: {again}", UNFINISHED if time_up else 128 + number
        ) from None
    finally:
        if minutes:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def check_minutes(minutes: float | None) -> None:
    """Refuse a time limit that cannot be kept.

    Raises:
        ValueError: there is no time in it, or this system has no alarm signals.
    """
    if minutes is None:
        return
    if minutes <= 0:
        raise ValueError(f"--minutes={minutes} leaves no time; give more than 0, or leave it out")
    if not hasattr(signal, "SIGALRM"):
        raise ValueError(
            "--minutes needs alarm signals, which this system lacks; stop the run yourself, it goes on anyway"
        )
