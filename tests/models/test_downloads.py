"""Downloads by the real client of the Hub, over HTTP, against a server on the loopback interface."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from support.hub_server import HubServer
from support.hub_tools import Client, logits, network, save
from torch import Tensor

from timm_fsr.hub.publish import collect

ROOT = Path(__file__).parents[2]


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

    @pytest.mark.parametrize("by", ["load", "create"])
    @pytest.mark.parametrize("other", ["no weights", "another file", "not answered"])
    def test_weights_that_cannot_be_checked_are_not_loaded(self, hub, client, repo, saved, by, other, tmp_path):
        client.do("push", str(saved), repo)
        tensors = load_tensors((saved / "model.safetensors").read_bytes())
        torch.save({**tensors, "fc.bias": tensors["fc.bias"] + 1}, tmp_path / "bin")
        config = json.loads((saved / "config.json").read_text())
        named = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "hf_hub_filename": "pytorch_model.bin"}}
        changes = {"pytorch_model.bin": (tmp_path / "bin").read_bytes()}
        if other == "no weights":
            changes["model.safetensors"] = None
        if other == "another file":
            changes["config.json"] = json.dumps(named).encode()
        hub.repos[repo].commit(changes)
        if other == "not answered":
            hub.fail("HEAD", f"{repo}/resolve/", 503, times=1)  # which the client repeats
            hub.fail("HEAD", "model.safetensors", 503, times=7)  # until it gives up; here the Hub recovers
            answer = client.ask(by, repo if by == "load" else f"hf-hub:{repo}")
            hub._plans.clear()
            assert answer.get("value") in (None, logits(network())), answer
            return
        client.fails("ValueError", "cannot be checked", by, repo if by == "load" else f"hf-hub:{repo}")

    def test_a_busy_hub_is_not_told_as_a_missing_file(self, hub, repo, saved, tmp_path, client):
        client.do("push", str(saved), repo)
        fresh = Client(hub, tmp_path / "home")
        hub.fail("HEAD", "model.safetensors", 503, times=99)
        fresh.fails("ConnectionError", f"the Hub answers 503 to requests for {repo}", "load", repo)
        hub._plans.clear()
        fresh.close()

    @pytest.mark.parametrize("by", ["load", "create"])
    def test_what_is_pushed_meanwhile_is_neither_loaded_nor_called_damage(self, hub, client, repo, tmp_path, by):
        """Configuration and weights are of one commit; here the next version comes between the two."""
        client.do("push", str(save(tmp_path / "a")), repo)
        newer = collect(save(tmp_path / "b", seed=1), repo)
        for _ in range(2):
            hub.on("HEAD", "model.safetensors", lambda: hub.repos[repo].commit(newer))
        found = client.do(by, repo if by == "load" else f"hf-hub:{repo}")
        hub._plans.clear()
        assert found == logits(network())

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"architecture": "resnet_tiny_cifar_mist"}, "knows no feature layer 'mist' (it has "),
            ({"architecture": "resnext_of_tomorrow"}, "import the package that registers it, or update timm"),
            ({"timm_fsr": {"format": 99, "version": "9.0"}}, "was saved by timm_fsr 9.0 in format 99"),
            ({"timm_fsr": "?"}, "is damaged"),
            ({"model_args": {"fsr_new": 1}, "timm_fsr": {"version": "9.0"}}, "it was saved by timm_fsr 9.0 (this is"),
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
        other = collect(save(tmp_path / "other", seed=1), f"owner/{name}")
        torch.save(load_tensors(other.pop("model.safetensors")), tmp_path / "bin")
        only = {"config.json": None, "model.safetensors": None, "pytorch_model.bin": (tmp_path / "bin").read_bytes()}
        hub.repos[f"owner/{name}"].commit(only)
        for by in ("load", "create"):
            client.fails("ValueError", "cannot be checked: it has no model.safetensors", by, name)
        hub.repos[f"owner/{name}"].commit(collect(save(tmp_path / "third", seed=1), f"owner/{name}"))
        client.fails("ValueError", "damaged or were exchanged", "load", name)


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an installed package has no docs/")
def test_fine_tuning_a_published_model(hub, client, repo, saved, tmp_path):
    """By the line of docs/hub.md, on images of other classes; the card says what it started from."""
    client.do("push", str(saved), repo)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "train_and_test.npz", image=pixels, label=np.arange(40) % 3)
    run = tmp_path / "run"
    line = re.search(r"^timm-fsr train .*hf-hub:user/name.*$", (ROOT / "docs" / "hub.md").read_text(), re.MULTILINE)[0]
    line = line.replace("user/name", repo).replace("FOLDER", str(tmp_path / "train_and_test.npz"))
    flags = {
        "output": run,
        "data.test_split": "train_and_test",
        "data.held_out": 8,
        "optim.epochs": 1,
        "optim.batch_size": 16,
        "attack.steps": 1,
        "evaluation.attacks": "[fgsm]",
        "evaluation.validation_steps": 1,
    }
    given = [part.replace("recipes/", f"{ROOT}/recipes/") for part in shlex.split(line)[2:]]
    given += [f"--{key}={value}" for key, value in flags.items()]
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
