"""Models that are asked for by the names of Ollama's library: what these names mean, that all of them can be had from a
stand-in for the Hub, and what is said of one that is not known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from web_server import Site, add_repository, python_with_hub, run_with_hub, serve

from qrun.cli import loading
from qrun.cli.main import cli
from qrun.engine.native import machine
from qrun.models import ARCHITECTURES, catalog, store
from qrun.models.catalog import (
    CATALOG,
    HubEntry,
    NotPulled,
    catalog_entry,
    catalog_names,
    closest_names,
    hub_catalog,
    resolve,
    stored_model,
)
from qrun.models.download import pull
from qrun.models.hub import parse_spec
from qrun.models.store import PullError

MODEL = b"GGUF" + bytes(range(256)) * 10
LLAMA = "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder that is new for every test."""
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        yield site


def entry_of(name: str) -> HubEntry:
    entry = catalog_entry(name)
    assert isinstance(entry, HubEntry), name
    return entry


def put(entry: HubEntry, file_name: str | None = None) -> Path:
    path = store.models_folder() / entry.repository / (file_name or f"model-{entry.quant}.gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MODEL)
    return path


# The data file


@pytest.mark.parametrize("entry", hub_catalog(), ids=lambda entry: entry.name)
def test_a_row_says_all_that_there_is_to_say(entry: HubEntry) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+:[a-z0-9._-]+", entry.name)
    assert all(re.fullmatch(r"[a-z0-9._-]+", tag) for tag in entry.tags)
    assert parse_spec(entry.spec) == parse_spec(f"hf:{entry.repository}:{entry.quant}")
    assert re.fullmatch(r"(UD-)?(Q\d_(0|K_[SML]|K_XL)|Q8_0|F16|MXFP4)", entry.quant)
    assert entry.licence and entry.description and entry.size and entry.cache > 0
    bits = entry.size * 8 / entry.parameters
    least, most = {"Q8_0": (8, 9), "F16": (15, 17)}.get(entry.quant, (4, 7.5))  # embeddings have more bits
    assert least < bits < most
    assert entry.cache < entry.size


def test_no_two_rows_answer_to_the_same_name() -> None:
    names = [name for entry in hub_catalog() for name in entry.names]
    assert len(names) == len(set(names)) > 200
    specs = [entry.spec for entry in hub_catalog()]
    assert len(specs) == len(set(specs))
    assert not {name.lower() for name in CATALOG} & set(names)


def test_a_family_has_at_most_one_latest() -> None:
    families = [entry.name.partition(":")[0] for entry in hub_catalog() if "latest" in entry.tags]
    assert len(families) == len(set(families))


def test_every_name_is_known_by_itself_and_in_any_case() -> None:
    for entry in hub_catalog():
        for name in entry.names:
            assert catalog_entry(name) is entry and catalog_entry(name.upper()) is entry
    assert len(catalog_names()) == len(set(catalog_names())) > 130


# What a name means


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama3.1", f"hf:{LLAMA}:Q4_K_M"),
        ("llama3.1:latest", f"hf:{LLAMA}:Q4_K_M"),
        ("llama3.1:8b", f"hf:{LLAMA}:Q4_K_M"),
        ("llama3.1:8b-instruct-q4_K_M", f"hf:{LLAMA}:Q4_K_M"),
        ("Llama3.1:8B-Instruct-Q8_0", f"hf:{LLAMA}:Q8_0"),
        ("llama3.1:8b-instruct-fp16", f"hf:{LLAMA}:F16"),
        ("llama3.1:q6_k", f"hf:{LLAMA}:Q6_K"),
        ("llama3.1:8b-iq4_xs", f"hf:{LLAMA}:IQ4_XS"),
        ("library/llama3.1:8b", f"hf:{LLAMA}:Q4_K_M"),
        ("registry.ollama.ai/library/llama3.1", f"hf:{LLAMA}:Q4_K_M"),
        ("https://ollama.com/library/llama3.1:8b-instruct-q8_0", f"hf:{LLAMA}:Q8_0"),
        ("qwen3.5:4b", "hf:unsloth/Qwen3.5-4B-GGUF:Q4_K_M"),
        ("qwen3.5:4b-ud-q4_k_xl", "hf:unsloth/Qwen3.5-4B-GGUF:UD-Q4_K_XL"),
        ("gemma4:12b", "hf:unsloth/gemma-4-12b-it-GGUF:Q4_K_M"),
        ("gpt-oss:20b", "hf:ggml-org/gpt-oss-20b-GGUF:MXFP4"),
        ("gpt-oss", "hf:ggml-org/gpt-oss-20b-GGUF:MXFP4"),
        ("llama3.2:1b", "hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q8_0"),
        ("llama3.2:1b-instruct-q4_K_M", "hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M"),
        ("qwen3:4b", "hf:bartowski/Qwen_Qwen3-4B-Thinking-2507-GGUF:Q4_K_M"),
        ("qwen3:4b-q4_K_M", "hf:bartowski/Qwen_Qwen3-4B-GGUF:Q4_K_M"),  # what the tag without it was before
    ],
)
def test_tags_and_quants_mean_what_they_mean_elsewhere(name: str, spec: str) -> None:
    assert entry_of(name).spec == spec


