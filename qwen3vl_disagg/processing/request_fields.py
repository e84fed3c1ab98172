"""What becomes of each field of a request: one table for all places where a client may say something.

Names are those of OpenAI, vLLM, SGLang, llama.cpp, ollama, transformers and qwen-vl-utils. A field is built; or it
would change the answer and is refused by name, unless its value asks for nothing; or it cannot change an answer and is
ignored, like every name that is not here. Of what is said about media, the table has the bounds too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen3vl_disagg.core.errors import InputError, NotBuiltYet
from qwen3vl_disagg.core.readers import Flag, Number, OneOf, Reader
from qwen3vl_disagg.core.sampling_params import body_fields

Place = Literal[
    "request",
    "completion",
    "response",
    "messages",
    "embeddings",
    "rerank",
    "score",
    "message",
    "text part",
    "image part",
    "clip part",
    "mm_processor_kwargs",
    "images_kwargs",
    "videos_kwargs",
    "media_io_kwargs.image",
    "media_io_kwargs.video",
]


read_flag = Flag()
COUNT, FRAMES = Number(1, 2**31, is_whole=True), Number(2, 768, is_whole=True)
FPS, SECONDS = Number(0.01, 240), Number(0, 2**31)


def read_size(value: object, where: str) -> dict[str, int]:
    """`size_min` and `size_max`: pixels of an image, or of all frames of a clip together."""
    names = {
        "shortest_edge": "size_min",
        "min_pixels": "size_min",
        "longest_edge": "size_max",
        "max_pixels": "size_max",
    }
    found: dict[str, int] = {}
    for name, number in check_object(value, where).items():
        if name not in names:
            raise InputError("size takes shortest_edge and longest_edge", param=f"{where}.{name[:64]}")
        found[names[name]] = COUNT(number, f"{where}.{name}")
    return found


def read_rate(value: object, where: str) -> float:
    """Frames a second; qwen-vl-utils has a list with an entry for each clip, of which one is taken."""
    return FPS(value[0] if isinstance(value, list) and len(value) == 1 else value, where)


@dataclass(frozen=True)
class BuiltField:
    """`read`: None where the field is read by what it is for."""

    read: Reader | None = None


@dataclass(frozen=True)
class RefusedField:
    """A 400 that names the field, but for null and these values."""

    neutral: tuple[Any, ...] = ()


IGNORED: Literal["ignored"] = "ignored"
Treatment = BuiltField | RefusedField | Literal["ignored"]


def _built(names: str, read: Reader | None = None) -> dict[str, Treatment]:
    return dict.fromkeys(names.split(), BuiltField(read))


def _ignored(names: str) -> dict[str, Treatment]:
    return dict.fromkeys(names.split(), IGNORED)


def _refused(names: str, *neutral: Any) -> dict[str, Treatment]:
    return dict.fromkeys(names.split(), RefusedField(neutral))


_HARMLESS_IN_PARTS = _ignored(
    "alt annotations cache_control citations content_hash filename format id media_type"
    " mime_type name source_type title uuid"
)
_SHOWN_ELSEWHERE = _refused("images image_urls videos audio input_audio file files attachments", [], "")
"""What the model would have to see, where no media stand."""
_BOUNDS = _built("min_pixels max_pixels", COUNT)
_IMAGE_SIZE = {
    **_BOUNDS,
    **_built("resized_height resized_width", COUNT),
    **_built("detail", OneOf(("auto", "low", "high", "original"))),
}
_CLIP_SAMPLING = {
    **_built("fps", FPS),
    **_built("num_frames", FRAMES),
    **_built("min_frames max_frames", COUNT),
    **_built("do_sample_frames", read_flag),
}
_CLIP_REST = {
    **_built("nframes", FRAMES),
    **_built("total_pixels", COUNT),
    **_built("video_start video_end", SECONDS),
}
_FORM = _built(
    "response_format structured_outputs json_schema regex ebnf choice grammar format"
    " guided_json guided_regex guided_choice guided_grammar guided_json_object"
)
"""What the text must look like."""
_AS_IT_IS = _refused("do_resize do_rescale do_normalize do_convert_rgb", True) | _ignored("return_tensors use_fast")

CHAT: dict[str, Treatment] = {
    **_built("messages model stream stream_options tools tool_choice parallel_tool_calls"),
    **_built("return_token_ids cache_salt add_generation_prompt continue_final_message"),
    **_built("chat_template_kwargs enable_thinking think reasoning reasoning_effort"),
    **_built("mm_processor_kwargs media_io_kwargs"),
    **_IMAGE_SIZE,
    **_CLIP_SAMPLING,
    **_CLIP_REST,
    # Other ways to come to several answers, or to one.
    **_refused("best_of"),
    **_refused("n_cmpl num_beams num_return_sequences", 1),
    **_refused("use_beam_search early_stopping", False),
    **_refused("length_penalty", 1),
    **_refused("do_sample penalty_alpha guidance_scale negative_prompt"),
    **_FORM,
    **_refused("structural_tag stop_regex", "", {}),
    **_ignored("guided_decoding_backend"),
    **_refused("guided_whitespace_pattern grammar_triggers preserved_tokens", []),
    **_refused("grammar_lazy", False),
    **_refused("parse_tool_calls", True),
    **_refused("function_call", "none", "auto"),
    **_refused("functions documents", []),
    **_refused("verbosity", "medium"),
    **_refused("prediction web_search_options"),
    **_refused("modalities", ["text"]),
    # Which tokens may come.
    **_refused("logits_processors custom_logit_processor custom_params vllm_xargs", [], {}),
    **_refused("samplers sampler_seed"),
    **_refused("typical_p typical tfs_z dynatemp_exponent encoder_repetition_penalty", 1),
    **_refused("mirostat mirostat_mode dry_multiplier xtc_probability dynatemp_range top_a epsilon_cutoff", 0),
    **_refused("eta_cutoff smoothing_factor no_repeat_ngram_size min_keep min_length", 0),
    **_refused("top_n_sigma adaptive_target", -1, 0),
    **_refused("repeat_last_n", -1),
    **_refused("penalize_nl", True),
    **_refused("repetition_detection max_length t_max_predict_ms"),
    **_refused("watermark watermarking", False),
    **_refused("stop_sequences stop_strings stop_words banned_tokens suppress_tokens", []),
    **_refused("random_seed sampling_seed eos_token_id max_output_tokens"),
    # What the model is shown.
    **_SHOWN_ELSEWHERE,
    **_refused("image image_url image_data video video_url video_data audio_data file_ids", [], ""),
    **_refused("chat_template template system prompt suffix input input_ids prompt_embeds"),
    **_refused("system_prompt system_instruction instructions previous_response_id conversation"),
    **_refused("context session_params task truncate"),
    **_refused("vl_high_resolution_images safe_prompt enable_search", False),
    **_refused("truncate_prompt_tokens", -1),
    **_refused("add_special_tokens raw use_audio_in_video echo return_full_text", False),
    **_refused("max_dynamic_patch min_dynamic_patch"),
    **_refused("images_config options extra_body parameters sampling_params generation_config", {}),
    **_refused("lora lora_path lora_request adapter_id", [], ""),
    # How it thinks, and what is told of it.
    **_refused("thinking reasoning_budget reasoning_budget_tokens thinking_budget thinking_token_budget", -1),
    **_refused("max_thinking_tokens", -1),
    **_refused("include_reasoning separate_reasoning stream_reasoning", True),
    **_refused("reasoning_format", "auto", "deepseek"),
    **_refused("thinking_forced_open reasoning_in_content", False),
    # What stands in the answer.
    **_refused("n_probs", 0),
    **_refused("logprob_token_ids response_fields", []),
    **_refused("return_tokens_as_token_ids return_prompt_text return_prompt_token_ids return_tokens", False),
    **_refused("return_hidden_states return_routed_experts return_meta_info return_token_offsets", False),
    **_refused("return_cached_tokens_details post_sampling_probs _debug_render_only", False),
    **_ignored("user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention"),
    **_ignored("request_id rid session_id extra_key custom_labels priority spaces_between_special_tokens"),
    **_ignored("truncation_side return_mm_kwargs routed_experts_prompt_start routed_experts_start_len"),
    **_ignored("kv_transfer_params ec_transfer_params bootstrap_host bootstrap_port bootstrap_room"),
    **_ignored("routed_dp_rank data_parallel_rank disagg_prefill_dp_rank ngram_corpus_id stream_interval"),
    **_ignored("cache_prompt id_slot n_keep n_discard n_indent timings_per_token return_progress keep_alive"),
    **_ignored("dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold"),
    **_ignored("mirostat_tau mirostat_eta adaptive_decay backend_sampling details decoder_input_details"),
}
"""Of a chat request, beside the sampling options: whatever these have is built, so their rows may not be here too."""

FIELDS: dict[Place, dict[str, Treatment]] = {
    "request": CHAT | _built(" ".join(body_fields("chat"))),
    "message": {
        **_built("role content tool_calls tool_call_id reasoning_content reasoning"),
        **_SHOWN_ELSEWHERE,
        **_refused("image image_url video video_url", [], ""),
        **_refused("function_call"),
        **_refused("tools documents", []),
        **_refused("prefix partial", False),
        **_ignored("name refusal annotations cache_control id reasoning_details"),
    },
    "text part": {
        **_built("type text"),
        **_SHOWN_ELSEWHERE,
        **_refused("image image_url video video_url", [], ""),
        **_HARMLESS_IN_PARTS,
    },
    "image part": {
        **_built("type image_url image url base64 data"),
        **_IMAGE_SIZE,
        **_SHOWN_ELSEWHERE,
        **_refused("video video_url text", ""),
        **_refused("file_id source max_dynamic_patch min_dynamic_patch image_embeds"),
        **_refused("modalities", "image"),
        **_HARMLESS_IN_PARTS,
    },
    "clip part": {
        **_built("type video_url video url base64 data"),
        **_IMAGE_SIZE,
        **_CLIP_SAMPLING,
        **_CLIP_REST,
        **_built("sample_fps raw_fps", FPS),
        **_SHOWN_ELSEWHERE,
        **_refused("image image_url text", ""),
        **_refused("file_id source max_dynamic_patch min_dynamic_patch"),
        **_refused("modalities", "video"),
        **_HARMLESS_IN_PARTS,
    },
    "mm_processor_kwargs": {
        **_BOUNDS,
        **_built("size", read_size),
        **_built("images_kwargs videos_kwargs"),
        **_CLIP_SAMPLING,
        **_built("fps", read_rate),
        **_AS_IT_IS,
    },
    "images_kwargs": {**_BOUNDS, **_built("size", read_size), **_AS_IT_IS},
    "videos_kwargs": {**_built("size", read_size), **_CLIP_SAMPLING, **_built("fps", read_rate), **_AS_IT_IS},
    "media_io_kwargs.image": _refused("image_mode", "RGB"),
    "media_io_kwargs.video": _built("fps num_frames"),
}

_FOR_CHAT = RefusedField(([], {}, "", "none", "auto", {"type": "text"}))
FIELDS["completion"] = {
    **{
        name: _FOR_CHAT if isinstance(treatment, BuiltField) else treatment
        for name, treatment in FIELDS["request"].items()
    },
    **_refused("parallel_tool_calls add_generation_prompt", True),
    **_refused("continue_final_message do_sample_frames", False),
    **_refused("suffix", ""),
    **_ignored("enable_thinking think reasoning reasoning_effort add_special_tokens"),
    **_FORM,
    **_built("prompt echo model stream stream_options return_token_ids cache_salt"),
    **_built(" ".join(body_fields("completion"))),
}
"""What is built there for conversations and media, and for their answers, is refused here."""

FIELDS["response"] = {
    **FIELDS["request"],
    **_refused(" ".join(set(body_fields("chat")) - set(body_fields("response")))),
    **_refused("logprobs return_token_ids continue_final_message background", False),
    **_refused("best_of", 1),
    **_refused("messages context_management", []),
    **_refused("truncation", "disabled"),
    **_refused("response_format moderation"),
    **_ignored("max_tool_calls"),
    **_built("input instructions text include metadata"),
    **_built(" ".join(body_fields("response"))),
    **_refused("prompt_logprobs"),
    **_refused("n", 1),
}
"""A conversation in another form: what that spells otherwise is refused in the chat's spelling."""

