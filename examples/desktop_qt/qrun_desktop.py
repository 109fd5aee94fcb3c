"""A window to chat with models on this computer.

    pip install qrun-gguf PySide6-Essentials
    python qrun_desktop.py [MODEL]

README.md beside this file says how it is built and packed.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QEvent, QObject, Qt, QTimer
from PySide6.QtGui import QCloseEvent, QColor, QKeyEvent, QPalette
from PySide6.QtWidgets import (
    QApplication,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QListWidget,
    QListWidgetItem,
    QMainWindow,
    QMenu,
    QMessageBox,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QSplitter,
    QVBoxLayout,
    QWidget,
)
from settings import History, Settings, SettingsDialog
from transcript import Transcript
from worker import Worker

from qrun.engine import known_models, stored_models

OPEN_FILE = "\0file"
SECONDS_TO_END = 0.4
"""So long the thread may take to end once the window is closed. Then the process ends without it."""

# Window, transcript, bubbles and code, text, text that matters less, what is chosen. Not all desktops know two schemes.
COLOURS = {
    "light": ("#f3f3f5", "#ffffff", "#eceef3", "#1d1d22", "#73737c", "#3b6fd4"),
    "dark": ("#232327", "#1a1a1d", "#2d2e35", "#e6e6ea", "#93939d", "#4a7ddd"),
}
STYLE = """
QPlainTextEdit { background: palette(base); border: 1px solid palette(mid); border-radius: 8px; padding: 4px; }
QListWidget { background: palette(window); border: none; outline: none; }
QListWidget::item { padding: 6px; border-radius: 6px; }
QListWidget::item:selected { background: palette(alternate-base); color: palette(text); }
#question { background: palette(alternate-base); border-radius: 10px; padding: 8px 12px; }
#thought QLabel { color: palette(placeholder-text); padding-left: 22px; }
#note { color: palette(placeholder-text); font-size: 11px; }
"""


class ModelPicker(QComboBox):
    """Files, models that were fetched, and models that can be."""

    def __init__(self) -> None:
        super().__init__(sizeAdjustPolicy=QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.setMinimumContentsLength(28)
        self.setPlaceholderText("Choose a model …")
        self.fill()

    def fill(self) -> None:
        """List what there is now; what is chosen stays, and nothing is signalled."""
        chosen = self.currentData()
        self.blockSignals(True)
        self.clear()
        self.addItem("Open a file …", OPEN_FILE)
        self.insertSeparator(self.count())
        known = {entry.name: entry for entry in known_models() if entry.problem is None}
        here = {path: name for name, entry in known.items() if (path := entry.stored()) is not None}
        for model in stored_models():
            name = here.get(model.path, model.name)
            self.addItem(f"{name}  ({_size(model.size)})", name)
        self.insertSeparator(self.count())
        for name, entry in known.items():
            if name not in here.values():
                self.addItem(f"{name}  (to fetch: {_size(entry.download_bytes)})", name)
        self.choose(chosen)
        self.blockSignals(False)

    def choose(self, source: str | None) -> None:
        """Show this one, without a signal; None for none."""
        blocked = self.blockSignals(True)
        index = self.findData(source) if source else -1
        if source and index < 0:
            self.insertItem(2, Path(source).name, source)
            index = 2
        self.setCurrentIndex(index)
        self.blockSignals(blocked)

    def showPopup(self) -> None:
        self.fill()
        super().showPopup()


class Window(QMainWindow):
    def __init__(self, source: str = "") -> None:
        super().__init__()
        self.setWindowTitle("qrun")
        self.resize(980, 680)
        self.settings, self.history, self.worker = Settings(), History(), Worker()
        self._use_scheme()
        self._talk_file = self.history.new()
        self._messages: list[dict[str, str]] = []
        self._asked = self._talk_file, self._messages  # the talk of the newest question
        self._model = ""  # what is loaded, as it was named
        self._busy = ""  # "", "loading" or "answering"
        self._question = ""

        self.talks = QListWidget()
        self.talks.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.talks.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        new = QPushButton("New talk")
        left = _column(new, self.talks)
        self.picker = ModelPicker()
        choose_settings = QPushButton("Settings …")
        self.transcript = Transcript()
        self.line = QPlainTextEdit(placeholderText="Ask something. Enter sends, Shift+Enter begins a line.")
        self.line.setFixedHeight(64)
        self.line.setTabChangesFocus(True)
        self.line.installEventFilter(self)
        self.button = QPushButton("Send")
        self.button.setFixedHeight(64)
        self.bar = QProgressBar(maximum=1000, textVisible=False)
        self.bar.setFixedSize(160, 12)
        self.status = QLabel(textFormat=Qt.TextFormat.PlainText)
        self.status.setMinimumWidth(0)
        right = _column(
            _row(self.picker, None, choose_settings), self.transcript, _row(self.line, self.button),
            _row(self.bar, self.status, None),
        )  # fmt: skip
        middle = QSplitter()
        middle.addWidget(left)
        middle.addWidget(right)
        middle.setSizes([200, 780])
        middle.setStretchFactor(1, 1)
        self.setCentralWidget(middle)

        self._clock = QTimer(self, interval=100)
        self._clock.timeout.connect(self._show_prompt_progress)
        new.clicked.connect(self.new_talk)
        choose_settings.clicked.connect(self.choose_settings)
        self.talks.itemActivated.connect(self._open_item)
        self.talks.itemClicked.connect(self._open_item)
        self.talks.customContextMenuRequested.connect(self._talk_menu)
        self.picker.activated.connect(self._picked)
        self.button.clicked.connect(self._send_or_stop)
        self.worker.progress.connect(self._show_progress)
        self.worker.loaded.connect(self._loaded)
        self.worker.piece.connect(self._show_piece)
        self.worker.answered.connect(self._answered)
        self.worker.failed.connect(self.show_error)
        self.worker.idle.connect(lambda: None if self.worker.busy else self._be(""))
        self._list_talks()
        self._be("")
        if source or self.settings.model:
            self.load(source or self.settings.model)
        self.line.setFocus()

    # What the user does

    def load(self, source: str) -> None:
        self._model = source
        self.picker.choose(source)
        self._be("loading")
        self.worker.load(source, self.settings.loading())

    def send(self) -> None:
        text = self.line.toPlainText().strip()
        if not text or self._busy:
            return
        if not self._model:
            self.show_error("There is no model: choose one above.")
            return
        self._question, self._asked = text, (self._talk_file, self._messages)
        self.line.clear()
        self.transcript.begin(text)
        self._be("answering")
        values = self.settings.values
        self.worker.ask(text, self.settings.sampling(), values["system"], values["think"])

    def stop(self) -> None:
        """End what is under way."""
        self.worker.stop()

    def new_talk(self) -> None:
        self._go_to(self.history.new(), [])

    def open_talk(self, path: Path) -> None:
        self._go_to(path, self.history.read(path))

    def _go_to(self, path: Path, messages: list[dict[str, str]]) -> None:
        if self._busy == "answering":
            self.stop()
        self._talk_file, self._messages = path, messages
        self.transcript.show_messages(messages)
        self.worker.open(messages)
        self._list_talks()
        self.line.setFocus()

    def choose_settings(self) -> None:
        before = self.settings.loading()
        if SettingsDialog(self, self.settings).exec():
            self._use_scheme()
            if self._model and self.settings.loading() != before:
                self.load(self._model)

    def _picked(self, index: int) -> None:
        source = self.picker.itemData(index)
        if source == OPEN_FILE:
            source, _ = QFileDialog.getOpenFileName(self, "Open a model", filter="Models (*.gguf);;All files (*)")
        elif source and source != self._model and not self._agreed(source):
            source = ""
        if source:
            self.load(source)
        else:
            self.picker.choose(self._model)

    def _agreed(self, name: str) -> bool:
        """Whether a model is here, or may be fetched."""
        entry = next((entry for entry in known_models() if entry.name == name), None)
        if entry is None or entry.stored():
            return True
        text = f"Fetch {name}?\n\n{entry.description}\n{_size(entry.download_bytes)}, licence: {entry.licence}"
        return QMessageBox.question(self, "Fetch a model", text) == QMessageBox.StandardButton.Yes

    def _send_or_stop(self) -> None:
        if self._busy:
            self.stop()
        else:
            self.send()

    def _talk_menu(self, point: object) -> None:
        item = self.talks.itemAt(point)  # type: ignore[call-overload]
        if item is not None:
            menu = QMenu(self)
            menu.addAction("Delete", lambda: self.delete_talk(item.data(Qt.ItemDataRole.UserRole)))
            menu.popup(self.talks.viewport().mapToGlobal(point))  # type: ignore[call-overload]

    def delete_talk(self, path: Path) -> None:
        self.history.delete(path)
        if path == self._talk_file:
            self.new_talk()
        self._list_talks()

    def _open_item(self, item: QListWidgetItem) -> None:
        path = item.data(Qt.ItemDataRole.UserRole)
        if path != self._talk_file:
            self.open_talk(path)

    # What the thread tells

    def _show_progress(self, what: str, share: float) -> None:
        self.bar.setRange(0, 0 if share < 0 else 1000)
        self.bar.setValue(int(share * 1000))
        self._say(what)

    def _show_prompt_progress(self) -> None:
        done, total = self.worker.prompt_progress()
        if self.transcript.answer is not None and not (self.transcript.answer.text or self.transcript.answer.thoughts):
            if total and done < total - 1:
                self._show_progress(f"Reading {total} tokens …", done / total)
        else:
            self.bar.setRange(0, 0)
            self._say("Answering …")

    def _loaded(self, name: str, notice: str) -> None:
        self.setWindowTitle(f"{name} - qrun")
        self.settings.model = self._model
        self.picker.fill()
        self.picker.choose(self._model)
        self._say(notice)

    def _show_piece(self, channel: str, text: str) -> None:
        if self.transcript.answer is not None:
            self.transcript.answer.add(channel, text)

    def _answered(self, new: list[dict[str, str]], note: str) -> None:
        self._clock.stop()
        path, messages = self._asked
        shown = self.transcript.answer  # None where another talk was opened meanwhile
        if shown is not None:
            self._say("")
        if new:
            messages += new
            try:
                self.history.write(path, messages)
            except OSError as error:
                self.show_error(str(error))
            self._list_talks()
            if shown is not None:
                shown.finish(note)
        elif shown is not None:  # there was no answer: the question goes back to where it can be changed
            self.transcript.take_back()
            self.line.setPlainText(self._question)

    def show_error(self, text: str) -> None:
        if self._busy == "loading":
            self._model = ""
            self.picker.choose(None)
            self.setWindowTitle("qrun")
        self._say(text, error=True)

    # How it looks

    def _be(self, busy: str) -> None:
        self._busy = busy
        self.button.setText("Stop" if busy else "Send")
        self.bar.setVisible(bool(busy))
        self.bar.setRange(0, 0)
        if busy == "answering":
            self._clock.start()
        else:
            self._clock.stop()

    def _say(self, text: str, error: bool = False) -> None:
        line = " ".join(text.split())
        self.status.setToolTip(line)
        self.status.setStyleSheet("color: #d03030;" if error else "")
        self.status.setText(self.status.fontMetrics().elidedText(line, Qt.TextElideMode.ElideRight, self.width() - 420))

    def _list_talks(self) -> None:
        self.talks.clear()
        for path, title in self.history.talks():
            item = QListWidgetItem(title)
            item.setData(Qt.ItemDataRole.UserRole, path)
            self.talks.addItem(item)
            if path == self._talk_file:
                self.talks.setCurrentItem(item)

    def _use_scheme(self) -> None:
        chosen = self.settings.values["scheme"]
        if chosen == "system":
            chosen = "dark" if QApplication.styleHints().colorScheme() == Qt.ColorScheme.Dark else "light"
        QApplication.setPalette(_palette(COLOURS[chosen]))
        self.setStyleSheet(STYLE)  # again: it has looked up its colours

    # Qt's own

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress and watched is self.line:
            enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
            if enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
                self.send()
                return True
        return super().eventFilter(watched, event)

    def closeEvent(self, event: QCloseEvent) -> None:
        self.worker.stop()
        super().closeEvent(event)


def _column(*widgets: QWidget) -> QWidget:
    box = QWidget()
    layout = QVBoxLayout(box)
    layout.setContentsMargins(8, 8, 8, 8)
    for widget in widgets:
        layout.addWidget(widget, 1 if isinstance(widget, Transcript | QListWidget) else 0)
    return box


def _row(*widgets: QWidget | None) -> QWidget:
    """None is room that stretches."""
    box = QWidget()
    layout = QHBoxLayout(box)
    layout.setContentsMargins(0, 0, 0, 0)
    for widget in widgets:
        if widget is None:
            layout.addStretch(1)
        else:
            layout.addWidget(widget)
    return box


def _palette(colours: tuple[str, ...]) -> QPalette:
    window, base, raised, text, faint, chosen = map(QColor, colours)
    palette = QPalette(window)
    role = QPalette.ColorRole
    for background in (role.Window, role.Button):
        palette.setColor(background, window)
    palette.setColor(role.Base, base)
    for ground in (role.AlternateBase, role.ToolTipBase):
        palette.setColor(ground, raised)
    for writing in (role.WindowText, role.Text, role.ButtonText, role.ToolTipText):
        palette.setColor(writing, text)
        palette.setColor(QPalette.ColorGroup.Disabled, writing, faint)
    palette.setColor(role.PlaceholderText, faint)
    palette.setColor(role.Mid, raised.darker(115) if window.lightness() > 127 else raised.lighter(140))
    for accent in (role.Highlight, role.Link, role.Accent):
        palette.setColor(accent, chosen)
    palette.setColor(role.HighlightedText, QColor("white"))
    return palette


def _size(size: int | None) -> str:
    if size is None:
        return "of unknown size"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def main(arguments: list[str], started: Callable[[Window], object] = lambda window: None) -> int:
    """Runs the app; `started` is called once its window is shown."""
    sys.setswitchinterval(0.001)  # the window's thread gets its turn sooner while another one runs Python
    app = QApplication(arguments)
    app.setApplicationName("qrun-desktop")
    app.setOrganizationName("qrun")
    app.setStyle("Fusion")
    window = Window(arguments[1] if len(arguments) > 1 else "")
    window.show()
    started(window)
    status = app.exec()
    if not window.worker.close(SECONDS_TO_END):
        os._exit(status)  # a kernel is being compiled here, which cannot be ended; nothing is lost by that
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
