"""AFD: its layer and its objective by formula, and a teacher that stays the same through resumes and processes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from support.runs import before_step, equal, tiny, weights
from support.tiny import images, labels, same_state, state, tiny_resnet
from timm.models import _registry
from torch import Tensor, nn

import timm_fsr
from timm_fsr.attacks.pgd import PGD
from timm_fsr.layers.afd import Disentangler
from timm_fsr.training.objectives.afd import AFD
from timm_fsr.training.recipe import Recipe
from timm_fsr.training.trainer import train

CHANNELS, CLASSES = 6, 4
TERMS = ["adversarial", "alignment", "afd.confusion", "afd.separation", "afd.probe"]


@pytest.fixture
def layer() -> Disentangler:
    torch.manual_seed(0)
    layer = Disentangler(CHANNELS, CLASSES, confusion_weight=0.5, separation_weight=2.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def features(batch: int = 8) -> Tensor:
    return torch.randn(batch, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(1))


def logits(batch: int = 8) -> Tensor:
    return torch.randn(batch, CLASSES, generator=torch.Generator().manual_seed(2))


def classes(batch: int = 8) -> Tensor:
    return torch.arange(batch) % CLASSES


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())


def model() -> nn.Module:
    """In training mode, with weights of its own and maps that are no identity any more."""
    model = timm_fsr.attach(tiny_resnet(), "afd").train()
    with torch.no_grad():
        for parameter in model.afd.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


class Still:
    """Stands in for an attack."""

    eps = 0.1

    def __call__(self, _: Any, given: Tensor, **__: Any) -> Tensor:
        return (given + 0.1).clamp(0, 1)


class TestLayer:
    def test_it_begins_as_the_identity(self):
        fresh = Disentangler(CHANNELS, CLASSES)
        out, aux = fresh(features())
        assert torch.equal(out, features())
        torch.testing.assert_close(aux["confused"], aux["intrinsic"])

    def test_losses_are_those_of_the_paper(self, layer):
        out, aux = layer(features(), classes())
        maps = layer.intrinsic.weight[:, :, 0, 0], layer.confused.weight
        torch.testing.assert_close(out, torch.einsum("kc,nchw->nkhw", maps[0], features()), rtol=1e-4, atol=1e-5)
        confusion, separation, probe = [], [], []
        for n, image in enumerate(features()):
            pooled = image.mean(dim=(1, 2))
            intrinsic, confused = maps[0] @ pooled, maps[1] @ pooled
            wrong = next(k for k in logits()[n].argsort(descending=True).tolist() if k != classes()[n])
            confusion.append(-layer.head(confused).log_softmax(0)[wrong])
            probe.append(-layer.head(intrinsic).log_softmax(0)[classes()[n]])
            separation.append(cosine(intrinsic, confused))
        expected = {"confusion": 0.5 * sum(confusion), "separation": 2 * sum(separation), "probe": sum(probe)}
        found = layer.aux_losses(aux, logits(), classes())
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value / 8, rtol=1e-4, atol=1e-5, msg=name)

    def test_each_loss_trains_its_own_part(self, layer):
        feature = features().requires_grad_()
        _, aux = layer(feature, classes())
        parts = {"feature": feature, **dict(layer.named_parameters())}
        trained = {}
        for name, loss in layer.aux_losses(aux, logits(), classes()).items():
            found = torch.autograd.grad(loss, list(parts.values()), allow_unused=True, retain_graph=True)
            trained[name] = {part for part, gradient in zip(parts, found, strict=True) if gradient is not None}
        assert trained == {
            "confusion": {"confused.weight"},
            "separation": {"feature", "intrinsic.weight"},
            "probe": {"head.weight", "head.bias"},
        }

    def test_the_intrinsic_map_folds_into_the_classifier(self):
        one = model().eval()
        plain = tiny_resnet().eval()
        with torch.no_grad():
            plain.fc.weight.copy_(one.fc.weight @ one.afd["layer4"].intrinsic.weight[:, :, 0, 0])
        torch.testing.assert_close(one(images()), plain(images()), rtol=1e-4, atol=1e-5)

    def test_what_cannot_work_is_refused(self):
        for args in ({"confusion_weight": -1.0}, {"separation_weight": -1.0}):
            with pytest.raises(ValueError, match="loss weights must be 0 or more"):
                Disentangler(CHANNELS, CLASSES, **args)
        bare = Disentangler(CHANNELS, 0)
        with pytest.raises(ValueError, match=r"call model\.reset_classifier"):
            bare.aux_losses(bare(features())[1], logits(), classes())


class TestObjective:
    def test_terms_are_those_of_the_paper(self):
        """After a step, so that the teacher is not the student."""
        student = model()
        objective = AFD(alignment=7.0, label_smoothing=0.1).begin(student)
        before = copy.deepcopy(student).eval()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
        terms = objective(student, Still(), images(), labels())
        assert list(terms) == TERMS

        seen: dict[str, Tensor] = {}
        for name, one in (("student", student), ("teacher", before)):
            handle = one.layer4[-1].register_forward_hook(lambda _m, _x, out, name=name: seen.update({name: out}))
            out = one(Still()(None, images()) if name == "student" else images())
            handle.remove()
            if name == "student":
                expected = F.cross_entropy(out, labels(), label_smoothing=0.1)
        pooled = {name: out.mean(dim=(2, 3)) for name, out in seen.items()}  # hooks come after the site
        apart = [1 - cosine(*pair) for pair in zip(pooled["student"], pooled["teacher"], strict=True)]
        assert sum(apart) > 1e-3
        torch.testing.assert_close(terms["adversarial"], expected)
        torch.testing.assert_close(terms["alignment"], 7 * sum(apart) / 4, rtol=1e-4, atol=1e-6)

    def test_the_teacher_is_frozen_and_no_part_of_the_model(self):
        student = model()
        before = state(student)
        objective = AFD().begin(student)
        teacher = objective.teacher
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any(module.training for module in teacher.modules())
        assert all(module.training for module in student.modules())
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            objective(student, PGD(steps=1), images(), labels()).total().backward()
            optimizer.step()
        assert same_state(teacher, before)
        assert not same_state(student, before)
        assert list(student.state_dict()) == list(before)
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert not any(teacher is module for module in student.modules())
        assert objective == AFD()
        assert repr(objective) == "AFD(label_smoothing=0.0, alignment=25.0)"

    def test_without_a_beginning_or_its_layer_it_says_so(self):
        with pytest.raises(ValueError, match=r"no teacher yet; train with objective\.begin\(model\)"):
            AFD()(model(), Still(), images(), labels())
        with pytest.raises(ValueError, match=r"needs the feature layer 'afd'.*model\.layer=afd"):
            AFD().begin(tiny_resnet())


def rank_main(folder: Path) -> None:
    """Two steps of a wrapped model with all that has labels, attack terms or a teacher."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    student = timm_fsr.attach(timm_fsr.attach(model(), "cas"), "cifs", layer_args={"probe": "mlp"})
    timm_fsr.attach(student, "hfdr", layer_args={"hidden": 4})
    objective = AFD().begin(student)
    prepared, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.05))
    calls: list[None] = []
    prepared.register_forward_pre_hook(lambda *_: calls.append(None))
    half = images(8)[4 * rank : 4 * rank + 4], labels(8)[4 * rank : 4 * rank + 4]
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        objective(prepared, PGD(steps=2), *half).total().backward()
        optimizer.step()
    assert len(calls) == 2, "an attack or the teacher ran through the wrapper"
    torch.save(dict(student.named_parameters()), folder / f"{rank}.pt")


