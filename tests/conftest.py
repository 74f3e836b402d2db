"""One torch thread per worker, no network, tiny timm models for contract tests, and a Hub on the loopback interface."""

from __future__ import annotations

import os

# Before the imports that read them; subprocesses of tests inherit both.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as timm_fsr does, which is imported after torch here

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.backbones import TINY_BACKBONES, TinyBackbone
from support.browser import browser  # noqa: F401 (a fixture)
from support.hub_server import HubServer
from support.hub_tools import Client, save

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in jobs that a script puts into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: once compiled code was differentiated, autograd has threads, which no fork has."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "debug_launcher"))


@pytest.fixture(params=TINY_BACKBONES, ids=lambda backbone: backbone.id)
def backbone(request: pytest.FixtureRequest) -> TinyBackbone:
    """Each tiny backbone in turn."""
    return request.param


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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "saved")
