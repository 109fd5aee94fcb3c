"""A loaded model: the engine's public face."""

import contextlib
import dataclasses
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np

from qrun.engine import arguments
from qrun.engine.embedding.texts import TextEmbedder
from qrun.engine.errors import Closed, GenerationCancelled, OfThisProcess
from qrun.engine.figures import Activity, MemoryUse, TokenLogprob
from qrun.engine.finding import find_model
from qrun.engine.generation.adapters import Adapters, LoraChoice, NamedAdapter
from qrun.engine.generation.options import GenerationArguments
from qrun.engine.generation.session import Host, Session, check_tokens
from qrun.engine.identity import bits_of, fingerprint, prefix_key
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.sampling.options import SamplingOptions
from qrun.models.catalog import entry_of_file

if TYPE_CHECKING:
    from qrun.engine.generation.diffusion import Diffusion
    from qrun.engine.generation.draft_loading import LoadedDraft
    from qrun.engine.generation.generation import Generation
    from qrun.engine.program.runtime import Runtime
    from qrun.engine.text.chat_template import ChatTemplate
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.formats import GGUFReader
    from qrun.models import Graph
    from qrun.models.adapter import Adapter, LoraLike
    from qrun.models.pooling import PoolingKind

DEFAULT_CONTEXT = 4096
"""Tokens of context, unless the model was trained for fewer or the caller asks for another number."""


