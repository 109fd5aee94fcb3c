"""Conversations: what is computed, what goes when the context is full, what is saved."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cli_fakes import make_model, runtime_of, text_of
from engine_fakes import EOS

from qrun.engine import ChatTemplate, ContextOverflow
from qrun.engine.conversation import Conversation


def say(conversation: Conversation, text: str) -> str:
    return "".join(conversation.answer(text))


def test_an_answer_joins_the_conversation() -> None:
    conversation = Conversation(make_model(), system="be kind")
    assert say(conversation, "hello") == "HELLO!"
    assert conversation.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "HELLO!"},
    ]
    assert conversation.stop_reason == "stop"


def test_an_answer_can_be_stopped() -> None:
    conversation = Conversation(make_model())
    answer = conversation.answer("hello")
    assert next(answer) == "H"
    conversation.stop()
    assert "".join(answer) == ""
    assert conversation.stop_reason == "cancelled"
    assert conversation.messages[-1] == {"role": "assistant", "content": "H"}


def test_only_new_tokens_are_computed() -> None:
    model = make_model()
    conversation = Conversation(model)
    say(conversation, "one")
    runtime_of(model).evaluated.clear()
    assert say(conversation, "two") == "TWO!"
    assert text_of(runtime_of(model).evaluated[0]) == "</s>(u)two</s>(a)"
    assert conversation.last_stats is not None
    assert conversation.last_stats.cached_tokens == len("(u)one") + 1 + len("(a)ONE!")


@pytest.mark.parametrize("special", [False, True])
def test_a_turn_that_spells_a_special_token(special: bool) -> None:
    model = make_model()
    source = "{% for m in messages %}({{ m.role[0] }}){{ m.content }}</s>{% endfor %}(a)"
    spellings = frozenset({"</s>"}), frozenset[str]()
    model.chat_template = ChatTemplate(source, model.tokenizer, special_spellings=spellings)  # type: ignore[arg-type]
    conversation = Conversation(model)
    conversation.special_tokens_in_messages = special
    say(conversation, "a</s>b")
    runtime_of(model).evaluated.clear()
    assert say(conversation, "two") == "TWO!"
    assert text_of(runtime_of(model).evaluated[0]) == "</s>(u)two</s>(a)"  # the rest was known
    assert conversation.session.tokens.count(EOS) == 3 + special


def test_a_new_system_prompt_is_heeded_and_can_be_removed() -> None:
    model = make_model()
    conversation = Conversation(model, system="old")
    say(conversation, "one")
    conversation.set_system("new")
    say(conversation, "two")
    assert text_of(conversation.session.tokens).startswith("(s)new</s>(u)one</s>(a)ONE!</s>(u)two</s>(a)TWO!")
    conversation.set_system("")
    assert conversation.system is None
    say(conversation, "three")
    assert text_of(conversation.session.tokens).startswith("(u)one")


def test_clear_keeps_the_system_prompt() -> None:
    conversation = Conversation(make_model(), system="s")
    say(conversation, "one")
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "s"}]
    assert conversation.session.tokens == []


def test_the_oldest_turns_go_when_the_context_is_full_and_the_system_prompt_stays() -> None:
    forgotten: list[int] = []
    conversation = Conversation(make_model(context=100), system="stay", on_forget=forgotten.append)
    for i in range(8):
        assert say(conversation, f"turn {i}") == f"TURN {i}!"
    assert forgotten and all(n % 2 == 0 for n in forgotten)
    assert conversation.messages[0] == {"role": "system", "content": "stay"}
    assert [message["role"] for message in conversation.messages[1:3]] == ["user", "assistant"]
    assert conversation.messages[-1]["content"] == "TURN 7!"
    assert len(forgotten) < 4  # each time there is room for some turns to come


def test_an_answer_that_fills_the_context_goes_on_without_the_oldest_turns() -> None:
    forgotten: list[int] = []
    conversation = Conversation(make_model(context=100), on_forget=forgotten.append)
    say(conversation, "a" * 10)
    say(conversation, "b")
    question = "c" * 27  # 74 tokens of prompt and 28 of answer are more than 100, though a quarter was free
    assert say(conversation, question) == question.upper() + "!"
    assert sum(forgotten) == 2
    assert conversation.stop_reason == "stop"


@pytest.mark.parametrize("context", range(93, 96))
@pytest.mark.parametrize("stop", [(), ("É!",)])
def test_an_answer_is_one_text_though_turns_are_forgotten_within_it(context: int, stop: tuple[str, ...]) -> None:
    """Wherever the context becomes full: within a character, or within what ends the answer."""
    forgotten: list[int] = []

    def on_forget(n: int) -> None:
        forgotten.append(n)
        assert conversation.answering

    conversation = Conversation(make_model(context), on_forget=on_forget)
    say(conversation, "a" * 14)
    conversation.sampling = {"stop": stop, "max_tokens": 27}
    assert say(conversation, "é" * 13) == "É" * 12 + ("" if stop else "É!")
    assert (forgotten, conversation.stop_reason) == ([2], "stop" if stop else "length")
    assert not conversation.answering


def test_an_answer_longer_than_any_room_is_cut() -> None:
    conversation = Conversation(make_model(context=100))
    answer = say(conversation, "x" * 60)
    assert conversation.stop_reason == "context"
    assert answer == "X" * len(answer) and 30 < len(answer) < 60


def test_a_turn_that_never_fits_leaves_no_trace() -> None:
    conversation = Conversation(make_model(context=100))
    say(conversation, "one")
    with pytest.raises(ContextOverflow):
        say(conversation, "x" * 200)
    assert len(conversation.messages) == 2
    assert say(conversation, "two") == "TWO!"


def test_a_template_s_refusal_leaves_no_trace() -> None:
    conversation = Conversation(make_model())
    with pytest.raises(ValueError, match="does not like"):
        say(conversation, "fault")
    assert conversation.messages == []


def test_stopping_keeps_what_was_said_and_the_session() -> None:
    model = make_model()
    conversation = Conversation(model)
    pieces = []
    for piece in conversation.answer("a long question"):
        pieces.append(piece)
        if len(pieces) == 4:
            conversation.session.stop()
    assert conversation.stop_reason == "cancelled"
    assert conversation.messages[-1] == {"role": "assistant", "content": "A LO"}
    assert say(conversation, "next") == "NEXT!"
    assert conversation.last_stats is not None and conversation.last_stats.cached_tokens > 20


def test_a_turn_that_is_stopped_before_its_answer_leaves_no_trace() -> None:
    model = make_model()
    conversation = Conversation(model)
    runtime_of(model).on_batch = conversation.session.stop
    assert say(conversation, "hello") == ""
    assert conversation.messages == []


def test_max_tokens_counts_over_the_whole_answer() -> None:
    conversation = Conversation(make_model(), sampling={"max_tokens": 3})
    assert say(conversation, "hello") == "HEL"
    assert conversation.stop_reason == "length"


def test_a_stop_string_cuts_the_text_and_the_next_turn_still_fits() -> None:
    conversation = Conversation(make_model(), sampling={"stop": ("LL",)})
    assert say(conversation, "hello") == "HE"
    assert say(conversation, "two") == "TWO!"
    assert "(a)HE</s>(u)two" in text_of(conversation.session.tokens)


def test_a_saved_conversation_goes_on_without_being_read_again(tmp_path: Path) -> None:
    first = Conversation(make_model(), system="s")
    say(first, "one")
    assert first.save(tmp_path / "talk.json") == [tmp_path / "talk.json", tmp_path / "talk.npz"]
    model = make_model()
    second = Conversation(model)
    assert second.load(tmp_path / "talk.json") is True
    assert second.messages == first.messages
    assert say(second, "two") == "TWO!"
    assert text_of(runtime_of(model).evaluated[0]) == "</s>(u)two</s>(a)"


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_saved_conversation_is_for_its_owner_alone(tmp_path: Path) -> None:
    conversation = Conversation(make_model())
    say(conversation, "one")
    (tmp_path / "old.json").touch(0o644)
    before = os.umask(0o022)
    try:
        files = conversation.save(tmp_path / "new" / "folder" / "talk.json")
        files += conversation.save(tmp_path / "old.json")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", tmp_path / "new" / "folder")} == {0o700}


def test_a_conversation_that_cannot_be_saved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(make_model())
    say(conversation, "one")
    conversation.save(tmp_path / "talk.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    say(conversation, "two")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError) as caught:
        conversation.save(tmp_path / "talk.json")
    assert caught.value.filename == str(tmp_path / "talk.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_conversation_with_what_is_no_text_can_be_saved(tmp_path: Path) -> None:
    first = Conversation(make_model(), system="from a terminal of another encoding: \udcff")
    first.save(tmp_path / "talk.json")
    second = Conversation(make_model())
    second.load(tmp_path / "talk.json")
    assert second.messages == first.messages


def test_without_its_state_a_saved_conversation_is_read_again(tmp_path: Path) -> None:
    first = Conversation(make_model())
    say(first, "one")
    first.save(tmp_path / "talk.json")
    for damage in (lambda path: path.write_bytes(b"damaged"), lambda path: path.unlink()):
        damage(tmp_path / "talk.npz")
        second = Conversation(make_model())
        assert second.load(tmp_path / "talk.json") is False
        assert say(second, "two") == "TWO!"
        assert second.last_stats is not None and second.last_stats.cached_tokens == 0


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"messages": [1], "text": "", "tokens": []}', "\udcff", "[" * 10**5]
)
def test_what_is_no_conversation_changes_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    conversation = Conversation(make_model())
    say(conversation, "one")
    with pytest.raises(ValueError, match="not a saved conversation"):
        conversation.load(path)
    assert len(conversation.messages) == 2
