"""Schemas, regular expressions and grammars: whatever a model would rather say, what it says is what they allow."""

from __future__ import annotations

import gc
import json
import re
import weakref
from typing import Any

import jsonschema
import numpy as np
import pytest
from engine_fakes import FakeRuntime, FakeTokenizer
from trained_tokenizer import END, trained_tokenizer

from qrun.engine.generation.answer_rules import text_rules
from qrun.engine.generation.generation import Generation
from qrun.engine.generation.session import Host, Session
from qrun.engine.sampling import constraints
from qrun.engine.sampling.constraints import Constraint
from qrun.engine.sampling.options import SamplingOptions
from qrun.engine.sampling.sampler import Sampler

TOKENIZER = trained_tokenizer()
FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "uuid"))


def text_schema(**keys: Any) -> dict[str, Any]:
    return {"type": "string", **keys}


def record(required: list[str] | None = None, more: Any = False, **properties: Any) -> dict[str, Any]:
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


SHORT = text_schema(maxLength=12)
WHOLE = {"type": "integer", "minimum": -99, "maximum": 999}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": record(value=WHOLE, inner={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1})},
}

SCHEMAS: dict[str, dict[str, Any]] = {
    # Values
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": WHOLE,
    "positive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 50},
    "negative": {"type": "integer", "minimum": -500, "maximum": -3},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.75},
    "number above": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    "several types": {"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": 9},
    # Texts
    "text": SHORT,
    "text of some length": text_schema(minLength=3, maxLength=7),
    "empty text": text_schema(maxLength=0),
    "pattern": text_schema(pattern="^[A-Z]{2}-[0-9]{3}$"),
    "pattern anywhere": text_schema(pattern="ab", maxLength=6),
    "pattern of choices": text_schema(pattern="^(red|green|dark (blue|grey))$"),
    "pattern and length": text_schema(pattern="^[a-z]+$", minLength=2, maxLength=5),
    "date": text_schema(format="date"),
    "time": text_schema(format="time", maxLength=14),
    "date-time": text_schema(format="date-time", maxLength=30),
    "uuid": text_schema(format="uuid"),
    "ipv4": text_schema(format="ipv4"),
    "e-mail": text_schema(format="email", maxLength=14),
    # Choices
    "enum": {"enum": ["alpha", "alpine", "al"]},
    "enum of all kinds": {"enum": [1, "1", None, True, [1, 2], {"a": 1}]},
    "enum with escapes": {"enum": ['say "hi"', "back\\slash", "new\nline", "é😀"]},
    "const": {"const": "exactly this"},
    "const object": {"const": {"a": [1, {"b": None}]}},
    "any of": {"anyOf": [WHOLE, SHORT, {"type": "null"}]},
    "any of objects": {"anyOf": [record(cat=WHOLE), record(dog=SHORT), record(cat=SHORT, dog=WHOLE)]},
    "one of kinds": {"oneOf": [{"type": "boolean"}, WHOLE]},
    "one of marked": {
        "oneOf": [record(kind={"const": "cat"}, lives=WHOLE), record(kind={"const": "dog"}, name=SHORT)]
    },
    "nullable": {"anyOf": [text_schema(maxLength=5), {"type": "null"}], "default": None, "title": "Name"},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "all of objects": {"allOf": [record(a=WHOLE, b=SHORT), {"properties": {"a": {"maximum": 5}}}]},
    # Arrays
    "array": {"type": "array", "items": WHOLE, "maxItems": 5},
    "array of some length": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "empty array": {"type": "array", "items": SHORT, "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [SHORT, WHOLE, {"type": "null"}], "items": False, "minItems": 3},
    "tuple and more": {"type": "array", "prefixItems": [WHOLE], "items": SHORT, "minItems": 1, "maxItems": 3},
    "arrays in arrays": {
        "type": "array", "maxItems": 2, "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 3}
    },
    "array of choices": {"type": "array", "items": {"anyOf": [WHOLE, {"enum": ["x", "y"]}]}, "maxItems": 4},
    "array of objects": {"type": "array", "items": record(name=SHORT, n=WHOLE), "minItems": 1, "maxItems": 2},
    # Objects
    "object": record(name=SHORT, size=WHOLE),
    "nothing in it": record(),
    "optional": record([], a=WHOLE, b=SHORT, c={"type": "boolean"}),
    "some optional": record(["b"], a=WHOLE, b=SHORT, c={"type": "null"}),
    "long names": record(a_rather_long_name_of_a_property=WHOLE, and_a_second_that_is_no_shorter=SHORT),
    "names that begin alike": record(order_id=WHOLE, order_name=SHORT, order={"type": "null"}),
    "odd names": record(**{'with "quotes"': WHOLE, "with space": WHOLE, "ünïcode": WHOLE, "": WHOLE}),
    "nested": record(a=record(b=record(c=record(d={"enum": ["deep"]})))),
    "map": {"type": "object", "additionalProperties": WHOLE, "maxProperties": 2},
    "map of some size": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1,
                         "maxProperties": 2},
    "pattern of names": {"type": "object", "patternProperties": {"^x-[a-z]{1,4}$": WHOLE},
                         "additionalProperties": False, "maxProperties": 2},
    "required but not described": {"type": "object", "required": ["q"], "properties": {}, "additionalProperties": WHOLE,
                                   "maxProperties": 1},
    "more allowed": record(["a"], {"type": "null"}, a=WHOLE) | {"maxProperties": 2},
    # References
    "reference": {"$ref": "#/$defs/kind", "$defs": {"kind": {"enum": ["a", "b"]}}},
    "references": record(a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"}) | {"$defs": {"n": WHOLE}},
    "old definitions": record(a={"$ref": "#/definitions/n"}) | {"definitions": {"n": {"type": "boolean"}}},
    "reference to a property": record(a=WHOLE, b={"$ref": "#/properties/a"}),
    "reference with keys beside it": record(a={"$ref": "#/$defs/n", "maximum": 5}) | {"$defs": {"n": WHOLE}},
    "recursive": TREE,
    "list that goes on": {
        "$defs": {"item": record(n=WHOLE, next={"anyOf": [{"$ref": "#/$defs/item"}, {"type": "null"}]})},
        "$ref": "#/$defs/item",
    },
    # As libraries and people write them
    "pydantic": {
        "$defs": {"Kind": {"enum": ["small", "large"], "title": "Kind", "type": "string"}},
        "properties": {
            "kind": {"$ref": "#/$defs/Kind"},
            "since": {"anyOf": [{"format": "date", "type": "string"}, {"type": "null"}], "default": None},
            "tags": {"items": {"maxLength": 8, "type": "string"}, "maxItems": 2, "title": "Tags", "type": "array"},
        },
        "required": ["kind", "tags"], "title": "Item", "type": "object", "additionalProperties": False,
    },
    "zod": {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": False,
        "properties": {"id": {"type": "integer", "exclusiveMinimum": 0, "maximum": 10000},
                       "status": {"type": "string", "enum": ["open", "closed"]}},
        "required": ["id", "status"],
    },
    "an invoice": record(
        number=text_schema(pattern="^[0-9]{4}/[0-9]{2}$"),
        lines={"type": "array", "minItems": 1, "maxItems": 2,
               "items": record(what=SHORT, price={"type": "number", "minimum": 0, "maximum": 1000})},
        paid={"type": "boolean"},
    ),
    "settings": record(
        ["mode"], mode={"enum": ["fast", "slow"]}, retries={"type": "integer", "minimum": 0, "maximum": 9},
        limits=record([], low={"type": "number", "minimum": 0, "maximum": 1}, high=WHOLE),
    ),
    "descriptions and examples": record(a=WHOLE | {"description": "a", "examples": [1]}, b=SHORT | {"title": "B"}),
}  # fmt: skip


