"""Sampling options: checks, names, and defaults from a model's metadata."""

import math
from typing import Any

import numpy as np
import pytest

from qrun.engine.sampling.options import SAMPLERS, SamplingOptions


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be at least 0, not -0.1"),
        ("temperature", math.nan, "temperature must be a finite number, not nan"),
        ("temperature", math.inf, "temperature must be a finite number, not inf"),
        ("temperature", "hot", "temperature must be a finite number, not 'hot'"),
        ("temperature", True, "temperature must be a finite number, not True"),
        ("top_k", -1, "top_k must be at least 0, not -1"),
        ("top_k", 1.5, "top_k must be a whole number, not 1.5"),
        ("top_k", True, "top_k must be a whole number, not True"),
        ("top_p", 1.01, "top_p must be between 0 and 1, not 1.01"),
        ("min_p", -1, "min_p must be between 0 and 1, not -1"),
        ("repetition_penalty", 0, "repetition_penalty must be above 0, not 0"),
        ("repetition_window", -2, "repetition_window must be at least -1, not -2"),
        ("dry_base", 0.5, "dry_base must be at least 1, not 0.5"),
        ("mirostat", 1, "mirostat must be 0 or 2, not 1"),
        ("max_tokens", -1, "max_tokens must be at least 0, not -1"),
        ("seed", -1, "seed must be at least 0, not -1"),
        ("stop", ["a", ""], "stop must be texts that are not empty, not ''"),
        ("stop", [3], "stop must be texts that are not empty, not 3"),
        ("stop", 3, "stop must be texts that are not empty, not 3"),
        ("samplers", ["top_z"], "samplers: 'top_z' is none of penalties, dry, "),
        ("samplers", ["top_k", "top-k"], "samplers: 'top_k' is named twice"),
        ("logit_bias", [1], r"logit_bias must map token ids to numbers, not \[1\]"),
        ("logit_bias", {"a": 1}, "logit_bias: a token id must be a whole number, not 'a'"),
        ("logit_bias", {-1: 1}, "logit_bias: a token id must be at least 0, not -1"),
        ("logit_bias", {1: math.inf}, "logit_bias of token 1 must be a finite number, not inf"),
        ("logprobs", 1, "logprobs must be True or False, not 1"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SamplingOptions(**{name: value})
    assert "\n" not in str(caught.value)


def test_values_come_out_in_one_type() -> None:
    options = SamplingOptions(
        top_k=np.int64(3), temperature=np.float32(0.5), stop="END", logit_bias={np.int32(4): 1, 5: -math.inf}
    )
    assert (type(options.top_k), type(options.temperature)) == (int, float)
    assert options.stop == ("END",)
    assert options.logit_bias == {4: 1.0, 5: -math.inf}


@pytest.mark.parametrize(
    ("name", "near"), [("temprature", "temperature"), ("topk", "top_k"), ("max_new_tokens", "max_tokens")]
)
def test_an_unknown_option_is_a_type_error_that_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TypeError, match=f"^unknown option '{name}'; did you mean '{near}'\\?$"):
        SamplingOptions().replace(**{name: 1})


def test_an_unknown_option_that_resembles_none() -> None:
    with pytest.raises(TypeError, match=r"^unknown option 'zzz'$"):
        SamplingOptions().replace(zzz=1)


def test_replace_with_none_keeps_the_default() -> None:
    options = SamplingOptions(top_k=7, seed=3)
    assert options.replace(top_k=None, seed=None, top_p=0.5) == SamplingOptions(top_k=7, seed=3, top_p=0.5)


def test_defaults_come_from_metadata() -> None:
    metadata = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.9,
        "general.sampling.min_p": 0.0,
        "general.sampling.xtc_probability": 0.1,
        "general.sampling.xtc_threshold": 0.2,
        "general.sampling.penalty_last_n": -1,
        "general.sampling.penalty_repeat": 1.05,
        "general.sampling.mirostat": 2,
        "general.sampling.mirostat_tau": 4.0,
        "general.sampling.mirostat_eta": 0.2,
        "general.sampling.sequence": "top_k;typ_p;nucleus;Min-P;tfs;temp",
        "general.name": "x",
    }
    assert SamplingOptions.from_metadata(metadata) == SamplingOptions(
        temperature=0.6,
        top_k=20,
        top_p=0.9,
        min_p=0.0,
        xtc_probability=0.1,
        xtc_threshold=0.2,
        repetition_window=-1,
        repetition_penalty=1.05,
        mirostat=2,
        mirostat_tau=4.0,
        mirostat_eta=0.2,
        samplers=("top_k", "typical_p", "top_p", "min_p", "temperature"),
    )
    assert SamplingOptions.from_metadata({}) == SamplingOptions()


def test_other_spellings_of_off_in_metadata() -> None:
    options = SamplingOptions.from_metadata({"general.sampling.top_k": -1, "general.sampling.temp": -1.0})
    assert (options.top_k, options.temperature) == (0, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", 7.0),
        ("top_p", math.nan),
        ("top_p", "high"),
        ("top_p", True),
        ("top_p", np.zeros(3)),
        ("top_k", 2.5),
        ("mirostat", 1),
        ("sequence", "nothing;known"),
        ("sequence", 5),
    ],
)
def test_a_bad_hint_in_metadata_is_passed_over(key: str, value: Any) -> None:
    assert SamplingOptions.from_metadata({f"general.sampling.{key}": value}) == SamplingOptions()


def test_every_step_of_the_default_order_can_be_named() -> None:
    assert SamplingOptions(samplers=SAMPLERS).samplers == SAMPLERS
