"""The models that are served: loaded when they are asked for, unloaded when nobody has for a while."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.models.catalog import NotPulled, catalog_entry, named_files, resolve, stored_model
from qrun.models.store import SHARD_NAME, models_in, stored_models
from qrun.server.errors import APIError, unavailable
from qrun.server.threads import in_daemon

if TYPE_CHECKING:
    from qrun.engine import Model
    from qrun.engine.generation.adapters import NamedAdapter

Source = str | os.PathLike[str]
Load = Callable[[Source], "Model"]

_ROOM = 1.2  # of a file's size, which has to be free before it is loaded


@dataclass(eq=False)
class Entry:
    """A model by its name. ttl: seconds for which it stays when nobody uses it; None for ever."""

    id: str
    source: Source
    model: Model | None = None
    ttl: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    is_ours: bool = True
    """Whether the server has loaded the model, and may close it."""
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    timer: asyncio.TimerHandle | None = None
    adapters: tuple[NamedAdapter, ...] = ()
    """Those of the model that can be asked for by name; known once it has been loaded."""
    size: int = 0
    """Bytes of the files of a model that the server has loaded."""

    @property
    def loaded(self) -> Model:
        """The model, for those who use it."""
        assert self.model is not None
        return self.model

    def adapter_of(self, name: Any) -> NamedAdapter | None:
        """The adapter of the model that is called so."""
        return next((adapter for adapter in self.adapters if adapter.name == name), None)

    @property
    def expires_in(self) -> float | None:
        """Seconds until it will be unloaded if nobody asks for it."""
        return None if self.ttl is None or not self.is_ours else max(self.used + self.ttl - time.monotonic(), 0.0)


def name_of(source: Source) -> str:
    """The name by which a model is served: that of the catalog or the store, or of its file."""
    path = Path(source)
    if isinstance(source, str) and not path.is_file() and (entry := catalog_entry(source)):
        return entry.name
    found = SHARD_NAME.match(path.name)
    if found:
        return found["stem"]
    return path.name if path.suffix.lower() != ".gguf" else path.stem


def _size_of(source: Source) -> int:
    """Bytes of a model's file; 0 where there is none."""
    try:
        return resolve(source).stat().st_size
    except (OSError, LookupError):
        return 0


def _stored_path(name: str) -> Path | None:
    """The file of the store that the catalog, or a spec of the hub, means by a name: `llama3.1:8b`, say."""
    try:
        stored = stored_model(name)
    except (ValueError, LookupError, OSError):
        return None
    return stored.path if stored is not None else None


