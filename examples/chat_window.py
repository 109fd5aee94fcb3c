"""A window to chat in: answers appear as they come, can be stopped, and closing the window ends all.

    pip install PySide6-Essentials
    python examples/chat_window.py model.gguf

Packed with `pyinstaller --windowed examples/chat_window.py` it needs no options: see docs/embedding.md.
"""

import queue
import sys
import threading

from PySide6.QtCore import QObject, Signal
from PySide6.QtGui import QCloseEvent, QTextCursor
from PySide6.QtWidgets import QApplication, QHBoxLayout, QLineEdit, QPlainTextEdit, QPushButton, QVBoxLayout, QWidget

from qrun.engine import Conversation, Model, QrunError


class Talk(QObject):
    """A conversation in a thread of its own. What it signals arrives in the window's thread."""

    status = Signal(str)
    said = Signal(str)
    idle = Signal()

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._conversation: Conversation | None = None
        self._stopped = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="talk")

    def start(self) -> None:
        """Load the model, once somebody listens."""
        self._thread.start()

    def ask(self, question: str) -> None:
        self._stopped.clear()
        self._questions.put(question)

    def stop(self) -> None:
        """End the answer that is under way, or about to begin."""
        self._stopped.set()
        if self._conversation is not None:
            self._conversation.stop()

    def close(self) -> None:
        """End the thread; within a tenth of a second, or after the kernel that is being compiled."""
        self._closed = True
        self._questions.put(None)
        self.stop()
        self._thread.join()

    def _progress(self, done: int, total: int) -> None:
        """Kernels are compiled, once on each machine. What is raised here ends that."""
        if self._closed:
            raise InterruptedError
        self.status.emit(f"preparing {done} of {total}")

    def _run(self) -> None:
        try:
            with Model.load(self._path, progress=self._progress) as model:
                self._conversation = Conversation(model, model.chat_system, dict(model.chat_sampling))
                self.status.emit(model.path.name)
                self.idle.emit()
                while (question := self._questions.get()) is not None:
                    self._answer(self._conversation, question)
        except InterruptedError:
            pass
        except (QrunError, OSError, ValueError) as error:  # the file: not there, damaged, not supported
            self.status.emit(str(error))

    def _answer(self, conversation: Conversation, question: str) -> None:
        try:
            for piece in conversation.answer(question, self._stopped.is_set):
                if piece.channel == "content":
                    self.said.emit(str(piece))
        except QrunError as error:  # the question is longer than the context
            self.status.emit(str(error))
        self.said.emit("\n\n")
        self.idle.emit()


class Window(QWidget):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.resize(640, 480)
        self.text = QPlainTextEdit(readOnly=True)
        self.line = QLineEdit(enabled=False)
        self.button = QPushButton("Stop", enabled=False)
        below = QHBoxLayout()
        below.addWidget(self.line)
        below.addWidget(self.button)
        layout = QVBoxLayout(self)
        layout.addWidget(self.text)
        layout.addLayout(below)
        self.talk = Talk(path)
        self.talk.status.connect(self.setWindowTitle)
        self.talk.said.connect(self.append)
        self.talk.idle.connect(lambda: self.answering(False))
        self.line.returnPressed.connect(self.send)
        self.button.clicked.connect(self.talk.stop)
        self.talk.start()

    def send(self) -> None:
        question = self.line.text().strip()
        if question:
            self.line.clear()
            self.append(f"> {question}\n")
            self.answering(True)
            self.talk.ask(question)

    def answering(self, under_way: bool) -> None:
        self.line.setEnabled(not under_way)
        self.button.setEnabled(under_way)
        self.line.setFocus()

    def append(self, text: str) -> None:
        self.text.moveCursor(QTextCursor.MoveOperation.End)
        self.text.insertPlainText(text)

    def closeEvent(self, event: QCloseEvent) -> None:
        self.talk.close()
        event.accept()


if __name__ == "__main__":
    app = QApplication(sys.argv)
    window = Window(app.arguments()[1] if len(app.arguments()) > 1 else "SmolLM2-135M-Instruct")
    window.show()
    sys.exit(app.exec())
