"""How long a step and a first token take, as sums of terms: so many of something, each at so many seconds.

What is done at the same time by ranks that have a unit each counts once, for the rank with the most; where ranks share
units it counts as an even share of the sum (`Units.spread`). Bytes and operations of a step are added, not overlapped:
that is at most twice the larger of the two, and linear in the machine's figures, so that measurements can be fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qwen3vl_disagg.core.settings import DEFAULT_ENGINE, Dispatch, EngineSettings
from qwen3vl_disagg.parallel.sizes import SizedModel, padded_rows
from qwen3vl_disagg.plan.hardware import Cost, Hardware, Units


@dataclass(frozen=True)
class Term:
    """`amount` of `cost`: `what` it is for, `formula` where the amount comes from."""

    what: str
    formula: str
    amount: float
    cost: Cost

    def seconds(self, costs: dict[Cost, float]) -> float:
        return self.amount * costs[self.cost]


def total_seconds(terms: Iterable[Term], costs: dict[Cost, float]) -> float:
    return sum(term.seconds(costs) for term in terms)


def amounts(terms: Iterable[Term]) -> dict[Cost, float]:
    """How many of each cost."""
    found: dict[Cost, float] = {}
    for term in terms:
        found[term.cost] = found.get(term.cost, 0.0) + term.amount
    return found


@dataclass(frozen=True)
class Place:
    """A split on a machine."""

    model: SizedModel
    hardware: Hardware
    num_encode: int
    num_language: int
    dispatch: Dispatch = "gather"
    settings: EngineSettings = DEFAULT_ENGINE

    @property
    def units(self) -> Units:
        return Units.of(self.hardware, self.num_encode + self.num_language)

    @property
    def num_hosts(self) -> int:
        """Hosts that the language ranks are on."""
        per_host = self.hardware.units_per_host
        return 1 if per_host is None else -(-self.num_language // per_host)

    @property
    def is_lockstep(self) -> bool:
        """Experts are spread over several ranks, so these step together."""
        return self.num_language > 1 and self.model.moe_layers > 0


@dataclass(frozen=True)
class Rank:
    """What one language rank has in a step."""

    tokens: int = 0
    requests: int = 0
    """Whose logits are wanted."""
    pairs: float = 0.0
    """Its tokens, times what each looks back at."""
    kv_tokens: float = 0.0
    """Tokens whose keys and values are read."""

    @classmethod
    def decode(cls, requests: int, context: float) -> Rank:
        return cls(requests, requests, requests * context, requests * context)

    @classmethod
    def chunk(cls, start: int, tokens: int) -> Rank:
        """A piece of one prompt."""
        return cls(tokens, 1, tokens * start + tokens * (tokens + 1) / 2, start + tokens)


def step_terms(place: Place, ranks: Sequence[Rank]) -> list[Term]:
    """One step of the language ranks, all that have tokens at once."""
    model, units = place.model, place.units
    text = model.config.text
    busy = [rank for rank in ranks if rank.tokens]
    tokens = sum(rank.tokens for rank in busy)
    alone = units.spread([1.0] * len(busy))
    weights = units.read([model.step_weight_bytes(rank.tokens) for rank in busy])
    kv = units.read([rank.kv_tokens * model.kv_token_bytes() for rank in busy])
    flop = units.compute([model.step_flop(rank.tokens, rank.requests, rank.pairs) for rank in busy])
    requests = units.spread([float(rank.requests) for rank in busy])
    terms = [
        Term("step", "ranks with tokens / units", alone, "step"),
        Term("layers", "layers x ranks with tokens / units", text.num_hidden_layers * alone, "layer"),
        Term("requests in it", "of the fullest rank", requests, "request"),
        Term("weights beside experts", "attention + dense MLPs + routers + norms + head", weights, "byte"),
        Term("keys and values", "context x 2 x layers x kv heads x head size", kv, "byte"),
        Term("operations of them", "2 x weights x tokens + 4 x layers x heads x head size x pairs", flop, "flop"),
    ]
    return terms + _expert_terms(place, tokens, max(rank.tokens for rank in busy))


def _expert_terms(place: Place, tokens: int, longest: int) -> list[Term]:
    """The experts' part of a step. Where they are spread, all ranks take part, tokens or not."""
    model, units = place.model, place.units
    if not model.moe_layers:
        return []
    experts = model.num_experts_of(place.num_language)
    touched = units.read([model.experts_bytes(model.touched_experts(count, tokens)) for count in experts])
    flop = units.compute([model.experts_flop(count, tokens) for count in experts])
    terms = [
        Term("experts", "layers x E_l (1 - (1 - K / E)^tokens) x 3 D F", touched, "byte"),
        Term("operations of experts", "2 x layers x tokens x K x E_l / E x 3 D F", flop, "flop"),
    ]
    return terms + (_wire_terms(place, longest) if place.is_lockstep else [])


