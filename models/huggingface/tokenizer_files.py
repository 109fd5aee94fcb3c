"""The files of a tokenizer that a folder with a checkpoint has, and the tokens that they add to the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.json_file import read_json
from qrun.models.huggingface.pretokenizers import Cutting

# The tokens with a part to play, in the order in which Transformers adds those that are not there.
PARTS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text by its spelling.

    lstrip, rstrip: with the white space before or behind it. single_word: only where no word goes on. normalized: its
    normal form is looked for in normalised text. special: it is no text.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass
class TokenizerFiles:
    """The contents of the files in a folder, empty where there is none."""

    folder: Path
    tokenizer: Mapping[str, Any]  # tokenizer.json
    config: Mapping[str, Any]  # tokenizer_config.json
    added: Mapping[str, Any]  # added_tokens.json
    special: Mapping[str, Any]  # special_tokens_map.json
    generation: Mapping[str, Any]  # generation_config.json
    path: Path
    """The file that messages about the tokenizer name."""
    cutting: Cutting | None = None
    """How a text is cut into words, where `tokenizer` does not say it."""

    @classmethod
    def of(cls, folder: Path) -> TokenizerFiles:
        """Raises FormatError for a file that is damaged."""
        return cls(
            folder,
            tokenizer=optional_json(folder / "tokenizer.json"),
            config=optional_json(folder / "tokenizer_config.json"),
            added=optional_json(folder / "added_tokens.json"),
            special=optional_json(folder / "special_tokens_map.json"),
            generation=optional_json(folder / "generation_config.json"),
            path=folder / "tokenizer.json",
        )

    @property
    def is_general(self) -> bool:
        """Whether a tokenizer.json is read by the class that does what it says and nothing else."""
        general = self.config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        return bool(self.tokenizer) and general

    def token_text(self, part: str) -> str | None:
        """What the token with a part to play is called: "bos", "eos", ..."""
        named = self._named(f"{part}_token")
        return None if named is None else named.content

    def added_tokens(self, pieces: Mapping[str, int], n_pieces: int) -> dict[int, AddedToken]:
        """Tokens beside the model's own, or among them, by id.

        pieces: the model's own; n_pieces: how many those are, also such as are no text. Where a tokenizer.json lists
        them, ids are those that Transformers gives out, whatever the files say: the model's own id, or else the next
        one after all others.
        """
        model = self.tokenizer.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        listed = isinstance(vocab, dict)
        ids = dict(vocab if isinstance(vocab, dict) else pieces)
        taken = frozenset(ids.values()) if listed else frozenset()
        next_id = len(ids) if listed else n_pieces
        tokens: dict[str, AddedToken] = {}
        for given, token in self._given_tokens():
            if not token.content:
                continue
            if token.content not in tokens:
                if not listed and given is not None:
                    ids[token.content] = given
                if token.content not in ids and next_id in taken:
                    raise FormatError(self.path, f"ids are missing before {next_id}, which {quote(token.content)} gets")
                id = ids.setdefault(token.content, next_id)
                next_id = max(next_id, id + 1)
            tokens[token.content] = token
        return {ids[content]: token for content, token in tokens.items()}

    def _given_tokens(self) -> Iterator[tuple[int | None, AddedToken]]:
        """As the files have them, with their ids. Later ones replace earlier ones of the same spelling."""
        known: set[str] = set()
        parts = [token for part in PARTS if (token := self._named(f"{part}_token"))]
        names = {token.content for token in parts}

        def give(given: Any, token: Any) -> tuple[int, AddedToken]:
            id, added = self._id(given), self._token(token)
            known.add(added.content)
            return id, added

        listed = self.tokenizer.get("added_tokens") or []
        if not isinstance(listed, list):
            raise FormatError(self.path, f"added_tokens is not a list: {quote(str(listed))}")
        for token in listed:
            yield give(token.get("id") if isinstance(token, dict) else None, token)
        decoder = self.config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            for id, token in sorted(((self._id(id), token) for id, token in decoder.items()), key=lambda pair: pair[0]):
                yield give(id, token)
        for text, id in sorted(self.added.items(), key=lambda pair: str(pair[1]).zfill(10)):
            if text not in known:
                yield give(id, {"content": text, "special": text in names})
        for token in parts:
            if token.content not in known:
                known.add(token.content)
                yield None, token
        for key in ("additional_special_tokens", "extra_special_tokens"):
            for values in (self.config, self.special):
                others = values.get(key)
                for other in others if isinstance(others, list) else []:
                    named = self._special(other)
                    if named is not None and named.content not in known:
                        known.add(named.content)
                        yield None, named

    def _named(self, key: str) -> AddedToken | None:
        for values in (self.config, self.special):
            token = self._special(values.get(key))
            if token is not None:
                return token
        return None

    def _special(self, value: Any) -> AddedToken | None:
        if isinstance(value, str):
            return AddedToken(value, special=True)
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            return self._token({**value, "special": True})
        return None

    def _token(self, token: Any) -> AddedToken:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(self.path, f"the added token {quote(str(token))} has no content")
        flags = {}
        for name in ("special", "lstrip", "rstrip", "single_word", "normalized"):
            value = token.get(name)
            if value is None:
                value = name == "normalized" and not token.get("special")
            if not isinstance(value, bool):
                what = f"{name} of the added token {quote(token['content'])} is {quote(str(value))}"
                raise FormatError(self.path, f"{what}, which is neither true nor false")
            flags[name] = value
        return AddedToken(token["content"], **flags)

    def _id(self, id: Any) -> int:
        if isinstance(id, str) and id.isdecimal() and len(id) < 10:
            id = int(id)
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise FormatError(self.path, f"an added token has the id {quote(str(id))}")
        return id


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
