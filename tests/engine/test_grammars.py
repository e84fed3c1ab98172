"""Answers keep to their grammars, in any company."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLParserLimits
from msgspec import structs

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar, GrammarTool
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine import llguidance_matcher
from qwen3vl_disagg.engine.engine import Engine
from qwen3vl_disagg.engine.masks import Mask
from qwen3vl_disagg.engine.sampler import Sampler, apply_masks, fill_by_bits
from qwen3vl_disagg.engine.sampling import SamplingRow
from qwen3vl_disagg.processing.answer_grammar import MAX_CHOICES
from qwen3vl_disagg.protocol.messages import Finished, Tokens
from tests.support.grammars import (
    Scripted,
    answer,
    compiler,
    end_ids,
    make_engine,
    model,
    run,
    text_of,
    to_an_end,
    tokenizer,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 3, "maximum": 5000},
        "kinds": {"type": "array", "items": {"enum": ["red", "blue \u00e9", None]}, "maxItems": 3},
    },
    "required": ["name", "size", "kinds"],
    "additionalProperties": False,
}
LARK = 'start: pair ("," pair)*\npair: /[a-c]/ "=" /[0-9]{1,2}/\n'
GBNF = 'root ::= "<" inner ">"\ninner ::= [x-z]+\n'
CHOICES = ["yes", "no", 'may"be', "e\u0301 a"]
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]


def fits_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


GRAMMARS = {
    "schema": (Grammar.of_schema(SCHEMA), fits_schema),
    "regex": (Grammar.of_regex(r"^(ab|/c){2,4}\d$"), re.compile(r"(ab|/c){2,4}[0-9]").fullmatch),
    "choice": (Grammar.of_choice(CHOICES), CHOICES.__contains__),
    "lark": (Grammar.of_lark(LARK), re.compile(r"[a-c]=[0-9]{1,2}(,[a-c]=[0-9]{1,2})*").fullmatch),
    "gbnf": (Grammar.of_lark(GBNF), re.compile("<[x-z]+>").fullmatch),
}


def requests_of(**more) -> dict[str, tuple[list[int], SamplingParams]]:
    """One for each grammar, and two without."""
    found = {n: (PROMPT, to_an_end(grammar=g, seed=i, **more)) for i, (n, (g, _)) in enumerate(GRAMMARS.items())}
    plain = SamplingParams(max_new_tokens=20, temperature=1.0, seed=9, ignore_eos=True)
    return found | {"plain": (PROMPT, plain), "plain too": (PROMPT[3:], plain)}


def check(name: str, ids: list[int]) -> None:
    assert set(ids[:-1]) & end_ids() == set()
    assert ids[-1] in end_ids()
    assert GRAMMARS[name][1](text_of(ids)), text_of(ids)


def test_rows_with_and_without_grammars_in_one_batch():
    together = run(make_engine(), requests_of())
    for name, (ids, params) in requests_of().items():
        tokens, reason = answer(together[name])
        if name in GRAMMARS:
            assert reason == "stop"
            check(name, tokens)
        alone = run(make_engine(), {name: (ids, params)})
        assert tokens == answer(alone[name])[0]


@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy_and_sampled_with_everything_else(name):
    grammar, _ = GRAMMARS[name]
    everything = to_an_end(
        grammar=grammar,
        top_p=0.9,
        top_k=40,
        min_p=0.01,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logprobs=3,
    )
    greedy = SamplingParams(max_new_tokens=300, grammar=grammar, logit_bias=everything.logit_bias, logprobs=0)
    events = run(make_engine(), {"all": (PROMPT, everything), "greedy": (PROMPT, greedy)})
    for one in events.values():
        ids, reason = answer(one)
        if reason == "stop":
            check(name, ids)
        else:
            assert len(ids) == 300  # the most likely token over and over
    assert answer(events["all"])[1] == "stop"


def test_logprobs_are_of_the_raw_distribution():
    free = SamplingParams(max_new_tokens=1, logprobs=4)
    bound = SamplingParams(max_new_tokens=1, logprobs=4, grammar=Grammar.of_choice(["red", "blue"]))
    events = run(make_engine(), {"free": (PROMPT, free), "bound": (PROMPT, bound)})
    tops = [[e.logprobs[0].top for e in events[n] if isinstance(e, Tokens) and e.logprobs] for n in ("free", "bound")]
    assert [i for i, _ in tops[0][0]] == [i for i, _ in tops[1][0]]
    assert [x for _, x in tops[0][0]] == pytest.approx([x for _, x in tops[1][0]], abs=1e-5)
    [first] = answer(events["bound"])[0]
    assert first != tops[1][0][0][0]


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 60}])
def test_an_answer_that_is_whole_ends_whatever_bans_the_end(more):
    events = run(make_engine(), {"a": (PROMPT, to_an_end(grammar=Grammar.of_choice(["red", "blue"]), **more))})
    ids, reason = answer(events["a"])
    assert reason == "stop"
    assert text_of(ids) in ("red", "blue")


def test_an_answer_that_can_go_on_keeps_to_min_tokens_and_ignore_eos():
    grammar = Grammar.of_regex("[a-z ]+")
    events = run(
        make_engine(),
        {
            "min": (PROMPT, to_an_end(grammar=grammar, min_tokens=30)),
            "ignore": (PROMPT, to_an_end(grammar=grammar, ignore_eos=True, max_new_tokens=40)),
        },
    )
    ids, reason = answer(events["min"])
    assert reason == "stop"
    assert len(ids) > 30
    ids, reason = answer(events["ignore"])
    assert (len(ids), reason) == (40, "length")
    assert re.fullmatch("[a-z ]+", text_of(ids))


@pytest.mark.parametrize(("allowed", "more"), [([5], {}), ([5, 6], {}), ([1, 5], {}), ([1, 5], {"ignore_eos": True})])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_that_would_leave_nothing_of_a_mask_do_not_hold(allowed, more, temperature):
    """All that the mask allows are ends and stop tokens, for which it is too early."""
    sampler, logits = Sampler(banned_ids=[0], eos_ids=[1]), torch.randn(3, 40)
    params = SamplingParams(min_tokens=4, stop_token_ids=[5, 6], temperature=temperature, seed=4, **more)
    [mask] = masks_of(allowed, vocab_size=40)
    rows = [SamplingRow(params, seed) for seed in range(3)]
    picked, _ = sampler.sample(logits, rows, [None, mask, None])
    assert picked[1] in allowed
    assert {picked[0], picked[2]}.isdisjoint([1, 5, 6])
    [wider] = masks_of([*allowed, 9], vocab_size=40)
    assert sampler.sample(logits, rows, [None, wider, None])[0] == [picked[0], 9, picked[2]]


def test_a_preempted_answer_goes_on_with_its_grammar():
    """Two requests have room together only at their beginnings; chunks of 8 compute the second again."""
    requests = {
        n: (PROMPT, to_an_end(grammar=Grammar.of_schema(SCHEMA), seed=s, max_new_tokens=90))
        for s, n in enumerate("abcd")
    }
    calm, tight = make_engine(), make_engine()
    pool = tight.scheduler.pool
    assert pool.allocate(pool.num_free - pool.pages_for(len(PROMPT) + 90))
    expected, events = run(calm, requests), run(tight, requests)
    assert calm.scheduler.num_preempted == 0
    assert tight.scheduler.num_preempted > 0
    for name in requests:
        assert answer(events[name]) == answer(expected[name])
    assert sum(answer(one)[1] == "stop" for one in events.values()) > 1


def test_the_grammar_begins_behind_the_reasoning():
    prompt = [tokenizer().token_id("<|im_start|>"), *tokenizer().encode("assistant\n<think>\n")]
    bias = to_an_end().logit_bias | dict.fromkeys(tokenizer().encode("</think>"), 4.0)
    params = to_an_end(grammar=Grammar.of_schema(SCHEMA), logit_bias=bias)
    ids, reason = answer(run(make_engine(), {"a": (prompt, params)})["a"])
    assert reason == "stop"
    before, tag, behind = text_of(ids).partition("</think>")
    assert tag
    assert before
    assert fits_schema(behind.lstrip("\n"))


def test_or_with_the_first_token_whatever_the_prompt_ends_with():
    prompt = [tokenizer().token_id("<|im_start|>"), *tokenizer().encode("assistant\n<think>\n")]
    grammar = structs.replace(Grammar.of_choice(["red", "blue"]), is_from_start=True)
    ids, reason = answer(run(make_engine(), {"a": (prompt, to_an_end(grammar=grammar))})["a"])
    assert reason == "stop"
    assert text_of(ids) in ("red", "blue")


TOOLS = (GrammarTool("look", json.dumps(SCHEMA)), GrammarTool("wait"))


@pytest.mark.parametrize(("max_calls", "most"), [(1, 1), (2, 2), (0, 50)])
def test_calls(max_calls, most):
    grammar = Grammar(kind="calls", tools=TOOLS, max_calls=max_calls)
    bias = to_an_end().logit_bias | {tokenizer().encode("<tool_call>")[0]: 30.0, tokenizer().encode("\n<")[0]: 30.0}
    params = to_an_end(grammar=grammar, max_new_tokens=250, logit_bias=bias)
    requests = {str(seed): (PROMPT, to_an_end(grammar=grammar, max_new_tokens=250, seed=seed)) for seed in range(2)}
    counts = []
    for events in run(make_engine(), requests | {"many": (PROMPT, params)}).values():
        ids, reason = answer(events)
        calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>\n?", text_of(ids), re.DOTALL)
        counts.append(len(calls))
        if reason == "stop":
            assert "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in calls).rstrip("\n") == text_of(ids)
        for call in calls:
            call = json.loads(call)
            if call["name"] == "look":
                jsonschema.validate(call["arguments"], SCHEMA)
            assert isinstance(call["arguments"], dict)
    assert 1 <= max(counts) <= most


def allowed(grammar: Grammar, text: str) -> tuple[bool, bool]:
    """Whether the grammar takes this text, token by token, and whether an end may come then."""
    matcher = compiler()(grammar, PROMPT)
    for token_id in tokenizer().encode(text):
        bits = np.unpackbits(matcher.mask().bits, bitorder="little")
        if not bits[token_id]:
            return False, False
        matcher.consume(token_id)
    bits = np.unpackbits(matcher.mask().bits, bitorder="little")
    return True, bool(bits[list(end_ids())].all())


CALL = '<tool_call>\n{"name": "wait", "arguments": {"a": 1}}\n</tool_call>'


def test_text_with_one_call_behind_it():
    grammar = Grammar(kind="text", tools=TOOLS, max_calls=1)
    assert allowed(grammar, "one < two <tool") == (True, True)
    assert allowed(grammar, CALL) == (True, True)
    assert allowed(grammar, f"so:\n{CALL}") == (True, True)
    assert allowed(grammar, f"so:\n{CALL.removesuffix('</tool_call>')}") == (True, False)
    assert allowed(grammar, f"{CALL}\n{CALL}") == (False, False)
    assert allowed(grammar, f"{CALL} then") == (False, False)
    assert allowed(grammar, 'so <tool_call>\n{"name": "other"') == (False, False)


def test_json_is_written_in_one_line_or_indented():
    grammar = Grammar.of_schema({"type": "object"})
    for text in ('{"a":1,"b":[2]}', '{"a": 1, "b": [2]}', '{\n  "a": [\n    1,\n    2\n  ]\n}', '{\r\n\t"a": 1\r\n}'):
        assert allowed(grammar, text) == (True, True), text
    assert allowed(grammar, '{\n\n"a": 1}') == (False, False)
    assert allowed(grammar, '{"a":  1}') == (False, False)


def test_placeholders_never_come():
    grammar = Grammar.of_lark('start: <|image_pad|> | "a"')
    matcher = compiler()(grammar, PROMPT)
    bits = np.unpackbits(matcher.mask().bits, bitorder="little")
    assert not bits[tokenizer().token_id("<|image_pad|>")]
    assert bits[tokenizer().encode("a")[0]]
    with pytest.raises(InputError) as caught:
        compiler()(Grammar.of_lark("start: <|image_pad|>"), PROMPT).mask()
    assert caught.value.code == "grammar_stuck"


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_a_choice_may_have_as_many_texts_as_is_said(tools):
    texts = [f"c{number}" for number in range(MAX_CHOICES)]
    grammar = Grammar(kind="choice", text=json.dumps(texts), tools=tools)
    assert allowed(grammar, texts[-1]) == (True, True)
    assert allowed(grammar, "c5") == (True, True)
    with pytest.raises(InputError, match=f"it may have {MAX_CHOICES}"):
        compiler()(Grammar.of_choice([*texts, "d"]), PROMPT)


def test_calls_in_place_of_json():
    grammar = Grammar(kind="json", text='{"type": "object"}', tools=TOOLS)
    assert allowed(grammar, '{"a": 1}') == (True, True)
    assert allowed(grammar, f"{CALL}\n{CALL}") == (True, True)
    assert allowed(grammar, f'{{"a": 1}}{CALL}') == (False, False)


@pytest.mark.parametrize("name", ["default", "example", "const", "enum", "properties", "format"])
def test_a_property_may_have_any_name(name):
    schema = {"$defs": {name: {"type": "string", "format": "password"}}, "properties": {name: {"format": "phone"}}}
    grammar = Grammar.of_schema({"type": "object", **schema, "required": [name]})
    assert allowed(grammar, json.dumps({name: "x"})) == (True, True)
    assert allowed(Grammar.of_schema({"const": {"format": "phone"}}), '{"format": "phone"}') == (True, True)


BAD = {
    "no json": (Grammar(kind="json", text="{"), "JSON"),
    "no object": (Grammar(kind="json", text="[]"), "object"),
    "keyword": (Grammar.of_schema({"not": {"type": "null"}}), "not"),
    "nothing fits": (Grammar.of_schema({"type": "integer", "minimum": 3, "maximum": 2}), "cannot be used"),
    "deep": (Grammar.of_schema(json.loads('{"items":' * 70 + "{}" + "}" * 70)), "64 levels"),
    "regex": (Grammar.of_regex("(a"), "cannot be used"),
    "repeats": (Grammar.of_regex("a{100000}"), "2000"),
    "repeats in a schema": (Grammar.of_schema({"pattern": "a{1,3000}"}), "2000"),
    "no choice": (Grammar.of_choice([]), "at least one"),
    "lark": (Grammar.of_lark('start: "a'), "cannot be used"),
    "gbnf": (Grammar.of_lark("root ::= ("), "cannot be read"),
    "arguments": (Grammar(kind="calls", tools=(GrammarTool("f", '{"type": "string"}'),)), "no object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grammar_fails_its_own_request(name):
    grammar, word = BAD[name]
    with pytest.raises(InputError, match=word) as caught:
        compiler()(grammar, PROMPT)
    assert caught.value.param == "grammar"
    events = run(make_engine(), {"bad": (PROMPT, to_an_end(grammar=grammar)), **requests_of()})
    assert answer(events["bad"]) == ([], "invalid_request")
    check("schema", answer(events["schema"])[0])


def test_what_nothing_fits_is_refused_with_the_first_token():
    events = run(make_engine(), {"bad": (PROMPT, to_an_end(grammar=Grammar.of_lark("start: start\n")))})
    ids, code = answer(events["bad"])
    assert ids == []
    assert code in ("grammar_too_complex", "grammar_stuck")


def test_a_grammar_that_becomes_too_much_ends_its_own_request(monkeypatch):
    """Whether an x may come is a matter of all that came: there is a new state with nearly each token."""
    monkeypatch.setattr(llguidance_matcher, "_limits", lambda: LLParserLimits(max_lexer_states=800))
    heavy = Grammar.of_regex("(.*a.{60}b.*){3}x")
    params = SamplingParams(max_new_tokens=900, temperature=1.0, seed=1, grammar=heavy)
    events = run(make_engine(), {"heavy": (PROMPT, params), **requests_of()})
    ids, code = answer(events["heavy"])
    assert code == "grammar_too_complex"
    assert ids
    for name in GRAMMARS:
        check(name, answer(events[name])[0])


def test_without_the_library_a_grammar_is_refused():
    engine = Engine(model(), eos_ids=end_ids())
    with pytest.raises(InputError, match="needs llguidance") as caught:
        engine.add("a", PROMPT, [], SamplingParams(grammar=Grammar.of_regex("r", param="response_format")))
    assert (caught.value.param, caught.value.code) == ("response_format", "not_installed")


def masks_of(*rows: list[int], vocab_size: int) -> list[Mask]:
    bits = np.zeros((len(rows), vocab_size + 7 & -8), np.uint8)
    for number, ids in enumerate(rows):
        bits[number, ids] = 1
    return [Mask(row) for row in np.packbits(bits, axis=1, bitorder="little")]


def test_masks_are_the_same_on_a_device():
    logits = torch.randn(5, 83)
    masks = masks_of([0, 7, 8, 82], [5], vocab_size=83)
    found, expected = logits.clone(), logits.clone()
    apply_masks(found, [3, 1], masks)
    fill_by_bits(expected, torch.tensor([3, 1]), torch.from_numpy(np.stack([mask.bits for mask in masks])))
    assert torch.equal(found, expected)
    assert found[3].isfinite().nonzero().flatten().tolist() == [0, 7, 8, 82]
    assert torch.equal(found[[0, 2, 4]], logits[[0, 2, 4]])


def test_a_mask_comes_before_the_filters_and_changes_no_other_row():
    sampler, logits = Sampler(banned_ids=[0], eos_ids=[1]), torch.randn(3, 40)
    params = SamplingParams(temperature=1.0, top_k=2, min_p=0.5, seed=4)
    rows = [SamplingRow(params, seed) for seed in range(3)]
    worst = logits[1].argsort()[:2].tolist()
    [mask] = masks_of(worst, vocab_size=40)
    plain, _ = sampler.sample(logits, rows)
    masked, _ = sampler.sample(logits, rows, [None, mask, None])
    assert masked[1] in worst
    assert [masked[0], masked[2]] == [plain[0], plain[2]]


def test_a_grammar_whose_lexer_has_learned_too_much_is_compiled_anew():
    grammar = Grammar.of_regex("[a-z]{3}")
    first = compiler()(grammar, PROMPT)
    first.mask()
    first.consume(tokenizer().encode("a")[0])
    first._matcher.consume_token(max(end_ids()))  # what no request does: the shared matcher is of no use any more
    assert first._matcher.is_error()
    again = np.unpackbits(first.mask().bits, bitorder="little")
    assert again[tokenizer().encode("b")[0]]
    assert not again[list(end_ids())].any()


def test_one_that_was_compiled_anew_is_shared_again_once_it_is_copied():
    grammar = Grammar.of_regex("[a-z]{3}")
    first = compiler()(grammar, PROMPT)
    first._matcher.consume_token(max(end_ids()))  # as above
    expected = first.mask().bits
    second = first.copy()
    for one in (first, second):
        one._matcher.consume_token(max(end_ids()))
        assert np.array_equal(one.mask().bits, expected)


def test_answers_share_what_is_compiled_and_nothing_else(monkeypatch):
    """Each goes its own way in the one grammar; the first mask is made once."""
    calls, began = list[Grammar](), list[int]()
    mask = llguidance_matcher.LlguidanceMatcher.mask

    def compile(grammar: Grammar, prompt_ids: list[int]) -> llguidance_matcher.LlguidanceMatcher:
        calls.append(grammar)
        return compiler()(grammar, prompt_ids)

    def noted(self: llguidance_matcher.LlguidanceMatcher) -> Mask:
        began.extend([1] if not self._consumed else [])
        return mask(self)

    monkeypatch.setattr(llguidance_matcher.LlguidanceMatcher, "mask", noted)
    name = "choice"
    events = run(make_engine(compile), {"many": (PROMPT, to_an_end(grammar=GRAMMARS[name][0], n=6))})["many"]
    assert (len(calls), len(began)) == (1, 1)
    answers = [[i for e in events if isinstance(e, Tokens) and e.sample == n for i in e.token_ids] for n in range(6)]
    for ids in answers:
        check(name, ids)
    assert len({tuple(ids) for ids in answers}) > 1


def test_an_answer_that_is_not_wanted_stops_no_other():
    """`begin` stands behind two others, which keep both threads."""
    gate = threading.Event()

    def compile(grammar: Grammar, prompt_ids: list[int]) -> Scripted:
        assert grammar.text == "c" or gate.wait(30)
        return Scripted()

    engine = make_engine(compile)
    for name in "ab":
        engine.add(name, PROMPT, [], SamplingParams(grammar=Grammar.of_regex(name)))
    engine.add("c", PROMPT, [], SamplingParams(grammar=Grammar.of_regex("c"), n=2))
    engine.cancel("c", 0)
    gate.set()
    events = list[Any]()
    while not engine.is_empty:
        events += engine.step()
        if not engine.has_work:
            engine.wait(10.0)
    ends = [(event.request_id, event.sample) for event in events if isinstance(event, Finished)]
    assert sorted(ends) == [("a", 0), ("b", 0), ("c", 1)]