def test_another_quant_has_a_name_of_its_own_and_no_size() -> None:
    entry = entry_of("llama3.1:8b-instruct-Q8_0")
    assert (entry.name, entry.size) == ("llama3.1:8b-q8_0", None)
    assert entry_of(entry.name) == entry
    assert entry_of("llama3.1:8b-q4_K_M") is entry_of("llama3.1:8b")


@pytest.mark.parametrize("name", ["llama3.1:9b", "llama3.1:", ":8b", "llama3.1:8b-q4_K_M-q8_0", "", "q8_0", "llama9"])
def test_other_names_are_not_known(name: str) -> None:
    assert catalog_entry(name) is None


def test_a_name_that_is_nearly_right_is_told_the_closest() -> None:
    assert closest_names("llama3.1:9b")[0] == "llama3.1:8b"
    assert "qwen3.5:4b" in closest_names("qwen35:4b")
    assert closest_names("smollm2-135m-instrukt")[0] == "SmolLM2-135M-Instruct"
    with pytest.raises(FileNotFoundError, match=r"no model of this name; the closest are gemma4:12b, .*--remote"):
        resolve("gema4:12b")
    with pytest.raises(PullError, match=r"^gema4:12b: not in the catalog \(the closest names in it are gemma4:12b,"):
        pull("gema4:12b")
    with pytest.raises(FileNotFoundError, match="no such file: "):  # a path, however much it is like a name
        resolve("./gema4:12b")
    assert closest_names("xyzzy") == []


def test_a_name_is_the_stored_file_once_it_is_pulled() -> None:
    entry = entry_of("llama3.1:8b")
    with pytest.raises(NotPulled, match=r"llama3.1:8b: not pulled yet; fetch it with: qrun pull llama3.1:8b$"):
        resolve("llama3.1")
    other = put(entry, "Meta-Llama-3.1-8B-Instruct-Q8_0.gguf")
    with pytest.raises(NotPulled):
        resolve("llama3.1")
    path = put(entry, "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf")
    assert resolve("llama3.1") == resolve("LLAMA3.1:8b-instruct") == resolve(entry.spec) == path
    assert resolve("llama3.1:8b-q8_0") == resolve(f"hf.co/{LLAMA}:Q8_0") == other
    assert pull("llama3.1") == path  # and nobody is asked
    found = stored_model("llama3.1:q8_0")
    assert found is not None and found.path == other
    assert stored_model("llama3.1:70b") is None


def test_a_spec_of_the_hub_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(NotPulled, match="hf:org/repo:Q4_0: not pulled yet; fetch it with: qrun pull hf:org/repo:Q4_0"):
        resolve("hf:org/repo:Q4_0")


# The Hub


def contents_of(entry: HubEntry, quant: str) -> list[bytes]:
    """The parts of one quant: two of a large model."""
    content = MODEL + f"{entry.repository} {quant}".encode()
    return [content + b"1", content + b"2"] if (entry.size or 0) > 50e9 else [content]


