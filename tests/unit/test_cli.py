"""The command line as a whole: help, options, errors, exit statuses."""

from __future__ import annotations

import ast
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from command_line import run

from qrun.cli import docs, loading
from qrun.cli.console import READER_LEFT, echo, notice
from qrun.cli.main import COMMANDS, cli
from qrun.cli.options import LoraFile, Size
from qrun.engine.sampling.options import SamplingOptions
from qrun.models.adapter import Lora

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def command_of(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    command = command_of(name)
    text = CliRunner().invoke(cli, [name, "--help"]).output
    assert "Examples:" in text and f"qrun {name}" in text
    assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_a_command_says_of_itself(name: str) -> None:
    first_words = (command_of(name).help or "").split()[0]
    assert COMMANDS[name].startswith(first_words)


def test_help_imports_no_command_and_nothing_heavy() -> None:
    script = (
        "import sys; from qrun.cli.main import main; main(['--help']); "
        "print([m for m in sys.modules if m.split('.')[0] in ('numpy', 'numba', 'rich', 'jinja2', 'tokenizers')"
        " or m.startswith(('qrun.cli.', 'qrun.engine', 'qrun.models'))"
        " and m not in ('qrun.cli.main', 'qrun.cli.console')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "cli" / "REFERENCE.md").read_text(encoding="utf-8")
    assert page == docs.reference(), "run: make docs"


def test_what_is_said_to_be_supported_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == docs.with_support(readme), "run: make docs"
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == docs.models_page(), "run: make docs"


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"qrun {name}" in readme for name in COMMANDS)


# Options


@pytest.mark.parametrize("name", ["chat", "run"])
def test_there_is_an_option_for_every_sampling_option_spelt_alike(name: str) -> None:
    options = {parameter.name: parameter for parameter in command_of(name).params}
    for field in dataclasses.fields(SamplingOptions):
        if field.name not in ("logprobs", "top_logprobs"):
            assert options[field.name].opts == ["--" + field.name.replace("_", "-")]


def test_sampling_options_reach_the_model_as_the_api_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, object] = {}

    class Model:
        tokenizer = object()

        def __enter__(self) -> Model:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def generate(self, prompt: str, **options: object) -> object:
            taken.update(options, prompt=prompt)
            return Nothing()

    class Nothing(list[str]):
        fills_in = False

    def load(source: str, options: dict[str, object]) -> Model:
        taken.update(options)
        return Model()

    monkeypatch.setattr(loading, "load_model", load)
    arguments = (
        "--temperature 0.5 --top-k 3 --max-tokens 7 --seed 1 --logit-bias 5=-inf --logit-bias 6=1.5 --stop a --stop b "
        "--samplers top_k,temperature --dry-breakers x -t 2 --ctx 64 --cache-type q8_0 --type q4_0 "
        "--cache-disk kept --cache-disk-bytes 1.5GiB --mlock "
        "--lora a.gguf --lora b.gguf=0.5 --draft small.gguf"
    )
    result = CliRunner().invoke(cli, ["run", "m.gguf", "hi", *arguments.split()])
    assert result.exit_code == 0, result.output
    assert taken == {
        "prompt": "hi", "temperature": 0.5, "top_k": 3, "max_tokens": 7, "seed": 1,
        "logit_bias": {5: float("-inf"), 6: 1.5}, "stop": ("a", "b"), "samplers": ("top_k", "temperature"),
        "dry_breakers": ("x",), "threads": 2, "context": 64, "cache_type": "q8_0", "type": "q4_0",
        "cache_disk": Path("kept"), "cache_disk_bytes": 3 << 29,
        "draft": "small.gguf", "mlock": True,
        "loras": (Lora(Path("a.gguf")), Lora(Path("b.gguf"), 0.5)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "m.gguf", "x", "--temperature", "-1"], 1, "qrun: temperature must be at least 0, not -1\n"),
        (["run", "m.gguf", "x", "--mirostat", "1"], 1, "qrun: mirostat must be 0 or 2, not 1\n"),
        (["run", "m.gguf", "x", "--top-k", "many"], 2, "'many' is not a valid integer"),
        (["run", "m.gguf", "x", "--logit-bias", "5"], 2, "not a token id, '=' and a number"),
        (["run", "m.gguf", "x", "--cache-type", "q2"], 2, "'q2' is not one of"),
        (["run", "m.gguf", "x", "--ctx", "0"], 2, "0 is not in the range"),
        (["run", "m.gguf", "x", "--system", "s"], 2, "--system needs --chat"),
        (["run", "m.gguf"], 2, "Missing argument 'PROMPT'"),
        (["nonsense"], 2, "No such command 'nonsense'.\n"),
        (["chatt"], 2, "No such command 'chatt'. Did you mean 'qrun chat'?"),
        (["Quantize", "m.gguf"], 2, "Did you mean 'qrun convert'?"),
        (["bench", "m.gguf", "-p", "0", "-n", "0"], 2, "leave nothing to measure"),
        (["run", "m.gguf", "x", "--cache-disk-bytes", "1G"], 2, "--cache-disk-bytes needs --cache-disk."),
        (["convert", "m.gguf", "--type", "q8_0", "--samples", "128"], 2, "--samples goes with --calibrate."),
        (["convert", "m.gguf", "--type", "q8_0", "--no-judge"], 2, "--judge goes with --calibrate."),
        (["help"], 2, "Did you mean 'qrun --help'?"),
        ([str(ROOT / "README.md")], 2, f"Did you mean 'qrun chat {ROOT / 'README.md'}'?"),
        (["convert", str(ROOT), "--type", "q4km"], 1, "'q4km' is no type (did you mean Q4_K_M?): it can be F32, "),
        (["convert", str(ROOT), "--type", "q8_0", "--output-type", "q6k"], 1, "tensor (did you mean Q6_K?): it can"),
        (["convert", str(ROOT), "--type", "best"], 1, "'best' is no type: it can be F32, "),
        (["rm"], 2, "Name a model"),
        (["bench", "m.gguf", "--compare", "--draft", "x"], 2, "'--compare' needs a value, and '--draft' is an option."),
        (["run", "m.gguf", "x", "--stop", "--lookup"], 2, "(As a value: --stop=--lookup)"),
        (["chat", "m.gguf", "-t", "--temperature=1"], 2, "'-t' needs a value, and '--temperature=1' is an option."),
    ],
)
def test_wrong_options(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, out, err = run(*arguments, capsys=capsys)
    assert (found, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12345", 12345), ("500M", 500_000_000), ("1.5 gb", 1_500_000_000), ("2k", 2000), ("10TB", 10**13),
        ("1KiB", 1024), ("1.5Gi", 3 << 29), ("0", None), ("0.1", None), ("2GG", None), ("-5M", None), ("i", None),
        ("1ib", None), ("9" * 400 + "G", None), ("9" * 10_000, None), (f"{2**63 - 1}", 2**63 - 1), (f"{2**63}", None),
        ("1.3333333333333333k", 1333),
    ],
)  # fmt: skip
def test_sizes_are_in_the_units_that_they_are_shown_in(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(click.BadParameter, match=r"is no size such as 500M, 1\.5GB or 20GiB"):
            Size().convert(text, None, None)
    else:
        assert Size().convert(text, None, None) == size


def test_only_a_server_takes_names_for_adapters(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b=c.gguf").touch()
    path = str(tmp_path / "a.gguf")
    assert LoraFile().convert(f"{path}=0.5", None, None) == Lora(tmp_path / "a.gguf", 0.5)
    assert LoraFile().convert(str(tmp_path / "b=c.gguf"), None, None) == Lora(tmp_path / "b=c.gguf")
    named = LoraFile(named=True).convert(f"poet={path}=0.5", None, None)
    assert named == Lora(tmp_path / "a.gguf", 0.5, "poet")
    for value in (f"poet={path}", f"poet={path}=0.5"):
        with pytest.raises(click.BadParameter, match=r"only qrun serve takes a name .* it is .*a\.gguf"):
            LoraFile().convert(value, None, None)


# Errors


@pytest.mark.parametrize("command", [["info"], ["run", "{}", "x"], ["chat"], ["tokenize", "{}", "x"], ["bench"]])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "qrun: bad.gguf: no such file"),
        (b"", "qrun: bad.gguf: "),
        (b"GGUF", "qrun: bad.gguf: "),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "qrun: bad.gguf: "),
        (b"<!DOCTYPE html><html>", "qrun: bad.gguf: "),
    ],
    ids=["missing", "empty", "short", "hostile", "page"],
)
def test_bad_files_are_one_line(
    command: list[str], content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("bad.gguf").write_bytes(content)
    arguments = [part.format("bad.gguf") for part in command]
    if len(arguments) == 1:
        arguments.append("bad.gguf")
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [["info"], ["chat"], ["convert", "--type", "q8_0"]], ids=lambda words: words[0])
def test_a_folder_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(*command, str(tmp_path), capsys=capsys)
    assert (status, err) == (1, f"qrun: {tmp_path}: is a folder, and no checkpoint: it has no config.json\n")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, and no model: "),
        (["model_index.json"], "is a pipeline of Diffusers, which makes images, and no language model"),
        (["b.gguf", "a.gguf"], "is a folder: name a file in it (a.gguf, b.gguf)"),
        ([f"m-0000{part}-of-00005.gguf" for part in range(1, 6)], "m-00003-of-00005.gguf and 2 others)"),
    ],
    ids=["adapter", "images", "files", "parts"],
)
def test_a_folder_of_another_kind_says_what_it_is(
    files: list[str], problem: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    status, _, err = run("chat", str(tmp_path), capsys=capsys)
    assert status == 1 and err.startswith(f"qrun: {tmp_path}: is ") and problem in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["chat {}", "run {} x", "info {}", "serve {}", "pull {}", "rm {}", "tokenize {} x", "embed {} x", "warmup {}",
     "bench {}", "convert {}", "imatrix {} text", "perplexity {} text", "compare {} --text text", "pack {} --out to",
     "run x y --draft {}"],
)  # fmt: skip
def test_an_empty_name_of_a_model_is_said_to_be_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", " ", "\n"):
        status, out, err = run(*(word.format(name) for word in command.split(" ")), capsys=capsys)
        assert (status, out) == (2, "") and "the name is empty" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    ["convert x {} --type q8_0", "convert x --type q8_0 --imatrix {}", "convert x --calibrate {}", "imatrix x {}",
     "run x y --cache-disk {}", "run x y --lora {}", "embed x y -o {}", "pack x --out {}", "serve --models-dir {}"],
)  # fmt: skip
def test_an_empty_path_is_not_the_working_directory(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(*(word.format("") for word in command.split(" ")), capsys=capsys)
    assert (status, out) == (2, "") and "the path is empty" in err.splitlines()[-1]


def test_a_catalog_model_that_is_not_there_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("info", "gemma-3-270m", capsys=capsys)
    assert (status, err) == (1, "qrun: gemma-3-270m: not pulled yet; fetch it with: qrun pull gemma-3-270m\n")


def fail_with(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loading, "load_model", fail)
    status, _, err = run("run", "m.gguf", "x", capsys=capsys)
    return status, err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\nlines \x1b[2J"), "qrun: two lines [2J\n"),
        (PermissionError(13, "Permission denied", "m.gguf"), "qrun: m.gguf: Permission denied\n"),
        (MemoryError(), "qrun: not enough memory\n"),
        (KeyError("key"), "qrun: internal error: KeyError: key\n"),
        (AssertionError(), "qrun: internal error: AssertionError: AssertionError\n"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(error, monkeypatch, capsys) == (1, message)


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = fail_with(KeyboardInterrupt(), monkeypatch, capsys)
    assert status == 130
    assert err.strip() == ""


def test_qrun_debug_shows_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QRUN_DEBUG", "1")
    with pytest.raises(KeyError):
        fail_with(KeyError("key"), monkeypatch, capsys)


# Standard streams that are closed, full, or left by their reader


def in_shell(command: str) -> tuple[int, str, str]:
    """A command line of bash, in which "qrun" is this one."""
    line = f'qrun() {{ {shlex.quote(sys.executable)} -m qrun.cli.main "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="shell")
def test_closed_streams_are_as_the_null_device() -> None:
    assert in_shell("qrun list --json <&- 2>&-") == (0, "[]\n", "")
    assert in_shell("qrun list --json >&-") == (0, "", "")
    assert in_shell("qrun --help >&- 2>&-") == (0, "", "")
    assert in_shell("qrun info nowhere <&- >&-") == (1, "", "qrun: nowhere: " + NOWHERE)
    assert in_shell("qrun info nowhere 2>&-") == (1, "", "")


NOWHERE = "no such file, and no model of this name (see: qrun list)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    assert in_shell("qrun list --json > /dev/full") == (1, "", "qrun: standard output: No space left on device\n")
    assert in_shell("qrun --help > /dev/full") == (1, "", "qrun: No space left on device\n")  # what click prints
    assert in_shell("qrun list --json > /dev/full 2>&1") == (1, "", "")
    assert in_shell("qrun list 2> /dev/full") == (0, "", "")
    assert in_shell("qrun info nowhere 2> /dev/full") == (1, "", "")
    assert in_shell("qrun nonsense 2> /dev/full") == (2, "", "")


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("command", ["list --json", "--help"])
def test_a_reader_that_leaves_early_is_no_error(command: str) -> None:
    assert in_shell(f"set -o pipefail; qrun {command} | true") == (READER_LEFT, "", "")
    assert in_shell("qrun chat --help | head -n 1") == (0, "Usage: qrun chat [OPTIONS] [MODEL]\n", "")


@pytest.mark.skipif(os.name != "posix", reason="standard input that is no text")
@pytest.mark.parametrize("command", ["run nowhere -", "tokenize nowhere -"])
def test_standard_input_that_cannot_be_read_is_one_line(command: str) -> None:
    assert in_shell(f"qrun {command} 0> file") == (1, "", "qrun: standard input: Bad file descriptor\n")
    assert in_shell(f"qrun {command} <&-") == (1, "", "qrun: nowhere: " + NOWHERE)


def test_everything_that_commands_print_goes_through_one_filter() -> None:
    """Nothing else writes to a terminal, so that nothing can forget to filter."""
    for path in (ROOT / "cli").glob("*.py"):
        if path.name == "peer_bench.py":  # run by another Python, read by this one
            continue
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not calls & {"print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"}, path


@pytest.mark.parametrize("stream", ["out", "err"])
def test_control_characters_go_where_no_terminal_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    text = "a\x1b]0;title\x07b\x9b2Jc\td\x00\re\n"
    echo(text, err=stream == "err")
    assert getattr(capsys.readouterr(), stream) == text + "\n"
    monkeypatch.setattr(f"sys.std{stream}.isatty", lambda: True)
    echo(text, err=stream == "err")
    assert getattr(capsys.readouterr(), stream) == "a]0;titleb2Jc\tde\n\n"


def test_wrong_usage_is_filtered_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    status, _, err = run("run", "m.gguf", "x", "\x07\x9b2J", capsys=capsys)
    assert status == 2 and "argument (2J)" in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_with_130_and_a_second_one_disturbs_nothing() -> None:
    script = (
        "import os, signal, sys; from qrun.cli import list, main\n"
        "def interrupted():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally: os.kill(os.getpid(), signal.SIGINT); print('in good order')\n"
        "list.command.callback = lambda **_: interrupted()\n"
        "sys.argv[1:] = ['list']; status = main.main(); os.kill(os.getpid(), signal.SIGINT); sys.exit(status)"
    )
    command = ["bash", "-c", f"trap - INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=interruptible)
    assert (done.returncode, done.stdout, done.stderr) == (130, "in good order\n", "\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_the_command_is_read_from_the_disk_ends_it_without_a_word() -> None:
    script = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'qrun.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        "from qrun.cli.start import main; sys.exit(main())"
    )
    command = ["bash", "-c", f"trap - INT; exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=interruptible)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def interruptible() -> None:
    """Even where the tests themselves were started so that they are not: in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_notice_is_one_line_that_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    notice("mo\ndel\x1b[31m.gguf has no chat template")
    assert capsys.readouterr().err == "qrun: mo del[31m.gguf has no chat template\n"


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str) -> None:
    script = CliRunner().invoke(cli, ["completion", shell]).output
    assert f"_QRUN_COMPLETE={shell}_complete" in script.replace('"', "")
    assert "qrun" in script


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_bash_takes_a_name_with_a_colon_for_one_word() -> None:
    script = CliRunner().invoke(cli, ["completion", "bash"]).output
    done = subprocess.run(["bash", "-c", f'{script}\necho "$COMP_WORDBREAKS"'], capture_output=True, text=True)
    assert done.returncode == 0 and "=" in done.stdout and ":" not in done.stdout


def completions(*words: str) -> list[str]:
    line = " ".join(["qrun", *words])
    environment = os.environ | {"_QRUN_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    script = "from qrun.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    return done.stdout.split()


def test_commands_options_and_models_are_completed() -> None:
    assert "plain,chat" in completions("ch")
    assert "plain,--temperature" in completions("run", "m", "p", "--temp")
    assert "plain,SmolLM2-135M-Instruct" in completions("info", "smol")
    assert "plain,llama3.1:8b" in completions("chat", "llama3.1:")
