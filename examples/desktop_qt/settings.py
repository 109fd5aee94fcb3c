"""What the user has chosen, and the talks that were held: kept in the user's folders, as Qt knows them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PySide6.QtCore import QSaveFile, QSettings, QStandardPaths
from PySide6.QtWidgets import (
    QComboBox,
    QDialog,
    QDialogButtonBox,
    QDoubleSpinBox,
    QFormLayout,
    QLabel,
    QPlainTextEdit,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

OWN = "the model's own"

# name: label, lowest and highest value, step, decimals. Below the lowest lies "the model's own".
SAMPLING: dict[str, tuple[str, float, float, float, int]] = {
    "temperature": ("Temperature", 0, 5, 0.1, 2),
    "top_k": ("Top k", 0, 1000, 10, 0),
    "top_p": ("Top p", 0, 1, 0.05, 2),
    "min_p": ("Min p", 0, 1, 0.01, 2),
    "repetition_penalty": ("Repetition penalty", 0.5, 2, 0.05, 2),
    "max_tokens": ("Longest answer, tokens", 1, 100_000, 100, 0),
    "seed": ("Seed", 0, 1_000_000, 1, 0),
}
LOADING: dict[str, tuple[str, float, float, float, int]] = {
    "context": ("Context, tokens", 128, 1_000_000, 1024, 0),
    "threads": ("Threads", 1, 256, 1, 0),
}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "think": ("Thinking before the answer", {"as the model does": None, "yes": True, "no": False}),
    "cache_type": ("Memory of the talk", {"exact (F16)": "f16", "half (Q8_0)": "q8_0", "quarter (Q4_0)": "q4_0"}),
    "scheme": ("Colours", {"as the system": "system", "light": "light", "dark": "dark"}),
}


class Settings:
    """All of it, as a dictionary that is written when it changes; None stands for the model's own."""

    def __init__(self) -> None:
        self._store = QSettings()
        self.values: dict[str, Any] = dict.fromkeys((*SAMPLING, *LOADING, "system"))
        self.values |= {name: next(iter(choices.values())) for name, (_, choices) in CHOICES.items()}
        try:
            saved = json.loads(str(self._store.value("settings", "{}")))
            self.values |= {name: value for name, value in saved.items() if name in self.values}
        except (ValueError, AttributeError):  # not ours, or damaged: begin anew
            pass

    @property
    def model(self) -> str:
        """The model that was used last; "" if there was none."""
        return str(self._store.value("model", ""))

    @model.setter
    def model(self, source: str) -> None:
        self._store.setValue("model", source)

    def save(self) -> None:
        self._store.setValue("settings", json.dumps(self.values))

    def sampling(self) -> dict[str, Any]:
        """Options of an answer."""
        return {name: self.values[name] for name in SAMPLING if self.values[name] is not None}

    def loading(self) -> dict[str, Any]:
        """Options of `Model.load`."""
        return {name: self.values[name] for name in (*LOADING, "cache_type") if self.values[name] is not None}


class SettingsDialog(QDialog):
    def __init__(self, parent: QWidget, settings: Settings) -> None:
        super().__init__(parent, windowTitle="Settings")
        self._settings = settings
        form = QFormLayout()
        self.system = QPlainTextEdit(settings.values["system"] or "", placeholderText=f"System prompt: {OWN}")
        self.system.setFixedHeight(80)
        form.addRow("System prompt", self.system)
        self._choices: dict[str, QComboBox] = {}
        self.numbers: dict[str, QSpinBox | QDoubleSpinBox] = {}
        for name in ("think",):
            self._add_choice(form, name)
        for name, number in SAMPLING.items():
            self._add_number(form, name, *number)
        form.addRow(QLabel("When a model is loaded:"))
        for name, number in LOADING.items():
            self._add_number(form, name, *number)
        self._add_choice(form, "cache_type")
        form.addRow(QLabel("This window:"))
        self._add_choice(form, "scheme")
        buttons = QDialogButtonBox(QDialogButtonBox.StandardButton.Ok | QDialogButtonBox.StandardButton.Cancel)
        buttons.accepted.connect(self.accept)
        buttons.rejected.connect(self.reject)
        column = QVBoxLayout(self)
        column.addLayout(form)
        column.addWidget(buttons)

    def _add_choice(self, form: QFormLayout, name: str) -> None:
        label, choices = CHOICES[name]
        box = self._choices[name] = QComboBox()
        for text, value in choices.items():
            box.addItem(text, value)
        values, value = list(choices.values()), self._settings.values[name]
        box.setCurrentIndex(values.index(value) if value in values else 0)
        form.addRow(label, box)

    def _add_number(
        self, form: QFormLayout, name: str, label: str, lowest: float, highest: float, step: float, decimals: int
    ) -> None:
        value = self._settings.values[name]
        below = lowest - step
        box: QSpinBox | QDoubleSpinBox
        if decimals:
            box = QDoubleSpinBox(decimals=decimals, singleStep=step, minimum=below, maximum=highest)
            box.setValue(below if value is None else value)
        else:
            box = QSpinBox(singleStep=int(step), minimum=int(below), maximum=int(highest))
            box.setValue(int(below if value is None else value))
        box.setSpecialValueText(OWN)
        self.numbers[name] = box
        form.addRow(label, box)

    def accept(self) -> None:
        values = self._settings.values
        values["system"] = self.system.toPlainText().strip() or None
        for name, box in self.numbers.items():
            lowest = {**SAMPLING, **LOADING}[name][1]
            values[name] = None if box.value() < lowest else box.value()
        for name, choice in self._choices.items():
            values[name] = choice.currentData()
        self._settings.save()
        super().accept()


class History:
    """Talks, a file each: their messages as JSON."""

    def __init__(self) -> None:
        folder = QStandardPaths.writableLocation(QStandardPaths.StandardLocation.AppDataLocation)
        self._folder = Path(folder) / "talks"

    def new(self) -> Path:
        """Where a talk that begins now will lie."""
        return self._folder / f"{time.time_ns()}.json"

    def talks(self) -> Iterator[tuple[Path, str]]:
        """Their files and what they began with, the newest first."""
        for path in sorted(self._folder.glob("*.json"), reverse=True):
            questions = [message["content"] for message in self.read(path) if message["role"] == "user"]
            if questions:
                yield path, questions[0].strip().partition("\n")[0]

    def read(self, path: Path) -> list[dict[str, str]]:
        """The messages of a talk; none of a file that is gone, or is something else."""
        try:
            messages = json.loads(path.read_text("utf-8"))
            thought = "reasoning_content"
            return [
                {"role": str(message["role"]), "content": str(message["content"])}
                | ({thought: str(message[thought])} if thought in message else {})
                for message in messages
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def write(self, path: Path, messages: list[dict[str, str]]) -> None:
        """Keep a talk. Raises OSError, and what was there stays as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = QSaveFile(str(path))
        written = file.open(QSaveFile.OpenModeFlag.WriteOnly)
        written = written and file.write(json.dumps(messages, indent=1).encode()) >= 0
        if not (written and file.commit()):
            raise OSError(f"the talk cannot be kept: {path}: {file.errorString()}")

    def delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
