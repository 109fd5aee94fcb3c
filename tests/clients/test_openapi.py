"""schemathesis over what the server says of itself, against a small context, so that no answer is long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qrun.engine import Model
from qrun.server import Server
from qrun.server.app import _ROUTES
from qrun.server.openapi import document

schemathesis: Any = pytest.importorskip("schemathesis")
hypothesis: Any = pytest.importorskip("hypothesis")

OPERATIONS = [
    found.ok() for found in schemathesis.openapi.from_dict(document(_ROUTES)).get_all_operations()
]
# A model that could be fetched or deleted there is none: the server has no store.


@pytest.fixture(scope="module")
def small_url(model: Model) -> Iterator[str]:
    with Model.load(model.path, context=96) as small, Server(small) as server:
        yield server.url


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_is_too_much(operation: Any, small_url: str) -> None:
    """Whatever comes: an answer of a type that is told of, and never one that is the server's own fault."""

    @hypothesis.given(data=hypothesis.strategies.data())
    @hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    def run(data: Any) -> None:
        case = data.draw(operation.as_strategy())
        response = case.call(base_url=small_url, timeout=60)
        assert response.status_code < 500 or response.status_code in (501, 503), response.text
        if response.status_code >= 400:
            assert response.json()["error"]
        else:
            case.validate_response(response, checks=[schemathesis.checks.content_type_conformance])

    run()
