"""Labels in the order of a model's outputs: the classes of data are matched to those of a model by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_fsr.data.dataset import ImageData, Images
from timm_fsr.data.streaming import StreamedData
from timm_fsr.evaluation.inference import Batches
from timm_fsr.models.description import class_names, input_size, own_crop, size_text
from timm_fsr.models.pixel import base_model

KindOfImages = TypeVar("KindOfImages", bound=Images)

_SHOWN = 5
_REMEDY = "if that is wrong, say with `classes` what the classes are"


@dataclass(frozen=True, eq=False)
class Match:
    """How the labels of data are read for a model.

    Attributes:
        positions: for each class of the data, in their order, the model's output that stands for it; None where the
            model has none, and no image is of it. None in place of the list: labels are taken as they are.
        classes: the names of the model's outputs, as far as the model or the data know them.
        notes: what a reader has to know about it, as sentences.
    """

    positions: Sequence[int | None] | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def apply(self, labels: Tensor) -> Tensor:
        """Int64 labels (N,) of the data as positions among the model's outputs."""
        if self.positions is None:
            return labels
        table = torch.tensor([-1 if place is None else place for place in self.positions], device=labels.device)
        return table[labels]


def match_classes(
    model: nn.Module, data: KindOfImages, classes: Sequence[str] | None = None
) -> tuple[KindOfImages, tuple[str, ...]]:
    """The data with its labels in the order of the model's outputs.

    Args:
        model: a timm model or a pixel-space model. What it knows of its classes was written when it was trained.
        data: images with labels.
        classes: what neither knows: the names of the model's outputs, in their order. If the model knows them and the
            labels of the data are plain numbers, these are the names of the numbers, from 0.

    Returns:
        The data, itself if its labels are in that order already, and what a reader has to know as sentences.

    Raises:
        ValueError: the data has images of classes that the model does not know, or more classes than outputs.
    """
    names, own = class_names(model), data.classes
    if classes is not None:
        classes = _checked(classes)
    named = data.named
    if classes is not None and names is not None and not named:
        _check_count(classes, len(own), f"numbers in the labels of {data.name}", at_least=True)
        own, named = tuple(classes), True
    elif classes is not None:
        _check_count(classes, outputs_of(model), "outputs of the model")
        names = tuple(classes)
    used = data.labels.unique().tolist()
    match = match_names(names, own, used, named=named, outputs=outputs_of(model), source=data.name)
    labels = match.apply(data.labels)
    if match.classes == data.classes and torch.equal(labels, data.labels):
        return data, match.notes
    return replace(data, labels=labels, classes=match.classes), match.notes  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Judged:
    """Data as a model is judged on it.

    Attributes:
        batches: the images, and labels in the order of the model's outputs.
        classes: the names of the model's outputs, as far as they are known.
        name: of the data; "" where it has none.
        conditions: what a report says of it.
        notes: what a reader has to know, as sentences.
    """

    batches: Batches
    classes: tuple[str, ...] | None
    name: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def judged_data(model: nn.Module, data: Batches, classes: Sequence[str] | None = None) -> Judged:
    """The labels of `ImageData` or `StreamedData` matched by name; other data as it is, as its labels have no names.

    Raises:
        ValueError: see `match_classes`; or `classes` are given for data whose labels have no names.
    """
    if not isinstance(data, Images):
        if classes is not None:
            raise ValueError(
                "`classes` names what the data does not know, but the labels of tensors are taken as the model's "
                "outputs; give what timm_fsr.load_data returns, or leave out `classes`"
            )
        return Judged(data, class_names(model))
    judged, notes = match_classes(model, data, classes)
    about: dict[str, Any] = {
        "data_fingerprint": data.fingerprint,
        "classes": list(judged.classes),
    }
    if judged is not data and judged.fingerprint != data.fingerprint:
        about["labels_fingerprint"] = judged.fingerprint  # the same images, with labels in the model's order
    if data.crop is not None:
        about["crop"] = str(data.crop)
    if data.skipped:
        about["skipped_images"] = data.skipped
    return Judged(judged, judged.classes, data.name, about, (*data.notes, *notes, *_size_notes(model, data)))


