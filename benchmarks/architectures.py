"""Attaches FSR at its default place to every timm architecture and checks what it does there.

    python benchmarks/architectures.py                         the smallest architecture of each family
    python benchmarks/architectures.py --all --resume          all, going on where the last run stopped
    python benchmarks/architectures.py --all --filter "vit_*"  some of them
    python benchmarks/architectures.py --all --quick           all in minutes: attach only

Every architecture is checked by shape, on the meta device: every new parameter but the auxiliary head's is
connected to the logits in training mode, and detaching gives back the keys. The smallest classifier of each family,
and every other one up to `--limit` million parameters, is checked in numbers too, on the CPU with weights that are
random throughout: forward passes in training and eval mode give finite logits; attaching changes the logits; the
gradient of the main loss reaches every new parameter but the auxiliary head's, also in a deep copy; detaching gives
back the state dict and the logits bit for bit.

"works" means that all this held, or with `--quick` that attaching found a place with one spatial output on which the
logits depend.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import fnmatch
import importlib.metadata
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import model_entrypoint
from torch import Tensor, nn

import timm_fsr
from timm_fsr.hooks.site import layer_groups

CLASSES = 10
SMALL = 128  # pixels: the image size of models that take any
SMALL_FIXED = 112  # pixels: of models that can be built for it; seven patches of 16, eight of 14
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one architecture: `status` is works, refused, failed or "no classifier"."""

    name: str
    family: str
    status: str
    check: str = ""
    model_class: str = ""
    parameters: int = 0
    place: str = ""
    layout: str = ""
    reason: str = ""
    seconds: float = 0.0


def main() -> None:
    """Examine, write one JSON line for each architecture, and render the lines as Markdown."""
    args = parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    lines = args.json
    lines.parent.mkdir(parents=True, exist_ok=True)
    done = read(lines) if args.resume and lines.exists() else {}
    if not args.resume:
        lines.write_text("")
    for family, names in by_family(args.filter).items():
        first = "" if args.quick else smallest(names, done)
        for name in names if args.all else [first]:
            if name not in done or (name == first and done[name].check == "place"):
                limit = -1 if args.quick else args.limit * 1e6
                done[name] = outcome = examine(name, family, limit, in_numbers=name == first)
                with lines.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            print(summary(done[name]), flush=True)
    if args.markdown:
        args.markdown.write_text(markdown(list(done.values()), args))
    print(tally(done.values()))
    sys.exit(any(outcome.status == "failed" for outcome in done.values()))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all architectures, not the smallest of each family")
    parser.add_argument("--filter", default="*", metavar="PATTERN", help='names to look at, such as "vit_*"')
    parser.add_argument("--limit", type=float, default=30, metavar="M", help="million parameters checked in numbers")
    parser.add_argument("--quick", action="store_true", help="attach only: is there a place that reaches the logits?")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes that --json has already")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "architectures.jsonl", help="one outcome a line")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables, such as docs/architectures.md")
    return parser.parse_args()


def by_family(pattern: str) -> dict[str, list[str]]:
    """The architectures of timm itself whose names match, by the module that defines them."""
    families = {}
    for family in timm.list_modules():
        names = fnmatch.filter(timm.list_models(module=family), pattern)
        names = [name for name in names if model_entrypoint(name).__module__ == f"timm.models.{family}"]
        if names:
            families[family] = names
    return families


def smallest(names: list[str], done: dict[str, Outcome]) -> str:
    """The classifier with the fewest parameters; without a classifier, the architecture with the fewest."""

    def order(name: str) -> tuple[bool, int]:
        if name in done:
            return done[name].status == "no classifier", done[name].parameters
        model = weightless(name)
        return not classifies(model), count(model)

    return min(names, key=order) if len(names) > 1 else names[0]


