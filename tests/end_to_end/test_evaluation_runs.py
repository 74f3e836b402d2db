"""Evaluations that are killed, shared over processes, or tried again: per-image results stay the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from support.brief import brief_autoattack
from support.tiny import images, tiny_resnet, with_fsr
from torch import Tensor, nn

import timm_fsr.evaluation.evaluator
import timm_fsr.evaluation.suites.adaptive
from timm_fsr.cli.main import main
from timm_fsr.evaluation.evaluator import evaluate
from timm_fsr.evaluation.registry import Stage, Suite
from timm_fsr.evaluation.saved_images import Rescored, attacked_batches, rescore
from timm_fsr.models.saving import save_pretrained
from timm_fsr.reports.report import Report
from timm_fsr.utils.distributed import join_processes

ATTACKS = ["fgsm", "pgd3", "apgd-ce"]


def network() -> nn.Module:
    return with_fsr(tiny_resnet()).eval()


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Of each batch the untrained network is right about five images and wrong about one."""
    given = images(6)
    with torch.no_grad():
        truth = network()(given).argmax(1)
    truth[0] = (truth[0] + 1) % 10
    return [(given.roll(index, dims=0), truth.roll(index)) for index in range(count)]


@pytest.fixture
def model() -> nn.Module:
    return network()


def outcomes(report: Report) -> dict[str, object]:
    values = report.to_dict()
    return {key: values[key] for key in ("correct", "stages", "labels", "attacks", "accuracy")}


class Killed(BaseException):
    """What no handler of errors catches, as SIGKILL."""


