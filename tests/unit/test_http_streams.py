"""The bench's client of streams."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from tests.bench.http_streams import Stream, _Arrivals


def answer(texts: list[str], *, chunked: bool) -> bytes:
    """What a server sends: an event for each text, and the usage."""
    events = [{"choices": [{"index": 0, "text": text}]} for text in texts]
    events.append({"choices": [], "usage": {"completion_tokens": len(texts)}})
    frames = [f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode() for event in events]
    frames = [b":\n\n", *frames, b"data: [DONE]\n\n"]
    if not chunked:
        return b"".join(frames)
    return b"".join(b"%x\r\n%s\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"


@pytest.mark.parametrize("chunked", [True, False])
def test_texts_and_their_times_wherever_the_bytes_are_cut(chunked: bool, rng: np.random.Generator) -> None:
    texts = ["a", "", "b\n", '"text":"', "ü", "c" * 300]
    raw = answer(texts, chunked=chunked)
    for _ in range(50):
        cuts = [0, *sorted(rng.choice(np.arange(1, len(raw)), 7, replace=False).tolist()), len(raw)]
        found = Stream()
        arrivals = _Arrivals(found, chunked)
        for start, end in pairwise(cuts):
            arrivals.add(raw[start:end])
        arrivals.settle()
        assert found.text == "".join(texts) and found.n_tokens == len(texts)
        assert len(found.times) == sum(bool(text) for text in texts) and found.times == sorted(found.times)


def test_an_event_has_come_when_its_last_byte_has() -> None:
    raw = answer(["a", "b"], chunked=True)
    second = raw.index(b'"b"')
    found = Stream()
    arrivals = _Arrivals(found, True)
    for part in (raw[: second + 1], raw[second + 1 : -1], raw[-1:]):
        arrivals.add(part)
    first, middle, _ = arrivals._times
    arrivals.settle()
    assert found.times == [first, middle]


def test_what_a_cut_stream_has_brought() -> None:
    raw = answer(["a", "b"], chunked=True)
    found = Stream()
    arrivals = _Arrivals(found, True)
    arrivals.add(raw[: raw.index(b'"b"') + 1])
    arrivals.settle()
    assert found.text == "a" and len(found.times) == 1
