"""Pushes by the real client of the Hub, over HTTP, against a server on the loopback interface."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.hub_server import Repo
from support.hub_tools import FILES, RECIPE, Client, logits, network, report_on, save

import timm_fsr
from timm_fsr.hub.publish import collect
from timm_fsr.training.recipe import Recipe

CARDS = Path(__file__).parents[2] / "hub_cards"


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

    @pytest.mark.parametrize(
        ("recipe", "shown", "stored"),
        [
            (None, "**The training is not documented**: no recipe came with the weights.", None),
            ("  Ten epochs of AT.\nBy hand. ", "| description | Ten epochs of AT. By hand. |", "description: "),
            ({"lr": 0.1, "model": "a | b"}, "| model | a \\| b |", "lr: 0.1\n"),
        ],
    )
    def test_a_model_that_other_code_trained(self, hub, client, repo, saved, recipe, shown, stored):
        """Its author may say how, in a text or keys and values; the card never promises that it can be repeated."""
        client.do("push", str(saved), repo)
        assert "recipe.yaml" in hub.repos[repo].commits[-1].files
        client.do("push_model", str(saved), repo, recipe=recipe, license="mit")
        files = hub.repos[repo].commits[-1].files
        card = files["README.md"].decode()
        assert "whose training is not documented" in card
        assert "The training is not documented" in card
        assert shown in card
        assert "timm-fsr train --config" not in card
        assert "Training images: not documented." in card
        assert "unnamed" not in card
        assert "datasets:" not in card
        assert ("recipe.yaml" in files) == (stored is not None), "the recipe of the model before is not this one's"
        assert stored is None or stored in files["recipe.yaml"].decode()
        assert client.do("push_model", str(saved), repo, recipe=recipe, license="mit")["changed"] is False
        assert client.do("load", repo) == logits(network())

    def test_a_pull_request_without_a_recipe_is_found_again(self, hub, client, repo, saved):
        client.do("push", str(saved), repo)
        first = client.do("push_model", str(saved), repo, license="mit", create_pr=True)
        assert "recipe.yaml" not in hub.repos[repo].pull_requests[1][-1].files
        assert client.do("push_model", str(saved), repo, license="mit", create_pr=True) == {**first, "changed": False}

    def test_a_recipe_of_ours_is_a_recipe(self, tmp_path):
        recipe = Recipe.load(overrides=["--output=/home/joe/runs/x", "--model.layer=fsr"])
        model = network()
        folder = timm_fsr.save_pretrained(model, tmp_path, report=report_on(model), recipe=recipe, license="mit")
        files = collect(folder, "us/toy")
        card = files["README.md"].decode()
        assert "`timm-fsr train --config recipe.yaml` repeats it" in card
        assert "trained on Fashion-MNIST" in card
        assert b"joe" not in files["recipe.yaml"]
        (folder / "recipe.yaml").write_bytes(files["recipe.yaml"])
        again = Recipe.load(folder / "recipe.yaml")
        assert again == dataclasses.replace(recipe, output=again.output)

    def test_the_same_again_makes_no_commit(self, hub, client, repo, saved):
        first = client.do("push", str(saved), repo)
        again = client.do("push", str(saved), repo)
        assert again == {**first, "changed": False}
        assert len(hub.repos[repo].commits) == 2

    def test_exported_files_come_with_it_and_go_with_its_weights(self, hub, client, repo, saved, tmp_path):
        first = client.do("push", str(saved), repo, formats=["pt2"])
        files = hub.repos[repo].commits[-1].files
        assert f"`{hashlib.sha256(files['model.pt2']).hexdigest()}`" in files["README.md"].decode()
        assert client.do("push", str(saved), repo, formats=["pt2"]) == {**first, "changed": False}
        assert not (saved / "model.pt2").exists(), "the folder is only read"
        client.do("push", str(save(tmp_path / "other", seed=1)), repo)
        files = hub.repos[repo].commits[-1].files
        assert "model.pt2" not in files, "it is about the weights before"
        assert "### Without timm" not in files["README.md"].decode()

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

    @pytest.mark.parametrize(
        ("outcome", "text"),
        [
            ("hang up", "the connection to the Hub broke"),
            (503, "the Hub answers 503"),
            (403, "refused uploads"),
        ],
    )
    def test_an_upload_of_the_weights_that_fails(self, hub, client, repo, saved, outcome, text):
        """The client repeats such a request itself, a few times."""
        hub.fail("PUT", f"/storage/{repo}/", outcome, times=99)
        client.fails("ConnectionError", text, "push", str(saved), repo)
        assert set(hub.repos[repo].commits[-1].files) == {".gitattributes"}
        hub._plans.clear()
        hub.fail("PUT", f"/storage/{repo}/", outcome, times=0 if outcome == 403 else 8)
        client.do("push", str(saved), repo)
        hub._plans.clear()
        assert client.do("load", repo) == logits(network())

    @pytest.mark.parametrize("outcome", ["hang up after", "504 after"])
    def test_a_pull_request_is_not_opened_twice(self, hub, client, repo, saved, outcome):
        """Not by the same push, which does not know that it was done, and not by the next, which looks first."""
        client.do("push", str(saved), repo)
        (saved / "README.md").write_bytes(collect(saved, repo)["README.md"] + b"\nReviewed.\n")
        hub.fail("POST", f"{repo}/commit/", outcome, times=1)
        client.fails("ConnectionError", "the same command completes it", "push", str(saved), repo, create_pr=True)
        assert len(hub.repos[repo].pull_requests) == 1
        done = client.do("push", str(saved), repo, create_pr=True)
        commit = hub.repos[repo].pull_requests[1][-1].oid
        expected = {"repo_id": repo, "url": f"{hub.url}/{repo}/discussions/1", "commit": commit, "changed": False}
        assert done == expected
        (saved / "README.md").write_bytes(collect(saved, repo)["README.md"] + b"\nAgain.\n")
        assert client.do("push", str(saved), repo, create_pr=True)["url"].endswith("discussions/2")

    def test_a_pull_request_and_a_branch_exclude_each_other(self, saved):
        with pytest.raises(ValueError, match="leave out create_pr or revision"):
            timm_fsr.push_to_hub(saved, "owner/name", create_pr=True, revision="longer")

    def test_a_commit_that_was_made_but_not_answered_is_told_as_ours(self, hub, client, repo, saved):
        hub.fail("POST", f"{repo}/commit/", "hang up after")
        done = client.do("push", str(saved), repo)
        assert done["changed"]
        assert done["commit"] == hub.repos[repo].commits[-1].oid

    def test_a_public_repository_made_in_between_gets_no_private_model(self, hub, client, repo, saved):
        hub.on("POST", "repos/create", lambda: hub.repos.update({repo: Repo(private=False)}))
        text = "exists and is public, not private as asked for; nothing was pushed"
        client.fails("ValueError", text, "push", str(saved), repo, private=True)
        assert set(hub.repos[repo].commits[-1].files) == {".gitattributes"}

    def test_metadata_that_the_hub_does_not_accept_leave_no_empty_repository(self, hub, client, repo, saved):
        text = "nothing was pushed: make the card again by timm-fsr card"
        client.fails("ValueError", text, "push", str(saved), repo, license="licence-of-nowhere")
        assert repo not in hub.repos

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


class TestBundle:
    """What is missing or wrong is found before anything is sent; here the Hub is even out of reach."""

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "report.json"])
    def test_a_missing_part(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"lacks {name}; a published model has"):
            timm_fsr.push_to_hub(saved, "owner/name")

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
            timm_fsr.push_to_hub(saved, "owner/name")

    def test_a_token_is_not_published(self, saved, monkeypatch):
        """Recipes and reports lose it; a card or configuration that has it is refused."""
        monkeypatch.setenv("HF_TOKEN", "hf_of_an_owner")
        token = "hf_" + "aB3" * 11
        (saved / "recipe.yaml").write_text(yaml.safe_dump({"how": f"https://joe:pw@a.org/x?token={token}", "t": token}))
        sent = b"".join(
            content for name, content in collect(saved, "owner/name").items() if name != "model.safetensors"
        )
        assert token.encode() not in sent
        assert b"joe:pw" not in sent
        card = collect(saved, "owner/name")["README.md"].decode()
        for secret in (token, "hf_of_an_owner"):
            (saved / "README.md").write_text(f"{card}\nBy {secret}\n")
            with pytest.raises(ValueError, match=r"README\.md has an access token in it, .*revoke the token"):
                collect(saved, "owner/name")

    def test_exchanged_weights(self, saved, tmp_path):
        shutil.copy(save(tmp_path / "other", seed=1) / "model.safetensors", saved)
        with pytest.raises(ValueError, match="damaged or were exchanged"):
            timm_fsr.push_to_hub(saved, "owner/name")

    def test_a_report_about_other_weights(self, saved):
        report_on(network(1)).save(saved / "report.json")
        with pytest.raises(ValueError, match=r"report\.json is about other weights"):
            timm_fsr.push_to_hub(saved, "owner/name")

    def test_a_report_that_does_not_say_what_it_is_about(self, saved):
        report = report_on(network())
        del report.conditions["weights_sha256"]
        report.save(saved / "report.json")
        with pytest.raises(ValueError, match="does not say which weights"):
            timm_fsr.push_to_hub(saved, "owner/name")

    def test_a_folder_that_changes_meanwhile(self, saved, tmp_path, monkeypatch):
        """Between the check and the reading, as a training that goes on may do."""
        other = save(tmp_path / "other", seed=1)
        original = timm_fsr.hub.publish.check_card

        def changed(*arguments: Any) -> None:
            original(*arguments)
            shutil.copy(other / "model.safetensors", saved)

        monkeypatch.setattr(timm_fsr.hub.publish, "check_card", changed)
        with pytest.raises(ValueError, match="was changed while it was read"):
            timm_fsr.push_to_hub(saved, "owner/name")

    def test_the_card_of_another_evaluation(self, saved):
        (saved / "README.md").write_bytes(collect(saved, "owner/name")["README.md"].replace(b"75.0\n", b"95.0\n"))
        with pytest.raises(ValueError, match="the card belongs to another evaluation"):
            timm_fsr.push_to_hub(saved, "owner/name")

    def test_a_model_without_a_report(self):
        with pytest.raises(ValueError, match=r"needs the report of its evaluation; give report="):
            timm_fsr.push_to_hub(network(), "owner/name")

    @pytest.mark.parametrize("given", [{"report": report_on(network())}, {"recipe": RECIPE}])
    def test_a_folder_with_another_report_or_recipe(self, saved, given):
        with pytest.raises(ValueError, match="is a folder, which has its own; leave them out"):
            timm_fsr.push_to_hub(saved, "owner/name", **given)


class TestMetadata:
    """Judged by the client's own `ModelCard.validate`, which asks the server."""

    @pytest.mark.skipif(not CARDS.is_dir(), reason="an installed package has no hub_cards/")
    def test_the_published_cards_are_valid(self, client):
        cards = [path for path in CARDS.glob("*.md") if path.stem != "README"]
        assert cards
        for path in cards:
            client.do("validate", path.read_text())

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("license: apache-2.0", "license: My Own Licence"),
            ("type: accuracy", "type: [accuracy]"),
            ("- timm\n", "- 3\n"),
            ("value: 75.0", "value: many"),
        ],
    )
    def test_a_broken_one_is_not(self, client, saved, old, new):
        card = collect(saved, "owner/name")["README.md"].decode()
        client.do("validate", card)
        assert old in card
        client.fails("ValueError", "must be", "validate", card.replace(old, new))


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
