"""A server of the default model, on a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qrun.engine import Model
from qrun.models.catalog import CATALOG, DEFAULT_MODEL
from qrun.models.download import pull_entry
from qrun.models.store import PullError
from qrun.server import Server


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    try:
        path = pull_entry(CATALOG[DEFAULT_MODEL])
    except PullError as error:
        pytest.skip(str(error))
    with Model.load(path) as model:
        yield model


@pytest.fixture(scope="session")
def url(model: Model) -> Iterator[str]:
    with Server(model) as server:
        yield server.url
