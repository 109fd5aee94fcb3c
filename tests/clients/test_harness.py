"""lm-evaluation-harness on a small task of its own, without a network: `make test-clients`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrun.engine import Model

TEXTS = [
    "The capital of France is Paris. It lies on the Seine, and more than two million people live in it.",
    "Water freezes at zero degrees Celsius and boils at a hundred, where the pressure of the air is that of the sea.",
]
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "a spoon"], "answer": 0},
    {"question": "Two and two is", "choices": ["green", "four"], "answer": 1},
    {"question": "At night it is", "choices": ["dark", "a Tuesday in the year of the lord"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{rest}
"""
CHOICE = """\
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
GENERATE = """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def results(url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("lm_eval")
    folder: Path = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(folder / "home"))
        import lm_eval
        from lm_eval.tasks import TaskManager

        tasks = {"choice": ("multiple_choice", CHOICE, QUESTIONS), "generate": ("generate_until", GENERATE, QUESTIONS),
                 "rolling": ("loglikelihood_rolling", ROLLING, [{"text": text} for text in TEXTS])}  # fmt: skip
        for name, (kind, rest, rows) in tasks.items():
            file = folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            task = TASK.format(name=f"qrun_{name}", file=file, kind=kind, rest=rest)
            (folder / f"{name}.yaml").write_text(task)
        return lm_eval.simple_evaluate(
            model="local-completions",
            model_args={"model": "m", "base_url": f"{url}/v1/completions", "num_concurrent": 2, "max_retries": 1},
            tasks=[f"qrun_{name}" for name in tasks],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )


def test_choices(results: Any) -> None:
    assert results["results"]["qrun_choice"]["acc,none"] == 1.0


def test_generations(results: Any) -> None:
    texts = [sample["filtered_resps"][0] for sample in results["samples"]["qrun_generate"]]
    assert len(texts) == len(QUESTIONS) and "Paris" in texts[0]


def test_perplexity_is_that_of_the_engine(results: Any, model: Model) -> None:
    assert model.tokenizer is not None and model.tokenizer.bos_id is not None
    wanted = 0.0
    for text in TEXTS:
        ids = model.tokenize(text, add_special=False)
        beginning = [model.tokenizer.bos_id, *ids]  # the harness begins with it
        logits = model.logits(beginning).astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        wanted += float(sum(logprobs[i, id] for i, id in enumerate(beginning[1:])))
    found = results["results"]["qrun_rolling"]["byte_perplexity,none"]
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found == pytest.approx(math.exp(-wanted / n_bytes), rel=1e-5)