def files_of(entry: HubEntry) -> dict[str, bytes]:
    """What the repository of an entry holds: several quants, a large one split and in a folder of its own, and what is
    no model."""
    base = re.sub("-gguf$", "", entry.repository.rpartition("/")[2], flags=re.IGNORECASE)
    beside = ("mmproj", "mtp", "dflash")
    files = {"README.md": b"#", "imatrix.gguf": MODEL} | {f"{what}-{base}-{entry.quant}.gguf": MODEL for what in beside}
    for quant in dict.fromkeys((entry.quant, "Q3_K_M", "UD-Q4_K_M", "IQ4_XS")):
        match contents_of(entry, quant):
            case [whole]:
                files[f"{base}-{quant}.gguf"] = whole
            case parts:
                names = (f"{quant}/{base}-{quant}-0000{no}-of-00002.gguf" for no in (1, 2))
                files |= dict(zip(names, parts, strict=True))
    return files


def test_every_name_of_the_catalog_can_be_pulled(site: Site) -> None:
    """All in one process, to save the time that it takes to import the Hub's library."""
    expected: dict[str, list[bytes]] = {}
    for entry in hub_catalog():
        add_repository(site, entry.repository, files_of(entry))
        expected[entry.name] = contents_of(entry, entry.quant)
    Path("names.json").write_text(json.dumps(list(expected)))
    script = (
        "import json; from qrun.models.download import pull\n"
        "print(json.dumps({name: str(pull(name)) for name in json.load(open('names.json'))}))"
    )
    done = python_with_hub(site, "-c", script)
    assert done.returncode == 0, done.stderr
    pulled = {path: name for name, path in json.loads(done.stdout).items()}
    assert len(pulled) == len(expected)
    for model in store.stored_models():
        assert [file.read_bytes() for file in model.files] == expected[pulled[str(model.path)]]
    assert {model.path for model in store.stored_models()} == {Path(path) for path in pulled}
    assert all(resolve(name) == Path(path) for path, name in pulled.items())


def test_a_name_is_pulled_and_listed_under_its_name(site: Site) -> None:
    entry = entry_of("llama3.1:8b")
    add_repository(site, LLAMA, files_of(entry), card={"license": "llama3.1"})
    done = run_with_hub(site, "pull", "llama3.1")
    path = store.models_folder() / LLAMA / "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    assert "qrun: Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf, 0 MB, licence: llama3.1\n" in done.stderr
    assert f"qrun: fetching llama3.1:8b from {entry.spec} (4.9 GB, Llama 3.1 Community)\n" in done.stderr
    done = run_with_hub(site, "list", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["llama3.1:8b"]
    asked = len(site.asked)
    done = run_with_hub(site, "pull", "llama3.1:8b-q4_K_M")  # is there: nobody is asked
    assert done.stdout == f"{path}\n" and "in the store already" in done.stderr and len(site.asked) == asked
    assert run_with_hub(site, "rm", "llama3.1").returncode == 0
    assert store.stored_models() == []


def test_a_quant_that_the_repository_lacks_is_one_line(site: Site) -> None:
    add_repository(site, LLAMA, files_of(entry_of("llama3.1:8b")))
    done = run_with_hub(site, "pull", "llama3.1:8b-q5_1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"qrun: llama3.1:8b-q5_1: hf:{LLAMA}:Q5_1: no file fits 'Q5_1'; there are: ")
    assert len(done.stderr.splitlines()) == 1


# Commands


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(available, available))


def test_the_catalog_is_listed_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 8_000_000_000)
    put(entry_of("qwen3.5:4b"))
    status, out, err = run("list", "--remote")
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines()}
    assert status == 0 and len(lines) == len(CATALOG) + len(hub_catalog())
    assert lines["llama3.1:8b"] == "llama3.1:8b 8.0B 4.9 GB fits Meta: chat Llama 3.1 Community"
    assert " too large " in lines["llama3.1:70b"] and " pulled " in lines["qwen3.5:4b"]
    assert "keys and values of 4096 tokens in F16, and 250 MB more are at most the 8.0 GB" in err


