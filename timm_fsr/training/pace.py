"""How long the rest of a run takes, and the bars that say so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console

from timm_fsr.evaluation.evaluator import Standing
from timm_fsr.training.recipe import Recipe
from timm_fsr.utils.progress import Bar, Rate, bar, duration


def training_passes(recipe: Recipe) -> float:
    """Forward passes that training on one image costs as much as; a backward pass counts as one more for each input.

    An attack step needs the gradient of the image alone, so that it costs two; the training pass needs that of the
    weights too, and costs three. It sees the adversarial image in AT, it and the clean one in most other methods, and
    the attack of TRADES sees the clean one once more.
    """
    name, attack = recipe.objective.name, recipe.attack.build()
    if name == "natural":
        return 3
    steps = getattr(attack, "steps", 1) * getattr(attack, "restarts", 1)
    return 2 * steps + (3 if name == "at" else 6) + (name == "trades")


def validation_passes(recipe: Recipe) -> float:
    """Forward passes that validation on one image costs as much as: the clean one, the attack, the attacked one."""
    return 2 * recipe.evaluation.validation_steps + 2


@dataclass(kw_only=True)
class Pace:
    """The seconds that are left of a run, by how fast its steps, validations and checkpoints have been lately.

    Attributes:
        steps: of an epoch.
        epochs: of the run.
        validate_every: epochs between validations.
        expected: how many steps a validation takes as long as, until one has been timed.
        validation: seconds of the last validation.
        saving: seconds that the last epoch's end took besides.
    """

    steps: int
    epochs: int
    validate_every: int = 1
    expected: float = 0.0
    validation: float | None = None
    saving: float = 0.0
    _trained: float = 0.0
    _rate: Rate = field(default_factory=Rate)

    def step(self, seconds: float, done: int) -> None:
        """Note that `done` steps of the run are done, the last of which took so long."""
        self._trained += seconds
        self._rate.add(self._trained, done)

    @property
    def seconds_per_step(self) -> float | None:
        """Of the last minute; None before the second step, as the first one has much to make ready."""
        return self._rate.seconds_each

    def epoch_left(self, epoch: int, step: int, *, validated: bool = False) -> float | None:
        """Seconds until the end of an epoch (counted from 0) of which `step` steps are done, checkpoint included."""
        each = self.seconds_per_step
        if each is None:
            return None
        return (self.steps - step) * each + (0.0 if validated else self._validations(epoch, 1)) + self.saving

    def run_left(self, epoch: int, step: int, *, validated: bool = False) -> float | None:
        """Seconds until the end of the last epoch; before its test images are attacked."""
        each, now = self.seconds_per_step, self.epoch_left(epoch, step, validated=validated)
        if each is None or now is None:
            return None
        later = self.epochs - epoch - 1
        return now + later * (self.steps * each + self.saving) + self._validations(epoch + 1, later)

    def share(self, epoch: int, step: int, *, validated: bool = False) -> float:
        """How much of the run is done, in [0, 1]."""
        left, whole = self.run_left(epoch, step, validated=validated), self.run_left(0, 0)
        if left is None or not whole:
            return (epoch * self.steps + step) / (self.epochs * self.steps)
        return max(0.0, 1 - left / whole)

    def _validations(self, first: int, epochs: int) -> float:
        """Seconds of the validations in a number of epochs from the given one on; the last one always has one."""
        last = first + epochs
        count = last // self.validate_every - first // self.validate_every
        if epochs and last == self.epochs and last % self.validate_every:
            count += 1
        each = self.expected * (self.seconds_per_step or 0.0) if self.validation is None else self.validation
        return count * each


class Watch:
    """What a run shows of itself while it trains, validates and saves."""

    def __init__(self, show: Bar, pace: Pace, *, batch_size: int, attack: str) -> None:
        self._show, self.pace, self._batch_size, self._attack = show, pace, batch_size, attack
        self._epoch = self._step = 0
        self._since, self._validated = time.perf_counter(), 0.0

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Epoch number `epoch`, counted from 0, goes on after `step` steps."""
        self._epoch, self._step, self._validated = epoch, step, 0.0
        self._show.begin(self._title(), self.pace.steps, step)
        self._since = time.perf_counter()

    def step(self, step: int, note: Callable[[], str]) -> None:
        """Tell how many steps of the epoch are done; `note` tells of them when it is shown."""
        now = time.perf_counter()
        self.pace.step(now - self._since, self._epoch * self.pace.steps + step)
        self._since, self._step = now, step
        self._update(step, lambda: ", ".join(filter(None, (self._speed(), note()))))

    @contextmanager
    def validation(self, images: int) -> Iterator[Callable[[Standing], None]]:
        """Show a validation on a number of images of this process; yields what to tell of it."""
        self._show.begin(f"{self._title()}: validation ({self._attack})", images)
        self._update(0, "")
        began = time.perf_counter()

        def tell(now: Standing) -> None:
            passed = time.perf_counter() - began
            if now.images:
                self.pace.validation = passed * images / now.images
            self._update(now.images, f"at most {100 * now.bound:.1f} % robust", passed)

        yield tell
        self.pace.validation = self._validated = time.perf_counter() - began

    def end_epoch(self) -> None:
        """The epoch has ended, models and checkpoints included."""
        self.pace.saving = time.perf_counter() - self._since - self._validated

    def remaining(self) -> str:
        """The time that is left after the epoch that is ending, in words; "" if there is none, or it is unknown."""
        if self._epoch + 1 >= self.pace.epochs:
            return ""
        left = self.pace.run_left(self._epoch, self.pace.steps, validated=True)
        return "" if left is None else f"{duration(left)} left"

    def _title(self) -> str:
        return f"epoch {self._epoch + 1}/{self.pace.epochs}"

    def _speed(self) -> str:
        each = self.pace.seconds_per_step
        return f"{self._batch_size / each:,.0f} images/s" if each else ""

    def _update(self, done: int, note: str | Callable[[], str], validated: float = 0.0) -> None:
        """Draw the part and the run, given the seconds that validation has taken in this epoch."""
        place = (self._epoch, self._step)
        left, whole = (
            None if seconds is None else max(0.0, seconds - validated)
            for seconds in (self.pace.epoch_left(*place), self.pace.run_left(*place))
        )
        self._show.update(done, note, left=left, whole=(self.pace.share(*place), whole))


@contextmanager
def watched(console: Console, recipe: Recipe, steps: int, held_out: int) -> Iterator[Watch]:
    """Show how far a run is while the block runs.

    Args:
        console: where; nothing is shown on a quiet one.
        recipe: of the run.
        steps: of an epoch.
        held_out: number of images that it is validated on.
    """
    optim, evaluation = recipe.optim, recipe.evaluation
    in_batches = held_out / optim.batch_size * validation_passes(recipe) / training_passes(recipe)
    pace = Pace(steps=steps, epochs=optim.epochs, validate_every=evaluation.validate_every, expected=in_batches)
    whole = f"all {optim.epochs} epochs" if evaluation.patience is None else f"at most {optim.epochs} epochs"
    with bar(console, "training", None, whole=whole) as show:
        attack = f"{evaluation.validation_attack.upper()}-{evaluation.validation_steps}"
        yield Watch(show, pace, batch_size=optim.batch_size, attack=attack)
