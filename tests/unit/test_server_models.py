"""Several models in one server: found, loaded, unloaded."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from asgi_client import call, request
from server_fakes import hold, make_model

from qrun.engine import Model
from qrun.engine.native.machine import Memory
from qrun.formats import FormatError
from qrun.server import Application, app

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


class Loader:
    """Loads fakes, and notes which."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.models: dict[str, Model] = {}
        self.wait = threading.Event()
        self.wait.set()

    def __call__(self, source: Any) -> Model:
        name = Path(source).stem
        self.loaded.append(name)
        self.wait.wait(60)
        if name == "damaged":
            raise FormatError(Path("/secret/damaged.gguf"), "is damaged")
        if name == "missing":
            raise FileNotFoundError(2, "no such file", "/secret/missing.gguf")
        self.models[name] = make_model(f"I am {name}.", name=f"{name}.gguf")
        return self.models[name]


def serve(*names: str, **settings: Any) -> tuple[Application, Loader]:
    loader = Loader()
    return app([f"/models/{name}.gguf" for name in names], load=loader, **settings), loader


def said(answer: Any) -> str:
    assert answer.status == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_models_are_loaded_when_they_are_asked_for() -> None:
    served, loader = serve("a", "b")
    assert loader.loaded == []
    assert said(call(served, "POST", PATH, CHAT | {"model": "b"})) == "I am b."
    assert said(call(served, "POST", PATH, CHAT)) == "I am a."
    assert said(call(served, "POST", PATH, CHAT | {"model": "B.gguf"})) == "I am b."
    assert loader.loaded == ["b", "a"]
    states = {one["id"]: one["state"] for one in call(served, "GET", "/v1/models").json()["data"]}
    assert states == {"a": "loaded", "b": "loaded"}


def test_any_name_does_where_there_is_one_model() -> None:
    served, _ = serve("a")
    for name in ("gpt-4o", "", None, "a"):
        assert said(call(served, "POST", PATH, CHAT | {"model": name})) == "I am a."


def test_unknown_names_where_there_are_several() -> None:
    served, loader = serve("a", "b")
    answer = call(served, "POST", PATH, CHAT | {"model": "gpt-4o"})
    assert answer.status == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert call(served, "POST", PATH, CHAT | {"model": 3}).status == 400
    assert loader.loaded == []
    told = call(served, "POST", "/v1/messages", CHAT | {"model": "claude-haiku", "max_tokens": 20}).json()
    assert told["content"][0]["text"] == "I am a."


def test_names_of_ones_own() -> None:
    loader = Loader()
    served = app({"big": "/models/a.gguf", "small": make_model("small")}, load=loader)
    assert said(call(served, "POST", PATH, CHAT | {"model": "big"})) == "I am a."
    assert said(call(served, "POST", PATH, CHAT | {"model": "small"})) == "small"


@pytest.mark.parametrize(("name", "status"), [("damaged", 500), ("missing", 404)])
def test_models_that_cannot_be_loaded(name: str, status: int) -> None:
    served, loader = serve("a", name)
    answer = call(served, "POST", PATH, CHAT | {"model": name})
    assert answer.status == status and "secret" not in answer.text
    call(served, "POST", PATH, CHAT | {"model": name})
    assert loader.loaded == [name, name]  # it may be there by now
    assert said(call(served, "POST", PATH, CHAT)) == "I am a."


