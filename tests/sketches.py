"""Models of every architecture without their weights: what a file says of itself, and the shapes of its tensors.

`tests/data/sketches.json` has one for each small model that was at hand (`tests.toys`), made when its logits were those
of the reference engine. With weights from a seed it is a model again, and a few of its logits, as the plain forward
pass gave them then, show in any clone that an architecture has stayed what it was.

    python -m tests.sketches    adds those of the models at hand, or makes them anew
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qrun.formats import GGUFReader, GGUFWriter, TensorInfo, TensorType, ValueType
from qrun.models import build_graph
from tests.reference import forward
from tests.toys import OWN_FILES, more_files, source_of, tokens_and_logits

FILE = Path(__file__).parent / "data" / "sketches.json"
EMBEDDERS = FILE.with_name("embedders.json")
"""Those of models that make embeddings (`tests.data.make_embedders`)."""
TOKENS = [(37 * i + 5) % 113 for i in range(24)]
SOURCE = TOKENS[::-1]
"""What they answer, of models with an encoder."""
# What the models have of every architecture's keys, and no architecture that is run reads.
UNREAD = (
    "deepstack", "token_shift", "pooling_type", "decoder", "swin_norm", "hrm.prefix_lm", "group_norm", "router_logit",
    ".vocab_size",
)  # fmt: skip


def load() -> dict[str, Any]:
    """All sketches of models that have logits, by the name of the model."""
    return json.loads(FILE.read_text()) | {name: one for name, one in load_embedders().items() if "logits" in one}


def load_embedders() -> dict[str, Any]:
    """All of models that make embeddings, by the name of the model."""
    return dict(json.loads(EMBEDDERS.read_text()))


def write_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Single values, and arrays of int32."""
    kinds = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            writer.set_metadata(key, value, ValueType.ARRAY, ValueType.INT32)
        else:
            writer.set_metadata(key, value, kinds[type(value)])


def write_tensors(writer: GGUFWriter, reader: Any) -> None:
    """Those of a `model`."""
    for tensor in reader.tensors.values():
        writer.add_tensor(tensor.name, TensorType.F32, tensor.shape)
    for tensor in reader.tensors.values():
        writer.write_tensor(tensor.name, np.ascontiguousarray(tensor.raw))


def model(sketch: dict[str, Any]) -> Any:
    """What `build_graph` wants of a reader: random weights, the same ones each time."""
    rng = np.random.default_rng(7)
    tensors = {}
    for name, shape in sketch["tensors"].items():
        values = rng.standard_normal(shape) * shape[-1] ** -0.5
        if name.startswith("rope_f"):  # divisors
            values = 1.0 + np.abs(values)
        elif "norm" in name:
            values = 1.0 + values
        elif name.endswith("ssm_a"):  # states fade
            values = -np.abs(values)
        raw = values.astype(np.float32).reshape(-1).view(np.uint8)
        tensors[name] = TensorInfo(name, TensorType.F32, tuple(shape), raw.size, 0, FILE, raw)
    prefix = sketch["architecture"]
    metadata = {key: unpacked(value) for key, value in sketch["metadata"].items()}
    return SimpleNamespace(path=FILE, metadata=metadata | {"general.architecture": prefix}, tensors=tensors)


def some_logits(reader: Any) -> list[float]:
    """A few numbers that every weight has a part in: of the last token, and the mean size of all."""
    graph = build_graph(reader, 64)
    logits = forward(graph, TOKENS, SOURCE if graph.encoder else None)
    return [round(float(value), 5) for value in (*logits[-1, :6], np.abs(logits).mean())]


def unpacked(value: Any) -> Any:
    """Lists are arrays of the type that files give them."""
    if not isinstance(value, list):
        return value
    return np.array(value, bool if all(isinstance(one, bool) for one in value) else None)


def sketch_of(path: Path) -> dict[str, Any]:
    """Raises AssertionError if the file's logits change when keys are left out."""
    with GGUFReader(path) as reader:
        architecture = str(reader.metadata["general.architecture"])
        read = (f"{architecture}.", *(["xielu."] if architecture == "apertus" else []))
        metadata = {
            key: value.tolist() if isinstance(value, np.ndarray) else round(value, 9) if type(value) is float else value
            for key, value in reader.metadata.items()
            if key.startswith(read) and (architecture == "t5" or not any(part in key for part in UNREAD))
        }
        # A 0 is "not given", but an epsilon or a token may be 0; so is a bound that is infinite.
        metadata = {
            key: value
            for key, value in metadata.items()
            if isinstance(value, bool) or value not in (0, 0.0, -np.inf) or key.endswith(("epsilon", "eos_token_id"))
        }
        sketch = {
            "architecture": architecture,
            "metadata": metadata,
            "tensors": {name: list(tensor.shape) for name, tensor in reader.tensors.items()},
        }
        kept = model(sketch)
        kept.tensors = dict(reader.tensors)
        tokens, expected = tokens_and_logits(path)
        error = forward(build_graph(kept, 64), tokens, source_of(path) or None) - expected
        assert np.mean(error**2) <= 1e-6 * np.mean(expected**2), path
    return sketch | {"logits": some_logits(model(sketch))}


def main() -> None:
    """Write the file; what it has of models that are not at hand stays."""
    sketches = load() | {path.stem: sketch_of(path) for path in OWN_FILES + more_files()}
    lines = (f"{json.dumps(name)}: {json.dumps(sketch)}" for name, sketch in sorted(sketches.items()))
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
