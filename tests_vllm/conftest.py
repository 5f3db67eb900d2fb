"""One server for all tests that ask it and no more: its start costs more than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mgrpo.model.policy import Policy
from tests.models import state_bytes
from tests_vllm.kit import Served, reference, served

# The gateway asks for a parser of tool calls; a judge's question and its reply are longer than the others' histories.
ARGUMENTS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--max-model-len", "512")


@pytest.fixture(scope="session")
def policy() -> Policy:
    """What the server holds at first, here."""
    torch.set_num_threads(1)
    return reference()


@pytest.fixture(scope="session")
def start(policy: Policy) -> bytes:
    return state_bytes(policy.model)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """In float32, its weights through a folder."""
    with served(tmp_path_factory.mktemp("fs"), "fs", "float32", arguments=ARGUMENTS) as made:
        yield made


@pytest.fixture
def live(shared_server: Served, start: bytes) -> Served:
    """The server with the weights that it began with, whatever the test before has left in it."""
    if shared_server.data is not start:
        shared_server.load(start)
    return shared_server


@pytest.fixture
def doomed(live: Served) -> Served:
    """The same server for a test that ends it."""
    return live


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared server first, those that end it last of them: no second server runs beside it."""

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        names = getattr(item, "fixturenames", ())
        return "shared_server" not in names, "doomed" in names

    items.sort(key=turn)