def examine(name: str, family: str, limit: float, *, in_numbers: bool) -> Outcome:
    """Build one architecture, attach FSR and check it; in numbers too if asked or up to `limit` parameters.

    A negative `limit` stops after attaching.
    """
    start = time.perf_counter()
    model = weightless(name)
    outcome = Outcome(name, family, "works", "", type(model).__name__, count(model))
    if not classifies(model):
        return dataclasses.replace(outcome, status="no classifier", reason="gives features, not logits")
    keys = list(model.state_dict())
    try:
        timm_fsr.attach(model)
    except ValueError as error:
        return dataclasses.replace(outcome, status="refused", reason=str(error))
    in_numbers = in_numbers or outcome.parameters <= limit
    (site,) = layer_groups(model)[0].sites
    prefix = f"+{site.layout.prefix_tokens}" if site.layout.prefix_tokens else ""
    rows, columns = site.layout.grid
    outcome = dataclasses.replace(
        outcome,
        place=site.name,
        layout=f"{site.layout.kind}{prefix} {site.layout.channels}x{rows}x{columns}",
        check="numbers" if in_numbers else "shape" if limit >= 0 else "place",
    )
    try:
        if limit >= 0:
            check_shape(model, keys)
        if in_numbers:
            check_numbers(name)
    except Exception as error:
        outcome = dataclasses.replace(outcome, status="failed", reason=f"{type(error).__name__}: {error}")
    return dataclasses.replace(outcome, seconds=round(time.perf_counter() - start, 1))


def weightless(name: str) -> nn.Module:
    """The architecture on the meta device, with few classes where it has any."""
    with torch.device("meta"):
        return build(name)


def build(name: str, **kwargs: Any) -> nn.Module:
    """The architecture with `CLASSES` classes; encoders that know none as they are."""
    try:
        return timm.create_model(name, num_classes=CLASSES, **kwargs)
    except (TypeError, AssertionError):
        return timm.create_model(name, **kwargs)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def classifies(model: nn.Module) -> bool:
    """Whether a model on the meta device maps two images to two rows of `CLASSES` logits."""
    logits = model.eval()(images_for(model, device="meta"))
    return isinstance(logits, Tensor) and logits.shape == (2, CLASSES)


def images_for(model: nn.Module, size: int | None = None, device: str = "cpu") -> Tensor:
    """Two random images of the model's input size, or of `size` pixels."""
    channels, height, width = cast(dict[str, Any], model.pretrained_cfg)["input_size"]
    generator = torch.Generator(device).manual_seed(0) if device != "meta" else None
    return torch.rand(2, channels, size or height, size or width, generator=generator, device=device)


def check_shape(model: nn.Module, keys: list[str]) -> None:
    """Connect and detach a model on the meta device that FSR is attached to; `keys` are its state dict's before."""
    logits = model.train()(images_for(model, device="meta"))
    gradients = main_gradients(model, logits, torch.zeros(2, dtype=torch.long, device="meta"))
    expect(not missing(gradients), f"no gradient reaches {missing(gradients)}")
    timm_fsr.detach(model)
    expect(list(model.state_dict()) == keys, "detach left other keys")


