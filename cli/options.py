"""Arguments and options that several commands share.

The sampling options are those of `SamplingOptions`, one for each of its fields and spelt like it, so that the command
line and the API cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from qrun.engine.sampling.options import ORDERS, SamplingOptions

if TYPE_CHECKING:
    from qrun.models.adapter import Lora

CACHE_TYPES = ("f16", "q8_0", "q4_0")
Command = Callable[..., Any]


class ModelName(click.ParamType):
    """A path, or a name from the catalog or the store; completes all of them."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name: str = value
        if not name.strip() and not os.path.exists(name):
            self.fail("the name is empty", param, ctx)
        return name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from qrun.models.catalog import catalog_names
        from qrun.models.store import stored_models

        names = dict.fromkeys([*catalog_names(), *(model.name for model in stored_models())])
        matching = [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]
        return [*matching, CompletionItem(incomplete, type="file")]


class FilePath(click.Path):
    """A path, but not an empty one: that would be the working directory, and mostly is a variable that is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class LogitBias(click.ParamType):
    """ID=BIAS, as a pair."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not a token id, '=' and a number", param, ctx)


class LoraFile(click.ParamType):
    """FILE or FILE=SCALE, if `named` also NAME=FILE or NAME=FILE=SCALE, as a `Lora`. A file whose name ends like a
    scale, or begins like a name, can be named all the same."""

    def __init__(self, named: bool = False) -> None:
        self._named = named
        self.name = "[NAME=]FILE[=SCALE]" if named else "FILE[=SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        from qrun.models.adapter import Lora

        if isinstance(value, Lora):
            return value
        if not value:
            self.fail("the path is empty", param, ctx)
        if Path(value).exists():
            return Lora(Path(value))
        name, equals, rest = value.partition("=")
        if equals and name and (Path(rest).exists() or Path(rest.rpartition("=")[0] or ".").is_file()):
            if not self._named:
                self.fail(f"{value!r}: only qrun serve takes a name for an adapter, by which requests ask for it; here "
                          f"it is {rest}", param, ctx)  # fmt: skip
            found: Lora = self.convert(rest, param, ctx)
            return Lora(found.path, found.scale, name)
        path, equals, scale = value.rpartition("=")
        try:
            return Lora(Path(path), float(scale)) if equals and path else Lora(Path(value))
        except ValueError:
            self.fail(f"{value!r}: {scale!r} is no scale of an adapter, which is a number, and no file", param, ctx)


class Names(click.ParamType):
    """Several names in one argument, between commas."""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))


def model_argument(**settings: Any) -> Callable[[Command], Command]:
    """The argument MODEL."""
    return click.argument("model", type=ModelName(), **settings)


# Fields that the command line has no use for: it never shows log probabilities, and names a draft to use it.
_LEFT_OUT = {"logprobs", "top_logprobs", "draft"}


@functools.cache
def _field_docs() -> dict[str, str]:
    """The texts below the fields of SamplingOptions: Python keeps them in the source alone, which a packed app may have
    left out. There are none then."""
    import ast

    docs: dict[str, str] = {}
    try:
        (definition,) = ast.parse(inspect.getsource(SamplingOptions)).body
    except OSError:
        return docs
    assert isinstance(definition, ast.ClassDef)
    name = ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = " ".join(str(node.value.value).replace("`", "").split())
            name = ""
    return docs


class _FieldOption(click.Option):
    """The option of a field of SamplingOptions. Its help is looked for when somebody asks for it."""

    @property
    def help(self) -> str | None:
        return _field_docs().get(self.name or "", "")

    @help.setter
    def help(self, text: str | None) -> None:
        """`click` has none to give."""