class Model(OfThisProcess):
    """A model that is ready to run. Get one with `Model.load`; a `with` statement or `close` frees it at once, and
    otherwise it goes when nobody holds it, its sessions or its generations any more.

    May be used from several threads: their generations are computed together, which costs much less than one after the
    other, and each is the same to the bit as if it were alone. Prompts that begin like an earlier one, of any
    generation or session, go on from there. All methods raise Closed (a RuntimeError) once the model is closed.
    """

    def __init__(
        self,
        path: Path,
        reader: "GGUFReader",
        graph: "Graph",
        runtime: "Runtime",
        tokenizer: "Tokenizer | None",
        tokenizer_problem: str | None = None,
        loras: "Sequence[Adapter[Any]]" = (),
        draft: "LoadedDraft | None" = None,
        cache_bytes: int | None = None,
        adapters: Sequence[NamedAdapter] = (),
    ) -> None:
        self.path = path
        """The model's file."""
        self.reader = reader
        """The open file: its metadata and tensors. Its mapping goes with the model."""
        self.graph = graph
        """What is computed: the architecture, its sizes (`n_vocab`, `n_embd`, `context_length`) and operations."""
        self.tokenizer = tokenizer
        """None if the file has none that can be used; then prompts are token ids, and pieces have no text.
        None also once the model is closed."""
        self.tokenizer_problem = tokenizer_problem
        """Why there is no tokenizer, in one line; None if there is one."""
        self.loras = tuple(loras)
        """The adapters that were loaded with the model: their paths and scales."""
        self.adapters = tuple(adapters)
        """The adapters that generations can ask for with `lora`, in their order."""
        self.context = runtime.context
        """The most tokens of one session."""
        self.threads = runtime.threads
        """How many threads compute."""
        self.defaults = SamplingOptions.from_metadata(reader.metadata)
        """What is not given to `chat` (see `chat_sampling`), `generate` and `complete`: the file's own wishes, or the
        usual values."""
        entry = entry_of_file(path)
        self.chat_system = entry.system if entry else None
        """The system prompt with which `chat` begins where the messages have none; None if there is none. Models of the
        catalog have some, however their file is named. An empty system message keeps it away."""
        self.chat_sampling: Mapping[str, Any] = dict(entry.sampling) if entry else {}
        """Options of `chat`, in place of `defaults`, where the caller gives no others: the catalog's, too."""
        self._runtime = runtime
        self._fingerprint = fingerprint(reader.files, graph, loras)
        self._draft = draft
        make_draft = draft.session_draft if draft else None
        room = cache_limit(runtime, cache_bytes)
        self._host = Host(
            runtime, tokenizer, self.defaults, self._fingerprint, make_draft, room,
            None if graph.causal else _diffusion(reader, graph), Adapters(adapters),
        )  # fmt: skip
        self._texts = TextEmbedder(path, reader, graph, runtime)
        self._closed = False
        # Guards what follows.
        self._lock = ForkAwareLock()
        # Sessions of chat, generate and complete whose generations may be under way.
        self._pool: set[Session] = set()  # changed without the lock by those that end

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        threads: int | None = None,
        context: int | None = None,
        cache_type: Literal["f16", "q8_0", "q4_0"] = "f16",
        batch: int = 512,
        cache_bytes: int | None = None,
        cache_disk: str | os.PathLike[str] | None = None,
        cache_disk_bytes: int | None = None,
        loras: "Sequence[LoraLike]" = (),
        adapters: "Mapping[str, LoraLike] | None" = None,
        type: str | None = None,
        draft: str | os.PathLike[str] | None = None,
        kernels: str | os.PathLike[str] | None = None,
        mlock: bool = False,
        progress: Callable[[int, int], None] | None = None,
        converting: Callable[[int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> Self:
        """Load a model from a GGUF file, by a name from the catalog, or from a folder with a checkpoint.

        source: a path (of a split model, its first file), the name of a model that was pulled, or a folder with
            config.json and safetensors files as Hugging Face has them: it is quantised when it is first loaded, and
            the result kept in the cache.
        threads: threads that compute; by default one for each core that the process may use.
        context: the most tokens of one session; by default what the model was trained for, at most 4096.
        cache_type: how keys and values are kept: "f16" (which is float32 for a file that is nothing but float32),
            "q8_0" or "q4_0".
        batch: the most tokens of a prompt that are computed at once.
        cache_bytes: what all that is cached of texts may take, before what has ended and was not used for longest is
            forgotten, and what is under way has to wait: by default a quarter of the free memory, but room for one
            context at least.
        cache_disk: a folder in which beginnings of texts of 512 tokens or more are kept when nobody has used them for
            ten seconds, when they are forgotten and when the model is closed: a prompt that begins so goes on from
            there, to the same bits, also in another process. What people have said lies there: it is made for its owner
            alone, and refused (PermissionError) where others may write to it.
        cache_disk_bytes: what the folder's files may take, before those that were not used for longest go: by default
            10 GiB, or a tenth of what is free if that is less.
        loras: LoRA adapters (GGUF files), each a path or a pair of a path and a scale; 1.0 is what it was trained for.
        adapters: more of them by names of your own, of which each generation asks for what it wants (`lora="name"`), or
            none: the same memory and the same steps serve all. Those that change embeddings or experts are refused.
        type: of a folder: what it is quantised to, as `qrun convert --type` takes it; by default Q8_0.
        draft: a smaller model with the same vocabulary, named as the model is. It guesses tokens, of which the model
            checks several at a time: the same text, and sooner. "mtp" stands for draft layers in the model's own file.
        kernels: a folder that `qrun pack` made: machine code that is searched first, so that nothing is compiled.
        mlock: keep the weights in memory: they are read at once, and the system may not take them back when memory
            gets short.
        progress: called with (done, total) while kernels are compiled, which happens once on each machine; ten times
            a second, or as each is done where they are compiled in this process. What it raises ends the loading.
        converting: called with (done, total), in bytes, while a folder is quantised.
        notice: called with lines about what of a folder is not used, or may be wrong, when it is quantised, and about
            what is wrong with `cache_disk`, or why weights are not locked; without it, the one is a CacheWarning, and
            the other a RuntimeWarning.

        Raises FormatError (a ValueError) for a file that is damaged or not supported, OSError or NotPulled for one
        that is not there, ValueError for a wrong argument: all with one line that says what and where. A file whose
        tokenizer is missing, damaged or not supported loads all the same: see `tokenizer_problem`. CompileError (a
        RuntimeError) if a kernel is in no pack, and there is no Numba to compile it with.
        """
        threads = arguments.optional_number("threads", threads)
        context = arguments.optional_number("context", context)
        batch = arguments.whole_number("batch", batch)
        cache_bytes = arguments.optional_number("cache_bytes", cache_bytes, arguments.MOST_BYTES)
        cache_disk_bytes = arguments.optional_number("cache_disk_bytes", cache_disk_bytes, arguments.MOST_BYTES)
        for name, place in (("source", source), ("cache_disk", cache_disk), ("draft", draft), ("kernels", kernels)):
            if place is not None or name == "source":
                arguments.path(name, place)
        for name, function in (("progress", progress), ("converting", converting), ("notice", notice)):
            arguments.callback(name, function)
        from qrun.engine.generation.draft_loading import DRAFT_LAYERS, load_draft, load_draft_layers
        from qrun.engine.native.cpu_count import available_cores
        from qrun.engine.native.packs import using
        from qrun.engine.native.read_ahead import read_ahead
        from qrun.engine.program.runtime import Runtime
        from qrun.engine.text.tokenizer import Tokenizer
        from qrun.formats import FormatError, GGUFReader
        from qrun.models import Graph, build_drafts, build_graph
        from qrun.models.adapter import Lora, check_switchable, open_adapters

        if cache_disk is not None:  # before anything that takes long
            from qrun.engine.generation.disk_prefixes import prepare_folder

            prepare_folder(Path(cache_disk))
        wanted = [Lora.of(lora) for lora in arguments.several("loras", loras)]
        by_name = arguments.mapping("adapters", adapters if adapters is not None else {})
        switched = {name: Lora.of(lora) for name, lora in by_name.items()}
        with using(kernels), contextlib.ExitStack() as undo:
            find = functools.partial(
                find_model, threads=threads, progress=converting, compiling=progress, notice=notice
            )
            path = find(source, type)
            reader = GGUFReader(path)
            undo.callback(reader.close)
            opened_reader = weakref.ref(reader)  # which has no tensors any more when it is closed
            read_ahead(reader.files, lambda: (left := opened_reader()) is not None and bool(left.tensors))
            with open_adapters(wanted) as opened:
                graph = build_graph(reader, context, opened, default_context=DEFAULT_CONTEXT)
            if draft is not None and graph.encoder is not None:
                raise ValueError(f"{path}: a draft for a model with an encoder is not supported")
            if draft is not None and not graph.causal:
                raise ValueError(f"{path}: a draft is for models that write one token after the other")
            layers: list[Graph] = []
            if draft == DRAFT_LAYERS:
                graph, layers = build_drafts(reader, graph)
            tokenizer: Tokenizer | None = None
            problem = None
            try:
                tokenizer = Tokenizer.load(reader)
            except FormatError as error:
                problem = str(error)
            with open_adapters(switched.values()) as opened_by_name:
                for adapter in opened_by_name:
                    check_switchable(graph, adapter)
                    if adapter.notice and notice:
                        notice(adapter.notice)
                runtime = Runtime(
                    graph,
                    threads=threads or available_cores(),
                    context=graph.context,
                    cache_type=cache_type,
                    batch=batch,
                    progress=progress,
                    adapters=opened_by_name,
                )
            undo.callback(runtime.close)
            drafting = None
            if layers:
                drafting = load_draft_layers(layers, runtime, progress)
            elif draft is not None:
                drafting = load_draft(draft, reader, runtime, find, progress)
            if drafting is not None:
                undo.callback(drafting.close)
            if mlock:
                lock_weights([runtime, *(drafting.runtimes if drafting is not None else ())], notice)
            named = [NamedAdapter(name, lora.path, lora.scale) for name, lora in switched.items()]
            model = cls(path, reader, graph, runtime, tokenizer, problem, opened, drafting, cache_bytes, named)
            undo.pop_all()  # they are the model's now
            undo.callback(model.close)
            if cache_disk is not None:
                model._keep_on_disk(Path(cache_disk), cache_disk_bytes, notice)
            undo.pop_all()
            return model

    def _keep_on_disk(self, folder: Path, limit: int | None, notice: Callable[[str], None] | None) -> None:
        import hashlib

        from qrun.engine.generation.disk_prefixes import DiskPrefixes
        from qrun.engine.native.object_cache import warn_once

        # All files are read now: they may be replaced later, or go.
        model = hashlib.sha256(f"{self._fingerprint()} {bits_of(self.graph, self._runtime)}".encode()).hexdigest()
        self._host.adapters.digest(tuple((number, 1.0) for number in range(len(self.adapters))))
        # Not bound to this object, which may go while its sessions stay.
        key = functools.partial(prefix_key, model, self._host.adapters)
        self._host.prefixes.disk = DiskPrefixes(folder, limit, self._runtime, key, notice or warn_once)

    @functools.cached_property
    def chat_template(self) -> "ChatTemplate | None":
        """How the model wants a conversation to be written; None without a tokenizer. ChatTemplateError (a ValueError)
        if the file's template is wrong."""
        if self.tokenizer is None:
            return None
        from qrun.engine.text.chat_template import ChatTemplate

        return ChatTemplate.from_reader(self.reader, self.tokenizer, self.tokenizer.special_spellings)

    @property
    def chat_notice(self) -> str | None:
        """A line for whoever chats with a model that has no template of its own; None if it has one."""
        if self.chat_template is None or not self.chat_template.is_fallback:
            return None
        return f"{self.path.name} has no chat template: a plain one stands in, and answers may be poor"

    @property
    def context_notice(self) -> str | None:
        """That the context is longer than what the model was trained for, in a line; None if it is not."""
        return context_notice(self.graph, self.context)

    def chat(
        self,
        messages: str | Iterable[Any],
        *,
        tools: Iterable[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens_in_messages: bool = False,
        think: bool | None = None,
        schema: Any = None,
        grammar: str | None = None,
        regex: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        continue_last: bool = False,
        **options: Unpack[GenerationArguments],
    ) -> "Generation":
        """The answer to a conversation, piece by piece, computed as the pieces are asked for.

        messages: dictionaries with "role" and "content", and what else OpenAI's interface or the model's template
            knows; a text alone is a question. They are brought into the form that the template reads. Where none is
            the system's, `chat_system` comes first.
        tools: descriptions of functions, for templates that know tools.
        template_variables: what else to tell the template, such as {"enable_thinking": False}.
        special_tokens_in_messages: whether "<|im_end|>" in the text of a message is the token that ends a message,
            or (by default) text like any other. For what exactly, see `ChatTemplate.render`.
        think: whether a model that can is to think before it answers; None leaves that to its template. What it thinks
            comes in pieces of the channel "reasoning" and is in `Generation.reasoning`, not in its `text`. Likewise,
            with tools, calls of functions are in `Generation.tool_calls` as far as they can be read.
        schema, grammar, regex: what the answer must be, one of them: JSON by a JSON schema (a dictionary, its JSON, or
            a class with `model_json_schema`; {} for any JSON), a text of a grammar in Lark's syntax or GBNF, or a text
            that a regular expression matches. It begins after what the model thinks. With tools, the answer is that
            or a call.
        tool_choice: "auto" (the default: the model decides), "none" (no calls), "required" (at least one), or
            {"name": ...}, a function to call. Arguments of calls are always what the function's schema says, for
            formats of calls that are known (see `call_grammars`).
        parallel_tool_calls: whether there may be several calls.
        continue_last: the last message is the beginning of the answer, with which the model goes on.
        options: those of SamplingOptions, before `chat_sampling` and `defaults`, and `on_full`, which makes room when
            the context is full: see `Session.generate` and `keep_newest`. A `reasoning_budget` of 0 is `think=False`.

        Raises ChatTemplateError (a ValueError) if the template refuses, or knows no thoughts and `think` is True,
        ContextOverflow (a ValueError) if the
        conversation is longer than the context, TypeError for messages that are none or an unknown option, ValueError
        for a wrong value, and for a schema or grammar that is wrong or not supported.
        """
        given = {name: value for name, value in options.items() if value is not None}
        chosen: dict[str, Any] = {**self.chat_sampling, **given}
        if chosen.get("reasoning_budget") == 0:
            think = False
        if continue_last and self.graph.encoder is not None:
            raise ValueError(f"{self.path.name}: the model answers a whole text, and begins the answer itself")
        if isinstance(tools, Iterator):
            tools = list(tools)
        prompt, begun = self._chat_prompt(
            messages, tools, template_variables, special_tokens_in_messages, think, continue_last
        )
        template = self.chat_template
        assert template is not None
        rules = None
        looks_for_calls = bool(tools)
        if tools or tool_choice is not None or schema is not None or grammar is not None or regex is not None:
            from qrun.engine.generation.answer_rules import chat_rules
            from qrun.engine.text.messages import read_tools

            rules, looks_for_calls = chat_rules(
                self.tokenizer, template.format, read_tools(tools), tool_choice, parallel_tool_calls, schema, grammar,
                regex,
            )  # fmt: skip
        response = template.response(prompt, tools if looks_for_calls else None)
        more = {"response": response, "rules": rules, "begun": begun}
        return self._generate(self.template_tokens(prompt + begun), chosen | more)

    def chat_prompt(
        self,
        messages: str | Iterable[Any],
        *,
        tools: Iterable[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens_in_messages: bool = False,
        think: bool | None = None,
        continue_last: bool = False,
    ) -> str:
        """The text from which `chat` goes on, for `template_tokens`. Arguments and errors are those of `chat`."""
        prompt, begun = self._chat_prompt(
            messages, tools, template_variables, special_tokens_in_messages, think, continue_last
        )
        return prompt + begun

    def _chat_prompt(
        self,
        messages: str | Iterable[Any],
        tools: Iterable[Any] | None,
        template_variables: Mapping[str, Any] | None,
        special_tokens_in_messages: bool,
        think: bool | None,
        continue_last: bool,
    ) -> tuple[str, str]:
        """The same, and with what the answer begins that is to be continued."""
        from qrun.engine.text.messages import message_text, read_messages

        self._check_open()
        self._check_writes()
        self._known_tokenizer()
        template = self.chat_template
        assert template is not None
        messages = read_messages(messages)
        begun = ""
        if continue_last and messages:
            begun = message_text(messages.pop().get("content", ""))
        if not messages:
            raise ValueError("there are no messages: at least one is wanted")
        if self.chat_system and not any(message["role"] in ("system", "developer") for message in messages):
            messages = [{"role": "system", "content": self.chat_system}, *messages]
        given = arguments.mapping("template_variables", {} if template_variables is None else template_variables)
        variables = {**given, "add_generation_prompt": True}
        if think is not None:
            variables["think"] = think
        if special_tokens_in_messages:
            variables["special_tokens_in_messages"] = True
        prompt = template.render(messages, tools=tools, **variables)
        if begun and (response := template.response(prompt)) is not None and response.channel == "reasoning":
            prompt += response.closing
        return prompt, begun

    def complete(
        self,
        prompt: str | Iterable[int],
        *,
        schema: Any = None,
        grammar: str | None = None,
        regex: str | None = None,
        **options: Unpack[GenerationArguments],
    ) -> str:
        """The text with which the model goes on from a prompt. Arguments and errors are those of `generate`."""
        generation = self.generate(prompt, schema=schema, grammar=grammar, regex=regex, **options)
        for _ in generation:
            pass
        return generation.text

    def generate(
        self,
        prompt: str | Iterable[int],
        *,
        schema: Any = None,
        grammar: str | None = None,
        regex: str | None = None,
        **options: Unpack[GenerationArguments],
    ) -> "Generation":
        """The text with which the model goes on from a prompt (a text, or token ids), piece by piece; or its answer, of
        a model with an encoder that reads the prompt first (T5).

        schema, grammar, regex: what the text must be: see `chat`.
        options: those of SamplingOptions, and `on_full`, which makes room when the context is full: see
            `Session.generate`.

        Raises ContextOverflow (a ValueError) for a prompt that is longer than the context, TypeError for an unknown
        option, ValueError for a wrong value.
        """
        self._check_open()
        chosen: dict[str, Any] = dict(options)
        if schema is not None or grammar is not None or regex is not None:
            from qrun.engine.generation.answer_rules import text_rules

            chosen["rules"] = text_rules(self._known_tokenizer(), schema, grammar, regex)
        return self._generate(self._text_tokens(prompt) if isinstance(prompt, str) else prompt, chosen)

    def logits(
        self, tokens: Iterable[int], lora: LoraChoice | None = None, *, source: Iterable[int] | None = None
    ) -> np.ndarray:
        """Logits after each of at least one token: float32 [n_tokens, n_vocab]. lora: as for `generate`.

        source: what a model with an encoder answers; the tokens are those of the answer then, from `graph.start` on.

        Raises ContextOverflow (a ValueError) for more tokens than the context, ValueError for one that does not exist,
        or a source that is missing or that the model has no encoder for.
        """
        self._check_open()
        self._check_writes()
        if (source is None) is not (self._runtime.start is None):
            problem = "it has no encoder to read a source" if source is not None else _UNREAD
            raise ValueError(f"{self.path.name}: {problem}")
        tokens = check_tokens(tokens, self._runtime.n_vocab, self.context)
        sequence = self._runtime.sequence()
        sequence.adapters = self._host.adapters.chosen(lora)
        if source is not None:
            sequence.answer(tuple(check_tokens(source, self._runtime.n_vocab, self.context)))
        try:
            logits = self._runtime.evaluate(sequence, tokens, "all", lambda: self._closed)
        except GenerationCancelled:
            self._check_open()
            raise
        finally:
            sequence.close()
        assert logits is not None
        return logits

    def embed(
        self,
        texts: "str | Sequence[str | Sequence[int]]",
        *,
        pooling: "PoolingKind | None" = None,
        normalize: bool = True,
        dimensions: int | None = None,
        instruction: str | None = None,
        truncate: bool = False,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """A vector for each text (or list of token ids): float32 [n, width], the same to the bit in any company.

        pooling: "mean" of a text's rows, "cls" (the first), "last", or "rank" (numbers of a model that compares); by
            default what the file says. Of "none" come the rows of all texts, one below the other.
        normalize: to the length 1, so that products are cosines; not what "rank" gives.
        dimensions: only the first so many, for models that were trained for that.
        instruction: what the model wants before each text ("search_query: "), or around it, with {text} where it goes.
        truncate: of a text that is too long take the beginning.
        names: what errors call the texts, by default "text 2 of 3": for who hands over many texts some at a time.

        Raises ContextOverflow (a ValueError) for a text longer than the context, ValueError for an empty one.
        """
        from qrun.engine.embedding.embedder import names_of, normalized

        chosen = [texts] if isinstance(texts, str) else list(texts)
        names = arguments.several("names", names) if names is not None else names_of(len(chosen))
        if len(names) != len(chosen):
            raise ValueError(f"names must be {len(chosen)}, as many as there are texts, and not {len(names)}")
        if instruction is not None:
            arguments.text("instruction", instruction)
        dimensions = arguments.optional_number("dimensions", dimensions)
        self._check_open()
        embedder = self._texts.embedder
        kind = pooling or embedder.kind
        self._texts.check_pooling(kind)
        width = embedder.width(kind)
        if dimensions is not None and dimensions > width:
            raise ValueError(f"dimensions is {dimensions}, and the model's vectors have {width}")
        tokens = [
            self._text_to_embed(text, name, instruction, truncate) for text, name in zip(chosen, names, strict=True)
        ]
        vectors = self._texts.vectors(tokens, kind, names)
        if kind == "none":
            vectors = [row for rows in vectors for row in rows]
        vectors = [vector[:dimensions] for vector in vectors]
        if normalize and kind != "rank":
            vectors = [normalized(vector) for vector in vectors]
        return np.stack(vectors) if vectors else np.empty((0, dimensions or width), np.float32)

    def rerank(
        self, query: str, documents: Iterable[str], *, truncate: bool = False, names: Sequence[str] | None = None
    ) -> np.ndarray:
        """How well each document answers a query: float32 [n], higher is better. truncate: see `embed`. names: what
        errors call the documents, see there, too.

        Raises ValueError for a model that was not trained for that, ContextOverflow for a pair that is too long.
        """
        self._check_open()
        self._texts.check_pooling("rank")
        pairs = [self.pair_tokens(query, document, truncate=truncate) for document in documents]
        return self.embed(pairs, pooling="rank", names=names)[:, 0].copy()

    @property
    def embeds(self) -> bool:
        """Are embeddings (or rankings) all that the model can make?"""
        return self.graph.embeds

    @property
    def pooling(self) -> "PoolingKind":
        """How `embed` makes vectors, if it is not told: "rank" of a model that compares texts."""
        self._check_open()
        return self._texts.embedder.kind

    def embedding_tokens(self, text: str, instruction: str | None = None) -> list[int]:
        """The tokens of a text as `embed` takes it."""
        if instruction is not None:
            text = instruction.replace("{text}", text) if "{text}" in instruction else instruction + text
        return self.tokenize(text)

    def _text_to_embed(
        self, text: str | Sequence[int], name: str, instruction: str | None, truncate: bool
    ) -> list[int]:
        if isinstance(text, str):
            tokens = self.embedding_tokens(text, instruction)
        elif not len(text):  # the embedder says so
            return []
        else:
            try:
                tokens = check_tokens(text, self._runtime.n_vocab, len(text))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return self._texts.shortened(self.tokenizer, tokens) if truncate else tokens

    def pair_tokens(self, query: str, document: str, *, truncate: bool = False) -> list[int]:
        """The tokens of a query and a document as `rerank` takes them."""
        self._check_open()
        arguments.text("query", query)
        arguments.text("document", document)
        return self._texts.pair_tokens(self._known_tokenizer(), query, document, truncate=truncate)

    def prompt_logprobs(
        self, tokens: Iterable[int], top: int = 0, lora: LoraChoice | None = None
    ) -> list[TokenLogprob | None]:
        """How likely each token of a text was after those before it; None for the first, which nothing comes before.

        top: how many of the likeliest tokens are told in each place. lora: as for `generate`. Errors are those of
        `logits`; unlike there, a few rows are held at a time.
        """
        from qrun.engine.judging.scoring import negative_log_likelihoods, rows_at_a_time
        from qrun.engine.sampling.sampler import likeliest

        self._check_open()
        self._check_writes()
        if self.graph.encoder is not None:
            raise ValueError(f"{self.path.name}: {_UNREAD}")
        top = arguments.whole_number("top", top, 0)
        tokens = check_tokens(tokens, self._runtime.n_vocab, self.context)
        found: list[TokenLogprob | None] = [None]
        rows = rows_at_a_time(self._runtime.n_vocab)
        sequence = self._runtime.sequence()
        sequence.adapters = self._host.adapters.chosen(lora)
        try:
            for start in range(0, len(tokens) - 1, rows):
                end = min(start + rows, len(tokens) - 1)
                logits = self._runtime.evaluate(sequence, tokens[start:end], "all", lambda: self._closed)
                assert logits is not None
                targets = tokens[start + 1 : end + 1]
                logprobs = (-negative_log_likelihoods(logits, targets)).tolist()
                for row, target, logprob in zip(logits, targets, logprobs, strict=True):
                    rank = 1 + int(np.count_nonzero(row > row[target]))
                    total = float(row[target]) - logprob
                    found.append(TokenLogprob(target, logprob, likeliest(row, top, total) if top else [], rank))
        except GenerationCancelled:
            self._check_open()
            raise
        finally:
            sequence.close()
        return found

    @property
    def activity(self) -> Activity:
        """What is under way."""
        scheduler, prefixes = self._host.scheduler, self._host.prefixes
        return Activity(scheduler.running, scheduler.waiting, self._runtime.cache_bytes, prefixes.limit)

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text. `add_special` adds what the model expects around a text (BOS, mostly);
        `parse_special` reads the spellings of special tokens as these tokens. ValueError without a tokenizer."""
        self._check_open()
        text = arguments.text("text", text)
        return self._known_tokenizer().encode(text, add_special=add_special, parse_special=parse_special)

    def count_tokens(
        self,
        prompt: str | Iterable[Any],
        *,
        tools: Iterable[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens_in_messages: bool = False,
        think: bool | None = None,
    ) -> int:
        """How many tokens a prompt has: a text as `generate` takes it, or messages as `chat` does, with all that their
        template and `chat_system` add. The other arguments and the errors are those of `chat`; a prompt that is longer
        than the context is counted all the same."""
        self._check_open()
        if isinstance(prompt, str):
            return len(self._text_tokens(prompt))
        text = self.chat_prompt(
            prompt,
            tools=tools,
            template_variables=template_variables,
            special_tokens_in_messages=special_tokens_in_messages,
            think=think,
        )
        return len(self.template_tokens(text))

    def memory(self) -> MemoryUse:
        """What the model takes of memory now."""
        self._check_open()
        runtimes = [self._runtime, *(self._draft.runtimes if self._draft else ())]
        if (of_texts := self._texts.own_runtime) is not None:
            runtimes.append(of_texts)
        uses = [runtime.memory() for runtime in runtimes]
        return MemoryUse(
            file=sum(os.path.getsize(file) for file in self.reader.files),
            weights=sum(use["weights"] for use in uses),
            arena=sum(use["arena"] for use in uses),
            cache=sum(use["cache"] for use in uses),
            cache_used=sum(runtime.cache_bytes for runtime in runtimes),
            cache_limit=self._host.prefixes.limit,
        )

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. ValueError without a tokenizer."""
        self._check_open()
        return self._known_tokenizer().decode(list(ids))

    def template_tokens(self, text: str) -> list[int]:
        """The token ids of a text that a chat template made: with its special tokens, though not those that messages
        spell (see `ChatTemplate.render`), and with BOS in front if the model wants one, which some templates write
        themselves and others leave out."""
        from qrun.engine.text.prompt import encode_prompt

        self._check_open()
        tokenizer = self._known_tokenizer()
        tokens = encode_prompt(tokenizer, arguments.text("text", text))
        if tokenizer.add_bos and tokenizer.bos_id is not None and tokens[:1] != [tokenizer.bos_id]:
            tokens = [tokenizer.bos_id, *tokens]
        if self.graph.encoder is not None and (end := tokenizer.end_id) is not None and tokens[-1:] != [end]:
            return [*tokens, end]  # which encoders see behind a text
        return tokens

    def prepare_constraints(self) -> None:
        """Make now what the first schema, grammar or call of a function would wait for: up to two seconds for large
        vocabularies. From any thread. ValueError without a tokenizer or llguidance."""
        from qrun.engine.sampling.constraints import compiler

        self._check_open()
        compiler(self._known_tokenizer())

    def session(self) -> Session:
        """A new session, which keeps the state of one conversation."""
        self._check_open()
        self._check_writes()
        return Session(self._host)

    def stop(self) -> None:
        """End all generations under way, in every session, with the stop reason "cancelled"; from any thread."""
        for session in self._host.sessions():
            session.stop()

    def close(self) -> None:
        """Free the model's memory and threads, from any thread, after ending its generations and closing its sessions.
        A second time does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self.stop()  # all of them, before waiting for any
        for session in self._host.sessions():
            session.leave()
            session.stop()  # what began in the meantime
        self._pool.clear()
        self._host.prefixes.clear()  # of what all of them held, as much is written as there is time for
        if self._draft is not None:
            self._draft.close()
        self._texts.close()
        self._runtime.close()
        # What takes memory goes, even if the caller keeps this object: a tokenizer can take more than the weights,
        # which the operations keep mapped. The graph's figures stay.
        self.tokenizer = self._host.tokenizer = None
        vars(self).pop("chat_template", None)
        self.graph = dataclasses.replace(self.graph, operations=[])
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text_tokens(self, text: str) -> list[int]:
        """The tokens of a text to go on from."""
        tokenizer = self._known_tokenizer()
        tokens = tokenizer.encode(text)
        if not tokens and tokenizer.bos_id is not None:  # nothing to go on from but the beginning of a text
            return [tokenizer.bos_id]
        return tokens

    def _generate(self, tokens: Iterable[int], options: dict[str, Any]) -> "Generation":
        with self._lock:
            self._check_open()
            for session in [one for one in list(self._pool) if not one.busy]:
                self._pool.discard(session)
                session.leave()
            session = self.session()
            try:
                generation = session.generate(tokens, **options)
            except BaseException:
                session.close()
                raise
            pool = self._pool  # and not this object: a generation may outlive its model

            def leave() -> None:
                session.leave()
                pool.discard(session)

            generation.when_over = leave
            self._pool.add(session)
            return generation

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self.path.name}: the model is closed")

    def _check_writes(self) -> None:
        if self.graph.embeds:
            raise ValueError(f"{self.path.name}: the model makes embeddings and no text: see `embed` (qrun embed)")

    def _known_tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise ValueError(self.tokenizer_problem)
        return self.tokenizer


_UNREAD = "the model has an encoder: it answers a text, and goes on from none"


def _diffusion(reader: "GGUFReader", graph: "Graph") -> "Diffusion | None":
    """How a model fills in masks, if it does and its file says which token is one."""
    from qrun.engine.generation.diffusion import Diffusion
    from qrun.models.support import DIFFUSION

    mask = reader.metadata.get("tokenizer.ggml.mask_token_id")
    if graph.architecture not in DIFFUSION or type(mask) is not int or not 0 <= mask < graph.n_vocab:
        return None
    return Diffusion(mask, reader.metadata.get("diffusion.shift_logits", True) is not False)


def lock_weights(runtimes: "Iterable[Runtime]", notice: Callable[[str], None] | None) -> None:
    """Keep the files of runtimes in memory. Says, or warns, where the system does not do that."""
    from qrun.engine.native.memory_lock import lock_in_memory

    files = {id(file): file for runtime in runtimes for file in runtime.files}
    if problem := lock_in_memory(files.values()):
        if notice is not None:
            notice(problem)
        else:
            warnings.warn(problem, RuntimeWarning, stacklevel=3)  # at the line that loads


def cache_limit(runtime: "Runtime", wanted: int | None) -> int:
    """How many bytes sequences may hold."""
    if wanted is not None:
        return wanted
    from qrun.engine.native.machine import memory

    available = memory().available
    return max((available or 0) // 4, runtime.context_bytes)


def context_notice(graph: "Graph", context: int) -> str | None:
    """A line for whoever runs a model with more context than it was trained for, else None."""
    if context <= graph.context_length:
        return None
    return (
        f"a context of {context} tokens, and the model was trained for {graph.context_length}: "
        "what it says beyond that may be nonsense"
    )
