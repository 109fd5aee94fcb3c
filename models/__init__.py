"""What can be run: architectures described as graphs. Executes nothing."""

from collections.abc import Sequence
from pathlib import Path

from qrun.formats import FormatError, GGUFReader, TensorInfo
from qrun.models import (
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
from qrun.models.adapter import Adapter, adapt
from qrun.models.drafts import DraftLayers, build_layer, with_hidden
from qrun.models.graph import Graph, GraphBuilder
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.support import architecture_problem, other_kind

__all__ = ["ARCHITECTURES", "DRAFTS", "Graph", "build_drafts", "build_graph", "check_goes_on"]

ARCHITECTURES = {
    "llama": llama.build,
    "llama4": llama4.build,
    "qwen": qwen.build,
    "qwen2": qwen2.build,
    "qwen2vl": qwen2.build_vl,
    "qwen2moe": qwen2moe.build,
    "qwen3": qwen3.build,
    "qwen3moe": qwen3.build,
    "qwen3vl": qwen3.build,
    "qwen3vlmoe": qwen3.build,
    "qwen3next": qwen35.build_next,
    "qwen35": qwen35.build,
    "qwen35moe": qwen35.build_experts,
    "qwen4exp": qwen4exp.build,
    "gemma": gemma.build,
    "gemma2": gemma2.build,
    "gemma3": gemma3.build,
    "gemma3n": gemma3n.build,
    "gemma4": gemma4.build,
    "phi3": phi3.build,
    "phi2": phi2.build,
    "phimoe": phimoe.build,
    "smollm3": smollm3.build,
    "gpt-oss": gpt_oss.build,
    "muse-glimmer": muse_glimmer.build,
    "mistral3": mistral3.build,
    "granite": granite.build,
    "granitemoe": granite.build_experts,
    "granite_swa": granite.build_windows,
    "minicpm": granite.build_minicpm,
    "minicpm3": deepseek2.build_minicpm3,
    "olmo2": olmo2.build,
    "olmo": olmo.build,
    "olmoe": olmoe.build,
    "deepseek": deepseek.build,
    "deepseek2": deepseek2.build,
    "deepseek2-ocr": deepseek.build_ocr,
    "deepseek4": deepseek4.build,
    "mistral4": deepseek2.build,
    "chatglm": chatglm.build,
    "glm4": glm4.build,
    "glm4moe": glm4moe.build,
    "exaone": exaone.build,
    "exaone4": exaone4.build,
    "exaone-moe": exaone_moe.build,
    "hunyuan-dense": hunyuan.build,
    "hunyuan_vl": hunyuan.build,
    "hunyuan-moe": hunyuan.build_experts,
    "hy_v3": hy_v3.build,
    "ernie4_5": ernie4_5.build,
    "ernie4_5-moe": ernie4_5_moe.build,
    "paddleocr": ernie4_5.build_paddleocr,
    "seed_oss": seed_oss.build,
    "bailingmoe": bailingmoe.build,
    "bailingmoe2": bailingmoe2.build,
    "bailingmoe3": bailingmoe3.build,
    "kimi-k3": kimi_k3.build,
    "rwkv6": rwkv.build_6,
    "rwkv6qwen2": rwkv.build_6_qwen2,
    "rwkv7": rwkv.build_7,
    "arwkv7": rwkv.build_7_qwen2,
    "dots1": bailingmoe2.build,
    "mellum": mellum.build,
    "afmoe": afmoe.build,
    "arcee": arcee.build,
    "bitnet": bitnet.build,
    "laguna": laguna.build,
    "minimax-01": minimax_01.build,
    "minimax-m2": minimax_m2.build,
    "lfm2": lfm2.build,
    "lfm2moe": lfm2.build_experts,
    "kimi-linear": kimi_linear.build,
    "mimo2": mimo2.build,
    "spark2_5": spark2_5.build,
    "smallthinker": smallthinker.build,
    "maple": maple.build,
    "step35": step35.build,
    "apertus": apertus.build,
    "deci": deci.build,
    "grok": grok.build,
    "arctic": arctic.build,
    "internlm2": llama.build,
    "xverse": llama.build,
    "baichuan": baichuan.build,
    "plamo": plamo.build,
    "plamo3": plamo3.build,
    "openelm": qwen3.build,
    "pangu-embedded": qwen2.build,
    "nanbeige": nanbeige.build,
    "maincoder": maincoder.build,
    "cogvlm": cogvlm.build,
    "talkie": talkie.build,
    "command-r": command_r.build,
    "cohere2": command_r.build_windows,
    "cohere2moe": cohere2moe.build,
    "dbrx": dbrx.build,
    "falcon": falcon.build,
    "gpt2": gpt2.build,
    "gptneox": gptneox.build,
    "stablelm": stablelm.build,
    "starcoder": gpt2.build,
    "starcoder2": gpt2.build_turning,
    "codeshell": gpt2.build_turning,
    "pockettts": gpt2.build_pockettts,
    "bloom": gpt2.build_bloom,
    "nemotron": nemotron.build,
    "orion": orion.build,
    "jais": jais.build,
    "jais2": nemotron.build,
    "refact": refact.build,
    "mpt": mpt.build,
    "grovemoe": grovemoe.build,
    "hrm_text": hrm_text.build,
    "deepseek32": deepseek2.build_sparse,
    "glm-dsa": deepseek2.build_sparse,
    "dots3note": dots3note.build,
    "minimax-m3": minimax_m3.build,
    "hy_v4": hy_v4.build,
    "glm5-next": glm5_next.build,
    "plm": plm.build,
    "mamba": mamba.build,
    "mamba2": mamba.build_2,
    "jamba": jamba.build,
    "nemotron_h": nemotron_h.build,
    "nemotron_h_moe": nemotron_h.build,
    "granitehybrid": granite.build_hybrid,
    "falcon-h1": falcon_h1.build,
    "plamo2": plamo2.build,
    "dream": qwen2.build_vl,
    "llada": llada.build,
    "llada-moe": llada.build_experts,
    "rnd1": qwen3.build,
    "bert": bert.build,
    "nomic-bert": bert.build_turning,
    "nomic-bert-moe": bert.build_turning,
    "jina-bert-v2": bert.build_jina_v2,
    "jina-bert-v3": bert.build_turning,
    "modern-bert": modern_bert.build,
    "neo-bert": modern_bert.build_neo,
    "eurobert": qwen2.build,
    "gemma-embedding": gemma3.build,
    "llama-embed": llama.build,
    "t5": t5.build,
    "t5encoder": t5.build_encoder,
}
"""By the name that a file gives under `general.architecture`."""

DRAFTS = {
    "bailingmoe3": DraftLayers(bailingmoe3.build_draft),
    "deepseek2": DraftLayers(deepseek2.build_block),
    "glm4moe": DraftLayers(glm4moe.build_block),
    "hy_v3": DraftLayers(hy_v3.build_block),
    "mimo2": DraftLayers(mimo2.build_block, normed=False),
    "qwen35": DraftLayers(qwen35.build_draft),
    "qwen35moe": DraftLayers(qwen35.build_draft_experts),
    "qwen3next": DraftLayers(qwen35.build_draft_experts),
    "step35": DraftLayers(step35.build_block, normed=False),
}
"""Draft layers, by architecture, where they can be run."""

MAX_TEXT = 8192
"""The longest text, in tokens, of which a model makes an embedding, unless the caller says another number."""

SPARSE = "the model attends to chosen positions only where there are more than"
"""Which the graphs of such models do not: `Graph.max_context`."""


def build_graph(
    reader: GGUFReader,
    context: int | None = None,
    adapters: Sequence[Adapter[TensorInfo]] = (),
    *,
    default_context: int = MAX_CONTEXT,
) -> Graph:
    """The graph of the model in an open file, with the changes of some adapters in it.

    context: the most tokens that will be used at once, by default the trained context, or `default_context` if that is
    less. Models that turn their heads differently for long contexts are built for it, so run the graph with its own
    `context`. Where the graph is right for a shorter context only, that is the default. Raises `FormatError`, naming
    the file, for an architecture that is not known, a hyper-parameter out of bounds, a tensor that is missing or has
    the wrong shape or type, an adapter of another model, or a file that is no model.
    """
    if (other := other_kind(reader)) and other.problem:
        raise FormatError(reader.path, other.problem)
    metadata = Metadata(reader)
    if problem := architecture_problem(metadata.architecture, ARCHITECTURES):
        raise FormatError(reader.path, f"{problem} (supported: {', '.join(ARCHITECTURES)})")
    build = ARCHITECTURES[metadata.architecture]
    h = Hyperparameters.read(metadata)
    builder = GraphBuilder(reader)
    used = context or min(h.context_length, MAX_TEXT if h.embeds else default_context)
    logits = build(builder, metadata, h, used)
    if builder.max_context is not None and used > builder.max_context:
        if context:
            problem = f"a context of {context} tokens is not supported: {SPARSE} {builder.max_context}"
            raise FormatError(reader.path, problem)
        used = builder.max_context
    if builder.has(f"blk.{h.n_blocks}.attn_norm.weight"):
        raise metadata.error("block_count", f"is {h.n_blocks}, but the file has tensors of block {h.n_blocks}")
    graph = builder.finish(
        metadata.architecture, logits, h.n_embd, h.context_length, used, h.n_vocab if h.embeds else None
    )
    if not h.causal and (graph.n_states or graph.causal):
        raise metadata.error("attention.causal", "is False, which is not supported for this architecture")
    return adapt(graph, adapters)


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
