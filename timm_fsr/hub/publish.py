"""Publishing: one commit on the Hub with everything that belongs to a robust model, or none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from torch import nn

from timm_fsr.hub.bundle import Bundle, ExportedFile, read_bundle
from timm_fsr.hub.card import CardOptions, check_card, check_repo_id, render_card
from timm_fsr.hub.privacy import holds_token
from timm_fsr.models.export import check_formats, exported_bytes
from timm_fsr.models.pretrained import CARD, RECIPE, REPORT
from timm_fsr.models.remote_code import MODELLING, modelling_code
from timm_fsr.models.saving import WrittenRecipe, load, save_pretrained, weights_digest
from timm_fsr.models.weights import CONFIG, RECORD, WEIGHTS
from timm_fsr.reports.report import Report
from timm_fsr.utils.defaults import EXPORTS
from timm_fsr.utils.hub_errors import explained, retried


@dataclass(frozen=True)
class Published:
    """Where a push has led.

    Attributes:
        repo_id: "user/name".
        url: of the commit, or of the pull request.
        commit: its full hash.
        changed: False if the Hub had all of it already, so that no commit was made.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool


@dataclass(frozen=True)
class Push:
    """What is pushed, and where.

    Attributes:
        repo_id: "user/name".
        files: content by name.
        private: make a new repository private or public; None takes the Hub's default, and any existing one.
        revision: branch to commit to; made if missing. None is the main one.
        create_pr: open a pull request instead of committing to the branch.
        message: of the commit.
        token: None takes the one that the machine is logged in with.
    """

    repo_id: str
    files: Mapping[str, bytes]
    private: bool | None
    revision: str | None
    create_pr: bool
    message: str
    token: str | None


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    report: Report | None = None,
    recipe: WrittenRecipe | Mapping[str, Any] | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    baseline: Report | None = None,
    formats: Sequence[str] = (),
) -> Published:
    """Publish a model with its report, recipe and card, in one commit.

    A card (`README.md`) in a folder is pushed unchanged; without one, one is generated. The folder is only read. Paths
    of this machine in the report and the recipe are cut to their last part. An open pull request of yours that holds
    the same files is found, not doubled.

    Args:
        model: what `save_pretrained` takes, or the path of a folder that it wrote.
        repo_id: "user/name"; the repository is made if it does not exist.
        report: of the evaluation of this very model; a folder brings its own.
        recipe: how it was trained: a `timm_fsr.Recipe`, plain values, or a text about a training by other code; None
            takes the one that the report of a training run has, and without any the card says that the training is not
            documented. A folder brings its own.
        private: make a new repository private or public; None takes the Hub's default. An existing one must be so.
        revision: branch to commit to; made if missing.
        create_pr: open a pull request instead.
        message: of the commit.
        token: None takes HF_TOKEN or the one stored by `hf auth login`.
        license: of the weights; None takes the one that they were saved with, or that of the weights that the training
            started from. The licence of an architecture is never taken.
        base_model: "user/name" that the training started from; None takes what was really loaded.
        baseline: the report of the same training without the feature layer, for the card.
        formats: "pt2", "onnx": publish these exported files as well, which are made if the folder has none; see
            `timm_fsr.export`. Those of the folder are always published.

    Raises:
        ValueError, FileNotFoundError: a part is missing or does not belong to the others; nothing was sent.
        PermissionError, ConnectionError: the Hub refused or could not be reached; it holds all of the push or nothing.
    """
    card = CardOptions(license=license, base_model=base_model, baseline=baseline)
    formats = check_formats(formats) if formats else ()
    if not isinstance(model, nn.Module):
        if report is not None or recipe is not None:
            raise ValueError(
                f"report and recipe are for a model, but {model} is a folder, which has its own; leave them out, or "
                "write them into the folder by save_pretrained(model, folder, report=..., recipe=...)"
            )
        files = collect(model, repo_id, card, formats)
    elif report is None:
        raise ValueError("a published model needs the report of its evaluation; give report=timm_fsr.evaluate(...)")
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, folder, report=report, recipe=recipe, license=license)
            files = collect(folder, repo_id, card, formats)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request is made against main, not {revision!r}; leave out create_pr or revision")
    message = message or f"Publish {repo_id.rpartition('/')[2]} by timm_fsr"
    push = Push(repo_id, files, private, revision, create_pr, message, token)
    heads: list[str | None] = []
    with explained(repo_id, writing=True):
        return retried(lambda: _push(push, heads), once_sent=not create_pr)  # a second pull request would do harm


