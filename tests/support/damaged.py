"""A catalogue of damaged checkpoint folders: what is done to a good one, and what must be said about it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.weights import edit_json, edit_tensors, join_header, split_header

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
TEXT = "model.language_model"
NORM, EMBEDDING, QUERY = (
    f"{TEXT}.norm.weight",
    f"{TEXT}.embed_tokens.weight",
    f"{TEXT}.layers.0.self_attn.q_proj.weight",
)
EXPERTS = f"{TEXT}.layers.1.mlp.experts"
PIXELS, SAMPLING, TOKENIZER = "preprocessor_config.json", "generation_config.json", "tokenizer.json"
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Damaged:
    """`base`: single, sharded, per_expert or float8. `said`: how each of the problems begins, all of them; `...` stands
    for anything."""

    name: str
    base: str
    damage: Damage
    said: tuple[str, ...]


CASES: list[Damaged] = []


def case(name: str, base: str, damage: Damage, *said: str) -> None:
    CASES.append(Damaged(name, base, damage, said))


def write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def in_turn(*steps: Damage) -> Damage:
    return lambda folder: [step(folder) for step in steps]


def header(data: bytes) -> Damage:
    return write(FILE, join_header(data, b""))


def resize(name: str, change: int) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + change)


def entry(tensor: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    """Change what the header says of a tensor."""

    def damage(folder: Path) -> None:
        entries, data = split_header(folder / FILE)
        entries[tensor] |= change(entries[tensor])
        (folder / FILE).write_bytes(join_header(entries, data))

    return damage


def moved(by: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda old: {"data_offsets": [offset + by for offset in old["data_offsets"]]}


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: edit_tensors(folder, change)


def indexed(name: Any) -> Damage:
    """Another file name for the second shard in the index."""

    def change(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        places |= {tensor: name for tensor, file in places.items() if file == SHARDS[1]}

    return lambda folder: edit_json(folder, change, INDEX)


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else in place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        make(folder / name)

    return damage


def renamed(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def setting(file: str, **changes: Any) -> Damage:
    """`section__key=value`; `...` removes the key."""

    def change(raw: dict[str, Any]) -> None:
        for path, value in changes.items():
            *sections, key = path.split("__")
            place = raw
            for section in sections:
                place = place[section]
            place.pop(key) if value is ... else place.update({key: value})

    return lambda folder: edit_json(folder, change, file)


def config(**changes: Any) -> Damage:
    return setting(CONFIG, **changes)


def without_special(name: str) -> Damage:
    def change(raw: dict[str, Any]) -> None:
        for token in raw["added_tokens"]:
            token["special"] = token["special"] and token["content"] != name

    return lambda folder: edit_json(folder, change, TOKENIZER)


DEEP = b"[" * 100_000
SAME_NAME = b"{" + b",".join(b'"t%d":0' % (i % 199_999) for i in range(200_000)) + b"}"


def link_out(path: Path) -> None:
    """A link to what lies outside the folder."""
    path.symlink_to(path.parent.parent / "outside")


# Weights: one file
case("truncated", "single", resize(FILE, -1000), f"{FILE}: truncated: the header promises")
case("trailing bytes", "single", resize(FILE, 7), f"{FILE}: 7 bytes after the last tensor")
case("no bytes at all", "single", write(FILE, b""), f"{FILE}: 0 bytes, too short for a safetensors file")
case("seven bytes", "single", write(FILE, b"\1" * 7), f"{FILE}: 7 bytes, too short for a safetensors file")
for length, size in ((2**63, 100), (1 << 20, 100), (100_000_001, 200_000_000)):  # the last a file of that size, sparse
    damage = in_turn(write(FILE, struct.pack("<Q", length)), resize(FILE, size - 8))
    said = f"{FILE}: header length {length} is more than {min(100_000_000, size - 8)} (file of {size} bytes)"
    case(f"header length {length}", "single", damage, said)
case("header cut", "single", header(b'{"a": '), f"{FILE}: header is not JSON")
case("header not UTF-8", "single", header(b"\xff\xfe{}"), f"{FILE}: header is not JSON: 'utf-8' codec")
case("header no object", "single", header(b"[]"), f"{FILE}: header is not a JSON object")
case("header nested", "single", header(DEEP), f"{FILE}: header is not JSON: nested too deeply")
case("header with one name twice", "single", header(SAME_NAME), f"{FILE}: header is not JSON: 't0' is given twice")
case("header of an endless number", "single", header(b'{"a": ' + b"9" * 5000 + b"}"), f"{FILE}: header is not JSON")
case("entry no object", "single", header(b'{"a": 3}'), f"{FILE}: a: entry lacks dtype, shape or data_offsets")
overlap = (
    f"{FILE}: {NORM}: data begins at byte ...(overlaps the tensor before it)",
    f"{FILE}: ...(leaves a gap before it)",
)
case("overlap", "single", entry(NORM, moved(-4)), *overlap)
case("gap", "single", entry(NORM, moved(4)), f"{FILE}: {NORM}: ...(leaves a gap before", f"{FILE}: ...(overlaps")
case(
    "offsets outside",
    "single",
    entry(NORM, moved(2**40)),
    *[f"{FILE}: {end}" for end in ("...(leaves a gap", "...(leaves a gap", "truncated")],
)
for name, change, reason in (
    ("unknown dtype", {"dtype": "F31"}, "unknown dtype 'F31'"),
    ("exponents as dtype", {"dtype": "F8_E8M0"}, "unknown dtype 'F8_E8M0'"),
    ("too small a range", {"shape": [65]}, "F32 [65] needs 260 bytes, data_offsets"),
    ("negative shape", {"shape": [-64]}, "shape [-64] is not a list of non-negative integers"),
    ("many dims", {"shape": [2] * 300_000}, "shape [2, 2, 2"),
    ("numbers of any length", {"shape": [10**4000] * 2}, "shape [1000000"),
    ("falling offsets", {"data_offsets": [8, 0]}, "data_offsets [8, 0] are not two rising integers"),
):
    case(name, "single", entry(NORM, lambda _, change=change: change), f"{FILE}: {NORM}: {reason}")
integers = tensors(lambda held: held.update({NORM: torch.zeros(64, dtype=torch.int32)}))
case("integers", "single", integers, f"{FILE}: {NORM}: dtype I32, expected one of F64, F32, F16, BF16")
case(
    "wrong shape",
    "single",
    tensors(lambda held: held.update({NORM: torch.zeros(63)})),
    f"{FILE}: {NORM}: shape [63], expected [64]",
)
turned = tensors(lambda held: held.update({QUERY: held[QUERY].T.contiguous()}))
case("transposed", "single", turned, f"{FILE}: {QUERY}: shape [64, 128], expected [128, 64]")
case("missing tensor", "single", tensors(lambda held: held.pop(EMBEDDING)), f"{EMBEDDING}: missing, expected [304, 64]")
case(
    "unknown tensor",
    "single",
    tensors(lambda held: held.update(extra=torch.zeros(2))),
    f"{FILE}: extra: unknown tensor F32 [2]",
)
fewer = tensors(lambda held: held.pop(f"{EXPERTS}.2.up_proj.weight"))
case("missing expert", "per_expert", fewer, f"{EXPERTS}.2.up_proj.weight: missing, expected [40, 64]")

# Which files
case("no weights", "single", gone(FILE), f"neither {FILE} nor {INDEX} is there")
case("pickled", "single", renamed(FILE, "pytorch_model.bin"), "pytorch_model.bin: pickled weights are refused")
pickled = [renamed(SHARDS[1], "two.bin"), indexed("two.bin")]
case("pickled shard", "sharded", in_turn(*pickled), f"{INDEX}: two.bin: not a safetensors file")
case("file and index", "single", write(INDEX, b"{}"), f"both {FILE} and {INDEX} are there")
case("a folder", "single", replaced(FILE, Path.mkdir), f"{FILE}: not a regular file")
case("a pipe", "single", replaced(FILE, os.mkfifo), f"{FILE}: not a regular file")
case("a link out", "single", replaced(FILE, link_out), f"{FILE}: a link that leaves the folder")
case("a link to nowhere", "single", replaced(FILE, lambda path: path.symlink_to("nothing")), f"neither {FILE} nor")
case("missing shard", "sharded", gone(SHARDS[1]), f"{INDEX}: {SHARDS[1]}: missing")
case("truncated shard", "sharded", resize(SHARDS[2], -1), f"{SHARDS[2]}: truncated: the header promises")
case(
    "a shard linked from outside",
    "sharded",
    replaced(SHARDS[1], link_out),
    f"{INDEX}: {SHARDS[1]}: a link that leaves the folder",
)
loop = replaced(SHARDS[1], lambda path: path.symlink_to(path.name))
case("a loop of links", "sharded", loop, f"{INDEX}: {SHARDS[1]}: ")
for name in ("../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", "a\0b"):
    case(f"index with {name!r}", "sharded", indexed(name), f"{INDEX}: {name!r}: the path leaves the folder")
case(
    "index in no encoding",
    "sharded",
    indexed("\ud800.safetensors"),
    f"{INDEX}: \\ud800.safetensors: cannot be resolved",
)
case("index with a long name", "sharded", indexed("a" * 5000), f"{INDEX}: {'a' * 80}: cannot be resolved")
number = write(INDEX, b'{"weight_map": {"a": 3}}')
case("index with a number", "sharded", number, f"{INDEX}: a: file name 3 is not a string")
more = setting(INDEX, weight_map__extra=SHARDS[0])
case("index with one more", "sharded", more, f"{SHARDS[0]}: extra: in {INDEX}, not in the file")
case(
    "index with one less",
    "sharded",
    setting(INDEX, **{f"weight_map__{NORM}": ...}),
    f"{SHARDS[2]}: {NORM}: in the file, not in {INDEX}",
)
for data, reason in (
    (b"{", "not JSON"),
    (DEEP, "not JSON: nested too deeply"),
    (b"[]", "not a JSON object"),
    (b"{}", "weight_map is missing or empty"),
):
    case(f"index {data[:3]!r} {len(data)}", "sharded", write(INDEX, data), f"{INDEX}: {reason}")

# config.json
for data, reason in (
    (b"{", "not JSON"),
    (b"\xff{}", "not JSON: 'utf-8' codec"),
    (DEEP, "not JSON: nested too deeply"),
    (b'{"a": 1, "a": 2}', "not JSON: 'a' is given twice"),
    (b"[1]", "not a JSON object"),
):
    case(f"config {data[:3]!r} {len(data)}", "single", write(CONFIG, data), f"{CONFIG}: {reason}")
case("no config", "single", gone(CONFIG), f"{CONFIG}: missing")
case("config linked from outside", "single", replaced(CONFIG, link_out), f"{CONFIG}: a link that leaves the folder")
case("config of 40 MB", "single", resize(CONFIG, 40_000_000), f"{CONFIG}: larger than 32000000 bytes")
known = "is not one of Qwen3VLMoeForConditionalGeneration, Qwen3VLForConditionalGeneration"
for change, reason in (
    ({"architectures": ["LlamaForCausalLM"]}, f"architectures: 'LlamaForCausalLM' {known}"),
    ({"architectures": [["a"]]}, f"architectures: ['a'] {known}"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: remote code is refused"),
    ({"dtype": "float64"}, "dtype 'float64' is not one of float32, bfloat16, float16"),
    ({"text_config__head_dim": ...}, "text_config.head_dim is missing"),
    ({"text_config__hidden_size": -1}, "text_config.hidden_size must be a non-negative int, got -1"),
    ({"text_config__hidden_size": 10**30}, "text_config.hidden_size must be a non-negative int, got 1000"),
    ({"text_config__hidden_size": "64"}, "text_config.hidden_size must be a non-negative int, got '64'"),
    ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers must be in 1..1024, got 1000000000"),
    ({"text_config__num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"text_config__num_experts_per_tok": 9}, "num_experts_per_tok 9 is not in 1..3"),
    ({"text_config__rms_norm_eps": float("nan")}, "text_config.rms_norm_eps must be a non-negative float, got nan"),
    ({"text_config__rope_theta": float("inf")}, "text_config.rope_theta must be a non-negative float, got inf"),
    ({"text_config__rope_scaling__mrope_section": [5, 5, 5]}, "mrope_section [5, 5, 5] adds up to 15, not to head_dim"),
    ({"text_config__rope_scaling__mrope_section": [2, 7, 7]}, "mrope_section [2, 7, 7] does not fit head_dim / 2 = 16"),
    ({"vision_config__num_heads": 5}, "vision head size 48/5 is not a multiple of 4"),
    ({"vision_config__num_position_embeddings": 63}, "num_position_embeddings 63 is not a square"),
    ({"vision_config__out_hidden_size": 65}, "vision out_hidden_size 65 differs from text hidden_size 64"),
    ({"vision_config__deepstack_visual_indexes": [0, 2]}, "deepstack_visual_indexes [0, 2] must rise within 0..1"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ({"text_config__rope_scaling__rope_theta": 10000.0}, "text_config.rope_scaling: two of rope_theta: 10000.0, 500"),
    ({"image_token_id": 304}, "vision token ids [304, 291, 287, 288] must differ and lie within the vocabulary of 304"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method 'awq' is not supported"),
    (
        {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
        "quantization_config.fmt 'e5m2' is not supported",
    ),
):
    case(f"config with {change}", "single", config(**change), f"{CONFIG}: {reason}")
wide = {f"text_config__{size}": 2**24 for size in ("num_experts", "moe_intermediate_size")}
impossible = config(**wide, text_config__hidden_size=2**16, vision_config__out_hidden_size=2**16)
case("sizes that no tensor can have", "single", impossible, f"{CONFIG}: impossible sizes")
crowd = f"{TEXT}.layers.{{}}.mlp.experts: the files hold ... tensors, expected one or more for each of 16777216 experts"
gate = f"{FILE}: {TEXT}.layers.{{}}.mlp.gate.weight: shape [3, 64], expected [16777216, 64]"
crowds = [line.format(layer) for layer in (0, 1) for line in (crowd, gate)]
case("experts without end", "per_expert", config(text_config__num_experts=2**24), *crowds)
stray = [f"{TEXT}.layers.{layer}.mlp.experts.0.stray.weight" for layer in range(40)]
empty = '"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
strays = header(("{" + ",".join(empty % name for name in [*stray, *map(str, range(20_000))]) + "}").encode())
many = in_turn(strays, config(text_config__num_experts=20_000, text_config__num_hidden_layers=40))
case("one tensor of many experts in many layers", "per_expert", many, "and 20,...", *["..."] * 100)
smaller = config(text_config__vocab_size=300)
case(
    "another vocabulary",
    "single",
    smaller,
    f"{FILE}: {EMBEDDING}: shape [304, 64], expected [300, 64]",
    f"{FILE}: lm_head.weight: shape [304, 64], expected [300, 64]",
)

# float8
scale = f"{QUERY}_scale_inv"
case(
    "no scales",
    "float8",
    tensors(lambda held: held.pop(scale)),
    f"{FILE}: {QUERY}: dtype F8_E4M3, but there is no {scale}",
)
short = tensors(lambda held: held.update({scale: held[scale][1:]}))
case(
    "too few scales",
    "float8",
    short,
    f"{FILE}: {scale}: shape [7, 3], expected [8, 3] for [128, 64] in blocks of [16, 24]",
)
flat = tensors(lambda held: held.update({scale: held[scale].half()}))
case("scales in float16", "float8", flat, f"{FILE}: {scale}: dtype F16, expected one of BF16, F32")
orphan = tensors(lambda held: held.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}))
case(
    "scales of plain weights",
    "float8",
    orphan,
    f"{FILE}: lm_head.weight: dtype F32 with scales beside it, expected F8_E4M3",
)
lone = tensors(lambda held: held.update({"gone.weight_scale_inv": torch.ones(1, 1)}))
case("scales of nothing", "float8", lone, f"{FILE}: gone.weight_scale_inv: scales without their tensor F32 [1, 1]")
blocks = config(quantization_config__weight_block_size=[128, 128])
case("another block", "float8", blocks, *[f"{FILE}: ..._scale_inv: shape ...in blocks of ["] * 12)

# Small files
case("no tokenizer", "single", gone(TOKENIZER), f"{TOKENIZER} is missing")
case("tokenizer cut", "single", resize(TOKENIZER, -100), f"{TOKENIZER} cannot be read")
case(
    "no <|image_pad|>", "single", without_special("<|image_pad|>"), f"{TOKENIZER}: <|image_pad|> is not a special token"
)
swapped = config(image_token_id=291, video_token_id=290)
case("other ids", "single", swapped, *[f"{TOKENIZER}: <|{kind}_pad|> has id" for kind in ("image", "video")])
case(
    "tokenizer linked from outside",
    "single",
    replaced(TOKENIZER, link_out),
    f"{TOKENIZER}: a link that leaves the folder",
)
case("no pixel settings", "single", gone(PIXELS), "...preprocessor_config.json")
case("pixel settings cut", "single", resize(PIXELS, -5), f"{PIXELS}: not JSON")
case("pixel settings nested", "single", write(PIXELS, DEEP), f"{PIXELS}: not JSON")
case("other patches", "single", setting(PIXELS, patch_size=14), f"{PIXELS}: patch_size is 14, config.json says 16")
case("means of NaN", "single", setting(PIXELS, image_mean=[float("nan")] * 3), f"{PIXELS}: ...")
case("sampling cut", "single", resize(SAMPLING, -5), f"{SAMPLING}: ")
case("sampling nested", "single", write(SAMPLING, DEEP), f"{SAMPLING}: nested too deeply")
case("sampling no object", "single", write(SAMPLING, b"[]"), f"{SAMPLING}: ")
case("end tokens without end", "single", setting(SAMPLING, eos_token_id=float("inf")), f"{SAMPLING}: ")
end = f"{SAMPLING}: eos_token_id {{}} is not in the vocabulary of 304"
case("end tokens that are none", "single", setting(SAMPLING, eos_token_id=[3, -1, 304]), *map(end.format, (-1, 304)))
case(
    "hotter than allowed",
    "single",
    setting(SAMPLING, temperature=1e6, do_sample=True),
    f"{SAMPLING}: temperature must be",
)
case(
    "template with an open brace",
    "single",
    write("chat_template.jinja", b"{% if %}"),
    "the chat template does not compile",
)
case(
    "template nested",
    "single",
    write("chat_template.jinja", b"{{" + b"(" * 50_000),
    "the chat template does not compile",
)
