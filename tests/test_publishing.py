"""Push and pull by the real client of the Hub, over HTTP, against a server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import timm_fsr
from timm_fsr.hub import weights_digest
from timm_fsr.publishing import FILES, collect, push_folder
from timm_fsr.report import Report

CLIENT = Path(__file__).with_name("hub_client.py")
RECIPE = {"seed": 0, "output": "runs/x", "model": {"name": "resnet_tiny_cifar", "layer": "fsr"}}


class Client:
    """A process of its own with a cache of its own, which does what tests/hub_client.py knows."""

    def __init__(self, hub: HubServer, home: Path, token: str | None = "hf_owner", **environment: str) -> None:
        settings = {**hub.environment(home, token), **environment}
        command = [sys.executable, str(CLIENT)]
        self.process = subprocess.Popen(
            command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, name: str, *positional: Any, **named: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps([name, positional, named]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def do(self, name: str, *positional: Any, **named: Any) -> Any:
        """What came of it, which has to be no error."""
        answer = self.ask(name, *positional, **named)
        assert "value" in answer, answer
        return answer["value"]

    def fails(self, kind: str, text: str, name: str, *positional: Any, **named: Any) -> None:
        answer = self.ask(name, *positional, **named)
        assert answer.get("kind") == kind, answer
        assert text in answer["message"]

    @contextmanager
    def using(self, token: str | None) -> Iterator[None]:
        """Within it the process has another token, or none."""
        self.do("setenv", "HF_TOKEN", token)
        try:
            yield
        finally:
            self.do("setenv", "HF_TOKEN", "hf_owner")

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: HubServer, home: Path) -> Iterator[Client]:
    process = Client(hub, home)
    yield process
    process.close()


@pytest.fixture
def repo(hub: HubServer, request: pytest.FixtureRequest) -> str:
    """A name that no other test uses; what was planned for another test is forgotten."""
    hub._plans.clear()
    hub.requests.clear()
    return f"owner/test-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8]}"


def network(seed: int = 0, **arguments: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet_tiny_cifar_fsr", num_classes=4, fsr_hidden=4, **arguments).eval()


def report_on(network: torch.nn.Module, **conditions: Any) -> Report:
    right = torch.tensor([True, True, False, True])
    return Report(
        correct={"clean": right, "pgd20": right & torch.tensor([True, False, True, False])},
        attacks={"pgd20": "PGD(...)"},
        norm="linf",
        eps=8 / 255,
        seed=0,
        labels=torch.arange(4),
        conditions={"model": "x", "data": "toys[test]", "weights_sha256": weights_digest(network), **conditions},
    )


def save(folder: Path, seed: int = 0, **conditions: Any) -> Path:
    model = network(seed)
    return timm_fsr.save_pretrained(model, folder, report=report_on(model, **conditions), recipe=RECIPE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "saved")


def logits(model: torch.nn.Module) -> list[float]:
    given = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return list(model.eval()(given).flatten().tolist())


def sent(hub: HubServer, method: str, text: str) -> int:
    return sum(one == method and text in path for one, path, _ in hub.requests)


class TestPush:
    def test_one_commit_holds_everything_and_timm_loads_it_bit_for_bit(self, hub, client, repo, saved):
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        done = client.do("push", str(saved), repo)
        first, second = hub.repos[repo].commits
        assert set(second.files) - set(first.files) == set(FILES)
        assert done == {
            "repo_id": repo,
            "url": f"{hub.url}/{repo}/commit/{second.oid}",
            "commit": second.oid,
            "changed": True,
        }
        assert second.files["model.safetensors"] == before["model.safetensors"]
        assert second.files["config.json"] == before["config.json"]
        card = second.files["README.md"].decode()
        assert f'timm.create_model("hf-hub:{repo}", pretrained=True)' in card
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before, "the folder was changed"
        expected = logits(network())
        with client.using(None):
            assert client.do("create", f"hf-hub:{repo}") == expected
            assert client.do("load", repo) == expected
            assert client.do("load", f"{repo}@{second.oid}") == expected

    def test_a_model_in_memory(self, hub, client, repo, saved):
        client.do("push_model", str(saved), repo, recipe=RECIPE, license="mit")
        files = hub.repos[repo].commits[-1].files
        assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
        assert "license: mit" in files["README.md"].decode()

    def test_the_same_again_makes_no_commit(self, hub, client, repo, saved):
        first = client.do("push", str(saved), repo)
        again = client.do("push", str(saved), repo)
        assert again == {**first, "changed": False}
        assert len(hub.repos[repo].commits) == 2

    def test_what_has_changed_is_one_more_commit(self, hub, client, repo, tmp_path):
        client.do("push", str(save(tmp_path / "a")), repo)
        client.do("push", str(save(tmp_path / "b", seed=1)), repo)
        assert len(hub.repos[repo].commits) == 3
        assert client.do("load", repo) == logits(network(1))

    def test_a_reviewed_card_is_pushed_unchanged(self, hub, client, repo, saved):
        card = collect(saved, repo)["README.md"] + b"\nReviewed.\n"
        (saved / "README.md").write_bytes(card)
        client.do("push", str(saved), repo)
        assert hub.repos[repo].commits[-1].files["README.md"] == card

    def test_no_path_of_the_machine_leaves_it(self, hub, client, repo, tmp_path):
        home = str(tmp_path / "my data" / "toys")
        folder = save(tmp_path / "saved", model=f"{home}/best", data=f"{home}[test]", training_data=f"{home}[train]")
        recipe = {**RECIPE, "output": str(tmp_path), "data": {"source": home}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        client.do("push", str(folder), repo)
        files = hub.repos[repo].commits[-1].files
        everything = b"".join(files[name] for name in FILES if name.endswith((".md", ".json", ".yaml")))
        assert str(tmp_path).encode() not in everything
        assert b"toys[test]" in everything

    def test_a_branch(self, hub, client, repo, tmp_path):
        client.do("push", str(save(tmp_path / "a")), repo)
        client.do("push", str(save(tmp_path / "b", seed=1)), repo, revision="longer")
        assert len(hub.repos[repo].commits) == 2
        assert client.do("create", f"hf-hub:{repo}@longer") == logits(network(1))
        assert client.do("create", f"hf-hub:{repo}") == logits(network())

    def test_a_branch_of_a_new_repository(self, hub, client, repo, saved):
        client.do("push", str(saved), repo, revision="first")
        assert client.do("load", f"{repo}@first") == logits(network())

    def test_a_pull_request_leaves_the_branch_alone(self, hub, client, repo, tmp_path):
        client.do("push", str(save(tmp_path / "a")), repo)
        done = client.do("push", str(save(tmp_path / "b", seed=1)), repo, create_pr=True)
        assert done["url"].endswith("/discussions/1")
        assert len(hub.repos[repo].commits) == 2
        assert hub.repos[repo].pull_requests[1][-1].files["config.json"]

    def test_private(self, hub, client, repo, saved):
        client.do("push", str(saved), repo, private=True)
        assert hub.repos[repo].private
        with client.using(None):
            text = "or it is private; check the name, and run `hf auth login`"
            client.fails("FileNotFoundError", text, "load", repo)
        assert client.do("load", repo) == logits(network())

    def test_what_is_to_be_private_is_not_pushed_where_all_can_see_it(self, hub, client, repo, tmp_path):
        client.do("push", str(save(tmp_path / "a")), repo)
        text = "exists and is public, not private as asked for; nothing was pushed"
        client.fails("ValueError", text, "push", str(save(tmp_path / "b", seed=1)), repo, private=True)
        assert len(hub.repos[repo].commits) == 2


class TestTrouble:
    @pytest.mark.parametrize("outcome", [429, 503, 409, 412, "hang up", "hang up after"])
    def test_a_passing_failure_is_tried_again(self, hub, client, repo, saved, outcome):
        hub.fail("POST", f"{repo}/commit/", outcome, times=2)
        client.do("push", str(saved), repo)
        assert len(hub.repos[repo].commits) == 2
        assert client.do("load", repo) == logits(network())

    def test_a_busy_hub_is_reported_and_holds_nothing(self, hub, client, repo, saved):
        hub.fail("POST", f"{repo}/commit/", 503, times=10)
        text = "the Hub answers 503 to requests for " + repo
        client.fails("ConnectionError", text, "push", str(saved), repo)
        assert set(hub.repos[repo].commits[-1].files) == {".gitattributes"}
        hub._plans.clear()
        client.do("push", str(saved), repo)
        assert len(hub.repos[repo].commits) == 2

    def test_a_pull_request_is_not_opened_twice(self, hub, client, repo, saved):
        client.do("push", str(saved), repo)
        (saved / "README.md").write_bytes(collect(saved, repo)["README.md"] + b"\nReviewed.\n")
        hub.fail("POST", f"{repo}/commit/", "hang up after", times=1)
        client.fails("ConnectionError", "the connection to the Hub broke", "push", str(saved), repo, create_pr=True)
        assert len(hub.repos[repo].pull_requests) == 1

    def test_a_wrong_token(self, hub, client, repo, saved):
        with client.using("hf_of_yesterday"):
            text = "the Hub refused the access token, with which not even public models can be had"
            client.fails("PermissionError", text, "push", str(saved), repo)
        assert repo not in hub.repos
        client.do("push", str(saved), repo)
        with client.using("hf_of_yesterday"):
            client.fails("PermissionError", text, "load", repo)

    def test_somebody_elses_repository(self, hub, client, repo, saved):
        client.do("push", str(saved), repo)
        (saved / "README.md").write_bytes(collect(saved, repo)["README.md"] + b"\nMine.\n")
        with client.using("hf_reader"):
            client.fails("PermissionError", "does not allow this with the token at hand", "push", str(saved), repo)
        assert len(hub.repos[repo].commits) == 2

    def test_no_token(self, hub, client, repo, saved):
        with client.using(None):
            answer = client.ask("push", str(saved), repo)
        assert answer["kind"] == "PermissionError"
        assert "hf auth login" in answer["message"]
        assert repo not in hub.repos

    def test_somebody_commits_in_between(self, hub, client, repo, saved):
        client.do("push", str(saved), repo)
        (saved / "README.md").write_bytes(collect(saved, repo)["README.md"] + b"\nReviewed.\n")
        hub.on("POST", f"{repo}/commit/", lambda: hub.repos[repo].commit({"notes.txt": b"theirs"}))
        client.do("push", str(saved), repo)
        files = hub.repos[repo].commits[-1].files
        assert files["notes.txt"] == b"theirs"
        assert files["README.md"].endswith(b"Reviewed.\n")

    @pytest.mark.parametrize("create_pr", [False, True])
    def test_a_model_pushed_in_between_is_not_mixed_with_ours(self, hub, client, repo, tmp_path, create_pr):
        """The client leaves out files that have not changed; on top of another model they would be missing."""
        ours = save(tmp_path / "a")
        client.do("push", str(ours), repo)
        (ours / "README.md").write_bytes(collect(ours, repo)["README.md"] + b"\nReviewed.\n")
        theirs = collect(save(tmp_path / "b", seed=1), repo)
        hub.on("POST", f"{repo}/commit/", lambda: hub.repos[repo].commit(theirs))
        client.do("push", str(ours), repo, create_pr=create_pr)
        history = hub.repos[repo].pull_requests[1] if create_pr else hub.repos[repo].commits
        expected = collect(ours, repo)
        assert {name: history[-1].files[name] for name in FILES} == expected

    def test_two_pushes_at_once_leave_one_model_whole(self, hub, client, repo, tmp_path):
        folders = [save(tmp_path / name, seed) for seed, name in enumerate("ab")]
        other = Client(hub, tmp_path / "home")
        threads = [
            threading.Thread(target=one.do, args=("push", str(folder), repo))
            for one, folder in zip((client, other), folders, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other.close()
        files = hub.repos[repo].commits[-1].files
        winner = [f for f in folders if (f / "model.safetensors").read_bytes() == files["model.safetensors"]]
        assert (winner[0] / "config.json").read_bytes() == files["config.json"]
        assert client.do("load", repo) in [logits(network(0)), logits(network(1))]

    def test_a_bad_name(self, client, saved):
        client.fails("ValueError", "is no name of a repository", "push", str(saved), "a/b/c")


class TestParts:
    """What is missing or wrong is found before anything is sent; here the Hub is even out of reach."""

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "report.json", "recipe.yaml"])
    def test_a_missing_part(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"lacks {name}; a published model has"):
            push_folder(saved, "owner/name")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("config.json", "{", "damaged"),
            ("report.json", "{}", "schema version"),
            ("report.json", "nothing", "not JSON"),
            ("recipe.yaml", "a: [", "damaged"),
            ("recipe.yaml", "text", "holds no keys"),
            ("README.md", "# A card without metadata\n", "library_name"),
            ("README.md", "---\nlicense: [\n---\n", "not valid"),
        ],
    )
    def test_a_part_that_is_none(self, saved, name, text, message):
        (saved / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            push_folder(saved, "owner/name")

    def test_exchanged_weights(self, saved, tmp_path):
        shutil.copy(save(tmp_path / "other", seed=1) / "model.safetensors", saved)
        with pytest.raises(ValueError, match="damaged or were exchanged"):
            push_folder(saved, "owner/name")

    def test_a_report_about_other_weights(self, saved):
        report_on(network(1)).save(saved / "report.json")
        with pytest.raises(ValueError, match=r"report\.json is about other weights"):
            push_folder(saved, "owner/name")

    def test_a_report_that_does_not_say_what_it_is_about(self, saved):
        report = report_on(network())
        del report.conditions["weights_sha256"]
        report.save(saved / "report.json")
        with pytest.raises(ValueError, match="does not say which weights"):
            push_folder(saved, "owner/name")

    def test_a_folder_that_changes_meanwhile(self, saved, tmp_path, monkeypatch):
        """Between the check and the reading, as a training that goes on may do."""
        other = save(tmp_path / "other", seed=1)
        original = timm_fsr.publishing.check_card

        def changed(*arguments: Any) -> None:
            original(*arguments)
            shutil.copy(other / "model.safetensors", saved)

        monkeypatch.setattr(timm_fsr.publishing, "check_card", changed)
        with pytest.raises(ValueError, match="was changed while it was read"):
            push_folder(saved, "owner/name")

    def test_the_card_of_another_evaluation(self, saved):
        (saved / "README.md").write_bytes(collect(saved, "owner/name")["README.md"].replace(b"75.0\n", b"95.0\n"))
        with pytest.raises(ValueError, match="the card is of another evaluation"):
            push_folder(saved, "owner/name")

    def test_a_model_without_a_recipe(self):
        model = network()
        with pytest.raises(FileNotFoundError, match=r"lacks recipe\.yaml"):
            timm_fsr.push_to_hub(model, "owner/name", report=report_on(model))


class TestPull:
    def test_other_classes_and_channels(self, client, repo, saved):
        client.do("push", str(saved), repo)
        assert len(client.do("load", repo, num_classes=7)) == 2 * 7
        assert len(client.do("create", f"hf-hub:{repo}", num_classes=7, in_chans=1)) == 2 * 7

    def test_from_the_cache_without_a_request(self, hub, client, repo, saved, home):
        client.do("push", str(saved), repo)
        assert client.do("load", repo) == logits(network())
        hub.requests.clear()
        offline = Client(hub, home, None, HF_HUB_OFFLINE="1")
        assert offline.do("load", repo) == logits(network())
        assert offline.do("create", f"hf-hub:{repo}") == logits(network())
        offline.fails("FileNotFoundError", "is not in the cache", "load", "owner/never-seen")
        offline.fails("ConnectionError", "HF_HUB_OFFLINE is set; unset it", "push", str(saved), repo)
        offline.close()
        assert hub.requests == []

    def test_a_hub_that_is_gone(self, repo, saved, tmp_path):
        with HubServer() as hub:
            client = Client(hub, tmp_path / "home")
            client.do("push", str(saved), repo)
            client.do("load", repo)
        assert client.do("load", repo) == logits(network()), "the cache has it"
        client.fails("FileNotFoundError", "check your connection", "load", "owner/never-seen")
        client.fails("ConnectionError", "the connection to the Hub broke", "push", str(saved), "owner/never-seen")
        client.close()

    @pytest.mark.parametrize(
        ("kind", "text", "name"),
        [
            ("FileNotFoundError", "the Hub has no model owner/nothing", "owner/nothing"),
            ("FileNotFoundError", "has no such revision", "{repo}@nowhere"),
            ("ValueError", "is no name of a repository", "hf-hub:a/b/c"),
        ],
    )
    def test_what_does_not_exist(self, client, repo, saved, kind, text, name):
        client.do("push", str(saved), repo)
        client.fails(kind, text, "load", name.format(repo=repo))

    def test_a_busy_hub(self, hub, client, repo, saved):
        client.do("push", str(saved), repo)
        hub.fail("HEAD", repo, 503, times=30)
        answer = client.ask("load", repo)
        hub._plans.clear()
        assert answer["kind"] in ("ConnectionError", "FileNotFoundError"), answer
        assert "try again later" in answer["message"] or "check your connection" in answer["message"]

    def test_a_repository_without_a_model(self, hub, client, repo, saved):
        client.do("push", str(saved), repo)
        hub.repos[repo].commit({"config.json": None})
        client.fails("FileNotFoundError", "lacks a file that a timm model has", "load", repo)

    @pytest.mark.parametrize("by", ["load", "create"])
    def test_exchanged_weights(self, hub, client, repo, saved, by):
        """Another network's weights of the same shapes, which nothing but the checksum tells apart."""
        client.do("push", str(saved), repo)
        tensors = load_tensors((saved / "model.safetensors").read_bytes())
        changed: dict[str, Tensor] = {**tensors, "fc.bias": tensors["fc.bias"] + 1}
        hub.repos[repo].commit({"model.safetensors": save_tensors(changed)})
        name = repo if by == "load" else f"hf-hub:{repo}"
        client.fails("ValueError", "damaged or were exchanged: the SHA-256 of model.safetensors", by, name)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"architecture": "resnet_tiny_cifar_mist"}, "knows no feature layer 'mist' (it has "),
            ({"architecture": "resnext_of_tomorrow"}, "import the package that registers it, or update timm"),
            ({"timm_fsr": {"format": 99, "version": "9.0"}}, "was saved by timm_fsr 9.0 in format 99"),
            ({"timm_fsr": "?"}, "is damaged"),
            ({"num_classes": None, "architecture": None}, "is damaged"),
        ],
    )
    def test_a_configuration_from_elsewhere(self, hub, client, repo, saved, change, text):
        client.do("push", str(saved), repo)
        config = json.loads((saved / "config.json").read_text())
        hub.repos[repo].commit({"config.json": json.dumps({**config, **change}).encode()})
        client.fails("ValueError", text, "load", repo)