def collect(
    folder: str | Path, repo_id: str, options: CardOptions | None = None, formats: Sequence[str] = ()
) -> dict[str, bytes]:
    """The files of a push by name, after everything that can be checked without the Hub has been.

    Args:
        folder: that `save_pretrained` wrote.
        repo_id: "user/name".
        options: of the card that is generated if the folder has none.
        formats: of exported files that are to be among them, besides those that the folder has.

    Raises:
        ValueError, FileNotFoundError: see `push_to_hub`.
    """
    folder, options = Path(folder), options or CardOptions()
    check_repo_id(repo_id)
    ignored = ", ".join(name for name, value in vars(options).items() if value is not None)
    if ignored and (folder / CARD).is_file():
        raise ValueError(
            f"{folder} has a card, which is pushed unchanged, so {ignored} would be ignored; make it again by timm-fsr "
            "card with them, or leave them out"
        )
    bundle = read_bundle(folder)
    model = load(str(folder))  # whoever downloads it has to be able to
    _check_same_weights(bundle, folder, model)
    exported = exported_bytes(folder, model, formats)
    bundle = dataclasses.replace(bundle, exports={name: ExportedFile.of(name, exported[name]) for name in exported})
    if (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8")
    else:
        card = render_card(bundle, repo_id, options)
    check_card(card, bundle, repo_id)
    config, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != bundle.config[RECORD]["sha256"] or json.loads(config) != bundle.config:
        raise ValueError(f"{folder} was changed while it was read, as a running training does; push it afterwards")
    files = {CARD: card.encode(), CONFIG: config, WEIGHTS: weights, **exported}
    if bundle.for_transformers:
        files[MODELLING] = modelling_code()  # never what lies in the folder
    if bundle.recipe:
        files[RECIPE] = yaml.safe_dump(dict(bundle.recipe), sort_keys=False, allow_unicode=True).encode()
    files[REPORT] = bundle.report.to_json().encode()
    _check_no_token(files, folder)
    return files


def _check_no_token(files: Mapping[str, bytes], folder: Path) -> None:
    """Refuse to publish an access token; reports and recipes have lost theirs already."""
    for name in files.keys() - {WEIGHTS, *EXPORTS.values()}:
        if holds_token(files[name].decode(), get_token()):
            raise ValueError(
                f"{folder / name} has an access token in it, which would be published; take it out, and revoke the "
                "token if anybody else has seen the file"
            )


def _check_same_weights(bundle: Bundle, folder: Path, model: nn.Module) -> None:
    """Refuse a report that is about other weights, which would be a false promise.

    It may be about the file, or about the float32 weights that a file in half precision becomes when it is loaded.
    """
    judged = bundle.report.conditions.get("weights_sha256")
    saved = bundle.config.get(RECORD, {}).get("sha256")
    if judged is None or saved is None:
        what = REPORT if judged is None else CONFIG
        raise ValueError(
            f"{folder / what} does not say which weights it belongs to, since an older timm_fsr wrote it; save and "
            "evaluate the model again"
        )
    if judged not in (saved, weights_digest(model)):
        raise ValueError(
            f"{folder / REPORT} is about other weights (SHA-256 {judged[:16]}...) than those beside it "
            f"({saved[:16]}...); evaluate this model"
        )


def _push(push: Push, heads: list[str | None]) -> Published:
    """One try, which finds what an earlier one has done already.

    Args:
        push: what and where.
        heads: the last commit of the branch at the beginning of each earlier try; this try's is added.
    """
    api = HfApi(token=push.token)
    _check_metadata(push)
    _prepare_repository(api, push)
    before = _head(api, push)
    heads.append(before)
    if push.create_pr:
        there = _find_pull_request(api, push)
        if there is not None:
            return dataclasses.replace(there, changed=len(heads) > 1)  # then an earlier try has made it
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in push.files.items()
    ]
    changes += [CommitOperationDelete(name) for name in _stale(api, push, before)]
    info = api.create_commit(
        push.repo_id,
        changes,
        commit_message=push.message,
        revision=push.revision,
        create_pr=push.create_pr,
        parent_commit=before,  # files that have not changed are not sent: they must not have changed since either
    )
    return Published(push.repo_id, info.pr_url or info.commit_url, info.oid, info.oid != heads[0])


