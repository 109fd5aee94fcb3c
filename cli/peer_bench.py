"""A peer's tokens per second, by the same procedure and with the same tokens as `qrun bench`.

Run by the Python in which the peer is installed (ik_llama_cpp, or llama_cpp), so it imports nothing of qrun:

    python peer_bench.py MODEL [-t THREADS] [-p PROMPT] [-n GEN] [-r REPS] [--depth TOKENS] [--seqs SEQUENCES]

Prints {"peer": name, "uses": instruction sets of its library, "pp512": tokens/s, "tg64": tokens/s, ...}. It calls
llama.h's functions through the packages' ctypes bindings, which have the same names in both.
"""

import argparse
import ctypes
import importlib
import json
import re
import sys
import time
from typing import Any

BINDINGS = {"ik_llama.cpp": "ik_llama_cpp._ctypes_api", "llama.cpp": "llama_cpp"}
BATCH = 512


class Engine:
    """One model in one of the peers."""

    def __init__(self, path: str, threads: int) -> None:
        for self.name, module in BINDINGS.items():
            try:
                self.api: Any = importlib.import_module(module)
                break
            except ImportError:
                continue
        else:
            sys.exit("neither ik_llama_cpp nor llama_cpp is installed in this Python")
        self.threads = threads
        self.api.llama_backend_init()
        parameters = self.api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            sys.exit(f"{self.name} cannot load {path}")
        self.n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def context(self, n_ctx: int, sequences: int = 1) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = n_ctx, max(BATCH, sequences), sequences
        parameters.n_threads = parameters.n_threads_batch = self.threads
        if hasattr(parameters, "flash_attn"):
            # ik_llama.cpp stops in batches of several sequences with it
            parameters.flash_attn = sequences == 1
        context = self.api.llama_init_from_model(self.model, parameters)
        if not context:
            sys.exit(f"{self.name} cannot make a context of {n_ctx} tokens")
        return context

    def decode(self, context: Any, tokens: list[int], position: int, together: bool = False) -> None:
        """Tokens of one sequence from `position` on; or one token at `position` for each of several sequences.
        On a CPU, llama_decode returns when all is computed."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.n_seq_id[i] = token, 1
            batch.pos[i] = position if together else position + i
            batch.seq_id[i][0] = i if together else 0
            batch.logits[i] = together or i == len(tokens) - 1
        status = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        if status:
            sys.exit(f"{self.name}: llama_decode failed with {status}")

    def read(self, context: Any, tokens: list[int], position: int) -> None:
        for start in range(0, len(tokens), BATCH):
            self.decode(context, tokens[start : start + BATCH], position + start)

    def generate(self, context: Any, tokens: list[int], position: int, sequences: int = 1) -> None:
        for i, token in enumerate(tokens):
            self.decode(context, [token] * sequences, position + i, together=sequences > 1)

    def uses(self) -> list[str]:
        """What its library has been built for, of what this machine has: "AVX2", "FMA"."""
        name = "llama_print_system_info"
        # One of the bindings lacks the function, and has the library.
        function = getattr(self.api, name, None) or getattr(getattr(self.api, "_lib", None), name, None)
        if function is None:
            return []
        function.restype = ctypes.c_char_p
        return switched_on((function() or b"").decode(errors="replace"))

    def free(self, context: Any) -> None:
        self.api.llama_free(context)


def switched_on(text: str) -> list[str]:
    """Of "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 |" the names with a 1, each once."""
    return list(dict.fromkeys(re.findall(r"\b([A-Z]\w+) = 1\b", text)))


def measure(engine: Engine, prompt: int, gen: int, reps: int, depth: int, seqs: int) -> dict[str, float]:
    """Best tokens per second over `reps` repetitions after one warm-up."""
    usable = min(engine.n_vocab - 300, 40000)
    tokens = [i * 7919 % usable + 100 for i in range(max(prompt, gen, depth, 1))]
    best: dict[str, float] = {}

    def timed(name: str, count: int, context: Any, work: Any) -> None:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        engine.free(context)
        if counts:
            best[name] = max(best.get(name, 0.0), round(count / seconds, 2))

    for repetition in range(reps + 1):
        counts = repetition > 0
        if prompt:
            context = engine.context(depth + prompt + 8)
            engine.read(context, tokens[:depth], 0)
            timed(f"pp{prompt}", prompt, context, lambda c=context: engine.read(c, tokens[:prompt], depth))
        if gen:
            context = engine.context(depth + gen + 8)
            engine.read(context, tokens[:depth], 0)
            timed(f"tg{gen}", gen, context, lambda c=context: engine.generate(c, tokens[:gen], depth))
        if gen and seqs > 1:
            context = engine.context(seqs * (gen + 8), seqs)
            timed(f"tg{gen}x{seqs}", gen * seqs, context, lambda c=context: engine.generate(c, tokens[:gen], 0, seqs))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for short, name, default in (("-t", "--threads", 2), ("-p", "--prompt", 512), ("-n", "--gen", 64),
                                 ("-r", "--reps", 3), ("-d", "--depth", 0), ("-s", "--seqs", 1)):  # fmt: skip
        parser.add_argument(short, name, type=int, default=default)
    args = parser.parse_args()
    engine = Engine(args.model, args.threads)
    best = measure(engine, args.prompt, args.gen, args.reps, args.depth, args.seqs)
    names = {"peer": engine.name, "uses": engine.uses()}
    print(json.dumps(names | {"threads": args.threads, "depth": args.depth, **best}))


if __name__ == "__main__":
    main()