def test_two_processes_stay_together(tmp_path):
    debug_launcher(rank_main, args=(tmp_path,), num_processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    begun = dict(model().named_parameters())
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), f"{name} drifted apart"
        assert name not in begun or not torch.equal(value, begun[name]), f"{name} was not trained"


FLAGS = [
    "--model.layer=afd",
    "--objective.name=afd",
    "--optim.lr=0.02",
    "--optim.ema_decay=0.9",
    "--checkpoint.every_steps=2",
    "--checkpoint.keep=3",
    "--evaluation.attacks=[]",
]


def fine_tuning(output: Path, trained: Path, *flags: str) -> Recipe:
    return tiny(output, *FLAGS, f"--model.name={trained}", *flags)


@pytest.fixture
def variant() -> Iterator[None]:
    """Saving needs an architecture with the layer that timm knows; as long as there is none, only within a test."""
    name = "resnet_tiny_cifar_afd"
    known = timm.is_model(name)
    if not known:
        timm_fsr.models.variants._register(name, "resnet_tiny_cifar", "afd")
    yield
    if not known:
        del _registry._model_entrypoints[name], timm_fsr.models.variants.default_cfgs[name]
        _registry._clear_model_entries(name)
        delattr(timm_fsr.models.variants, name)
        timm_fsr.models.variants.__all__.remove(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model to fine-tune."""
    folder = tmp_path_factory.mktemp("trained")
    timm_fsr.save_pretrained(tiny_resnet(in_chans=1), folder / "model")
    return folder / "model"


class Stopped(BaseException):
    """Nothing catches it."""


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def stop() -> None:
        raise Stopped

    before_step(monkeypatch, step, stop)


@pytest.mark.usefixtures("variant")
class TestRuns:
    def test_a_resumed_run_has_the_same_teacher_and_ends_the_same(self, trained, tmp_path, monkeypatch):
        train(fine_tuning(tmp_path / "whole", trained))
        with monkeypatch.context() as patch:
            stop_before(patch, 4)
            with pytest.raises(Stopped):
                train(fine_tuning(tmp_path / "cut", trained))
        train(fine_tuning(tmp_path / "cut", trained, "--resume=true"))
        for kind in ("best", "last"):
            assert equal(weights(tmp_path / "whole" / kind), weights(tmp_path / "cut" / kind))
        saved = weights(tmp_path / "cut" / "last")
        assert not any("teacher" in name for name in saved)
        lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
        assert {f"loss.{name}" for name in TERMS} <= set(lines[-1])

    def test_a_teacher_that_has_changed_is_refused(self, trained, tmp_path, monkeypatch):
        own = tmp_path / "own"
        shutil.copytree(trained, own)
        with monkeypatch.context() as patch:
            stop_before(patch, 4)
            with pytest.raises(Stopped):
                train(fine_tuning(tmp_path / "cut", own))
        other = tiny_resnet(in_chans=1)
        with torch.no_grad():
            other.fc.bias.add_(1)
        shutil.rmtree(own)
        timm_fsr.save_pretrained(other, own)
        with pytest.raises(ValueError, match="frozen teacher would be another model; put back"):
            train(fine_tuning(tmp_path / "cut", own, "--resume=true"))


class TestRecipe:
    def test_the_layer_is_asked_for_before_anything_starts(self, trained):
        recipe = Recipe.load(overrides=["--objective.name=afd", f"--model.name={trained}"])
        with pytest.raises(ValueError, match=r"needs the feature layer 'afd', but model.layer is fsr; set model.layer"):
            recipe.check()

    def test_a_model_with_random_weights_is_no_teacher(self):
        recipe = Recipe.load(overrides=["--objective.name=afd", "--model.layer=afd"])
        with pytest.raises(ValueError, match="fine-tunes a trained model, but resnet_tiny_cifar begins with random"):
            recipe.check()

    def test_a_trained_model_with_the_layer_passes(self, trained):
        Recipe.load(overrides=["--objective.name=afd", "--model.layer=afd", f"--model.name={trained}"]).check()

    def test_the_teacher_is_no_argument(self):
        recipe = Recipe.load(overrides=["--objective.args.afd.teacher=1"])
        with pytest.raises(ValueError, match="unknown argument of the objective 'afd' 'teacher'"):
            recipe.check()
        args = {"alignment": 3.0}
        assert Recipe.load(overrides=[f"--objective.args.afd={json.dumps(args)}"]).objective.args == {"afd": args}
