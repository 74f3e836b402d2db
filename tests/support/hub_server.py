"""A stand-in for the Hugging Face Hub on the loopback interface, which the real `huggingface_hub` client talks to.

It knows model repositories, in memory: creating, settings, commits (plain, LFS, as pull requests), branches, downloads.
A request that it does not know is answered 501, which the client does not repeat. The client reads its settings when it
is imported, so run it in a subprocess whose environment is `HubServer.environment(home)`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_yaml import yaml_errors

Answer = tuple[int, Any, dict[str, str]]  # status, bytes or what becomes JSON, headers

_LFS = "7z|arrow|bin|bz2|ckpt|gz|h5|model|msgpack|npy|npz|onnx|parquet|pb|pickle|pkl|pt|pth|safetensors|tar|tgz|xz|zip"
_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS.split("|")).encode()
_REPO, _REV = r"(?P<name>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
_ROUTES = (  # patterns of the path as it is sent, in which the slashes of a revision are quoted
    ("GET", "/api/whoami-v2", "_whoami"),
    ("POST", "/api/validate-yaml", "_validate_yaml"),
    ("POST", "/api/repos/create", "_create"),
    ("GET", f"/api/models/{_REPO}(/revision/{_REV})?", "_info"),
    ("PUT", f"/api/models/{_REPO}/settings", "_settings"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "_branch"),
    ("GET", f"/api/models/{_REPO}/discussions", "_discussions"),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}", "_files"),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REV}", "_files"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", "_preupload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", "_commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
    ("PUT", f"/storage/{_REPO}/(?P<oid>[0-9a-f]{{64}})", "_store"),
    ("GET", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "_resolve"),
)


def blob_id(content: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Does the Hub keep this file as LFS: by its name, for its size, or because it is binary?"""
    return size > 0 and (bool(re.search(rf"\.({_LFS})$", path)) or size > 10_000_000 or b"\0" in sample[:512])


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it; under "lfs" what is particular to one in LFS."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_lfs(path, len(content), content):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry.update(oid=blob_id(pointer), lfs={"oid": sha256, "size": len(content), "pointerSize": len(pointer)})
    return entry


class Commit(NamedTuple):
    """One commit, with all files that the repository has after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A model repository; `branches` and `pull_requests` (by number) hold whole histories, the oldest commit first."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    pull_requests: dict[int, list[Commit]] = field(default_factory=dict)
    authors: dict[int, str | None] = field(default_factory=dict)  # of the pull requests, all of which stay open
    objects: dict[str, bytes] = field(default_factory=dict)  # what was uploaded to LFS, by its SHA-256

    def __post_init__(self) -> None:
        self.commit({".gitattributes": _ATTRIBUTES}, "initial commit")

    @property
    def commits(self) -> list[Commit]:
        """The history of the branch main."""
        return self.branches["main"]

    def history(self, revision: str) -> list[Commit] | None:
        """The one that a commit to this branch or pull request is added to."""
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        return self.pull_requests.get(int(pull[1])) if pull else self.branches.get(revision)

    def until(self, revision: str) -> list[Commit]:
        """A copy of the history that ends with the commit of this branch, pull request or full commit id."""
        if history := self.history(revision):
            return list(history)
        for known in (*self.branches.values(), *self.pull_requests.values()):
            for count, commit in enumerate(known, 1):
                if commit.oid == revision:
                    return known[:count]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, changes: Mapping[str, bytes | None], message: str = "change", revision: str = "main") -> Commit:
        """Add a commit, as somebody's push would; None deletes a file."""
        history = self.history(revision)
        if history is None:
            raise RefusedError(400, f"{revision} is neither a branch nor a pull request")
        merged = {**(history[-1].files if history else {}), **changes}
        files = {path: content for path, content in sorted(merged.items()) if content is not None}
        history.append(Commit(os.urandom(20).hex(), message, files))
        return history[-1]


