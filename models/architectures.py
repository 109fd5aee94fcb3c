"""The architectures, by name, and the graph of a model's file."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.formats import FormatError, GGUFReader, TensorInfo
from qrun.formats.dataclass import dataclass
from qrun.models.adapter import RESCALED, Adapter, adapt
from qrun.models.drafts import DraftLayers, build_layer, with_hidden
from qrun.models.graph import Graph, GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.support import architecture_problem, other_kind

if TYPE_CHECKING:  # `Later` imports them by name: those who pack apps see here which there are
    from qrun.models import (  # noqa: F401
        afmoe,
        apertus,
        arcee,
        arctic,
        baichuan,
        bailingmoe,
        bailingmoe2,
        bailingmoe3,
        bert,
        bitnet,
        chatglm,
        cogvlm,
        cohere2moe,
        command_r,
        dbrx,
        deci,
        deepseek,
        deepseek2,
        deepseek4,
        dots3note,
        ernie4_5,
        ernie4_5_moe,
        exaone,
        exaone4,
        exaone_moe,
        falcon,
        falcon_h1,
        gemma,
        gemma2,
        gemma3,
        gemma3n,
        gemma4,
        glm4,
        glm4moe,
        glm5_next,
        gpt2,
        gpt_oss,
        gptneox,
        granite,
        grok,
        grovemoe,
        hrm_text,
        hunyuan,
        hy_v3,
        hy_v4,
        jais,
        jamba,
        kimi_k3,
        kimi_linear,
        laguna,
        lfm2,
        llada,
        llama,
        llama4,
        maincoder,
        mamba,
        maple,
        mellum,
        mimo2,
        minimax_01,
        minimax_m2,
        minimax_m3,
        mistral3,
        modern_bert,
        mpt,
        muse_glimmer,
        nanbeige,
        nemotron,
        nemotron_h,
        olmo,
        olmo2,
        olmoe,
        orion,
        phi2,
        phi3,
        phimoe,
        plamo,
        plamo2,
        plamo3,
        plm,
        qwen,
        qwen2,
        qwen2moe,
        qwen3,
        qwen4exp,
        qwen35,
        refact,
        rwkv,
        seed_oss,
        smallthinker,
        smollm3,
        spark2_5,
        stablelm,
        step35,
        t5,
        talkie,
    )

Build = Callable[[GraphBuilder, Metadata, Hyperparameters, int], Value]
"""From token ids to logits: builder, metadata, hyper-parameters, context -> logits."""


@dataclass(frozen=True)
class Later:
    """A function of one of the architectures' files, "file.function", which is imported when it is called: nobody waits
    for all the others."""

    place: str

    def __call__(self, *args: Any) -> Value:
        file, _, function = self.place.partition(".")
        value: Value = getattr(import_module(f"qrun.models.{file}"), function)(*args)
        return value


ARCHITECTURES: dict[str, Build] = {
    "llama": Later("llama.build"),
    "llama4": Later("llama4.build"),
    "qwen": Later("qwen.build"),
    "qwen2": Later("qwen2.build"),
    "qwen2vl": Later("qwen2.build_vl"),
    "qwen2moe": Later("qwen2moe.build"),
    "qwen3": Later("qwen3.build"),
    "qwen3moe": Later("qwen3.build"),
    "qwen3vl": Later("qwen3.build"),
    "qwen3vlmoe": Later("qwen3.build"),
    "qwen3next": Later("qwen35.build_next"),
    "qwen35": Later("qwen35.build"),
    "qwen35moe": Later("qwen35.build_experts"),
    "qwen4exp": Later("qwen4exp.build"),
    "gemma": Later("gemma.build"),
    "gemma2": Later("gemma2.build"),
    "gemma3": Later("gemma3.build"),
    "gemma3n": Later("gemma3n.build"),
    "gemma4": Later("gemma4.build"),
    "phi3": Later("phi3.build"),
    "phi2": Later("phi2.build"),
    "phimoe": Later("phimoe.build"),
    "smollm3": Later("smollm3.build"),
    "gpt-oss": Later("gpt_oss.build"),
    "muse-glimmer": Later("muse_glimmer.build"),
    "mistral3": Later("mistral3.build"),
    "granite": Later("granite.build"),
    "granitemoe": Later("granite.build_experts"),
    "granite_swa": Later("granite.build_windows"),
    "minicpm": Later("granite.build_minicpm"),
    "minicpm3": Later("deepseek2.build_minicpm3"),
    "olmo2": Later("olmo2.build"),
    "olmo": Later("olmo.build"),
    "olmoe": Later("olmoe.build"),
    "deepseek": Later("deepseek.build"),
    "deepseek2": Later("deepseek2.build"),
    "deepseek2-ocr": Later("deepseek.build_ocr"),
    "deepseek4": Later("deepseek4.build"),
    "mistral4": Later("deepseek2.build"),
    "chatglm": Later("chatglm.build"),
    "glm4": Later("glm4.build"),
    "glm4moe": Later("glm4moe.build"),
    "exaone": Later("exaone.build"),
    "exaone4": Later("exaone4.build"),
    "exaone-moe": Later("exaone_moe.build"),
    "hunyuan-dense": Later("hunyuan.build"),
    "hunyuan_vl": Later("hunyuan.build"),
    "hunyuan-moe": Later("hunyuan.build_experts"),
    "hy_v3": Later("hy_v3.build"),
    "ernie4_5": Later("ernie4_5.build"),
    "ernie4_5-moe": Later("ernie4_5_moe.build"),
    "paddleocr": Later("ernie4_5.build_paddleocr"),
    "seed_oss": Later("seed_oss.build"),
    "bailingmoe": Later("bailingmoe.build"),
    "bailingmoe2": Later("bailingmoe2.build"),
    "bailingmoe3": Later("bailingmoe3.build"),
    "kimi-k3": Later("kimi_k3.build"),
    "rwkv6": Later("rwkv.build_6"),
    "rwkv6qwen2": Later("rwkv.build_6_qwen2"),
    "rwkv7": Later("rwkv.build_7"),
    "arwkv7": Later("rwkv.build_7_qwen2"),
    "dots1": Later("bailingmoe2.build"),
    "mellum": Later("mellum.build"),
    "afmoe": Later("afmoe.build"),
    "arcee": Later("arcee.build"),
    "bitnet": Later("bitnet.build"),
    "laguna": Later("laguna.build"),
    "minimax-01": Later("minimax_01.build"),
    "minimax-m2": Later("minimax_m2.build"),
    "lfm2": Later("lfm2.build"),
    "lfm2moe": Later("lfm2.build_experts"),
    "kimi-linear": Later("kimi_linear.build"),
    "mimo2": Later("mimo2.build"),
    "spark2_5": Later("spark2_5.build"),
    "smallthinker": Later("smallthinker.build"),
    "maple": Later("maple.build"),
    "step35": Later("step35.build"),
    "apertus": Later("apertus.build"),
    "deci": Later("deci.build"),
    "grok": Later("grok.build"),
    "arctic": Later("arctic.build"),
    "internlm2": Later("llama.build"),
    "xverse": Later("llama.build"),
    "baichuan": Later("baichuan.build"),
    "plamo": Later("plamo.build"),
    "plamo3": Later("plamo3.build"),
    "openelm": Later("qwen3.build"),
    "pangu-embedded": Later("qwen2.build"),
    "nanbeige": Later("nanbeige.build"),
    "maincoder": Later("maincoder.build"),
    "cogvlm": Later("cogvlm.build"),
    "talkie": Later("talkie.build"),
    "command-r": Later("command_r.build"),
    "cohere2": Later("command_r.build_windows"),
    "cohere2moe": Later("cohere2moe.build"),
    "dbrx": Later("dbrx.build"),
    "falcon": Later("falcon.build"),
    "gpt2": Later("gpt2.build"),
    "gptneox": Later("gptneox.build"),
    "stablelm": Later("stablelm.build"),
    "starcoder": Later("gpt2.build"),
    "starcoder2": Later("gpt2.build_turning"),
    "codeshell": Later("gpt2.build_turning"),
    "pockettts": Later("gpt2.build_pockettts"),
    "bloom": Later("gpt2.build_bloom"),
    "nemotron": Later("nemotron.build"),
    "orion": Later("orion.build"),
    "jais": Later("jais.build"),
    "jais2": Later("nemotron.build"),
    "refact": Later("refact.build"),
    "mpt": Later("mpt.build"),
    "grovemoe": Later("grovemoe.build"),
    "hrm_text": Later("hrm_text.build"),
    "deepseek32": Later("deepseek2.build_sparse"),
    "glm-dsa": Later("deepseek2.build_sparse"),
    "dots3note": Later("dots3note.build"),
    "minimax-m3": Later("minimax_m3.build"),
    "hy_v4": Later("hy_v4.build"),
    "glm5-next": Later("glm5_next.build"),
    "plm": Later("plm.build"),
    "mamba": Later("mamba.build"),
    "mamba2": Later("mamba.build_2"),
    "jamba": Later("jamba.build"),
    "nemotron_h": Later("nemotron_h.build"),
    "nemotron_h_moe": Later("nemotron_h.build"),
    "granitehybrid": Later("granite.build_hybrid"),
    "falcon-h1": Later("falcon_h1.build"),
    "plamo2": Later("plamo2.build"),
    "dream": Later("qwen2.build_vl"),
    "llada": Later("llada.build"),
    "llada-moe": Later("llada.build_experts"),
    "rnd1": Later("qwen3.build"),
    "bert": Later("bert.build"),
    "nomic-bert": Later("bert.build_turning"),
    "nomic-bert-moe": Later("bert.build_turning"),
    "jina-bert-v2": Later("bert.build_jina_v2"),
    "jina-bert-v3": Later("bert.build_turning"),
    "modern-bert": Later("modern_bert.build"),
    "neo-bert": Later("modern_bert.build_neo"),
    "eurobert": Later("qwen2.build"),
    "gemma-embedding": Later("gemma3.build"),
    "llama-embed": Later("llama.build"),
    "t5": Later("t5.build"),
    "t5encoder": Later("t5.build_encoder"),
}
"""By the name that a file gives under `general.architecture`: the function of a file beside this one."""

DRAFTS = {
    "bailingmoe3": DraftLayers(Later("bailingmoe3.build_draft")),
    "deepseek2": DraftLayers(Later("deepseek2.build_block")),
    "glm4moe": DraftLayers(Later("glm4moe.build_block")),
    "hy_v3": DraftLayers(Later("hy_v3.build_block")),
    "mimo2": DraftLayers(Later("mimo2.build_block"), normed=False),
    "qwen35": DraftLayers(Later("qwen35.build_draft")),
    "qwen35moe": DraftLayers(Later("qwen35.build_draft_experts")),
    "qwen3next": DraftLayers(Later("qwen35.build_draft_experts")),
    "step35": DraftLayers(Later("step35.build_block"), normed=False),
}
"""Draft layers, by architecture, where they can be run."""

MAX_TEXT = 8192
"""The longest text, in tokens, of which a model makes an embedding, unless the caller says another number."""


def build_graph(
    reader: GGUFReader,
    context: int | None = None,
    adapters: Sequence[Adapter[TensorInfo]] = (),
    *,
    default_context: int = MAX_CONTEXT,
) -> Graph:
    """The graph of the model in an open file, with the changes of some adapters in it.

    context: the most tokens that will be used at once, by default the trained context, or `default_context` if that is
    less. Models that turn their heads differently for long contexts, or attend to chosen positions there, are built for
    it, so run the graph with its own `context`. Raises `FormatError`, naming the file, for an architecture that is not
    known, a hyper-parameter out of bounds, a tensor that is missing or has the wrong shape or type, an adapter of
    another model, or a file that is no model.
    """
    if (other := other_kind(reader)) and other.problem:
        raise FormatError(reader.path, other.problem)
    metadata = Metadata(reader)
    if problem := architecture_problem(metadata.architecture, ARCHITECTURES):
        raise FormatError(reader.path, problem)
    build = ARCHITECTURES[metadata.architecture]
    h = Hyperparameters.read(metadata)
    builder = GraphBuilder(reader)
    used = context or min(h.context_length, MAX_TEXT if h.embeds else default_context)
    logits = build(builder, metadata, h, used)
    if builder.has(f"blk.{h.n_blocks}.attn_norm.weight"):
        raise metadata.error("block_count", f"is {h.n_blocks}, but the file has tensors of block {h.n_blocks}")
    graph = builder.finish(
        metadata.architecture, logits, h.n_embd, h.context_length, used, h.n_vocab if h.embeds else None
    )
    if not h.causal and (graph.n_states or graph.causal):
        raise metadata.error("attention.causal", "is False, which is not supported for this architecture")
    return adapt(replace(graph, rescaled=reader.metadata.get(RESCALED) is True), adapters)


def check_goes_on(graph: Graph, path: Path) -> None:
    """Raises FormatError for a model that does not simply go on from a text, but answers one."""
    if graph.encoder is not None:
        raise FormatError(path, "the model has an encoder and a decoder, for which this is not supported")


def build_drafts(reader: GGUFReader, graph: Graph) -> tuple[Graph, list[Graph]]:
    """The graph of a model, with the hidden states that its draft layers go on from, and the graphs of these layers.

    Raises `FormatError` if the file has none, or of an architecture whose draft layers cannot be run.
    """
    metadata = Metadata(reader)
    h = Hyperparameters.read(metadata, drafts=True)
    if not GraphBuilder(reader).has(f"blk.{h.n_layer}.nextn.eh_proj.weight"):
        raise FormatError(reader.path, "it has no draft layers (mtp): name another model as its draft")
    drafts = DRAFTS.get(metadata.architecture)
    if drafts is None:
        known = ", ".join(DRAFTS)
        raise FormatError(
            reader.path, f"draft layers of {metadata.architecture} are not supported (supported: those of {known})"
        )
    layers = range(h.n_layer, h.n_blocks)
    graphs = [build_layer(drafts, GraphBuilder(reader), metadata, h, graph.context, layer) for layer in layers]
    return with_hidden(graph, drafts), graphs
