from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings
from qwen3vl_disagg.generate import bar, waterfall


def test_bars_are_drawn_to_an_eighth():
    assert bar(0, 10, 10, 4) == "████"
    assert bar(5, 5, 10, 4) == "  ██"
    assert bar(0, 1, 32, 4) == "▏   "
    assert bar(0, 0, 10, 4) == "    "
    assert bar(0, 1e-9, 10, 4) == "▏   "  # what took time is seen
    assert bar(0, 1, 0, 4) == "    "
    assert len(bar(9.99, 0.01, 10, 4)) == 4


def test_every_stage_has_its_line_and_starts_where_the_last_one_ended():
    timings = RequestTimings(preprocess=10, encode=10, prefill=10, decode=10, transfer_bytes=2500, encode_ranks=[3])
    timings.items = [ItemTimings(rows=16)]
    lines = waterfall(timings, width=4).splitlines()
    assert [line.split("|")[0].strip() for line in lines] == [
        *("queue", "preprocess", "encode", "transfer", "prefill", "decode")
    ]
    assert [line.split("|")[1] for line in lines] == ["    ", "█   ", " █  ", "    ", "  █ ", "   █"]
    assert "1 item(s) on encode rank 3" in lines[1]
    assert "16 rows" in lines[2]
    assert "2.5 kB" in lines[3]


def test_text_alone_names_no_encode_rank():
    assert "encode rank" not in waterfall(RequestTimings(prefill=1, decode=1))