class RefusedError(Exception):
    """An answer that is an error, in the Hub's form: its code and message are headers."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.answer: Answer = status, {"error": message}, {key: value for key, value in headers.items() if value}


class Request(NamedTuple):
    """What a request says apart from its path."""

    user: str | None
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class HubServer:
    """The server, a context manager. Tests may read and change its attributes at any time.

    Attributes:
        url: "http://127.0.0.1:PORT".
        tokens: the valid access tokens, with the names of their users.
        repos: by "owner/name". Only the owner may write, and read what is private; anybody may open a pull request.
        requests: (method, unquoted path with query, status) of every request, in order; status 0: the server hung up.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_owner": "owner", "hf_reader": "reader"}
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self._lock = threading.RLock()
        self._plans: list[tuple[str, str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process in which the client knows this server, the cache `home` and the token only."""
        hidden = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        disabled = {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        return {**kept, **settings, **disabled, **({"HF_TOKEN": token} if token else {})}

    def fail(self, method: str, text: str, outcome: int | str, times: int = 1) -> None:
        """Let the next `times` requests of this method (HEAD is not GET) fail whose unquoted path contains `text`.

        The outcome is a status or "hang up" (nothing is done), "hang up after" (it is done, but not answered), or
        "504 after" (it is done, but a gateway has lost patience).
        """
        self._plans += [(method, text, outcome)] * times

    def on(self, method: str, text: str, callback: Callable[[], object]) -> None:
        """Call `callback` once, in a thread of the server, just before the next such request is handled, or fails."""
        self._plans.append((method, text, callback))

    def answer(self, method: str, target: str, authorization: str | None, body: bytes) -> Answer | None:
        """What the Hub answers to a request; None to hang up."""
        path, answer = unquote(target), None
        if callback := self._planned(method, path, call=True):
            callback()
        outcome = self._planned(method, path, call=False)
        if outcome != "hang up":
            try:
                if isinstance(outcome, int):
                    raise RefusedError(outcome, "The test wants this failure")
                answer = self._route(method, target, authorization, body)
            except RefusedError as refused:
                answer = refused.answer
            except Exception:
                traceback.print_exc()
                answer = RefusedError(501, "tests/support/hub_server.py failed").answer
        if isinstance(outcome, str):
            answer = RefusedError(504, "Gateway timeout").answer if outcome == "504 after" else None
        self.requests.append((method, path, answer[0] if answer else 0))
        return answer

    def _planned(self, method: str, path: str, *, call: bool) -> Any:
        with self._lock:
            for plan in self._plans:
                if plan[0] == method and plan[1] in path and callable(plan[2]) is call:
                    self._plans.remove(plan)
                    return plan[2]
        return None

    def _route(self, method: str, target: str, authorization: str | None, body: bytes) -> Answer:
        user = self.tokens.get((authorization or "").removeprefix("Bearer "))
        if authorization is not None and user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        url = urlsplit(target)
        for known, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and known == method.replace("HEAD", "GET"):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self._lock:
                    return getattr(self, name)(Request(user, parse_qs(url.query), body), **groups)
        raise RefusedError(501, f"tests/support/hub_server.py knows no {method} {url.path}")

    def _repo(self, name: str, request: Request, *, write: bool = False) -> Repo:
        repo, owner = self.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and request.user != owner):
            raise RefusedError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and request.user is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        if write and request.user != owner and "create_pr" not in request.query:
            raise RefusedError(403, "You have read access but not the required permissions for this operation")
        return repo

    def _whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.")
        return 200, {"type": "user", "name": request.user, "fullname": request.user, "orgs": [], "auth": {}}, {}

    def _validate_yaml(self, request: Request) -> Answer:
        errors = [{"message": text} for text in yaml_errors(request.json["content"])]
        return 400 if errors else 200, {"errors": errors, "warnings": []}, {}

    def _create(self, request: Request) -> Answer:
        owner = request.json.get("organization") or request.user
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.")
        if owner != request.user:
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{request.json['name']}"
        about = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            return 409, {"error": "You already created this model repo", **about}, {}
        self.repos[name] = Repo(_is_private(request.json))
        return 200, about, {}

    def _settings(self, request: Request, name: str) -> Answer:
        self._repo(name, request, write=True).private = _is_private(request.json)
        return 200, {}, {}

    def _info(self, request: Request, name: str, revision: str = "main") -> Answer:
        repo = self._repo(name, request)
        commit = repo.until(revision)[-1]
        listed = re.search(r"\A---\n(?:.*\n)*?tags:\n((?:\s*- .*\n)+)", commit.files.get("README.md", b"").decode())
        tags = [line.strip(" -'\"") for line in listed[1].splitlines()] if listed else []
        state = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": tags}
        about = {"id": name, "author": name.split("/")[0], "sha": commit.oid, **state}
        return 200, {**about, "siblings": [{"rfilename": path} for path in commit.files]}, {}

    def _branch(self, request: Request, name: str, branch: str) -> Answer:
        repo = self._repo(name, request, write=True)
        if branch in repo.branches:
            raise RefusedError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.until(request.json.get("startingPoint", "main"))
        return 201, {}, {}

    def _discussions(self, request: Request, name: str) -> Answer:
        author = request.query.get("author", [None])[0]
        about = {"title": "", "status": "open", "isPullRequest": True, "createdAt": "2020-01-01T00:00:00.000Z"}
        about |= {"repo": {"name": name, "type": "model"}}
        known = self._repo(name, request).authors.items()
        found = [{**about, "num": n, "author": {"name": user}} for n, user in known if author in (None, user)]
        return 200, {"discussions": found, "count": len(found), "start": 0}, {}

    def _files(self, request: Request, name: str, revision: str) -> Answer:
        """All files or those that a form asks for; folders are not listed."""
        files = self._repo(name, request).until(revision)[-1].files
        wanted = parse_qs(request.body.decode())["paths"] if request.body else list(files)
        return 200, [describe(path, files[path]) for path in wanted if path in files], {}

    def _preupload(self, request: Request, name: str, revision: str) -> Answer:
        present = self._repo(name, request, write=True).until(revision)[-1].files
        answers = []
        for file in request.json["files"]:
            path, lfs = file["path"], is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            there = {"oid": _etag(path, present[path])} if path in present else {}
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **there})
        return 200, {"files": answers}, {}

    def _batch(self, request: Request, name: str) -> Answer:
        if "ref" not in request.json:  # for a pull request
            request.query["create_pr"] = ["1"]
        present = self._repo(name, request, write=True).objects
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in request.json["objects"]]
        for entry in objects:
            if entry["oid"] not in present:
                entry["actions"] = {"upload": {"href": f"{self.url}/storage/{name}/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, request: Request, name: str, oid: str) -> Answer:
        """An upload to the storage, which its address alone allows."""
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise RefusedError(400, "The content has another checksum")
        self.repos[name].objects[oid] = request.body
        return 200, b"", {}

    def _commit(self, request: Request, name: str, revision: str) -> Answer:
        repo = self._repo(name, request, write=True)
        head = repo.until(revision)[-1]
        header, *lines = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit") not in (None, head.oid):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        for line in lines:
            changes.update(_change(repo, head.files, line["key"], line["value"]))
        about: dict[str, Any] = {"success": True}
        if "create_pr" in request.query:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[number], repo.authors[number] = repo.until(revision), request.user
            revision, about["pullRequestUrl"] = f"refs/pr/{number}", f"{self.url}/{name}/discussions/{number}"
        oid = repo.commit(changes, header["value"]["summary"], revision).oid
        return 200, {**about, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}, {}

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self._repo(name, request).until(revision)[-1]
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", commit.oid)
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_etag(path, content)}"'}
        if "lfs" in describe(path, content):
            headers.update({"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))})
        return 200, content, headers


def _etag(path: str, content: bytes) -> str:
    entry = describe(path, content)
    return entry.get("lfs", entry)["oid"]


def _is_private(settings: Mapping[str, Any]) -> bool:
    """By the key that clients use today, or by the older one."""
    return settings.get("visibility") == "private" or settings.get("private") is True


def _change(repo: Repo, present: Mapping[str, bytes], key: str, value: Mapping[str, Any]) -> dict[str, bytes | None]:
    """What one line of a commit's body does to the files."""
    path = value["path"]
    if key == "file":
        return {path: base64.b64decode(value["content"])}
    if key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise RefusedError(400, f"LFS pointer of {path} points to an object that does not exist")
        return {path: repo.objects[value["oid"]]}
    folder = path.rstrip("/") + "/"
    gone = [name for name in present if (name.startswith(folder) if key == "deletedFolder" else name == path)]
    if not gone:
        raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    return dict.fromkeys(gone)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers, one per connection."""

    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
        if answer is None:
            return
        status, content, headers = answer
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815