FIELDS["messages"] = {
    **FIELDS["request"],
    **_refused(" ".join(set(body_fields("chat")) - set(body_fields("messages")))),
    **_refused("logprobs return_token_ids continue_final_message", False),
    **_refused("best_of", 1),
    **_refused("container mcp_servers context_management prefill", [], {}),
    **_refused("parallel_tool_calls", True),
    **_refused("response_format"),
    **_ignored("cache_control inference_geo speed diagnostics user_profile_id workspace_id anthropic_version"),
    **_built("messages system thinking output_config"),
    **_built(" ".join(body_fields("messages"))),
    **_refused("prompt_logprobs logprobs"),
    **_refused("n", 1),
}

_OF_PROMPTS = ("model", "cache_salt", "mm_processor_kwargs", *_IMAGE_SIZE, *_CLIP_SAMPLING, *_CLIP_REST)
_POOLED = {
    **{name: _FOR_CHAT if isinstance(row, BuiltField) else row for name, row in FIELDS["request"].items()},
    **{name: FIELDS["request"][name] for name in (*_OF_PROMPTS, "media_io_kwargs")},
    **_refused("stream return_token_ids continue_final_message", False),
    **_refused("add_generation_prompt normalize use_activation activation softmax", True),
    **_refused("n best_of", 1),
    **_refused("max_tokens_per_doc max_chunks_per_doc truncation"),
    **_ignored("add_special_tokens"),
    **_built("instruction"),
}
FIELDS["embeddings"] = {
    **_POOLED,
    **_built("input messages dimensions encoding_format"),
    **_built("add_generation_prompt continue_final_message chat_template_kwargs"),
    **_refused("embed_dtype", "float32"),
    **_refused("endianness", "native", "little"),
    **_refused("output_dimension output_dtype embedding_type embedding_types input_type prompt_name"),
    **_refused("late_chunking", False),
}
FIELDS["rerank"] = {
    **_POOLED,
    **_built("query documents top_n return_documents"),
    **_refused("rank_fields"),
    **_refused("raw_scores", False),
}
FIELDS["score"] = {
    **_POOLED,
    **_built("queries documents items text_1 text_2 data_1 data_2"),
    **_refused("top_n"),
}
"""What a prompt is made of; answers and their forms are refused."""

