"""The thread that loads models and answers. Nothing here knows of widgets: what it signals arrives in the window's
thread, and whatever is called from there returns at once."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from PySide6.QtCore import QObject, Signal

from qrun.engine import Conversation, Model, NotPulled, QrunError, pull


class Stopped(Exception):
    """Raised where a progress is told, to end what is under way."""


class Worker(QObject):
    progress = Signal(str, float)
    """What is being done, and how much of it: 0 to 1, or -1 where that is not known."""
    loaded = Signal(str, str)
    """The model's name, and a line about it, which may be empty."""
    piece = Signal(str, str)
    """A channel, "content" or "reasoning", and more text of the answer."""
    answered = Signal(list, str)
    """The question and the answer as messages, none where nothing was answered; and a line about it."""
    failed = Signal(str)
    """One line."""
    idle = Signal()
    """Something that was asked for is done, or has failed: see `busy`."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = queue.SimpleQueue()
        self._unfinished: set[threading.Event] = set()  # each job's own, set where it is to end
        self._stopped = threading.Event()  # that of the job under way
        self._model: Model | None = None
        self._talk: Conversation | None = None
        self._messages: list[dict[str, str]] = []  # all of the talk; of what `_talk` has, the oldest may be forgotten
        # Not to keep the process alive: a kernel that is compiled in this process cannot be ended.
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    # From the window

    def load(self, source: str, options: dict[str, Any]) -> None:
        """Load a model (a path, or a name; one of the catalog is fetched first) in place of the one that is loaded."""
        self.stop()
        self._do(lambda: self._load(source, options))

    def open(self, messages: list[dict[str, str]]) -> None:
        """Go on from these messages; without any, begin anew."""
        self._do(lambda: self._open(messages))

    def ask(self, text: str, options: dict[str, Any], system: str | None, think: bool | None) -> None:
        """`options` are those of SamplingOptions, before the model's own, as is the system prompt."""
        self._do(lambda: self._answer(text, options, system, think))

    def _do(self, job: Callable[[], None]) -> None:
        stopped = threading.Event()
        self._unfinished.add(stopped)
        self._jobs.put((job, stopped))

    def stop(self) -> None:
        """End what is under way or waits; what has come of an answer stays."""
        for stopped in list(self._unfinished):
            stopped.set()
        if self._talk is not None:
            self._talk.stop()

    @property
    def busy(self) -> bool:
        """Whether anything that was asked for is under way or waits."""
        return bool(self._unfinished)

    def prompt_progress(self) -> tuple[int, int]:
        """Tokens of the prompt that have been read, and all of them."""
        return self._talk.prompt_progress if self._talk is not None else (0, 0)

    def close(self, seconds: float) -> bool:
        """End the thread. False if it has not ended in time."""
        self.stop()
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # In the thread

    def _run(self) -> None:
        while (next_job := self._jobs.get()) is not None:
            job, self._stopped = next_job
            try:
                self._go_on()
                job()
            except Stopped:
                self.failed.emit("Stopped.")
            # All with one line that a user can read. ImportError is of a package that was not packed along.
            except (QrunError, OSError, ValueError, MemoryError, ImportError) as error:
                self.failed.emit(str(error) or "There is not enough memory.")
            self._unfinished.discard(self._stopped)
            self.idle.emit()
        self._unload()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise Stopped

    def _telling(self, what: str) -> Callable[[int, int | None], None]:
        def tell(done: int, total: int | None) -> None:
            self._go_on()
            self.progress.emit(what, done / total if total else -1.0)

        return tell

    def _load(self, source: str, options: dict[str, Any]) -> None:
        self._unload()
        self.progress.emit("Loading …", -1.0)
        try:
            self._model = self._open_model(source, options)
        except NotPulled:
            pull(source, self._telling(f"Fetching {source} …"))
            self._model = self._open_model(source, options)
        if self._model.tokenizer is None:
            problem = str(self._model.tokenizer_problem)
            self._unload()
            raise ValueError(problem)
        self._talk = Conversation(self._model, on_forget=self._forgot)
        self._talk.messages[:] = self._messages
        self.loaded.emit(self._model.path.stem, self._model.chat_notice or self._model.context_notice or "")

    def _open_model(self, source: str, options: dict[str, Any]) -> Model:
        return Model.load(
            source, progress=self._telling("Preparing for this computer, once …"),
            converting=self._telling("Converting, once …"), **options,
        )  # fmt: skip

    def _unload(self) -> None:
        model, self._model, self._talk = self._model, None, None
        if model is not None:
            model.close()

    def _open(self, messages: list[dict[str, str]]) -> None:
        self._messages = list(messages)
        if self._talk is not None:
            self._talk.clear()
            self._talk.messages[:] = messages

    def _answer(self, text: str, options: dict[str, Any], system: str | None, think: bool | None) -> None:
        model, talk = self._model, self._talk
        if model is None or talk is None:
            raise ValueError("There is no model: choose one above.")
        talk.set_system(model.chat_system if system is None else system)
        talk.sampling = {**model.chat_sampling, **options}
        talk.think = think
        self._forgotten = 0
        replied = False
        try:
            for piece in talk.answer(text, self._stopped.is_set):
                if piece:
                    replied = replied or piece.channel == "content"
                    self.piece.emit(piece.channel, str(piece))
        finally:
            new = talk.messages[-2:] if replied else []
            self._messages += new
            self.answered.emit(new, self._summary(talk))

    def _forgot(self, n_messages: int) -> None:
        self._forgotten += n_messages

    def _summary(self, talk: Conversation) -> str:
        stats = talk.last_stats
        parts = [f"{stats.generated_tokens} tokens, {stats.generated_tokens_per_second:.0f} a second"] if stats else []
        if talk.stop_reason in ("context", "length", "cancelled"):
            ends = {"context": "the context is full", "length": "cut at the length that is set", "cancelled": "stopped"}
            parts.append(ends[talk.stop_reason])
        if self._forgotten:
            parts.append(f"the oldest {self._forgotten} messages are forgotten")
        return " · ".join(parts)