def test_the_catalog_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of("llama3.1:8b")
    assert entry.size is not None
    needed = entry.size + entry.cache + 250_000_000
    for available, fits in ((needed, True), (needed - 1, False), (None, None)):
        with_memory(monkeypatch, available)
        rows = {row["name"]: row for row in json.loads(run("list", "--remote", "--json")[1])}
        assert rows["llama3.1:8b"] == {
            "name": "llama3.1:8b", "names": list(entry.names), "description": "Meta: chat",
            "parameters": entry.parameters, "size": entry.size, "licence": entry.licence, "source": entry.spec,
            "fits": fits, "problem": None, "path": None,
        }  # fmt: skip
        assert rows["SmolLM2-135M-Instruct"]["source"] == "package index"


def test_a_model_that_would_not_run_is_not_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 8_000_000_000)
    without = {name: build for name, build in ARCHITECTURES.items() if name != "qwen2"}  # the order of the others stays
    monkeypatch.setattr(catalog, "ARCHITECTURES", without)
    problem = "architecture 'qwen2' is not supported (much like it: qwen)"
    rows = {row["name"]: row["problem"] for row in json.loads(run("list", "--remote", "--json")[1])}
    assert rows["qwen2.5:7b"] == problem and rows["llama3.1:8b"] is None
    _, out, err = run("list", "--remote")
    assert re.search("^qwen2.5:7b .* not yet ", out, re.MULTILINE)
    assert "not yet: its architecture is not supported by this version\n" in err
    monkeypatch.setattr(loading, "pull_with_progress", lambda spec, announcement: put(entry_of(spec)))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(ValueError, match=re.escape(f"qwen2.5:7b: {problem}")):
        loading.load_model("qwen2.5", {})
    assert f"qrun: qwen2.5:7b does not run here: {problem}\n" in run("pull", "qwen2.5")[2]  # who asks for it gets it
    assert stored_model("qwen2.5:7b") is not None


def test_too_little_memory_is_said_before_a_model_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "pull_with_progress", lambda spec, announcement: put(entry_of(spec)))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for available, said in ((4_000_000_000, True), (8_000_000_000, False)):
        with_memory(monkeypatch, available)
        loading.fetch_if_watched("llama3.1")
        expected = "qrun: llama3.1:8b needs about 5.7 GB of memory, and 4.0 GB are available now\n"
        assert capsys.readouterr().err == expected * said
        stored = stored_model("llama3.1")
        assert stored is not None
        store.remove(stored)


def test_names_are_completed() -> None:
    from qrun.cli.options import ModelName

    found = [item.value for item in ModelName().shell_complete(None, None, "llama3.1:")]  # type: ignore[arg-type]
    assert found[:-1] == ["llama3.1:8b", "llama3.1:8b-instruct", "llama3.1:70b", "llama3.1:70b-instruct"]


@pytest.mark.parametrize("watched", [True, False])
def test_a_chat_fetches_its_model_only_where_somebody_sees_it(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str]] = []

    def pull(spec: str, announcement: str) -> Path:
        fetched.append((spec, announcement))
        return put(entry_of(spec))

    monkeypatch.setattr(loading, "pull_with_progress", pull)
    monkeypatch.setattr("sys.stdin.isatty", lambda: watched)
    monkeypatch.setattr("sys.stderr.isatty", lambda: watched)
    if not watched:
        with pytest.raises(NotPulled, match=r"qrun pull llama3\.1:8b$"):
            loading.load_model("llama3.1", {})
        assert fetched == []
        return
    with pytest.raises(ValueError, match=r"model-Q4_K_M.gguf: "):  # it is none, but it was loaded
        loading.load_model("llama3.1", {})
    spec = entry_of("llama3.1").spec
    assert fetched == [("llama3.1", f"fetching llama3.1:8b from {spec} (4.9 GB, Llama 3.1 Community)")]
    with pytest.raises(ValueError, match=r"model-Q4_K_M.gguf: "):
        loading.load_model("llama3.1", {})
    assert len(fetched) == 1