class Hub:
    """models: paths or names, or loaded models. folder: another folder, all of whose models are served too, by the
    names of their files. with_store: serve what is in the store as well.

    ttl: seconds after which a model that nobody uses is unloaded; most_loaded: how many may be loaded at a time.
    """

    def __init__(
        self,
        models: Iterable[Source | Model] | Mapping[str, Source | Model],
        load: Load,
        *,
        folder: Path | None = None,
        with_store: bool = False,
        ttl: float | None = None,
        most_loaded: int | None = None,
    ) -> None:
        self._load = load
        self._folder = folder
        self._with_store = with_store
        self._ttl = ttl
        self._most_loaded = most_loaded
        self._entries: dict[str, Entry] = {}
        self._found: set[str] = set()
        self._loading = asyncio.Lock()  # one at a time: each has to know what room the one before it has left
        self._closed = False
        named = models.items() if isinstance(models, Mapping) else ((None, model) for model in models)
        for name, model in named:
            self._add(name, model)
        self._take(*self._look())
        self.is_ready = True
        """False while the first model is being loaded."""

    def _add(self, name: str | None, model: Source | Model) -> Entry:
        source: Source = model if isinstance(model, str | os.PathLike) else model.path
        id = name or name_of(source)
        if id in self._entries and self._entries[id].source != source:
            id = os.fspath(source)  # two files of one name
        entry = Entry(id, source, ttl=self._ttl)
        if not isinstance(model, str | os.PathLike):
            entry.model, entry.is_ours, entry.adapters = model, False, model.adapters
        self._entries[id] = entry
        return entry

    async def refresh(self) -> None:
        """Look again at what lies in the folder and the store."""
        sources = {entry.source for entry in self._entries.values() if isinstance(entry.source, Path)}
        self._take(*await in_daemon(self._look, sources))

    def _look(self, sources: Iterable[Path] = ()) -> tuple[list[tuple[str, Path]], set[Path]]:
        """The names and files of the models that lie there, and which of `sources` have gone. It may take a while, as
        on disks of a network."""
        found: list[tuple[str, Path]] = []
        if self._folder is not None:
            found += [(stored.name, stored.path) for stored in models_in(self._folder)]
        if self._with_store:
            names = named_files()
            found += [(names.get(stored.path, stored.name), stored.path) for stored in stored_models()]
        return found, {source for source in sources if not source.exists()}

    def _take(self, found: list[tuple[str, Path]], gone: set[Path]) -> None:
        for name, path in found:
            if name not in self._entries:
                self._found.add(self._add(name, path).id)
        for entry in list(self._entries.values()):
            if entry.model is None and entry.source in gone:
                del self._entries[entry.id]  # it was deleted

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    @property
    def default(self) -> Entry | None:
        """The first model."""
        return next(iter(self._entries.values()), None)

    async def find(self, name: Any, *, lenient: bool = False, exact: bool = False) -> Entry:
        """The model of a name. Any name will do where there is one model, or `lenient` takes the first for it, but not
        where it is to be `exact`. APIError where there is none."""
        if name is not None and not isinstance(name, str):
            raise APIError("model must be a text", param="model")
        entry = self.named(name or "")
        if entry is None:
            await self.refresh()
            entry = self.named(name or "")
        if entry is None and name and self._with_store:
            path = await in_daemon(_stored_path, name)
            entry = next((one for one in self._entries.values() if path is not None and one.source == path), None)
        if entry is None and not exact and (lenient or not name or len(self._entries) == 1):
            entry = self.default
        if entry is None:
            raise APIError(
                f"the model {name!r} does not exist: see /v1/models for those that do",
                404, "not_found_error", param="model", code="model_not_found",
            )  # fmt: skip
        return entry

    def named(self, name: Any) -> Entry | None:
        """The model of exactly this name, but for case and what names of files and Ollama's end in, or that has an
        adapter of this name."""
        if not isinstance(name, str):
            return None
        if name in self._entries:
            return self._entries[name]
        wanted = name.lower().removesuffix(":latest").removesuffix(".gguf")
        for entry in self._entries.values():
            if entry.id.lower().removesuffix(".gguf") == wanted:
                return entry
        for entry in self._entries.values():
            if entry.adapter_of(name) is not None:
                return entry
        ends = [entry for entry in self._entries.values() if entry.id.lower().endswith("/" + wanted)]
        return ends[0] if len(ends) == 1 else None

    @asynccontextmanager
    async def use(self, name: Any, *, lenient: bool = False) -> AsyncIterator[Entry]:
        """The model of a name, loaded: it stays so within the `with` statement."""
        entry = await self.find(name, lenient=lenient)
        entry.users += 1
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        try:
            await self.load(entry)
            yield entry
        finally:
            entry.users -= 1
            entry.used = time.monotonic()
            self.expire_later(entry)

    def is_lazy(self, entry: Entry) -> bool:
        """Was the model found in a folder or the store, and is loaded only when it is asked for?"""
        return entry.id in self._found

    async def load(self, entry: Entry, *, plainly: bool = False) -> None:
        """Load a model, if it is not loaded. plainly: raise what is wrong with it as it is."""
        if entry.model is not None:
            return
        async with entry.lock, self._loading:
            if entry.model is not None:
                return
            if self._closed:
                raise unavailable("the server is shutting down")
            await self._make_room(entry)
            try:
                entry.model = await in_daemon(self._load, entry.source)
                entry.adapters = entry.model.adapters
                entry.size = sum(os.path.getsize(file) for file in entry.model.reader.files)
            except (NotPulled, OSError, ValueError) as error:
                if plainly:
                    raise
                if isinstance(error, NotPulled | FileNotFoundError):
                    message = f"the model {entry.id!r} is not there any more"
                    raise APIError(message, 404, "not_found_error", param="model", code="model_not_found") from error
                # Without paths: whoever runs the server finds them in its log.
                raise APIError(f"the model {entry.id!r} cannot be loaded", 500, "server_error",
                               code="model_load_failed") from error  # fmt: skip

    def expire_later(self, entry: Entry) -> None:
        """Unload a model when its time has come, if nobody asks for it until then."""
        if entry.users or not entry.is_ours or entry.ttl is None or entry.model is None:
            return
        loop = asyncio.get_running_loop()
        if entry.timer is not None:
            entry.timer.cancel()
        entry.timer = loop.call_later(max(entry.ttl, 0.0), lambda: loop.create_task(self.unload(entry)))

    async def unload(self, entry: Entry) -> bool:
        """Free a model that nobody uses; whether that was done."""
        if entry.users or entry.model is None or not entry.is_ours:
            return False
        async with entry.lock:
            model = entry.model
            if entry.users or model is None:
                return False
            entry.model = None
            await in_daemon(model.close)
        return True

    async def _make_room(self, entry: Entry) -> None:
        from qrun.engine.native.machine import memory

        size = await in_daemon(_size_of, entry.source)
        while True:
            loaded = [one for one in self._entries.values() if one.model is not None]
            available = memory().available
            mapped = sum(one.size for one in loaded)  # the system counts files that are mapped as available
            short = available is not None and available < mapped + size * _ROOM
            many = self._most_loaded is not None and len(loaded) >= self._most_loaded
            idle = sorted((one for one in loaded if one.is_ours and not one.users), key=lambda one: one.used)
            if not (short or many) or not idle or not await self.unload(idle[0]):
                return

    def stop(self) -> None:
        """End all generations under way."""
        for entry in self._entries.values():
            if entry.model is not None:
                entry.model.stop()

    def close(self) -> None:
        """Free all models that the server has loaded."""
        self._closed = True
        for entry in self._entries.values():
            if entry.model is not None and entry.is_ours:
                entry.model.close()
                entry.model = None