class Dying:
    """Notes each call, and kills the process at a given one."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model: nn.Module, given: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise Killed
        noise = torch.rand(given.shape, generator=generator) - 0.5
        return (given + 0.1 * noise).clamp(given - 0.03, given + 0.03).clamp(0, 1)


def no_square(model: nn.Module, given: Tensor, labels: Tensor, classes: int) -> Tensor:
    """A Square that does nothing."""
    return given


def chain(run: Dying) -> Suite:
    return Suite("chain", tuple(Stage(name, "noise", run) for name in ("one", "two", "three")))


class TestResume:
    @pytest.mark.parametrize("at", [1, 2, 5, 9])
    def test_a_killed_evaluation_goes_on_and_repeats_nothing(self, model, tmp_path, at):
        whole = Dying(at=0)
        expected = evaluate(model, batches(3), attacks=[chain(whole), "fgsm"])
        first = Dying(at)
        with pytest.raises(Killed):
            evaluate(model, batches(3), attacks=[chain(first), "fgsm"], folder=tmp_path)
        second = Dying(at=0)
        found = evaluate(model, batches(3), attacks=[chain(second), "fgsm"], folder=tmp_path)
        assert outcomes(found) == outcomes(expected)
        assert second.calls == whole.calls - (at - 1), "something was attacked twice"

    def test_a_finished_one_is_not_repeated_and_may_get_more_attacks(self, model, tmp_path):
        counted = Dying(at=0)
        evaluate(model, batches(2), attacks=[chain(counted)], folder=tmp_path)
        calls = counted.calls
        more = evaluate(model, batches(2), attacks=["fgsm", chain(counted)], folder=tmp_path)
        assert counted.calls == calls
        assert list(more.correct) == ["clean", "fgsm", "chain"]

    def test_what_was_found_before_counts_also_if_it_is_not_asked_for_again(self, model, tmp_path):
        """Else leaving an attack out would raise the robust accuracy."""
        suite = Suite("strong", (Stage("strong", "turned round", lambda m, given, y, g: (given + 0.03).clamp(0, 1)),))
        first = evaluate(model, batches(2), attacks=[suite, chain(Dying(0)), "pgd3"], folder=tmp_path)
        again = evaluate(model, batches(2), attacks=["fgsm"], folder=tmp_path)
        assert list(again.correct) == ["clean", "fgsm", "strong", "chain", "pgd3"]
        for name in ("strong", "chain", "pgd3"):
            assert again.correct[name].tolist() == first.correct[name].tolist()
            assert again.attacks[name] == first.attacks[name]
        assert list(again.stages["chain"]) == ["one", "two", "three"]
        assert again.worst_case <= first.worst_case
        other = [(given.flip(3), truth) for given, truth in batches(2)]
        assert list(evaluate(model, other, attacks=["fgsm"], folder=tmp_path).correct) == ["clean", "fgsm"]

    def test_what_was_found_on_a_part_of_the_images_is_named(self, model, tmp_path):
        evaluate(model, batches(1), attacks=["pgd3"], folder=tmp_path)
        more = evaluate(model, batches(3), attacks=["fgsm"], folder=tmp_path)
        assert list(more.correct) == ["clean", "fgsm"]
        assert any("outcomes of 'pgd3' on 1 of 3 batches" in note for note in more.notes)
        finished = evaluate(model, batches(3), attacks=["pgd3"], folder=tmp_path)
        assert list(finished.correct) == ["clean", "pgd3", "fgsm"]
        assert not any("batches" in note for note in finished.notes)

    def test_the_same_attack_with_other_parameters_is_named(self, model, tmp_path):
        suites = [Suite("mine", (Stage("one", detail, Dying(0)),)) for detail in ("weak", "strong")]
        for suite in suites:
            found = evaluate(model, batches(1), attacks=[suite], folder=tmp_path)
        assert found.attacks["mine"] == "strong"
        assert any("outcomes of 'mine' with other parameters" in note for note in found.notes)

    def test_other_images_are_attacked_anew(self, model, tmp_path):
        counted = Dying(at=0)
        evaluate(model, batches(1), attacks=[chain(counted)], folder=tmp_path)
        calls = counted.calls
        other = [(given.flip(3), truth) for given, truth in batches(1)]
        found = evaluate(model, other, attacks=[chain(counted)], folder=tmp_path)
        assert counted.calls > calls
        assert outcomes(found) == outcomes(evaluate(model, other, attacks=[chain(counted)]))

    @pytest.mark.parametrize("attack", ["transfer", "adaptive"])
    def test_other_weights_of_a_transfer_source_are_attacked_with_anew(self, model, tmp_path, attack, monkeypatch):
        monkeypatch.setattr(timm_fsr.evaluation.suites.adaptive, "STEPS", 1)
        monkeypatch.setattr(timm_fsr.evaluation.suites.adaptive, "Component", lambda *_: no_square)
        sources = [tiny_resnet(), network()]
        found = [
            evaluate(model, batches(1), attacks=[attack], folder=tmp_path, transfer_from={"base": source}, eps=0.1)
            for source in (*sources, sources[1])
        ]
        details = [report.attacks[list(report.correct)[1]] for report in found]
        assert details[0] != details[1] == details[2]
        lines = (tmp_path / "outcomes" / "0.jsonl").read_text().splitlines()
        assert sum('"of"' in line and '"transfer from base"]' in line for line in lines) == 2

    def test_another_model_is_refused(self, model, tmp_path):
        evaluate(model, batches(1), attacks=["fgsm"], folder=tmp_path)
        with pytest.raises(ValueError, match="holds the outcomes of another evaluation: its model is"):
            evaluate(tiny_resnet(), batches(1), attacks=["fgsm"], folder=tmp_path)
        with pytest.raises(ValueError, match="its eps is"):
            evaluate(model, batches(1), attacks=["fgsm"], folder=tmp_path, eps=0.5)
        evaluate(tiny_resnet(), batches(1), attacks=["fgsm"], folder=tmp_path, overwrite=True)

    def test_sigkill_to_the_command(self, model, tmp_path):
        """As a user would: killed at any moment, the same command gives what an uninterrupted one gives."""
        save_pretrained(with_fsr(tiny_resnet(in_chans=1)), tmp_path / "model")
        command = [sys.executable, "-m", "timm_fsr", "evaluate", str(tmp_path / "model"), "--limit=120"]
        command += ["--batch-size=40", "--attacks", "fgsm", "pgd40", "--output"]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        journal = tmp_path / "killed" / "outcomes" / "0.jsonl"
        started = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (journal.is_file() and journal.read_text().count("\n") >= 3):
            assert started.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
        started.wait()
        assert not (tmp_path / "killed" / "report.json").exists()
        before = journal.read_text().splitlines()
        for name in ("killed", "whole"):
            assert main([*command[3:], str(tmp_path / name)]) == 0  # in this process: a start takes seconds
        reports = [Report.load(tmp_path / name / "report.json") for name in ("killed", "whole")]
        assert outcomes(reports[0]) == outcomes(reports[1])
        after = journal.read_text().splitlines()
        assert len(after) == 1 + 2 + 3 * 3, "a finished batch was repeated"
        assert after[: len(before) - 1] == before[:-1]


def _evaluate_shared(folder: str) -> None:
    """What each process of the test below does."""
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = "2"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = join_processes()
    assert accelerator is not None
    report = evaluate(network(), batches(), attacks=ATTACKS, folder=folder, accelerator=accelerator)
    assert report.conditions["processes"] == 2
    report.save(Path(folder) / f"rank{accelerator.process_index}.json")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_give_the_results_of_one(model, tmp_path, monkeypatch):
    pytest.importorskip("pyautoattack")
    brief_autoattack(monkeypatch)  # in the two as well, which are forked
    expected = evaluate(model, batches(), attacks=ATTACKS)
    debug_launcher(_evaluate_shared, args=(str(tmp_path),), num_processes=2)
    for rank in range(2):
        assert outcomes(Report.load(tmp_path / f"rank{rank}.json")) == outcomes(expected), f"on process {rank}"
    lines = [(tmp_path / "outcomes" / f"{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [len(own) - 1 - 3 for own in lines] == [3 * 4, 2 * 4], "the batches were not shared"
    alone = evaluate(model, batches(), attacks=ATTACKS, folder=tmp_path)  # goes on with what two have begun
    assert outcomes(alone) == outcomes(expected)


class Wavering(nn.Module):
    """Random in eval mode on the second process only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        noise = torch.rand(()) if os.environ.get("RANK") == "1" or AcceleratorState().process_index == 1 else 0
        return self.model(given) + 0.1 * noise