def check_numbers(name: str) -> None:
    """Attach, run, train and detach on the CPU."""
    torch.manual_seed(0)
    model, images, base = runnable(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expect(bool(base.isfinite().all()), "the base model's logits are not finite")

    timm_fsr.attach(model)
    with torch.no_grad():
        changed = model(images)
    expect(changed.shape == base.shape and bool(changed.isfinite().all()), "eval logits are wrong or not finite")
    expect(not torch.equal(changed, base), "the logits do not change")

    twin = copy.deepcopy(model).train()  # training changes statistics, and a copy has to work anyway
    timm_fsr.detach(model)
    after = model.state_dict()
    expect(list(after) == list(state), "detach left other keys")
    expect(all(torch.equal(after[key], state[key]) for key in state), "detach left other values")
    with torch.no_grad():
        expect(torch.equal(model(images), base), "detach left other logits")

    logits = twin(images)
    expect(logits.shape == base.shape and bool(logits.isfinite().all()), "training logits are wrong or not finite")
    gradients = main_gradients(twin, logits, torch.tensor([0, 1]))
    absent = missing(gradients) or [key for key, g in gradients.items() if g is not None and not g.any()]
    expect(not absent, f"no gradient reaches {absent}")
    expect(all(bool(g.isfinite().all()) for g in gradients.values() if g is not None), "gradients are not finite")


@torch.no_grad()
def runnable(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The plain model, images that it takes, small ones if it does, and its logits."""
    for kwargs, size in (({"img_size": SMALL_FIXED}, SMALL_FIXED), ({}, SMALL)):
        try:
            return run(build(name, **kwargs), size)
        except Exception:  # what a model raises that has its own size is its own affair
            continue
    return run(build(name))


def run(model: nn.Module, size: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in eval mode and with noise on every parameter, images, its logits.

    Without the noise, a zero or tiny parameter at the start would hide what a layer does.
    """
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    images = images_for(model, size)
    return model, images, model.eval()(images)


def main_gradients(model: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, Tensor | None]:
    """Gradient of the cross-entropy with respect to each new parameter but the auxiliary head's."""
    (group,) = layer_groups(model)
    new = {key: value for key, value in group.named_parameters() if ".head." not in key}
    loss = F.cross_entropy(logits, labels)
    return dict(zip(new, torch.autograd.grad(loss, list(new.values()), allow_unused=True), strict=True))


def missing(gradients: dict[str, Tensor | None]) -> list[str]:
    """Names of the parameters that no gradient reaches."""
    return [key for key, gradient in gradients.items() if gradient is None]


def expect(condition: bool, message: str) -> None:
    """RuntimeError unless `condition`; a check must not vanish under `python -O`."""
    if not condition:
        raise RuntimeError(message)


def read(lines: Path) -> dict[str, Outcome]:
    """The outcomes in a file of JSON lines."""
    outcomes = (Outcome(**json.loads(line)) for line in lines.read_text().splitlines())
    return {outcome.name: outcome for outcome in outcomes}


def summary(outcome: Outcome) -> str:
    """One line of the running table."""
    size = f"{outcome.parameters / 1e6:.1f}M"
    what = f"{outcome.place} {outcome.layout} {outcome.reason}".strip()
    return f"{outcome.family:24} {outcome.name:40} {size:>8} {outcome.status:13} {outcome.check:7} {what}"


def tally(outcomes: Iterable[Outcome]) -> str:
    """The counts in a sentence."""
    counts = collections.Counter(outcome.status for outcome in outcomes)
    classifiers = counts.total() - counts["no classifier"]
    share = f" ({counts['works'] / classifiers:.1%})" if classifiers else ""
    return (
        f"{counts['works']} of {classifiers} image classifiers work{share}, {counts['refused']} refuse, "
        f"{counts['failed']} fail; {counts['no classifier']} more architectures give no logits."
    )


def markdown(outcomes: list[Outcome], args: argparse.Namespace) -> str:
    """The page docs/architectures.md."""
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        families.setdefault(outcome.family, []).append(outcome)
    rows = [family_row(family, members) for family, members in sorted(families.items())]
    checks = collections.Counter(outcome.check for outcome in outcomes)
    options = (
        " --all" * args.all + " --resume" * args.resume + f" --limit {args.limit:g} --markdown docs/architectures.md"
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("timm", "torch", "timm-fsr"))
    others = [f"- `{o.name}`: {o.status}. {o.reason}" for o in outcomes if o.status != "works"]
    return "\n".join(
        [
            "# FSR on every timm architecture",
            "",
            f"Measured with {versions} by",
            "",
            f"    python benchmarks/architectures.py{options}",
            "",
            "which went on from `--all` runs, the last of them with `--quick`; its first lines say what each word",
            "means.",
            "",
            f"**{tally(outcomes)}** Checked in numbers: {checks['numbers']}, the smallest classifier of each family "
            f"among them; by shape alone: {checks['shape']}; attached alone (`--quick`: the place has one spatial "
            f"output that the logits depend on): {checks['place']}.",
            "",
            "A family's row shows its smallest classifier. NLC+1 is a token sequence with one prefix token.",
            "",
            "| family | classifiers | work | smallest | default place | layout, C x H x W | check |",
            "|---|---:|---:|---|---|---|---|",
            *rows,
            "",
            "## Not working, and why",
            "",
            *(others or ["Nothing."]),
            "",
        ]
    )


def family_row(family: str, members: list[Outcome]) -> str:
    """One row of the table."""
    classifiers = [outcome for outcome in members if outcome.status != "no classifier"]
    works = sum(outcome.status == "works" for outcome in classifiers)
    first = min(classifiers or members, key=lambda outcome: outcome.parameters)
    place = f"`{first.place}`" if first.place else first.status
    cells = (family, len(classifiers), works, first.name, place, first.layout, first.check)
    return f"| {' | '.join(str(cell) for cell in cells)} |"


if __name__ == "__main__":
    main()