def match_labels(
    model: nn.Module, labels: Tensor, named: Sequence[str] | None, source: str, classes: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (N,) with the names `named`, if they are known, in the order of the model's outputs, and notes on them.

    Raises:
        ValueError: see `match_classes`.
    """
    if classes is not None:
        classes = _checked(classes)
        _check_count(classes, outputs_of(model), "outputs of the model")
    known = class_names(model) if classes is None else classes
    if named is None:
        return labels, ()
    used = labels.unique().tolist()
    match = match_names(
        known, named, used, named=tuple(named) != _numbers(len(named)), outputs=outputs_of(model), source=source
    )
    return match.apply(labels), match.notes


def match_names(
    known: Sequence[str] | None,
    found: Sequence[str],
    used: Iterable[int],
    *,
    named: bool,
    outputs: int | None,
    source: str,
) -> Match:
    """How labels 0, 1, ... of data with the classes `found` are read for a model with the classes `known`.

    Args:
        known: of the model, in the order of its outputs; None if it knows no names.
        found: of the data, in the order of its labels.
        used: the labels that occur.
        named: whether `found` are names, and not numbers that stand for them.
        outputs: how many the model has; None if that is not known.
        source: of the data, for messages.

    Raises:
        ValueError: images of classes that the model does not have.
    """
    used = list(used)
    missing = [found[label] for label in used if known is not None and found[label] not in known]
    numbers = known is not None and tuple(known) == _numbers(len(known))
    if known is None or (missing and numbers and named and len(missing) == len(used)):
        return _by_position(found, used, outputs, source, numbers=numbers, named=named)
    if missing and not named and not all(name.isdecimal() for name in known):
        places = _numbered(found)
        _check_labels([places[label] for label in used], len(known), source)
        note = (
            f"the labels of {source} are plain numbers and were read as positions among the model's classes: "
            f"{_examples(known, [places[label] for label in used])}; {_REMEDY}"
        )
        return Match(_moved(places), tuple(known), (note,))
    if missing:
        raise ValueError(_unknown_classes(missing, known, source))
    place = {name: number for number, name in enumerate(known)}
    positions = [place.get(name) for name in found]
    return Match(positions, tuple(known), tuple(_notes(positions, found, known, source)))


def outputs_of(model: nn.Module) -> int | None:
    """How many classes the model tells apart; None if it does not say."""
    return getattr(base_model(model), "num_classes", None)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The class names of a text file with one name a line, as timm's class maps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no names, or one twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give a text file with the name of one class in each line")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8; write the name of one class in each line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return _checked([line.strip() for line in lines])


class InOrderOf(nn.Module):
    """Another model whose logits come in the order of this one's classes.

    Args:
        model: maps images to logits (N, its classes).
        positions: for each class wanted, the output that stands for it.
    """

    positions: Tensor

    def __init__(self, model: nn.Module, positions: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("positions", torch.tensor(positions))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes wanted)."""
        return self.model(images)[:, self.positions]


def in_order_of(classes: Sequence[str] | None, source: nn.Module, name: str) -> nn.Module:
    """A model to transfer attacks from, with its outputs in the order of `classes` as far as names are known.

    Raises:
        ValueError: it lacks one of the classes.
    """
    known = class_names(source)
    if classes is None or known is None or tuple(classes) == known:
        return source
    missing = [label for label in classes if label not in known]
    if any(label.isdecimal() for label in missing) or (missing and known == _numbers(len(known))):
        return source  # numbers that stand for names nobody knows
    if missing:
        raise ValueError(
            f"attacks cannot be transferred from {name}: {_unknown_classes(missing, known, 'the attacked model')}"
        )
    return InOrderOf(source, [known.index(label) for label in classes])


def _size_notes(model: nn.Module, data: Images) -> Iterable[str]:
    size = input_size(model)
    if size is not None and size != data.image_size:
        yield (
            f"the images are {size_text(data.image_size)} (channels, height, width); the model was made for "
            f"{size_text(size)}"
        )
    stored = data.stored if isinstance(data, ImageData) else None
    scaled = isinstance(data, StreamedData) or (stored is not None and stored[1:] != data.image_size[1:])
    own = own_crop(model)
    if own is not None and own.share < 1 and data.crop is None and scaled:
        yield (
            f"the images were scaled whole, but the model's configuration crops them ({own}), as timm's own scripts do "
            "and timm_fsr.load_data with crop=timm_fsr.models.description.own_crop(model)"
        )


def _by_position(
    found: Sequence[str], used: Sequence[int], outputs: int | None, source: str, *, numbers: bool, named: bool
) -> Match:
    """Labels as they are stored, since nothing is known of the model's classes but their number."""
    if outputs is None:
        return Match(None, tuple(found))
    stored = list(range(len(found))) if named else _numbered(found)
    places = list(range(len(found))) if outputs == len(found) else stored
    _check_labels([places[label] for label in used], outputs, source, found if named else ())
    if outputs == len(found) and not numbers and stored == places:
        return Match(None, tuple(found))
    names = list(map(str, range(outputs)))
    for place, name in zip(places, found, strict=True):
        if place < outputs:
            names[place] = name
    note = (
        f"the model has {outputs} classes and knows no names of them; {source} has {len(found)}, and label {stored[0]} "
        f"({found[0]!r}) was read as the model's output {places[0]}, and so on; {_REMEDY}"
    )
    return Match(_moved(places), tuple(names), (note,))


def _numbered(found: Sequence[str]) -> list[int]:
    """The labels as the data has stored them, for classes that are plain numbers, of which some may be left out."""
    return list(map(int, found)) if all(name.isdecimal() for name in found) else list(range(len(found)))


def _moved(places: list[int]) -> list[int | None] | None:
    """The positions for `Match`; None where they change nothing."""
    return None if places == list(range(len(places))) else list(places)


def _notes(positions: Sequence[int | None], found: Sequence[str], known: Sequence[str], source: str) -> Iterable[str]:
    """What was other than in training."""
    kept = [(label, place) for label, place in enumerate(positions) if place is not None]
    moved = next(((label, place) for label, place in kept if label != place), None)
    lacking = [name for name in known if name not in found]
    if lacking:
        count = f"{len(lacking)} of the model's {len(known)} classes"
        yield f"{source} does not have {count}: {_listed(lacking)}; its labels were matched by name"
    elif moved is not None:
        label, place = moved
        yield (
            f"{source} has the model's classes in another order: {found[label]!r} is label {label} there and output "
            f"{place} of the model; its labels were matched by name"
        )


def _unknown_classes(missing: Sequence[str], known: Sequence[str], source: str) -> str:
    named = []
    for name in missing[:_SHOWN]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        named.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"{source} has images of classes that the model does not know: {', '.join(named)}{more}; its classes are "
        f"{_listed(known)}. Use data of these classes, or say with `classes` what the outputs of the model are called"
    )