def _sampling_option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Command], Command]:
    """The click option of one field. Unset options stay None: their defaults are the model's or the API's."""
    flag = "--" + field.name.replace("_", "-")
    default = None if field.default is dataclasses.MISSING or field.default in (None, ()) else field.default
    settings: dict[str, Any] = {"cls": _FieldOption, "default": None}
    if isinstance(default, int | float):
        settings["show_default"] = f"{default:g}"
    if field.name == "samplers":
        return click.option(flag, type=Names(), **settings | {"show_default": ",".join(default or ())})
    if field.name == "logit_bias":
        return click.option(flag, type=LogitBias(), multiple=True, **settings)
    if typing.get_origin(hint) is tuple:
        if default:
            settings["show_default"] = " ".join(map(repr, default))
        return click.option(flag, type=str, multiple=True, metavar="TEXT", **settings)
    if hint is str:
        return click.option(flag, type=click.Choice(ORDERS), **settings | {"show_default": default})
    if hint is bool:
        return click.option(flag, is_flag=True, **settings | {"show_default": None})
    kind = float if hint is float else int
    return click.option(flag, type=kind, **settings)


def _sampling_fields() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(SamplingOptions) if field.name not in _LEFT_OUT]


def sampling_options(function: Command) -> Command:
    """Adds all sampling options; the command gets those that were given as a dictionary called `sampling`.

    They are checked before the command runs, so that a wrong value does not wait for a model to load.
    """
    fields = _sampling_fields()
    hints = typing.get_type_hints(SamplingOptions)

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        values = {field.name: kwargs.pop(field.name) for field in fields}
        sampling = {name: value for name, value in values.items() if value is not None and value != ()}
        if "logit_bias" in sampling:
            sampling["logit_bias"] = dict(sampling["logit_bias"])
        SamplingOptions(**sampling)
        return function(*args, sampling=sampling, **kwargs)

    command: Command = gather
    for field in reversed(fields):
        command = _sampling_option(field, hints[field.name])(command)
    return command


def grammar_options(function: Command) -> Command:
    """Adds --schema, --grammar and --regex; the command gets the one that was given, read and checked as far as that is
    possible without a model, as `wanted`: arguments of Model.chat."""

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in ("schema", "grammar", "regex")}
        wanted = {name: value for name, value in given.items() if value is not None}
        if len(wanted) > 1:
            raise click.UsageError(f"{' and '.join(f'--{name}' for name in wanted)} do not go together.")
        for name, value in wanted.items():
            wanted[name] = _read_grammar(name, value)
        return function(*args, wanted=wanted, **kwargs)

    command: Command = gather
    file = FilePath(exists=True, dir_okay=False)
    for option in reversed((
        click.option("--schema", type=file, metavar="FILE",
                     help="Write JSON that the JSON schema in FILE allows. Needs qrun-gguf[grammar], as the next two."),
        click.option("--grammar", type=file, metavar="FILE",
                     help="Write a text of the grammar in FILE, in Lark's syntax or GBNF."),
        click.option("--regex", metavar="PATTERN",
                     help="Write a text that the regular expression matches as a whole."),
    )):  # fmt: skip
        command = option(command)
    return command


def _read_grammar(name: str, value: str) -> str:
    from qrun.engine.sampling import constraints

    checks: dict[str, Callable[[str], str]] = {
        "schema": constraints.schema_source, "grammar": constraints.grammar_source, "regex": constraints.regex_source
    }  # fmt: skip
    check = checks[name]
    if name == "regex":
        check(value)
        return value
    from qrun.formats.mapping import read_text

    text = read_text(Path(value))
    try:
        check(text)
    except ValueError as error:
        raise ValueError(f"{value}: {error}") from None
    return text


class Size(click.ParamType):
    """A number of bytes: 500M, 1.5GB, in the decimal units that sizes are shown in; or 20GiB, in powers of 1024."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(?:([kmgt])(i?))?b?", value.strip(), re.IGNORECASE)
        unit = (1024 if found[3] else 1000) ** " kmgt".index((found[2] or " ").lower()) if found else 0
        size = int(Decimal(found[1]) * unit) if found else 0
        if not 1 <= size < 1 << 63:
            self.fail(f"{value!r} is no size such as 500M, 1.5GB or 20GiB", param, ctx)
        return size


def said_options(options: Mapping[str, str]) -> list[str]:
    """Those of some options that were given, even as what they are by default: names by parameters."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return [name for parameter, name in options.items() if context.get_parameter_source(parameter) != default]