def _check_metadata(push: Push) -> None:
    """Let the Hub judge the card before it makes a repository for it, for it alone knows all that it accepts."""
    try:
        ModelCard(push.files[CARD].decode()).validate(repo_type="model")
    except ValueError as error:
        raise ValueError(
            f"the Hub does not accept the card's metadata ({' '.join(str(error).split())}); nothing was pushed: "
            "make the card again by timm-fsr card"
        ) from error


def _prepare_repository(api: HfApi, push: Push) -> None:
    """Make the repository if it is missing; refuse one whose visibility is not what was asked for."""
    try:
        existing = api.repo_info(push.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(push.repo_id, private=push.private, exist_ok=True)
        existing = api.repo_info(push.repo_id)  # which somebody else may have made meanwhile
    if push.private is not None and bool(existing.private) != push.private:
        kinds = {True: "private", False: "public"}
        raise ValueError(
            f"{push.repo_id} exists and is {kinds[bool(existing.private)]}, not {kinds[push.private]} as asked for; "
            "nothing was pushed: change it in its settings on the Hub, leave the option out, or use another name"
        )


def _head(api: HfApi, push: Push) -> str | None:
    """The last commit of the branch, which is made if it is missing."""
    try:
        return api.repo_info(push.repo_id, revision=push.revision).sha
    except RevisionNotFoundError:
        api.create_branch(push.repo_id, branch=str(push.revision), exist_ok=True)
        return api.repo_info(push.repo_id, revision=push.revision).sha


def _stale(api: HfApi, push: Push, revision: str | None) -> list[str]:
    """What an earlier model has and this one has not (recipe, code, exported files): it would pass for this one's."""
    absent = [name for name in (RECIPE, MODELLING, *EXPORTS.values()) if name not in push.files]
    return [entry.path for entry in api.get_paths_info(push.repo_id, absent, revision=revision)] if absent else []


def _find_pull_request(api: HfApi, push: Push) -> Published | None:
    """An open pull request of ours that holds all of the push already."""
    ours = api.whoami()["name"]
    for found in api.get_repo_discussions(
        push.repo_id, author=ours, discussion_type="pull_request", discussion_status="open"
    ):
        revision = f"refs/pr/{found.num}"
        there = api.get_paths_info(push.repo_id, list(push.files), revision=revision)
        kept = {entry.path: entry for entry in there if isinstance(entry, RepoFile)}
        whole = all(name in kept and _is_kept(kept[name], content) for name, content in push.files.items())
        if whole and not _stale(api, push, revision):
            commit = api.repo_info(push.repo_id, revision=revision).sha
            return Published(push.repo_id, found.url, str(commit), changed=False)
    return None


def _is_kept(entry: RepoFile, content: bytes) -> bool:
    """Does the Hub list this content? By SHA-256 where it is kept as LFS, else by the id that git gives it."""
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