def _check_labels(used: Sequence[int], outputs: int, source: str, names: Sequence[str] = ()) -> None:
    largest = max(used)
    if largest >= outputs:
        named = f" ({names[largest]!r})" if largest < len(names) else ""
        raise ValueError(
            f"{source} has images of label {largest}{named}, but the model has {outputs} classes (0 to {outputs - 1}); "
            "use the data that it was trained for"
        )


def _checked(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(classes)
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if isinstance(classes, str) or not names or twice is not None or not all(isinstance(n, str) and n for n in names):
        problem = f"have {twice!r} twice" if twice else "are no list of names"
        raise ValueError(f"`classes` {problem}; give one name for each class, in the order of their numbers")
    return names


def _check_count(classes: Sequence[str], count: int | None, what: str, *, at_least: bool = False) -> None:
    if count is not None and (len(classes) < count if at_least else len(classes) != count):
        raise ValueError(f"`classes` has {len(classes)} names for {count} {what}; give one name to each")


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _examples(known: Sequence[str], used: Sequence[int]) -> str:
    return ", ".join(f"{label} is {known[label]!r}" for label in list(used)[:3]) + (", ..." if len(used) > 3 else "")


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 2 * _SHOWN else ""
    return ", ".join(map(repr, names[: 2 * _SHOWN])) + more
