"""Stop strings and the sampler's switches through `LLM`: the same rules as over HTTP."""

from __future__ import annotations

import msgspec
import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.sampling_params import OPTIONS, SamplingParams
from tests.support.grammars import tokenizer
from tests.support.scenes import ask_scenes

PLAIN = SamplingParams(max_new_tokens=60, logprobs=0)


BESIDE = {
    "include_stop_str_in_output": {"stop": ["circle", "square", "nothing"]},
    "skip_special_tokens": {"allowed_token_ids": [tokenizer().token_id("<|vision_start|>")]},
}
"""What an option needs to make a difference."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("scenes")
    ask_scenes(folder, seed=5, count=1)
    image = next(path for path in sorted(folder.iterdir()) if path.suffix != ".jsonl")
    parts = [{"type": "image_url", "image_url": {"url": str(image)}}, {"type": "text", "text": "List all cells."}]
    return [{"role": "user", "content": parts}]


def with_(**fields) -> SamplingParams:
    return msgspec.structs.replace(PLAIN, **fields)


def is_at_rest(llm: LLM) -> bool:
    scheduler = llm.engine.scheduler
    return llm.engine.is_empty and scheduler.pool.num_free == scheduler.pool.num_pages


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.step in ("length", "text")])
def test_an_option_that_is_not_the_samplers_makes_a_difference(llm, question, name):
    beside = BESIDE.get(name, {})
    plain, other = llm.chat([question] * 2, [with_(**beside), with_(**beside, **{name: OPTIONS[name].example})])
    assert (other.text, other.token_ids) != (plain.text, plain.token_ids)


def test_a_stop_string_ends_the_answer_and_the_request(llm, question):
    [plain] = llm.chat([question], PLAIN)
    pieces: list[str] = []
    stop = plain.text[len(plain.text) // 3 :][:9]
    [result] = llm.chat([question], with_(stop=["zzz", stop]), on_text=lambda _, piece: pieces.append(piece))
    assert result.text == plain.text[: plain.text.index(stop)] == "".join(pieces)
    assert result.finish_reason == "stop"
    count = len(result.token_ids)
    assert result.token_ids == plain.token_ids[:count]
    decode = llm.processor.tokenizer.decode
    assert stop in decode(plain.token_ids[:count])
    assert stop not in decode(plain.token_ids[: count - 1])
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert result.usage.completion_tokens == count < plain.usage.completion_tokens
    assert result.timings.prefill > 0
    assert result.timings.decode > 0
    assert [item.rows for item in result.timings.items] == [item.rows for item in plain.timings.items]
    assert is_at_rest(llm)


def test_a_stop_token_ends_the_answer_and_is_no_text(llm, question):
    [plain] = llm.chat([question], PLAIN)
    stop = next(token for token in plain.token_ids[4:] if plain.token_ids.index(token) >= 4)
    count = plain.token_ids.index(stop) + 1
    [result] = llm.chat([question], with_(stop_token_ids=[stop]))
    assert result.token_ids == plain.token_ids[:count]
    assert result.text == llm.processor.tokenizer.decode(plain.token_ids[: count - 1])
    assert result.finish_reason == "stop"
    [later] = llm.chat([question], with_(stop_token_ids=[stop], min_tokens=count + 1))
    assert later.token_ids[:count] != plain.token_ids[:count], "not before so many"
    assert stop not in later.token_ids[:count]
    with pytest.raises(InputError):
        llm.chat([question], with_(stop_token_ids=[10**6]))
    assert is_at_rest(llm)


def test_what_ended_the_answer_may_be_a_part_of_it(llm, question):
    [plain] = llm.chat([question], PLAIN)
    stop = plain.text[len(plain.text) // 3 :][:9]
    [cut] = llm.chat([question], with_(stop=[stop], include_stop_str_in_output=True))
    assert cut.text == plain.text[: plain.text.index(stop) + len(stop)]
    token = cut.token_ids[-1]
    [cut] = llm.chat([question], with_(stop_token_ids=[token], include_stop_str_in_output=True))
    assert cut.text == llm.processor.tokenizer.decode(cut.token_ids)
    assert (cut.token_ids[-1], cut.finish_reason) == (token, "stop")
    for with_name in (False, True):
        fields = {"include_stop_str_in_output": True, "skip_special_tokens": not with_name}
        [whole] = llm.chat([question], with_(**fields))
        assert whole.text == plain.text + "<|im_end|>" * with_name


def test_others_go_on_when_one_stops(llm, question):
    [plain] = llm.chat([question], PLAIN)
    stop = plain.text[:3]
    results = llm.chat([question] * 3, [with_(stop=[stop]), PLAIN, with_(stop=["no such text"])])
    assert [result.text for result in results] == ["", plain.text, plain.text]
    assert is_at_rest(llm)


def test_a_stop_string_complete_with_the_last_token(llm, question):
    """The engine has finished the request in the same step; it ended with the stop string all the same."""
    [cut] = llm.chat([question], with_(max_new_tokens=5))
    assert cut.finish_reason == "length"
    [result] = llm.chat([question], with_(max_new_tokens=5, stop=[cut.text]))
    assert (result.text, result.finish_reason, result.token_ids) == ("", "stop", cut.token_ids)
    assert is_at_rest(llm)


def test_min_tokens(llm, question):
    [plain] = llm.chat([question], PLAIN)
    first = plain.text[0]
    for count in (1, 7):
        [result] = llm.chat([question], with_(stop=[first], min_tokens=count))
        assert len(result.token_ids) >= count
        assert result.token_ids == plain.token_ids[: len(result.token_ids)]
    [longer] = llm.chat([question], with_(min_tokens=len(plain.token_ids) + 4))
    assert plain.finish_reason == "stop"
    assert len(longer.token_ids) >= len(plain.token_ids) + 4
    assert longer.token_ids[: len(plain.token_ids) - 1] == plain.token_ids[:-1]


def test_a_bias_is_felt(llm, question):
    [plain] = llm.chat([question], PLAIN)
    wanted = plain.token_ids[1]
    [result] = llm.chat([question], with_(logit_bias={wanted: 100.0}, max_new_tokens=5))
    assert result.token_ids == [wanted] * 5
    [result] = llm.chat([question], with_(logit_bias={wanted: 100.0}, max_new_tokens=5, presence_penalty=2.0))
    assert result.token_ids == [wanted] * 5
    [result] = llm.chat([question], with_(logit_bias={plain.token_ids[0]: -100.0}))
    assert plain.token_ids[0] not in result.token_ids
    for bad, told in ((-1, "not .-1"), (llm.config.text.vocab_size, "from 0 to")):
        with pytest.raises(InputError, match=f"logit_bias takes token ids,? {told}"):
            llm.chat([question], with_(logit_bias={bad: 1.0}))
    with pytest.raises(InputError, match="stop takes"):
        llm.chat([question], with_(stop=[""]))
    assert is_at_rest(llm)


def test_a_penalty_on_repetition_is_felt(llm, question):
    [plain] = llm.chat([question], PLAIN)
    [result] = llm.chat([question], with_(repetition_penalty=5.0, logprobs=1))
    assert result.logprobs is not None
    best = [entry.top[0][0] for entry in result.logprobs]
    differs = [n for n, token_id in enumerate(result.token_ids) if token_id != best[n]]
    assert differs
    assert all(best[n] in [*plain.prompt_token_ids, *result.token_ids[:n]] for n in differs)
