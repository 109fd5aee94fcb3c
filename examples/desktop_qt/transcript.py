"""What has been said: a bubble for each message, answers as the Markdown that they are, thoughts folded away."""

import functools
import re
from collections.abc import Callable

from PySide6.QtCore import QEvent, QSize, Qt, QTimer, QUrl
from PySide6.QtGui import (
    QDesktopServices,
    QFontDatabase,
    QPalette,
    QTextCursor,
    QTextDocument,
    QTextFormat,
    QWheelEvent,
)
from PySide6.QtWidgets import (
    QFrame,
    QGridLayout,
    QLabel,
    QScrollArea,
    QSizePolicy,
    QTextBrowser,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

REDRAWN_MS = 60
"""An answer that grows is laid out anew so often, and not with every token."""
PART_CHARACTERS = 4000
"""Laying out a text takes some 10 ms for so many characters, in which nothing can be clicked. A longer answer is shown
in parts, and only the last is laid out anew."""
SHOWN_CHARACTERS = 1500
"""Of a longer question the rest is folded away."""
# Here, as PySide6 makes these classes when they are first asked for, some of them in 20 ms.
FEATURES = QTextDocument.MarkdownFeature.MarkdownDialectGitHub | QTextDocument.MarkdownFeature.MarkdownNoHTML
CODE = QTextFormat.Property.BlockCodeFence


def parts(text: str) -> list[str]:
    """A Markdown text, cut where a paragraph ends and the part is long enough; never within code."""
    found, part, size, fence = [], [], 0, ""
    for line in text.splitlines(keepends=True):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        elif size >= PART_CHARACTERS and not fence and not line.startswith((" ", "\t")) and part[-1].isspace():
            found.append("".join(part))
            part, size = [], 0
        part.append(line)
        size += len(line)
    return [*found, "".join(part)] if part else found


@functools.cache
def fixed_font() -> list[str]:
    """The families of the system's font of fixed width. Asked for when there is code: the first answer takes 30 ms."""
    return QFontDatabase.systemFont(QFontDatabase.SystemFont.FixedFont).families()


class Markdown(QTextBrowser):
    """A text as high as it is. What a model writes is not trusted: no HTML, and nothing is fetched or read for it."""

    def __init__(self) -> None:
        super().__init__(openLinks=False, frameShape=QFrame.Shape.NoFrame)
        self._text = ""
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.viewport().setAutoFillBackground(False)
        self.document().setDocumentMargin(0)
        layout = self.document().documentLayout()
        layout.documentSizeChanged.connect(lambda size: self.setFixedHeight(int(size.height()) + 2))
        self.anchorClicked.connect(self._follow)

    def show_text(self, text: str) -> None:
        if text == self._text:
            return
        self._text = text
        self._lay_out()

    def _lay_out(self) -> None:
        document = self.document()
        document.setMarkdown(self._text, FEATURES)
        self._shade_code(document)

    def _shade_code(self, document: QTextDocument) -> None:
        """Code stands on a ground of its own, in a font of fixed width."""
        ground = self.palette().color(QPalette.ColorRole.AlternateBase)
        whole = QTextCursor(document)
        whole.beginEditBlock()  # one layout for all that is changed
        block = document.begin()
        while block.isValid():
            if block.blockFormat().hasProperty(CODE):
                cursor = QTextCursor(block)
                block_format, font = block.blockFormat(), block.charFormat()
                block_format.setBackground(ground)
                block_format.setNonBreakableLines(False)
                cursor.setBlockFormat(block_format)
                cursor.select(QTextCursor.SelectionType.BlockUnderCursor)
                font.setFontFamilies(fixed_font())
                cursor.mergeCharFormat(font)
            block = block.next()
        whole.endEditBlock()

    def loadResource(self, kind: int, name: QUrl) -> None:
        """Pictures that an answer names stay out: they could be any file of this computer."""

    def _follow(self, link: QUrl) -> None:
        if link.scheme() in ("http", "https"):
            QDesktopServices.openUrl(link)

    def changeEvent(self, event: QEvent) -> None:
        super().changeEvent(event)
        if event.type() == QEvent.Type.PaletteChange and self._text:
            self._lay_out()

    def wheelEvent(self, event: QWheelEvent) -> None:
        event.ignore()  # the transcript is what scrolls


class PlainText(QLabel):
    """It remembers how high it is: while an answer grows, all that stands above it is asked again and again."""

    def __init__(self, text: str = "") -> None:
        self._heights: dict[int, int] = {}
        super().__init__(text, textFormat=Qt.TextFormat.PlainText, wordWrap=True)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

    def show_text(self, text: str) -> None:
        if text != self.text():
            self._heights.clear()
            self.setText(text)

    def changeEvent(self, event: QEvent) -> None:
        self._heights.clear()
        super().changeEvent(event)

    def heightForWidth(self, width: int) -> int:
        if width not in self._heights:
            self._heights[width] = super().heightForWidth(width)
        return self._heights[width]


class Growing(QWidget):
    """A text in parts, one below the other."""

    def __init__(self, make: Callable[[], Markdown | PlainText]) -> None:
        super().__init__()
        self._make = make
        self.parts: list[Markdown | PlainText] = []
        self._column = QVBoxLayout(self)
        self._column.setContentsMargins(0, 0, 0, 0)
        self._column.setSpacing(10)

    def show_text(self, text: str) -> None:
        """This is how far it has come: it begins with what was shown before."""
        for i, part in enumerate(parts(text)):
            if i == len(self.parts):
                self.parts.append(self._make())
                self._column.addWidget(self.parts[-1])
            self.parts[i].show_text(part.strip("\n"))


class Bubble(PlainText):
    """As wide as its lines, if there is room: a label that wraps asks for less."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.setObjectName("question")

    def sizeHint(self) -> QSize:
        width = max(self.fontMetrics().horizontalAdvance(line[:200]) for line in self.text().split("\n")) + 28
        width = min(width, 560)
        return QSize(width, self.heightForWidth(width))

    def minimumSizeHint(self) -> QSize:
        return QSize(60, 0)


class Question(QWidget):
    """What was asked. The rest of a long one comes when somebody wants to see it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        short = text[:SHOWN_CHARACTERS]
        if len(text) > SHOWN_CHARACTERS:
            short = short.rpartition(" ")[0] or short
        self.bubble = Bubble(short if short == text else f"{short} …")
        grid = QGridLayout(self)
        grid.setContentsMargins(60, 0, 0, 0)
        grid.setColumnStretch(0, 1)
        grid.addWidget(self.bubble, 0, 1)
        if short != text:
            self.more = QToolButton(text=f"Show all {len(text):,} characters", autoRaise=True)
            self.more.clicked.connect(self._show_all)
            grid.addWidget(self.more, 1, 1, Qt.AlignmentFlag.AlignRight)

    def _show_all(self) -> None:
        self.bubble.show_text(self._text)
        self.more.hide()


class Answer(QWidget):
    def __init__(self, text: str = "", thoughts: str = "", under_way: bool = False) -> None:
        super().__init__()
        self.text, self.thoughts = text, thoughts
        self.fold = QToolButton(checkable=True, autoRaise=True, visible=False)
        self.fold.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.fold.setArrowType(Qt.ArrowType.RightArrow)
        self.fold.setIconSize(QSize(8, 8))
        self.thought = Growing(PlainText)
        self.thought.setObjectName("thought")
        self.thought.hide()
        self.body = Growing(Markdown)
        self.note = QLabel(visible=False)
        self.note.setObjectName("note")
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(4)
        for widget in (self.fold, self.thought, self.body, self.note):
            column.addWidget(widget)
        self.fold.toggled.connect(self._toggle)
        self._under_way = under_way
        self._timer = QTimer(self, singleShot=True, interval=REDRAWN_MS)
        self._timer.timeout.connect(self._draw)
        self._draw()

    def add(self, channel: str, text: str) -> None:
        if channel == "reasoning":
            self.thoughts += text
        elif channel == "content":
            self.text += text
        if not self._timer.isActive():
            self._timer.start()

    def finish(self, note: str) -> None:
        self._under_way = False
        self.note.setText(note)
        self.note.setVisible(bool(note))
        self._draw()

    def _draw(self) -> None:
        if self.thoughts.strip():
            self.fold.setText("Thinking …" if self._under_way and not self.text else "Thoughts")
            self.fold.setVisible(True)
            if self.fold.isChecked():
                self.thought.show_text(self.thoughts)
        self.body.setVisible(bool(self.text))
        self.body.show_text(self.text)

    def _toggle(self, shown: bool) -> None:
        self.fold.setArrowType(Qt.ArrowType.DownArrow if shown else Qt.ArrowType.RightArrow)
        self.thought.show_text(self.thoughts)
        self.thought.setVisible(shown)


class Transcript(QScrollArea):
    """All messages. It follows what is new, unless somebody has scrolled back to read."""

    def __init__(self) -> None:
        super().__init__(widgetResizable=True, frameShape=QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._inside = QWidget()
        self._column = QVBoxLayout(self._inside)
        self._column.setContentsMargins(24, 20, 24, 12)
        self._column.setSpacing(16)
        self._column.addStretch(1)
        self.setWidget(self._inside)
        self._inside.setMinimumWidth(1)
        self._inside.setBackgroundRole(QPalette.ColorRole.Base)
        self.answer: Answer | None = None
        """The newest."""
        self._following = True
        Markdown().deleteLater()  # the first one takes 20 ms, the others one
        bar = self.verticalScrollBar()
        bar.rangeChanged.connect(lambda low, high: bar.setValue(high) if self._following else None)
        bar.valueChanged.connect(self._scrolled)

    def show_messages(self, messages: list[dict[str, str]]) -> None:
        """These, in the place of what is shown."""
        while self._column.count() > 1:
            widget = self._column.takeAt(0).widget()
            if widget is not None:
                widget.deleteLater()
        self.answer = None
        self._following = True
        for message in messages:
            if message["role"] == "user":
                self._add(Question(message["content"]))
            elif message["role"] == "assistant":
                self._add(Answer(message["content"], message.get("reasoning_content", "")))

    def begin(self, question: str) -> None:
        """A question, and an answer that has yet to come."""
        self._following = True
        self._add(Question(question))
        self.answer = Answer(under_way=True)
        self._add(self.answer)

    def take_back(self) -> None:
        """The newest question and its answer go."""
        for _ in range(2):
            item = self._column.takeAt(self._column.count() - 2)
            item.widget().deleteLater()
        self.answer = None

    def _add(self, widget: QWidget) -> None:
        self._column.insertWidget(self._column.count() - 1, widget)

    def _scrolled(self, value: int) -> None:
        self._following = value >= self.verticalScrollBar().maximum() - 4