class RandomRuntime(FakeRuntime):
    """After each text, logits at random, of which the bits of the rows are the same in any batch."""

    def logits_after(self, held: list[int]) -> np.ndarray:
        logits = np.random.default_rng(held[-40:]).standard_normal(self.n_vocab).astype(np.float32)
        logits[END] += 3
        return logits


def session(batch: int = 64, context: int = 1000) -> Session:
    runtime: Any = RandomRuntime(context=context, batch=batch, n_vocab=TOKENIZER.n_vocab + 5)
    return Session(Host(runtime, TOKENIZER, SamplingOptions(), lambda: "model"))


def generate(start: str = "x", seed: int = 1, make: Any = session, **options: Any) -> Generation:
    wanted = {name: options.pop(name) for name in ("schema", "grammar", "regex") if name in options}
    rules = text_rules(TOKENIZER, **wanted)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    generation = make().generate(TOKENIZER.encode(start), rules=rules, seed=seed, **options)
    for _ in generation:
        pass
    return generation


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_is_what_the_schema_says(name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    for seed in range(3):
        generation = generate(name, seed, schema=schema, temperature=0.0 if seed == 2 else 1.0)
        assert generation.stop_reason == "stop", generation.text
        checker.validate(json.loads(generation.text))


def test_there_are_many() -> None:
    assert len(SCHEMAS) >= 60


PATTERNS = ["^[A-Z]{2}-[0-9]{3}$", "^(red|green|dark (blue|grey))$", "^#[0-9a-f]{6}$", "^v[0-9]{1,2}(\\.[0-9]){2}$"]
NAMES = ["id", "name", "kind", "kinds", "größe", "is it?", "a \"b\"", "n_1", "n_2", "$x", "items", "type"]


class RandomSchemas:
    """Schemas as people put them together, of all that can be said, some levels deep."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.definitions: dict[str, Any] = {}

    def pick(self, choices: list[Any]) -> Any:
        return choices[self.rng.integers(len(choices))]

    def schema(self) -> dict[str, Any]:
        found = self.any(int(self.rng.integers(3)))
        return found | {"$defs": self.definitions} if self.definitions else found

    def any(self, levels: int) -> dict[str, Any]:
        if levels and self.rng.random() < 0.8:
            return self.pick([self.object, self.object, self.array, self.tuple, self.map, self.choice])(levels - 1)
        return self.pick([self.whole, self.number, self.text, self.pattern, self.values, self.format, self.reference])()

    def whole(self) -> dict[str, Any]:
        low = int(self.rng.integers(-3000, 3000))
        found = {"type": "integer", "minimum": low, "maximum": low + int(self.rng.integers(20, 2000))}
        return self.pick([found, found | {"multipleOf": int(self.rng.integers(2, 9))}, {"type": "boolean"}])

    def number(self) -> dict[str, Any]:
        low = round(float(self.rng.normal(scale=30)), 2)
        return {"type": "number", self.pick(["minimum", "exclusiveMinimum"]): low, "maximum": round(low + 7.25, 2)}

    def text(self) -> dict[str, Any]:
        shortest = int(self.rng.integers(4))
        return text_schema(minLength=shortest, maxLength=shortest + int(self.rng.integers(9)))

    def pattern(self) -> dict[str, Any]:
        return text_schema(pattern=self.pick(PATTERNS))

    def format(self) -> dict[str, Any]:
        return text_schema(format=self.pick(["date", "uuid", "ipv4"]))

    def values(self) -> dict[str, Any]:
        of_all_kinds = ["alpha", "alpine", "é😀", 'say "hi"', 17, -2.5, True, None, [1, "b"], {"a": {"b": []}}]
        chosen = [of_all_kinds[i] for i in self.rng.permutation(len(of_all_kinds))[: self.rng.integers(1, 5)]]
        return {"const": chosen[0]} if len(chosen) == 1 else {"enum": chosen}

    def reference(self) -> dict[str, Any]:
        name = f"n{self.rng.integers(3)}"
        if name not in self.definitions:
            self.definitions[name] = self.pick([self.whole, self.text, self.pattern, self.values])()
        return {"$ref": f"#/$defs/{name}"}

    def object(self, levels: int) -> dict[str, Any]:
        names = [NAMES[i] for i in self.rng.permutation(len(NAMES))[: self.rng.integers(5)]]
        return record([name for name in names if self.rng.random() < 0.6], **{name: self.any(levels) for name in names})

    def array(self, levels: int) -> dict[str, Any]:
        least = int(self.rng.integers(3))
        return {"type": "array", "items": self.any(levels), "minItems": least,
                "maxItems": least + int(self.rng.integers(3))}  # fmt: skip

    def tuple(self, levels: int) -> dict[str, Any]:
        firsts = [self.any(levels) for _ in range(self.rng.integers(1, 4))]
        return {"type": "array", "prefixItems": firsts, "items": False, "minItems": len(firsts)}

    def map(self, levels: int) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.any(levels), "maxProperties": int(self.rng.integers(3))}

    def choice(self, levels: int) -> dict[str, Any]:
        return {"anyOf": [*(self.any(levels) for _ in range(self.rng.integers(1, 3))), {"type": "null"}]}


def test_nor_do_texts_of_hundreds_of_others_say_anything_else(rng: np.random.Generator) -> None:
    for number in range(300):
        schema = RandomSchemas(rng).schema()
        generation = generate(str(number), number, schema=schema, make=lambda: session(context=4000))
        assert generation.stop_reason == "stop", (schema, generation.text)
        checker = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        checker.validate(json.loads(generation.text))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schema": {"type": "strange"}}, "schema: Invalid type: strange"),
    ({"schema": {"type": "string", "format": "colour"}}, "schema: Unknown format: colour"),
    ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "schema: .*look-around"),
    ({"schema": {"not": {"type": "string"}}}, 'schema: Unimplemented keys: \\["not"\\]'),
    ({"schema": {"$ref": "https://example.com/x.json"}}, "schema: Resource .* not present"),
    ({"schema": {"$ref": "#/$defs/missing"}}, "schema: Pointer .* does not exist"),
    ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "schema: Unsatisfiable"),
    ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "schema: oneOf"),
    ({"schema": False}, "schema: it allows nothing"),
    ({"schema": [1]}, "schema: an object is wanted, not list"),
    ({"schema": "{"}, "schema: it is no JSON"),
    ({"schema": {"a": object()}}, "schema: it is no JSON"),
    ({"schema": {"const": "x" * constraints.MAX_SOURCE}}, "schema: .* characters are more than"),
    ({"schema": {"const": "\ud800"}}, "schema: half of a surrogate pair"),
    ({"regex": "\ud800"}, "regex: half of a surrogate pair"),
    ({"grammar": "start: \"\ud800\""}, "grammar: half of a surrogate pair"),
    ({"regex": "("}, "regex: .*unclosed group"),
    ({"regex": "a(?=b)"}, "regex: .*look"),
    ({"regex": ""}, "regex: a text that is not empty"),
    ({"grammar": "root ::= missing"}, "grammar: .*'missing' not found"),
    ({"grammar": "what is this"}, "grammar: neither Lark nor GBNF"),
    ({"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000}, "grammar: it is nested too deeply"),
    ({"grammar": "root ::= root"}, "grammar: .*no text comes to an end in it"),
    ({"grammar": "start: missing"}, 'grammar: .*unknown name: "missing"'),
    ({"grammar": " "}, "grammar: a text that is not empty"),
    ({"grammar": 3}, "grammar: a text"),
    ({"regex": "a", "schema": {}}, "schema and regex do not go together"),
]


@pytest.mark.parametrize(("wanted", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_refused_before_the_first_token(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        text_rules(TOKENIZER, **wanted)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    for deep in (schema, nested(100), '{"items":' * 100_000 + "{}" + "}" * 100_000):
        with pytest.raises(ValueError, match="schema: its values are nested more than 64 deep"):
            text_rules(TOKENIZER, schema=deep)


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "null"}


def test_a_strangers_schema_costs_little() -> None:
    """Patterns and counts that explode elsewhere."""
    for schema in (
        text_schema(pattern="^(a|aa|aaa|b?c?d?){1,2000}(x{1,1000}y{1,1000}){1,500}$"),
        {"type": "array", "items": text_schema(minLength=5000, maxLength=100000), "minItems": 10000},
    ):
        try:
            generate(schema=schema, max_tokens=5)
        except ValueError as error:
            assert "\n" not in str(error)


def test_json_is_compact() -> None:
    generation = generate(schema=record(a=WHOLE, b={"type": "array", "items": WHOLE, "maxItems": 3}))
    assert re.fullmatch(r'\{"a":-?\d+,"b":\[[-\d,]*\]\}', generation.text)


def test_regular_expressions_and_grammars() -> None:
    assert generate(regex="(yes|no), [0-9]{3}").text[-3:].isdigit()
    assert re.fullmatch(r"\d+ (cats|dogs)", generate(grammar='root ::= [0-9]{1,4} " " ("cats" | "dogs")').text)
    lark = 'start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]{1,4}/'
    assert re.fullmatch(r"<[a-z]{1,4}(,[a-z]{1,4})*>", generate(grammar=lark, max_tokens=100).text)


class TestForcedTokens:
    SCHEMA = record(a_rather_long_name_of_a_property=WHOLE, and_a_second_that_is_no_shorter={"const": "one two three"})

    def test_they_are_not_asked_for(self) -> None:
        made = []

        def make() -> Session:
            made.append(session())
            return made[0]

        generation = generate(schema=self.SCHEMA, make=make)
        stats = generation.stats
        assert stats.forced_tokens > 0.6 * stats.generated_tokens
        assert stats.guessed_tokens == stats.accepted_tokens == 0
        runtime: Any = made[0]._host.runtime
        assert len(runtime.evaluated) <= 1 + stats.generated_tokens - 0.6 * stats.forced_tokens

    def test_log_probabilities_are_those_of_the_model(self) -> None:
        generation = generate(schema=self.SCHEMA, make=session, max_tokens=30)
        held = TOKENIZER.encode("x")
        again = session().generate(
            held, rules=text_rules(TOKENIZER, schema=self.SCHEMA), seed=1, temperature=1.0, top_k=0, top_p=1.0,
            min_p=0.0,
        )  # fmt: skip
        tokens = []
        for piece in again:
            if piece.token is not None:
                logits = RandomRuntime(n_vocab=TOKENIZER.n_vocab + 5).logits_after(held + tokens)[: TOKENIZER.n_vocab]
                expected = logits[piece.token] - np.log(np.exp(logits.astype(np.float64)).sum())
                assert piece.logprob == pytest.approx(expected, abs=1e-4)
                tokens.append(piece.token)
        assert again.text.startswith(generation.text)

    @pytest.mark.parametrize("others", [0, 3])
    def test_logits_are_asked_for_where_something_is_chosen_alone(self, others: int) -> None:
        def told(logprobs: bool) -> tuple[list[list[int]], int, int]:
            host = session()._host
            runtime: Any = host.runtime
            generations = [
                Session(host).generate(
                    TOKENIZER.encode(f"{number}"), rules=text_rules(TOKENIZER, schema=self.SCHEMA), seed=1,
                    logprobs=logprobs, temperature=1.0,
                )
                for number in range(1 + others)
            ]  # fmt: skip
            live = list(generations)
            while live:
                for generation in list(live):
                    if next(generation, None) is None:
                        live.remove(generation)
            chosen = sum(one.stats.generated_tokens - one.stats.forced_tokens for one in generations)
            return [one.tokens for one in generations], runtime.n_logits, chosen

        expected, n_all, _ = told(True)
        tokens, n_logits, n_chosen = told(False)
        assert tokens == expected
        assert n_logits <= n_chosen + 3 * (1 + others) < n_all

    def test_the_text_is_the_same_one_by_one(self) -> None:
        texts = {generate(schema=self.SCHEMA, make=lambda n=n: session(batch=n)).text for n in (1, 2, 3, 64)}
        assert len(texts) == 1

    def test_a_limit_cuts_them(self) -> None:
        for limit in range(1, 12):
            generation = generate(schema=self.SCHEMA, max_tokens=limit)
            assert (generation.stop_reason, len(generation.tokens)) == ("length", limit)

    def test_what_is_complete_at_the_limit_has_not_been_cut(self) -> None:
        whole = generate(schema=self.SCHEMA)
        assert generate(schema=self.SCHEMA, max_tokens=len(whole.tokens)).stop_reason == "stop"

    def test_a_stop_string_ends_them(self) -> None:
        generation = generate(schema=self.SCHEMA, stop=("two",))
        assert generation.stop_reason == "stop" and generation.text.endswith("one ")


def test_lookup_changes_nothing() -> None:
    schema = {"type": "array", "items": record(name={"enum": ["n1", "n2"]}, size=WHOLE), "minItems": 8, "maxItems": 12}
    for temperature in (0.0, 1.0):
        plain, guessed = (
            generate(schema=schema, temperature=temperature, lookup=lookup, max_tokens=250) for lookup in (False, True)
        )
        assert plain.text == guessed.text and len(plain.tokens) > 60


def test_nor_do_others_in_the_same_steps() -> None:
    host = session()._host
    names = ["object", "array of objects", "an invoice", "enum", "recursive", "settings"]
    alone = [generate(name, schema=SCHEMAS[name], max_tokens=80, temperature=0.8).text for name in names]
    together = [
        Session(host).generate(
            TOKENIZER.encode(name), rules=text_rules(TOKENIZER, schema=SCHEMAS[name]), seed=1, max_tokens=80,
            temperature=0.8, top_k=0, top_p=1.0, min_p=0.0,
        )
        for name in names
    ]  # fmt: skip
    live = list(together)
    while live:
        for generation in list(live):
            if next(generation, None) is None:
                live.remove(generation)
    assert [generation.text for generation in together] == alone


def test_it_goes_with_the_options_of_sampling() -> None:
    schema = record(a={"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 5, "maxItems": 9}, b=SHORT)
    for options in (
        {"repetition_penalty": 1.5}, {"dry_multiplier": 0.8}, {"mirostat": 2}, {"xtc_probability": 1.0}, {"top_k": 3},
        {"typical_p": 0.5}, {"top_p": 0.3}, {"min_p": 0.5}, {"logprobs": False}, {"frequency_penalty": 1.0},
        {"logit_bias": {END: 50.0}},
    ):  # fmt: skip
        generation = generate(schema=schema, **options)
        assert generation.stop_reason == "stop"
        jsonschema.validate(json.loads(generation.text), schema)


def test_a_bias_that_leaves_nothing_is_said() -> None:
    bias = dict.fromkeys((i for i in range(TOKENIZER.n_vocab) if b"{" in TOKENIZER.token_bytes(i)), -np.inf)
    with pytest.raises(ValueError, match="no token is left"):
        generate(schema={"type": "object"}, logit_bias=bias)


def test_copies_of_a_constraint_go_on_by_themselves() -> None:
    constraint = constraints.compiler(TOKENIZER).compile(constraints.regex_source("ab{1,3}c"))
    mask, other = np.zeros(constraint.n_words, np.uint32), np.zeros(constraint.n_words, np.uint32)
    a, b, c = (TOKENIZER.encode_further(letter)[0] for letter in "abc")
    constraint.accept(a)
    constraint.mask(mask)
    copy = constraint.copy()
    copy.accept(b)
    constraint.mask(other)
    assert (mask == other).all() and constraint.valid([b, b, b, b]) == 3
    copy.accept(c)
    assert copy.finished and copy.complete and not constraint.finished
    with pytest.raises(ValueError, match="cannot be followed"):
        constraint.accept(a)


def test_what_was_made_for_a_vocabulary_goes_with_it() -> None:
    tokenizer = FakeTokenizer()
    compiled = weakref.ref(constraints.compiler(tokenizer))
    assert constraints.compiler(tokenizer) is compiled()
    reference = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert (reference(), compiled()) == (None, None)


def test_without_the_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'qrun-gguf\[grammar\]'"):
        text_rules(TOKENIZER, regex="a")
    assert not constraints.available()


@pytest.mark.parametrize("options", [{"min_tokens": 30}, {"ignore_eos": True, "max_tokens": 40}])
def test_a_grammar_ends_the_text_though_it_was_to_be_longer(options: dict[str, Any]) -> None:
    generation = generate(regex="(yes|no), [0-9]{3}", **options)
    assert generation.text[-3:].isdigit() and generation.stop_reason == "stop"
    longer = generate(regex="(yes|no)(, [0-9]){1,40}", **options)
    assert len(longer.tokens) >= 30


def test_grammars_asked_for_again_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = constraints.compiler(TOKENIZER)
    made, make = [], compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda source, what: (made.append(source), make(source, what))[1])
    first = compiler.compile(constraints.regex_source("a[0-9]+x?"))
    first.accept(TOKENIZER.encode_further("a")[0])
    again = compiler.compile(constraints.regex_source("a[0-9]+x?"))
    assert len(made) == 1
    assert again.valid(TOKENIZER.encode_further("a")) == 1 and first.valid(TOKENIZER.encode_further("a")) == 0
    for i in range(40):
        compiler.compile(constraints.regex_source(f"b{i}"))
    assert len(compiler._known) <= 16


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_the_likeliest_tokens_are_asked_about_one_by_one_to_the_same_text(
    top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[int] = []
    mask = Constraint.mask
    monkeypatch.setattr(Constraint, "mask", lambda self, out: (masks.append(1), mask(self, out))[1])

    def told(**options: Any) -> list[tuple[list[int], Any]]:
        masks.clear()
        found = [generate(name, schema=SCHEMAS[name], top_k=top_k, max_tokens=60, **options) for name in SCHEMAS]
        return [(one.tokens, one.stop_reason) for one in found]

    monkeypatch.setattr("qrun.engine.sampling.sampler._FOLDS", 1)  # or so small a vocabulary is looked at as a whole
    one_by_one, n_masks = told(), len(masks)
    monkeypatch.setattr(Sampler, "sample_asking", lambda *_: None)
    assert told() == one_by_one
    assert n_masks < 0.7 * len(masks)