class TestTags:
    @pytest.fixture
    def tagged(self, tmp_path: Path) -> Path:
        """A checkpoint that the registry describes without having its weights."""
        folder = save(tmp_path / "resnet_tiny_cifar_fsr.on_toys")
        (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
        return folder

    def test_weights_come_from_the_namespace(self, hub, client, repo, saved, tagged, tmp_path):
        client.do("setenv", "TIMM_FSR_HUB", "owner")
        name = client.do("register", str(tagged))
        assert name == "resnet_tiny_cifar_fsr.on_toys"
        client.fails("FileNotFoundError", "the Hub has no model", "load", name)
        client.do("push", str(saved), f"owner/{name}")
        assert client.do("create", name) == logits(network())
        assert client.do("load", name) == logits(network())
        assert len(client.do("load", name, num_classes=7, in_chans=1)) == 2 * 7
        code, text = client.do("command", "models")
        assert code == 0
        assert f"hf-hub:owner/{name}" in text
        hub.repos[f"owner/{name}"].commit(collect(save(tmp_path / "other", seed=1), "owner/x"))
        client.fails("ValueError", "damaged or were exchanged", "load", name)


class TestCommand:
    def test_push(self, hub, client, repo, saved):
        code, text = client.do("command", "push", str(saved), repo, "--dry-run")
        assert code == 0
        assert "all parts are valid" in text
        assert hub.requests == []
        code, text = client.do("command", "push", str(saved), repo, "--private")
        assert code == 0, text
        assert "no card, so one is generated" in text
        assert hub.repos[repo].commits[-1].oid in text
        code, text = client.do("command", "push", str(saved), repo)
        assert (code, "no commit" in text) == (0, True)
        code, text = client.do("command", "push", str(saved / "nothing"), repo)
        assert (code, "timm-fsr push: error: " in text) == (2, True)


def test_fine_tuning_a_published_model(hub, client, repo, saved, tmp_path):
    """By name in a recipe, on images of other classes; the card says what it started from."""
    client.do("push", str(saved), repo)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "train.npz", image=pixels, label=np.arange(40) % 3)
    run = tmp_path / "run"
    flags = {
        "output": run,
        "model.name": f"hf-hub:{repo}",
        "data.source": tmp_path / "train.npz",
        "data.test_split": "train",
        "data.held_out": 8,
        "optim.epochs": 1,
        "optim.batch_size": 16,
        "attack.steps": 1,
        "evaluation.attacks": "[fgsm]",
        "evaluation.validation_steps": 1,
    }
    given = [f"--{key}={value}" for key, value in flags.items()]
    code, text = client.do("command", "train", *given)
    assert code == 0, text
    code, text = client.do("command", "push", str(run / "best"), f"{repo}-tuned")
    assert code == 0, text
    files = hub.repos[f"{repo}-tuned"].commits[-1].files
    assert f"base_model: {repo}" in files["README.md"].decode()
    config = json.loads(files["config.json"])
    assert (config["architecture"], config["num_classes"]) == ("resnet_tiny_cifar_fsr", 3)
    assert config["model_args"]["fsr_hidden"] == 4
    assert len(client.do("load", f"{repo}-tuned")) == 2 * 3
