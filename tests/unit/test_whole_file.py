"""Files that appear whole or not at all, and who may read them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from qrun.formats import GGUFWriter, ValueType
from qrun.formats.whole_file import (
    check_place,
    make_private_folder,
    move_whole,
    remove_unfinished,
    temporary_name,
    whole_file,
    write_whole,
)

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, links, devices")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def usual_umask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_file(path) as file:
        file.write(b"one ")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    write_whole(path, "drei\u00df")
    assert path.read_text("utf-8") == "drei\u00df"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_where_something_goes_wrong_the_old_file_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, whole_file(path) as file:
        file.write(b"new")
        raise error
    assert [(each, each.read_bytes()) for each in tmp_path.iterdir()] == [(path, b"old")]
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(path)


@posix
def test_a_disk_that_is_full_is_said_of_the_file_that_was_asked_for(tmp_path: Path) -> None:
    import resource
    import signal

    path = tmp_path / "a"
    path.write_bytes(b"old")
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_whole(path, b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert caught.value.filename == str(path)
    assert [(each, each.read_bytes()) for each in tmp_path.iterdir()] == [(path, b"old")]


@posix
def test_a_place_that_no_file_can_take_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file"
    check_place(place)
    place.touch()
    check_place(place)
    with pytest.raises(IsADirectoryError) as caught:
        check_place(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder to write into") as missing:
        check_place(tmp_path / "nowhere" / "file")
    assert missing.value.filename == str(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(FileNotFoundError):
        check_place(tmp_path / "link")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError) as refused:
        check_place(place)
    assert refused.value.filename == str(place)


def test_permissions_are_those_of_the_file_before_or_the_usual_ones(tmp_path: Path) -> None:
    write_whole(tmp_path / "new", b"")
    assert mode(tmp_path / "new") == 0o644
    (tmp_path / "new").chmod(0o640)
    write_whole(tmp_path / "new", b"")
    assert mode(tmp_path / "new") == 0o640


@posix
def test_private_files_and_folders_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch(0o644)
    with whole_file(path, private=True) as file:
        assert all(mode(each) == 0o600 for each in tmp_path.iterdir() if each != path)  # while it grows, too
        file.write(b"secret")
    assert mode(path) == 0o600
    make_private_folder(tmp_path / "b" / "c")
    assert (mode(tmp_path / "b"), mode(tmp_path / "b" / "c")) == (0o700, 0o700)
    (tmp_path / "b").chmod(0o755)
    make_private_folder(tmp_path / "b")
    assert mode(tmp_path / "b") == 0o755


@posix
def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "b")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "disk" / "b").read_bytes() == b"new"


@posix
def test_a_pipe_is_written_to_and_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path, b"new")
    assert caught.value.filename == str(tmp_path)


@posix
def test_a_model_is_never_put_in_a_device_s_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="name a file to write") as caught, GGUFWriter(path):
            pass
        assert caught.value.filename == str(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with GGUFWriter(tmp_path / "link.gguf") as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
    assert (tmp_path / "link.gguf").is_symlink() and (tmp_path / "real.gguf").is_file()


@pytest.mark.parametrize("stem", ["out", "a-long-name-of-a-model-that-was-tuned-for-instructions-in-many-languages"])
def test_only_what_was_left_of_this_file_is_removed(stem: str, tmp_path: Path) -> None:
    out, other = tmp_path / f"{stem}-Q4_K_M.gguf", tmp_path / f"{stem}-Q5_K_M.gguf"
    left, others = temporary_name(out), temporary_name(other)
    foreign = [tmp_path / f".{out.name[:60]}.{middle}.part" for middle in ("download", "1234567g", "12345678.12345678")]
    for path in (left, others, *foreign):
        path.touch()
    remove_unfinished(out)
    assert sorted(tmp_path.iterdir()) == sorted([others, *foreign])


@posix
def test_what_was_left_is_removed_beside_the_file_that_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "b")
    temporary_name(tmp_path / "disk" / "b").touch()
    remove_unfinished(tmp_path / "a")
    assert not list((tmp_path / "disk").iterdir())


def test_a_temporary_name_is_short_enough_for_every_file_system(tmp_path: Path) -> None:
    assert len(os.fsencode(temporary_name(tmp_path / ("\U0001f600" * 63)).name)) <= 255


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same disk", "another disk"])
def test_a_file_that_is_complete_is_moved(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "work" / "source", tmp_path / "target"
    source.parent.mkdir()
    replace = os.replace

    def within_a_disk(old: Path, new: Path) -> None:
        if Path(old).parent != Path(new).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(old), None, str(new))
        replace(old, new)

    if elsewhere:
        monkeypatch.setattr(os, "replace", within_a_disk)
    target.write_bytes(b"old")
    source.write_bytes(b"new" * 1000)
    move_whole(source, target)
    assert target.read_bytes() == b"new" * 1000
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [target]


def test_what_cannot_be_moved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def refuse(old: Path, new: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(new))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        move_whole(source, target)
    assert (source.read_bytes(), target.read_bytes()) == (b"new", b"old")
