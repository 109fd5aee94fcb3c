"""Sessions: what they reuse, that they are independent, and that they can be saved."""

import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from engine_fakes import FakeRuntime, cache_of, ids_of, make_session, speaking

from qrun.engine.errors import ContextOverflow
from qrun.engine.generation import session_file
from qrun.engine.generation.session import Session
from qrun.engine.generation.token_cache import common_prefix
from qrun.formats import FormatError
from qrun.models.graph import Choose, Index, Value


def texts(runtime: FakeRuntime) -> list[str]:
    return [bytes(token - 2 for token in tokens).decode() for tokens in runtime.evaluated]


def read(session: Session, text: str, **options: int) -> int:
    """Evaluates a text, and says how much of it was held already."""
    generation = session.generate(ids_of(text), **{"max_tokens": 0} | options)
    assert list(generation) == []
    return generation.stats.cached_tokens


def test_only_new_tokens_are_computed() -> None:
    runtime = FakeRuntime()
    session = make_session(runtime)
    assert read(session, "one two") == 0
    assert read(session, "one two three") == 7
    assert read(session, "one tooth") == 5
    assert read(session, "other") == 1
    assert texts(runtime) == ["one two", " three", "ooth", "ther"]
    assert session.tokens == ids_of("other")


def test_one_token_is_computed_even_if_all_are_held() -> None:
    runtime = FakeRuntime()
    session = make_session(runtime)
    read(session, "one two")
    assert read(session, "one two") == 6
    assert read(session, "one") == 2
    assert texts(runtime) == ["one two", "o", "e"]


def test_generated_tokens_are_held_for_the_next_turn() -> None:
    runtime = FakeRuntime(speaking(*ids_of("hello")))
    session = make_session(runtime)
    assert "".join(session.generate(ids_of("hi>"))) == "hello"
    assert session.tokens == ids_of("hi>hello")
    assert read(session, "hi>hello again") == 8


def test_where_a_window_gave_pages_back_the_text_is_computed_again() -> None:
    runtime = FakeRuntime(window=4)
    session = make_session(runtime)
    read(session, "0123456789")
    assert read(session, "01234567xx") == 8
    assert read(session, "0123xx") == 0
    assert texts(runtime)[-1] == "0123xx"
    assert session.tokens == ids_of("0123xx")