def _wire_terms(place: Place, longest: int) -> list[Term]:
    """Exchanges between the language ranks: two in a MoE layer (three with counts), two messages to agree on a step."""
    model, num_ranks, num_hosts = place.model, place.num_language, place.num_hosts
    together = place.units.spread([1.0] * num_ranks)
    if place.dispatch == "gather":
        each, formula = 2, "(L - 1) x rows, padded, x (D + 2 K, and D back)"
        sent = float(model.gather_bytes(num_ranks, padded_rows(longest)))
    else:
        formula = "rows x other ranks with one of their experts x (D + 2 K, and D back)"
        each, sent = 3, model.all_to_all_bytes(num_ranks, longest)
    exchanges = each * model.moe_layers * together
    near, far = num_ranks - num_hosts, num_hosts - 1
    return [
        Term("exchanges", f"({each} x MoE layers + 1) x ranks / units", exchanges + together, "exchange"),
        Term("hops in them", "exchanges x (L - hosts)", exchanges * near, "hop"),
        Term("hops between hosts", "exchanges x (hosts - 1)", exchanges * far, "host_hop"),
        Term("rows between ranks", f"MoE layers x {formula}", model.moe_layers * sent * together, "wire_byte"),
    ]


def share_out(requests: int, num_ranks: int) -> list[int]:
    """Requests of each language rank: as even as can be."""
    return [requests // num_ranks + (rank < requests % num_ranks) for rank in range(num_ranks)]


def chunks(tokens: int, most: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces in which a prompt is prefilled."""
    return [(start, min(most, tokens - start)) for start in range(0, tokens, most)]


def decode_terms(place: Place, concurrency: int, context: float) -> list[Term]:
    """One token for each of `concurrency` requests of `context` tokens."""
    return step_terms(place, [Rank.decode(count, context) for count in share_out(concurrency, place.num_language)])


def prefill_terms(place: Place, tokens: int, *, num_prompts: int = 1, most: int | None = None) -> list[Term]:
    """A prompt in pieces of at most `most` (default: of a step in which nothing is decoded), on each of `num_prompts`
    language ranks at the same time."""
    pieces = chunks(tokens, most or place.settings.max_prefill_tokens)
    first, *rest = [step_terms(place, [Rank.chunk(*piece)] * num_prompts) for piece in pieces]
    return [
        replace(term, amount=term.amount + sum(step[number].amount for step in rest))
        for number, term in enumerate(first)
    ]


def image_terms(place: Place, images: int, visual_tokens: int) -> list[Term]:
    """From the bytes of a request's images to their rows on a language rank; they spread over the encode ranks."""
    model, units = place.model, place.units
    each = [float(count) for count in share_out(images, place.num_encode)]
    rows = units.spread([count * visual_tokens for count in each])
    flop = units.compute([count * model.tower_flop(visual_tokens) for count in each])
    num_bytes = model.item_bytes(visual_tokens)
    return [
        Term("images' headers and bytes", "images", images, "item"),
        Term("decode, resize, cut up", "visual tokens of the fullest encode rank", rows, "preprocess_row"),
        Term("images in the vision tower", "of the fullest encode rank", units.spread(each), "tower"),
        Term("operations of the tower", "2 x weights x patches + 4 x blocks x width x patches^2", flop, "tower_flop"),
        Term("transfers", "images", images, "link"),
        Term("rows to the language rank", "rows x (1 + n) x D x itemsize", images * num_bytes, "link_byte"),
    ]


def first_token_terms(place: Place, images: int, visual_tokens: int, text_tokens: int) -> dict[str, list[Term]]:
    """Stages of one request that has the system to itself, one behind another."""
    stages = {"request": [Term("HTTP, prompt, routing", "requests", 1.0, "http")]}
    if images:
        stages["images"] = image_terms(place, images, visual_tokens)
    stages["prefill"] = prefill_terms(place, text_tokens + images * visual_tokens)
    return stages