def loading_options(function: Command, *, named_loras: bool = False) -> Command:
    """Adds --threads, --ctx, --cache-type, --cache-disk, --cache-disk-bytes, --mlock, --lora, --type and --draft; the
    command gets them as Model.load's arguments, as `loading`. named_loras: adapters can have names."""

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        loading = {
            "threads": kwargs.pop("threads"),
            "context": kwargs.pop("ctx"),
            "cache_type": kwargs.pop("cache_type"),
            "cache_disk": kwargs.pop("cache_disk"),
            "cache_disk_bytes": kwargs.pop("cache_disk_bytes"),
            "mlock": kwargs.pop("mlock"),
            "loras": kwargs.pop("loras"),
            "type": kwargs.pop("type_name"),
            "draft": kwargs.pop("draft"),
        }
        if loading["cache_disk_bytes"] is not None and loading["cache_disk"] is None:
            raise click.UsageError("--cache-disk-bytes needs --cache-disk.")
        return function(*args, loading=loading, **kwargs)

    command: Command = gather
    for option in reversed((
        threads_option(),
        click.option("--ctx", type=click.IntRange(min=1), metavar="TOKENS",
                     help="Tokens that the context holds.", show_default="the model's, at most 4096"),
        cache_type_option(),
        click.option("--cache-disk", type=FilePath(file_okay=False, path_type=Path), metavar="FOLDER",
                     help="Keep the beginnings of long prompts and talks in FOLDER, so that they are read once, and "
                          "not once in each process. What people have said lies there, for its owner alone."),
        click.option("--cache-disk-bytes", type=Size(), metavar="SIZE",
                     help="What that folder's files may take, such as 20G.",
                     show_default="10G, or a tenth of what is free"),
        click.option("--mlock", is_flag=True,
                     help="Keep the weights in memory: read them all at once, and let the system not take them back "
                          "when memory gets short."),
        lora_option(named_loras),
        type_option(),
        draft_option(),
    )):  # fmt: skip
        command = option(command)
    return command


def threads_option() -> Callable[[Command], Command]:
    """-t / --threads."""
    return click.option(
        "-t", "--threads", type=click.IntRange(min=1), help="Threads that compute.", show_default="one for each core"
    )


def lora_option(named: bool = False) -> Callable[[Command], Command]:
    """--lora, given any number of times: a tuple of `Lora` called `loras`."""
    names = " With a NAME it changes only the answers to requests that name it, as their model or in lora."
    return click.option(
        "--lora", "loras", type=LoraFile(named), multiple=True,
        help="Change the model by a LoRA adapter, a GGUF file; SCALE says how strongly (1: as it was trained). May be "
        "given several times." + (names if named else ""),
    )  # fmt: skip


def type_option() -> Callable[[Command], Command]:
    """--type, called `type_name`."""
    return click.option(
        "--type", "type_name", metavar="TYPE", show_default="Q8_0",
        help="Where MODEL is a folder with a checkpoint: what it is quantised to, as for qrun convert.",
    )  # fmt: skip


def draft_option() -> Callable[[Command], Command]:
    """--draft."""
    return click.option(
        "--draft", type=ModelName(), metavar="MODEL",
        help="A smaller model with the same vocabulary, which guesses tokens for MODEL to check several at a time: the "
        "same text, and sooner. mtp: draft layers in the model's own file.",
    )  # fmt: skip


def cache_type_option() -> Callable[[Command], Command]:
    """--cache-type."""
    return click.option(
        "--cache-type", type=click.Choice(CACHE_TYPES), default="f16", show_default=True,
        help="How keys and values of past tokens are kept: the smaller the type, the less memory.",
    )  # fmt: skip


def chunk_options(default_chunks: int | None = None) -> Callable[[Command], Command]:
    """--ctx and --chunks, of commands that read a text."""
    ctx = click.option(
        "--ctx", type=click.IntRange(min=4), default=512, show_default=True, metavar="TOKENS", help="Tokens in a chunk."
    )
    chunks = click.option(
        "--chunks", type=click.IntRange(min=1), metavar="N", default=default_chunks,
        show_default=default_chunks is not None, help="Read the first N chunks only.",
    )  # fmt: skip
    return lambda function: ctx(chunks(function))