@pytest.mark.parametrize("window", [None, 3])
def test_a_reused_prefix_changes_nothing(window: int | None) -> None:
    random = np.random.default_rng(0)
    rule = lambda held: (7 * sum(held) + len(held)) % 250 + 2  # noqa: E731
    session = make_session(FakeRuntime(rule, window=window))
    for _ in range(60):
        prompt = random.integers(2, 4, random.integers(1, 30)).tolist()
        options = {"max_tokens": int(random.integers(0, 5)), "seed": 1, "temperature": 1.0}
        reused, fresh = session.generate(prompt, **options), make_session(FakeRuntime(rule)).generate(prompt, **options)
        list(reused), list(fresh)
        assert reused.tokens == fresh.tokens
        assert session.tokens == cache_of(session).sequence.held  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([5, 10_000], "token 10000 is not in the vocabulary of 266"),
        ([-1], "token -1 is not in the vocabulary"),
        ([1.5], "list of token ids"),
        (["a"], "list of token ids"),
        ([[1, 2]], "list of token ids"),
    ],
)
def test_a_wrong_prompt_is_refused_at_once(prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_session().generate(prompt)


def test_prompts_may_be_arrays() -> None:
    session = make_session()
    list(session.generate(np.array(ids_of("ab"), np.int32), max_tokens=0))
    assert session.tokens == ids_of("ab")


def test_a_prompt_longer_than_the_context_gives_both_numbers() -> None:
    session = make_session(FakeRuntime(context=10))
    with pytest.raises(ContextOverflow, match=r"^the prompt has 11 tokens, and the context holds 10$"):
        session.generate(ids_of("a" * 11))
    assert isinstance(ContextOverflow(), ValueError)


def test_unknown_and_wrong_options_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        make_session().generate(ids_of("a"), temprature=1)
    with pytest.raises(ValueError, match="top_p must be between"):
        make_session().generate(ids_of("a"), top_p=2)
    with pytest.raises(ValueError, match="token 263 is not in the vocabulary"):
        make_session().generate(ids_of("a"), logit_bias={263: 1.0})


def test_a_new_generation_cancels_the_one_before() -> None:
    session = make_session()
    first = session.generate(ids_of("a"))
    next(first)
    second = session.generate(ids_of("b"))
    next(second)
    assert list(first) == []
    assert first.stop_reason == "cancelled"
    assert session.tokens == ids_of("b")
    assert next(second)


def in_thread(action: object) -> BaseException | None:
    caught: list[BaseException | None] = [None]

    def run() -> None:
        try:
            action()  # type: ignore[operator]
        except BaseException as error:
            caught[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return caught[0]


def test_another_thread_cannot_take_a_session_that_generates() -> None:
    session = make_session()
    generation = session.generate(ids_of("a"))
    next(generation)
    assert session.busy
    for action in (lambda: session.generate(ids_of("b")), session.clear):
        error = in_thread(action)
        assert isinstance(error, RuntimeError)
        assert "another thread" in str(error)
    next(generation)
    session.stop()
    assert not session.busy
    assert in_thread(lambda: session.generate(ids_of("b"))) is None


def test_a_generation_that_was_dropped_does_not_keep_its_session_busy() -> None:
    session = make_session()
    for _ in session.generate(ids_of("a")):
        break
    assert not session.busy


def test_stop_leaves_the_next_generation_alone() -> None:
    session = make_session()
    session.stop()
    assert next(session.generate(ids_of("a")))


def test_two_sessions_in_two_threads() -> None:
    runtime = FakeRuntime(speaking(*ids_of("hello there")))
    results: dict[str, str] = {}

    def talk(name: str) -> None:
        session = make_session(runtime)
        for turn in range(20):
            results[f"{name}{turn}"] = "".join(session.generate(ids_of(f"{name}{turn}>")))

    threads = [threading.Thread(target=talk, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == ["hello there"] * 40


def test_a_fork_goes_its_own_way() -> None:
    session = make_session()
    read(session, "one two")
    fork = session.fork()
    assert read(fork, "one two three") == 7
    assert read(session, "one too") == 5
    assert (session.tokens, fork.tokens) == (ids_of("one too"), ids_of("one two three"))
    session.close()
    assert read(fork, "one two three") == 12


def test_clear() -> None:
    session = make_session()
    read(session, "one")
    session.clear()
    assert session.tokens == []
    assert read(session, "one") == 0


def test_save_and_load(tmp_path: Path) -> None:
    session = make_session()
    read(session, "one two")
    session.save(tmp_path / "a.session")
    assert [path.name for path in tmp_path.iterdir()] == ["a.session"], "no temporary file is left"
    other = make_session()
    read(other, "something else")
    old = cache_of(other).sequence
    other.load(tmp_path / "a.session")
    assert old.closed  # type: ignore[attr-defined]
    assert other.tokens == ids_of("one two")
    assert read(other, "one two three") == 7


def test_an_empty_session_can_be_saved(tmp_path: Path) -> None:
    session = make_session()
    session.save(tmp_path / "a")
    read(session, "one")
    session.load(tmp_path / "a")
    assert session.tokens == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session()
    (tmp_path / "a").write_text("old")

    def fail(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        session.save(tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def saved(tmp_path: Path) -> Path:
    session = make_session()
    read(session, "one two")
    session.save(tmp_path / "saved")
    return tmp_path / "saved"


def refused(session: Session, path: Path) -> str:
    """The error of a load that fails, after which the session is as before."""
    read(session, "mine")
    with pytest.raises(FormatError) as caught:
        session.load(path)
    assert session.tokens == ids_of("mine")
    assert read(session, "mine too") == 4
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    assert refused(make_session(fingerprint="other"), saved(tmp_path)) == "saved by a session of another model"


def test_a_file_of_another_context_is_refused_where_that_decides_what_is_kept(tmp_path: Path) -> None:
    runtime, path = FakeRuntime(), saved(tmp_path)
    runtime.graph.architecture, runtime.graph.operations = "deepseek32", []
    error = refused(make_session(runtime, fingerprint="of a short context"), path)
    assert error.startswith("saved by a session of another model, or of this one with a longer context, in which ")
    x = Value(0, 1)
    runtime.graph.operations = [Choose(x, x, x, None, 0, Index(1, 1, budget=2048))]
    error = refused(make_session(runtime, fingerprint="of a long context"), path)
    assert error.startswith("saved by a session of another model, or of this one with a context of at most 2048 tokens")


def test_a_file_of_another_cache_type_is_refused(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    runtime.cache_type = "q8_0"
    assert refused(make_session(runtime), saved(tmp_path)) == "saved with cache type f16, not q8_0 as loaded"


def test_a_file_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    session = make_session(FakeRuntime(context=5))
    with pytest.raises(ContextOverflow, match="7 tokens"):
        session.load(saved(tmp_path))


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert refused(make_session(), tmp_path / "nothing") == "No such file or directory"
    assert refused(make_session(), tmp_path) == "Is a directory"


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("hello")
    assert "no saved session" in refused(make_session(), path)
    np.savez(path, tokens=np.zeros(3, np.int32))
    path = tmp_path / "other.npz"
    assert refused(make_session(), path) == "no saved session: it has no 'magic'"
    np.savez(path, magic=np.frombuffer(b"qrun session 1", np.uint8))
    assert refused(make_session(), path) == "saved by another version of qrun"
    np.savez_compressed(path, magic=np.zeros(100_000, np.uint8))
    assert "magic.npy is compressed" in refused(make_session(), path)
    np.savez(path, magic=np.array([{}], object), allow_pickle=True)
    assert "no saved session, or a damaged one" in refused(make_session(), path)


@pytest.mark.parametrize("shape", ["(999999999999,)", "(-1,)", "(2**70,)", "(1,)*1000000", "()", "7"])
def test_a_header_that_lies_is_refused(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(tmp_path / "lies", "w") as archive:
        archive.writestr("magic.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234567")
    assert "no saved session, or a damaged one: an array " in refused(make_session(), tmp_path / "lies")


def test_any_damaged_byte_is_noticed(tmp_path: Path) -> None:
    """Also in the archive's own directory; the few bytes that nothing reads may change unnoticed."""
    path = saved(tmp_path)
    good = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        session = make_session()
        try:
            session.load(path)
        except FormatError:
            continue
        assert session.tokens == ids_of("one two")
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(FormatError):
            make_session().load(path)


def test_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = session_file.read(path)
    for change in (
        {"keys": np.zeros((2, 9), np.float16)},
        {"n_past": np.array(3), "keys": np.zeros((3, 1), np.float16)},
    ):
        session_file.write(path, session_file.SavedSession("model", "f16", whole.tokens, whole.state | change))
        assert "does not fit" in refused(make_session(), path)
    without = {name: values for name, values in whole.state.items() if name != "keys"}
    session_file.write(path, session_file.SavedSession("model", "f16", whole.tokens, without))
    assert "does not fit" in refused(make_session(), path)


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    session = make_session()
    generation = session.generate(ids_of("a"))
    next(generation)
    session.close()
    session.close()
    session.stop()
    assert list(generation) == []
    assert generation.stop_reason == "cancelled"
    assert session.tokens == []
    for action in (
        lambda: session.generate(ids_of("a")),
        session.fork,
        session.clear,
        lambda: session.save(tmp_path / "a"),
        lambda: session.load(tmp_path / "a"),
    ):
        with pytest.raises(RuntimeError, match="the session is closed"):
            action()
    assert not list(tmp_path.iterdir())


def test_a_session_can_be_used_in_a_with_statement() -> None:
    with make_session() as session:
        read(session, "a")
    assert session.closed


@pytest.mark.parametrize(
    ("a", "b", "n"), [("", "", 0), ("abc", "", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("x", "abc", 0)]
)
def test_common_prefix(a: str, b: str, n: int) -> None:
    assert common_prefix(ids_of(a), ids_of(b)) == common_prefix(ids_of(b), ids_of(a)) == n