CLOSED: tuple[Place, ...] = (
    "mm_processor_kwargs",
    "images_kwargs",
    "videos_kwargs",
    "media_io_kwargs.image",
    "media_io_kwargs.video",
)
"""Here a name that is not in the table is refused: all that these hold is meant for the prompt."""

_ABOUT_MEDIA = re.compile(
    "pixel|frame|fps|size|height|width|resol|resiz|crop|detail|quality|sampl|start|end|duration|time|token"
)
"""In a part of media, a name that is not in the table but has one of these is taken for one that changes the answer."""
_MEDIA_PARTS: frozenset[Place] = frozenset({"image part", "clip part"})


def no_choice(given: Mapping[str, Any]) -> Collection[str]:
    """`best_of` where it is `n`: there is nothing to choose."""
    return ("best_of",) if is_one_of(given.get("best_of"), (given.get("n") or 1,)) else ()


def check_fields(given: Mapping[str, Any], place: Place, *, where: str = "", besides: Collection[str] = ()) -> None:
    """NotBuiltYet naming the first field that would change the answer and is not built.

    `where`: how its name begins in `param`. `besides`: more names that are fine here.
    """
    table = FIELDS[place]
    for name, value in given.items():
        treatment = table.get(name)
        if name in besides or isinstance(treatment, BuiltField) or treatment == IGNORED or value is None:
            continue
        if isinstance(treatment, RefusedField) and is_one_of(value, treatment.neutral):
            continue
        is_strange = place in CLOSED or (place in _MEDIA_PARTS and _ABOUT_MEDIA.search(name.lower()) is not None)
        if treatment is not None or is_strange:
            param = f"{where}.{name[:64]}" if where else name[:64]
            raise NotBuiltYet(param, param=param)


def read_fields(given: Mapping[str, Any], place: Place, where: str = "") -> dict[str, Any]:
    """What the fields with a reader mean; null says nothing. InputError naming the field, below `where`."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        treatment = FIELDS[place].get(name)
        if value is not None and isinstance(treatment, BuiltField) and treatment.read is not None:
            found[name] = treatment.read(value, f"{where}.{name}" if where else name)
    return found


def is_one_of(value: Any, others: Iterable[Any]) -> bool:
    """Whether it equals one of them; a truth value is no number."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in others)


def check_object(value: Any, where: str) -> dict[str, Any]:
    """An object, or nothing for null. InputError otherwise."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object", param=where)
    return value
