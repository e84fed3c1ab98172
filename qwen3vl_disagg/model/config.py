"""Model configuration, read from a checkpoint's `config.json` in either of its two spellings.

Nothing that decides a tensor's shape or the rotary angles has a default: an absent key is an error, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.json_text import shown

ARCHITECTURES = ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLForConditionalGeneration")
MAX_LAYERS = 1024
MAX_SIZE = 2**24
"""Bounds on counts and sizes, so that a wrong config is refused instead of built."""
SMALLEST_EPS = 2.0**-126
"""The smallest normal number of float32, in which norms are taken: below it a row of zeros could become 0 / 0."""


def rope_entries(text: Mapping[str, Any]) -> Any:
    """Of a parsed `text_config`, the entry with the rotary settings: `rope_parameters` where it says anything."""
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def rope_theta(text: Mapping[str, Any]) -> object:
    """Of a parsed `text_config`, the base of the rotary angles, beside those settings or among them, or None."""
    beside, among = text.get("rope_theta"), rope_entries(text)
    return among.get("rope_theta") if beside is None and isinstance(among, Mapping) else beside


class ConfigError(ValueError):
    """`problems` lists everything that is wrong with a config."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("config.json: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Rotary angles for a context longer than the one that was trained (YaRN, arXiv 2309.00071).

    Frequencies that turn at least `beta_fast` times within `original_max_position_embeddings` stay, those that turn at
    most `beta_slow` times are divided by `factor`, between them it is mixed. `truncate`: the bounds are whole indexes.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """On cos and sin, so that its square is on the scores."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Decoder. `num_experts == 0` means a dense model (`intermediate_size` wide MLPs everywhere)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    yarn: YarnScaling | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` (from 0) has experts."""
        sparse = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and layer not in self.mlp_only_layers and sparse


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision tower. One DeepStack level per entry of `deepstack_visual_indexes` (tower blocks, from 0)."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels * frames * height * width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model: text, vision and the token ids that tie them."""

    architecture: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    dtype: str = "bfloat16"

    @property
    def num_deepstack_levels(self) -> int:
        return len(self.vision.deepstack_visual_indexes)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed `config.json`. Raises ConfigError naming every absent or impossible entry at once."""
        reader = _Reader(raw)
        config = reader.model()
        problems = reader.problems or check_config(config)
        if problems:
            raise ConfigError(problems)
        return config


class _Reader:
    """Collects problems while reading, so that all of them are reported together."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def number(self, source: Mapping[str, Any], where: str, *names: str, kind: type = int) -> Any:
        for name in names:
            value = source.get(name)
            if value is None:
                continue
            good = (int,) if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, good) or not 0 <= value < 2**63:
                self.problems.append(f"{where}{name} must be a non-negative {kind.__name__}, got {shown(value)}")
                return kind(0)
            return kind(value)
        self.problems.append(f"{where}{' or '.join(names)} is missing")
        return kind(0)

    def integers(self, source: Mapping[str, Any], where: str, name: str, default: object = None) -> tuple[int, ...]:
        value = source.get(name, default)
        if not isinstance(value, (list, tuple)) or not all(type(v) is int for v in value):
            self.problems.append(f"{where}{name} must be a list of integers, got {shown(value)}")
            return ()
        return tuple(value)

    def section(self, name: str) -> Mapping[str, Any]:
        value = self.raw.get(name)
        if not isinstance(value, Mapping):
            self.problems.append(f"{name} is missing")
            return {}
        return value

    def model(self) -> ModelConfig:
        architectures = self.raw.get("architectures") or []
        architecture = architectures[0] if isinstance(architectures, list) and architectures else None
        if architecture not in ARCHITECTURES:
            self.problems.append(f"architectures: {shown(architecture)} is not one of {', '.join(ARCHITECTURES)}")
            architecture = ARCHITECTURES[0]
        if self.raw.get("auto_map"):
            self.problems.append("auto_map: remote code is refused")
        token_ids = {
            name: self.number(self.raw, "", name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        }
        is_tied = self.raw.get("tie_word_embeddings")
        if not isinstance(is_tied, bool | None):
            self.problems.append(f"tie_word_embeddings must be true or false, got {shown(is_tied)}")
        text = self.section("text_config")
        dtype = self.raw.get("dtype") or self.raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
        return ModelConfig(
            architecture=architecture,
            text=self.text(text, is_moe="Moe" in architecture),
            vision=self.vision(self.section("vision_config")),
            tie_word_embeddings=bool(is_tied),
            dtype=str(dtype or "bfloat16"),
            **token_ids,
        )

    def text(self, raw: Mapping[str, Any], *, is_moe: bool) -> TextConfig:
        where = "text_config."
        rope = rope_entries(raw)
        if not isinstance(rope, Mapping):
            self.problems.append(f"{where}rope_parameters must be an object, got {shown(rope)}")
            rope = {}
        rope_type = self.rope_type(rope)
        if rope_type not in ("default", "mrope", "yarn"):
            self.problems.append(f"{where}rope type {shown(rope_type)} is not supported (only 'default' and 'yarn')")
        for name in ("rope_parameters", "rope_scaling"):
            stray, other = self.raw.get(name), raw.get(name)
            if isinstance(stray, Mapping) and self.rope_type(stray) not in ("default", "mrope", rope_type):
                self.problems.append(f"{name}: rope type {shown(self.rope_type(stray))} belongs into text_config")
            if not isinstance(other, Mapping) or not other:
                continue
            if self.rope_type(other) != rope_type:
                types = f"{shown(self.rope_type(other))} there, {shown(rope_type)} in rope_parameters"
                self.problems.append(f"{where}{name}: two rope types: {types}")
            if (theta := other.get("rope_theta")) not in (None, rope_theta(raw)):
                self.problems.append(f"{where}{name}: two of rope_theta: {shown(theta)}, {shown(rope_theta(raw))}")
        if rope.get("mrope_interleaved") is False:
            self.problems.append(f"{where}mrope_interleaved must be true")
        if raw.get("norm_topk_prob") is False:
            self.problems.append(f"{where}norm_topk_prob=false is not supported")
        if raw.get("attention_bias"):
            self.problems.append(f"{where}attention_bias=true is not supported")
        if raw.get("hidden_act", "silu") != "silu":
            self.problems.append(f"{where}hidden_act must be 'silu', got {shown(raw.get('hidden_act'))}")
        section = self.integers(rope, where, "mrope_section")
        if len(section) != 3:
            self.problems.append(f"{where}mrope_section must have 3 entries, got {shown(list(section))}")
            section = (0, 0, 0)

        def number(*names: str, kind: type = int) -> Any:
            return self.number(raw, where, *names, kind=kind)

        experts = {}
        if is_moe:
            experts = {
                "num_experts": number("num_experts", "num_local_experts"),
                "num_experts_per_tok": number("num_experts_per_tok"),
                "moe_intermediate_size": number("moe_intermediate_size"),
                "mlp_only_layers": self.integers(raw, where, "mlp_only_layers", []),
                "decoder_sparse_step": raw.get("decoder_sparse_step", 1),
            }
        return TextConfig(
            vocab_size=number("vocab_size"),
            hidden_size=number("hidden_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=number("num_attention_heads"),
            num_key_value_heads=number("num_key_value_heads"),
            head_dim=number("head_dim"),
            intermediate_size=number("intermediate_size"),
            rms_norm_eps=number("rms_norm_eps", kind=float),
            rope_theta=self.number({"rope_theta": rope_theta(raw)}, where, "rope_theta", kind=float),
            mrope_section=(section[0], section[1], section[2]),
            max_position_embeddings=number("max_position_embeddings"),
            yarn=self.yarn({**rope, **raw}, where) if rope_type == "yarn" else None,
            **experts,
        )

    @staticmethod
    def rope_type(rope: Mapping[str, Any]) -> object:
        return rope.get("rope_type", rope.get("type", "default"))

    def yarn(self, rope: Mapping[str, Any], where: str) -> YarnScaling:
        """Entries beside `rope_type: yarn`. Those that decide how far have no default."""

        def optional(name: str, default: float) -> float:
            return self.number(rope, where, name, kind=float) if rope.get(name) else default

        factor = self.number(rope, where, "factor", kind=float)
        mscale, mscale_all_dim = optional("mscale", 0.0), optional("mscale_all_dim", 0.0)
        attention_factor = yarn_mscale(factor)
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        if rope.get("attention_factor") is not None:
            attention_factor = self.number(rope, where, "attention_factor", kind=float)
        truncate = rope.get("truncate", True)
        if not isinstance(truncate, bool):
            self.problems.append(f"{where}truncate must be true or false, got {shown(truncate)}")
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=self.number(rope, where, "original_max_position_embeddings"),
            attention_factor=attention_factor,
            beta_fast=optional("beta_fast", YarnScaling.beta_fast),
            beta_slow=optional("beta_slow", YarnScaling.beta_slow),
            truncate=bool(truncate),
        )

    def vision(self, raw: Mapping[str, Any]) -> VisionConfig:
        where = "vision_config."

        def number(name: str) -> Any:
            return self.number(raw, where, name)

        if raw.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            self.problems.append(f"{where}hidden_act must be 'gelu_pytorch_tanh', got {shown(raw.get('hidden_act'))}")
        rope, optional = rope_entries(raw), dict[str, Any]()
        if not isinstance(rope, Mapping):
            self.problems.append(f"{where}rope_parameters must be an object, got {shown(rope)}")
        elif self.rope_type(rope) not in ("default", "axial"):
            kind = shown(self.rope_type(rope))
            self.problems.append(f"{where}rope type {kind} is not supported (only 'default' and 'axial')")
        if (theta := rope_theta(raw)) is not None:
            optional["rope_theta"] = self.number({"rope_theta": theta}, where, "rope_theta", kind=float)
        hidden_size, num_heads, head_dim = number("hidden_size"), number("num_heads"), raw.get("head_dim")
        if head_dim is not None and head_dim != hidden_size / (num_heads or 1):
            self.problems.append(f"{where}head_dim {shown(head_dim)} is not hidden_size / num_heads")
        return VisionConfig(
            **optional,
            depth=number("depth"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            intermediate_size=number("intermediate_size"),
            out_hidden_size=number("out_hidden_size"),
            num_position_embeddings=number("num_position_embeddings"),
            deepstack_visual_indexes=self.integers(raw, where, "deepstack_visual_indexes"),
            in_channels=number("in_channels"),
            patch_size=number("patch_size"),
            temporal_patch_size=number("temporal_patch_size"),
            spatial_merge_size=number("spatial_merge_size"),
        )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much larger cos and sin become when the context grows by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_config(config: ModelConfig) -> list[str]:
    """What makes a config impossible, each with its formula. Empty when it is sound."""
    text, vision, problems = config.text, config.vision, []

    def need(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    sizes = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")}
    sizes |= {name: getattr(vision, name) for name in ("depth", "num_heads", "patch_size", "spatial_merge_size")}
    sizes |= {name: getattr(vision, name) for name in ("in_channels", "temporal_patch_size", "num_position_embeddings")}
    sizes |= {name: getattr(text, name) for name in ("num_attention_heads", "num_key_value_heads", "rope_theta")}
    sizes |= {"text intermediate_size": text.intermediate_size, "vision intermediate_size": vision.intermediate_size}
    sizes["vision hidden_size"] = vision.hidden_size
    sizes |= {"max_position_embeddings": text.max_position_embeddings, "vision rope_theta": vision.rope_theta}
    sizes["rms_norm_eps"] = text.rms_norm_eps
    largest = {"num_hidden_layers": MAX_LAYERS, "depth": MAX_LAYERS, "rope_theta": math.inf}
    largest |= {"vision rope_theta": math.inf, "max_position_embeddings": 2**31 - 1}
    # A theta below 1 makes frequencies that rise, beyond float32 where it is small enough.
    bounds = {name: (1, largest.get(name, MAX_SIZE)) for name in sizes} | {"rms_norm_eps": (SMALLEST_EPS, MAX_SIZE)}
    for name in ("num_experts", "moe_intermediate_size"):
        sizes[name], bounds[name] = getattr(text, name), (0, MAX_SIZE)
    for name, (low, high) in bounds.items():
        need(low <= sizes[name] <= high, f"{name} must be in {low}..{high}, got {sizes[name]}")
    if problems:
        return problems
    need(
        text.num_attention_heads % text.num_key_value_heads == 0,
        f"num_attention_heads {text.num_attention_heads} is not a multiple of num_key_value_heads "
        f"{text.num_key_value_heads}",
    )
    need(text.head_dim % 2 == 0, f"head_dim {text.head_dim} is odd")
    half, (_, height, width) = text.head_dim // 2, text.mrope_section
    need(
        3 * (height - 1) + 1 < half and 3 * (width - 1) + 2 < half,
        f"mrope_section {list(text.mrope_section)} does not fit head_dim / 2 = {half}",
    )
    need(
        sum(text.mrope_section) == half,
        f"mrope_section {list(text.mrope_section)} adds up to {sum(text.mrope_section)}, not to head_dim / 2 = {half}",
    )
    if (yarn := text.yarn) is not None:
        need(yarn.factor >= 1, f"yarn factor {yarn.factor} is less than 1")
        need(yarn.original_max_position_embeddings > 0, "yarn original_max_position_embeddings must be positive")
        need(yarn.attention_factor > 0, f"yarn attention_factor {yarn.attention_factor} is not positive")
        need(
            yarn.attention_factor <= MAX_SIZE,
            f"yarn attention_factor {yarn.attention_factor} is larger than {MAX_SIZE}: scores grow with its square",
        )
        need(
            yarn.beta_fast >= yarn.beta_slow,
            f"yarn beta_fast {yarn.beta_fast} is less than beta_slow {yarn.beta_slow}",
        )
        need(text.rope_theta > 1, f"yarn needs a rope_theta larger than 1, got {text.rope_theta}")
    if text.num_experts:
        need(
            0 < text.num_experts_per_tok <= text.num_experts,
            f"num_experts_per_tok {text.num_experts_per_tok} is not in 1..{text.num_experts}",
        )
        need(text.moe_intermediate_size > 0, "moe_intermediate_size must be positive")
    need(
        type(text.decoder_sparse_step) is int and text.decoder_sparse_step > 0,
        f"decoder_sparse_step must be a positive integer, got {shown(text.decoder_sparse_step)}",
    )
    token_ids = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    need(
        len(set(token_ids)) == 4 and max(token_ids) < text.vocab_size,
        f"vision token ids {token_ids} must differ and lie within the vocabulary of {text.vocab_size}",
    )
    need(
        vision.hidden_size % (4 * vision.num_heads) == 0,
        f"vision head size {vision.hidden_size}/{vision.num_heads} is not a multiple of 4",
    )
    need(vision.in_channels == 3, f"in_channels {vision.in_channels}: pictures have 3")
    side = round(vision.num_position_embeddings**0.5)
    need(
        side * side == vision.num_position_embeddings,
        f"num_position_embeddings {vision.num_position_embeddings} is not a square",
    )
    need(
        vision.out_hidden_size == text.hidden_size,
        f"vision out_hidden_size {vision.out_hidden_size} differs from text hidden_size {text.hidden_size}",
    )
    indexes = vision.deepstack_visual_indexes
    need(
        all(0 <= i < vision.depth for i in indexes) and list(indexes) == sorted(set(indexes)),
        f"deepstack_visual_indexes {shown(list(indexes))} must rise within 0..{vision.depth - 1}",
    )
    need(
        len(indexes) <= text.num_hidden_layers,
        f"{len(indexes)} DeepStack levels but only {text.num_hidden_layers} decoder layers",
    )
    return problems
