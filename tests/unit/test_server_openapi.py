"""The description of what the server offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from asgi_client import call
from server_fakes import make_model

from qrun.engine.generation.adapters import Adapters, NamedAdapter
from qrun.server import app, fields
from qrun.server.app import _ROUTES
from qrun.server.errors import APIError
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


def test_options_are_described_as_they_are_taken(document: Any) -> None:
    schema = document["paths"]["/completion"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    examples = [1, 0, 2.5, True, "confidence", "poet", ["poet"], {"poet": 0.5}, [{"id": 0, "scale": 1.0}], [{}], [1.5]]
    for option in SAMPLING:
        described = jsonschema.Draft202012Validator(schema["properties"][option.names.split()[0]])
        for example in examples:
            try:
                option.read(option.names, example)
                taken = True
            except APIError:
                taken = False
            assert taken or not described.is_valid(example), (option, example)


@pytest.mark.parametrize("lora", ["poet", ["poet", "clerk"], {"poet": 0.5}, [{"id": 0, "scale": 2}, {"name": "clerk"}]])
def test_each_form_of_adapters_is_described_and_taken(document: Any, lora: Any) -> None:
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate(lora, schema["properties"]["lora"])
    loaded = Adapters([NamedAdapter("poet", Path("a")), NamedAdapter("clerk", Path("b"))])
    assert loaded.chosen(fields.adapters("lora", lora))