def _evaluate_unlike(folder: str) -> None:
    """Two processes that would choose other attacks, and that are refused together."""
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = "2"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = join_processes()
    assert accelerator is not None
    suites = timm_fsr.evaluation.evaluator.build_suites
    asked: list[bool] = []
    timm_fsr.evaluation.evaluator.build_suites = lambda names, target: (
        asked.append(target.model_check.random) or suites(names, target)
    )
    evaluate(Wavering(network()), batches(), attacks=["fgsm"], folder=folder, accelerator=accelerator)
    with pytest.raises(ValueError, match="another evaluation: its seed is 0"):
        evaluate(Wavering(network()), batches(), attacks=[], seed=1, folder=folder, accelerator=accelerator)
    # Shuffled by each process on its own, some images would be judged twice and others never.
    first, second, *rest = batches()
    for shuffled, what in (([second, first, *rest], "first batches"), ([first, *rest, second], "images or labels")):
        data = batches() if accelerator.is_main_process else shuffled
        with pytest.raises(ValueError, match=f"the processes have different {what} .* in the same order"):
            evaluate(network(), data, attacks=[], accelerator=accelerator)
    (Path(folder) / f"{accelerator.process_index}.txt").write_text(str(asked))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_choose_the_same_attacks_and_are_refused_together(tmp_path):
    debug_launcher(_evaluate_unlike, args=(str(tmp_path),), num_processes=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["[False]", "[False]"]


class TestRescore:
    def test_saved_images_give_the_same_outcomes_again(self, model, tmp_path):
        report = evaluate(model, batches(2), attacks=["fgsm", "pgd3"], folder=tmp_path, save_images=True)
        found = rescore(model, tmp_path)
        assert {name: outcome.correct.tolist() for name, outcome in found.items()} == {
            name: report.correct[name].tolist() for name in ("fgsm", "pgd3")
        }

    def test_of_a_chain_the_last_state_is_kept_also_after_a_kill(self, model, tmp_path):
        whole = evaluate(model, batches(1), attacks=[chain(Dying(0))], folder=tmp_path / "whole", save_images=True)
        with pytest.raises(Killed):
            evaluate(model, batches(1), attacks=[chain(Dying(3))], folder=tmp_path / "cut", save_images=True)
        evaluate(model, batches(1), attacks=[chain(Dying(0))], folder=tmp_path / "cut", save_images=True)
        for folder in ("whole", "cut"):
            right = rescore(model, tmp_path / folder)["chain"].correct
            assert right[whole.correct["clean"]].tolist() == whole.correct["chain"][whole.correct["clean"]].tolist()

    def test_on_another_model_it_is_a_transfer(self, model, tmp_path):
        evaluate(model, batches(1), attacks=["fgsm"], folder=tmp_path, save_images=True)
        other = tiny_resnet().eval()
        stored = attacked_batches(tmp_path, "fgsm")
        expected = [other(batch.images).argmax(1) == batch.labels for batch in stored]
        found = rescore(other, tmp_path)["fgsm"]
        assert torch.equal(found.correct, torch.cat(expected))
        assert bool(found.perturbed.all())
        assert found.sentence().endswith("right (6 images)")

    def test_it_is_said_how_many_images_the_attack_has_changed(self, model, tmp_path):
        """AutoAttack's parts and chains leave images alone that are wrong already: a weak transfer."""
        evaluate(model, batches(2), attacks=[chain(Dying(0))], folder=tmp_path, save_images=True)
        found = rescore(model, tmp_path)["chain"]
        assert found.perturbed.tolist() == [False, *[True] * 5, True, False, *[True] * 4]
        flags = torch.tensor([True, False, False, True])
        said = Rescored(flags, torch.tensor([False, True, True, True])).sentence()
        assert said.startswith("50.00 % right (4 images); the attack changed 3 of them, of which 33.33 % are right: ")
        assert "save images of an attack that changes every one, such as pgd100 or apgd100" in said
        assert "the attack changed 0 of them: " in Rescored(flags, ~torch.ones(4).bool()).sentence()

    def test_other_images_in_the_same_folder(self, model, tmp_path):
        """A batch of the same number, but with other images, more of them or fewer, and then fewer batches."""
        (given, truth), *rest = batches(3)
        for data in ([(given[:2], truth[:2])], [(given, truth), *rest], [(given[:3], truth[:3])], batches(2)):
            report = evaluate(model, data, attacks=["fgsm", "pgd2"], folder=tmp_path, save_images=True)
            for name, outcome in rescore(model, tmp_path).items():
                assert outcome.correct.tolist() == report.correct[name].tolist()

    def test_other_parameters_in_the_same_folder(self, model, tmp_path):
        for run in (Dying(0), Dying(0)):
            run.at = 0
            suite = Suite("mine", (Stage("one", f"noise {id(run)}", run),))
            report = evaluate(model, batches(1), attacks=[suite], folder=tmp_path, save_images=True)
            assert run.calls == 1
            assert rescore(model, tmp_path)["mine"].correct[1:].tolist() == report.correct["mine"][1:].tolist()

    @pytest.mark.parametrize("kept_at_first", [False, True])
    @pytest.mark.parametrize("at", [0, 2, 3], ids=["whole", "after one", "after two"])
    def test_images_that_are_asked_for_later_are_made(self, model, tmp_path, at, kept_at_first):
        """Even if outcomes are known already: in part or all of them, with images of only a part or without."""
        whole = evaluate(model, batches(1), attacks=[chain(Dying(0))])
        if kept_at_first:
            with pytest.raises(Killed):
                evaluate(model, batches(1), attacks=[chain(Dying(2))], folder=tmp_path, save_images=True)
        with contextlib.suppress(Killed):
            evaluate(model, batches(1), attacks=[chain(Dying(at))], folder=tmp_path)
        report = evaluate(model, batches(1), attacks=[chain(Dying(0))], folder=tmp_path, save_images=True)
        assert outcomes(report) == outcomes(whole)
        expected = evaluate(model, batches(1), attacks=[chain(Dying(0))], folder=tmp_path / "whole", save_images=True)
        assert outcomes(expected) == outcomes(whole)
        found, wanted = (next(attacked_batches(path, "chain")).images for path in (tmp_path, tmp_path / "whole"))
        assert torch.equal(found, wanted)

    def test_overwriting_another_evaluation_removes_its_images(self, model, tmp_path):
        evaluate(model, batches(1), attacks=["fgsm"], folder=tmp_path, save_images=True)
        evaluate(tiny_resnet(), batches(1), attacks=["pgd2"], folder=tmp_path, save_images=True, overwrite=True)
        assert list(rescore(model, tmp_path)) == ["pgd2"]

    def test_images_that_do_not_fit(self, model, tmp_path):
        evaluate(model, batches(1), attacks=["fgsm"], folder=tmp_path, save_images=True)
        with pytest.raises(ValueError, match="images have 3 channels but the model takes 1"):
            rescore(tiny_resnet(in_chans=1), tmp_path)
