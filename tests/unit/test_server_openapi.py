"""The description of what the server offers."""

from __future__ import annotations

from typing import Any

import pytest
from asgi_client import call
from server_fakes import make_model

from qrun.server import app
from qrun.server.app import _ROUTES
from qrun.server.fields import SAMPLING


@pytest.fixture(scope="module")
def document() -> Any:
    answer = call(app(make_model()), "GET", "/openapi.json")
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    return answer.json()


def test_every_route_is_described_once(document: Any) -> None:
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(method, path.replace(":path}", "}")) for method, path, _ in _ROUTES}
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


def test_options_of_sampling_are_described(document: Any) -> None:
    operation = document["paths"]["/v1/chat/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages"]
    assert {option.names.split()[0] for option in SAMPLING} <= set(schema["properties"])
    assert schema["properties"]["temperature"] == {"type": "number"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