def test_who_asks_while_a_model_is_loaded_waits() -> None:
    served, loader = serve("a")
    loader.wait.clear()

    async def main() -> None:
        asking = [asyncio.create_task(request(served, "POST", PATH, CHAT)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in asking)
        loader.wait.set()
        assert {said(answer) for answer in await asyncio.gather(*asking)} == {"I am a."}

    asyncio.run(main())
    assert loader.loaded == ["a"]


def is_loaded(served: Application, id: str) -> bool:
    return any(entry.id == id and entry.model is not None for entry in served.state.hub.entries)


def test_a_model_that_nobody_uses_is_unloaded() -> None:
    served, loader = serve("a", ttl=0.05)

    async def main() -> None:
        assert said(await request(served, "POST", PATH, CHAT)) == "I am a."
        assert is_loaded(served, "a")
        end = time.monotonic() + 60
        while is_loaded(served, "a"):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        assert said(await request(served, "POST", PATH, CHAT)) == "I am a."

    asyncio.run(main())
    assert loader.loaded == ["a", "a"]


def test_a_model_in_use_stays() -> None:
    served, loader = serve("a", "b", most_loaded=1)

    async def main() -> None:
        assert said(await request(served, "POST", PATH, CHAT)) == "I am a."
        event = hold(loader.models["a"])
        asking = asyncio.create_task(request(served, "POST", PATH, CHAT))
        await asyncio.sleep(0.05)
        assert said(await request(served, "POST", PATH, CHAT | {"model": "b"})) == "I am b."
        assert is_loaded(served, "a")
        event.set()
        assert said(await asking) == "I am a."

    asyncio.run(main())


def test_the_most_models_at_a_time() -> None:
    served, loader = serve("a", "b", "c", most_loaded=2)
    for name in ("a", "b", "a", "c"):
        assert said(call(served, "POST", PATH, CHAT | {"model": name})) == f"I am {name}."
    assert [is_loaded(served, name) for name in "abc"] == [True, False, True]
    assert loader.loaded == ["a", "b", "c"]


def test_what_nobody_uses_goes_where_there_is_not_memory_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader()

    def load(source: Any) -> Model:
        model = loader(source)
        model.reader.files = (source,)  # type: ignore[misc]
        return model

    for name in "abc":
        (tmp_path / f"{name}.gguf").write_bytes(bytes(1000))
    monkeypatch.setattr("qrun.engine.native.machine.memory", lambda: Memory(9000, 2500))
    served = app([tmp_path / f"{name}.gguf" for name in "abc"], load=load)
    for name in "abc":  # the system counts as available what is mapped of the models before
        assert said(call(served, "POST", PATH, CHAT | {"model": name})) == f"I am {name}."
    assert [is_loaded(served, name) for name in "abc"] == [False, True, True]


def test_two_that_are_asked_for_at_once_are_not_one_too_many() -> None:
    served, loader = serve("a", "b", most_loaded=1)
    hub = served.state.hub

    async def one(name: str) -> None:
        async with hub.use(name):
            pass

    async def main() -> None:
        loader.wait.clear()
        both = asyncio.gather(one("a"), one("b"))
        await asyncio.sleep(0.05)
        loader.wait.set()
        await both

    asyncio.run(main())
    assert sorted(loader.loaded) == ["a", "b"]
    assert [is_loaded(served, name) for name in loader.loaded] == [False, True]


def test_a_checkpoint_s_folder_stays_a_deleted_file_does_not(tmp_path: Path) -> None:
    folder, file = tmp_path / "checkpoint", tmp_path / "m.gguf"
    folder.mkdir()
    file.write_bytes(b"")
    served = app([folder, file], load=Loader())
    ids = [one["id"] for one in call(served, "GET", "/v1/models").json()["data"]]
    assert ids == ["checkpoint", "m"]
    file.unlink()
    assert [one["id"] for one in call(served, "GET", "/v1/models").json()["data"]] == ["checkpoint"]


def test_a_model_of_the_store_is_found_by_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qrun.models import store
    from qrun.models.catalog import HubEntry, catalog_entry

    monkeypatch.setenv("QRUN_HOME", str(tmp_path))
    entry = catalog_entry("llama3.1:8b")
    assert isinstance(entry, HubEntry)
    for file in (f"{entry.repository}/model-{entry.quant}.gguf", "other.gguf"):
        path = store.models_folder() / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
    served = app(load=Loader(), with_store=True)
    ids = [one["id"] for one in call(served, "GET", "/v1/models").json()["data"]]
    assert sorted(ids) == sorted([entry.name, "other"])
    for name in (entry.name, "llama3.1:8b", "LLAMA3.1:8b", entry.spec, f"{entry.repository}/model-{entry.quant}"):
        told = call(served, "GET", f"/v1/models/{name}")
        assert told.status == 200 and told.json()["id"] == entry.name, name
    for name in ("llama3.1:70b", "llama3.1:8b-nope", "hf:a/b:c", "::"):
        assert call(served, "GET", f"/v1/models/{name}").status == 404, name


def test_the_event_loop_does_not_wait_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qrun.server import hub

    served = app(load=Loader(), models_dir=tmp_path)
    seen, look = [], hub.models_in
    monkeypatch.setattr(hub, "models_in", lambda path: (seen.append(threading.current_thread()), look(path))[1])
    assert call(served, "GET", "/v1/models").status == 200
    assert call(served, "GET", "/v1/models/a").status == 404
    assert len(seen) == 2 and threading.main_thread() not in seen


def test_how_long_a_model_stays_can_be_asked_for() -> None:
    served, _ = serve("a")

    async def main() -> None:
        body = {"model": "a", "messages": CHAT["messages"], "stream": False}
        assert (await request(served, "POST", "/api/chat", body | {"keep_alive": "5m"})).status == 200
        (told,) = (await request(served, "GET", "/api/ps")).json()["models"]
        assert told["name"] == "a" and told["expires_at"] > told["modified_at"]
        answer = await request(served, "POST", "/api/generate", {"model": "a", "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload" and not is_loaded(served, "a")

    asyncio.run(main())


def test_models_of_the_caller_are_left_alone() -> None:
    model = make_model()
    served = app(model, ttl=0.0)

    async def main() -> None:
        assert (await request(served, "POST", PATH, CHAT)).status == 200
        await asyncio.sleep(0.02)
        assert is_loaded(served, "fake")

    asyncio.run(main())
    served.close()
    assert model.complete("~") == "Hello there."


def test_two_files_of_one_name() -> None:
    served = app(["/x/a.gguf", "/y/a.gguf"], load=Loader())
    assert [entry.id for entry in served.state.hub.entries] == ["a", "/y/a.gguf"]
