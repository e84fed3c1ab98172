"""What is trained on is what serving feeds: the same ids, positions and pixels."""

import io
import json
import random

import pytest
import torch

from qwen3vl_disagg.assets.drawing import draw_scene
from qwen3vl_disagg.assets.scenes import (
    COLOURS,
    KINDS,
    PLACES,
    PLURALS,
    Decks,
    build_question,
    generate,
    questions,
    random_scene,
)
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.processing.answer_calls import read_calls
from qwen3vl_disagg.processing.positions import mrope_positions
from qwen3vl_disagg.processing.processor import Processor
from qwen3vl_disagg.processing.tools import parse_tools
from tools.training.evaluate import tool_questions
from tools.training.folder import read_config, write_settings
from tools.training.forms import (
    BETWEEN,
    FORMS,
    IMAGE_FIRST,
    TASKS,
    TEXT_FIRST,
    TOOL_FORM,
    Reply,
    in_json,
    json_answer,
    offer_tools,
    plain,
    read_call,
)
from tools.training.lessons import (
    SEARCHING,
    SEEING,
    GroupedBatch,
    Lessons,
    Prompts,
    Sequences,
    decode,
    lesson_loss,
    tool_conversation,
)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_settings(folder)
    return folder


@pytest.mark.parametrize("order", [IMAGE_FIRST, TEXT_FIRST, BETWEEN])
def test_prompts_and_pixels_equal_the_processor(folder, order):
    config = read_config(folder)
    processor, prompts = Processor.from_folder(folder, config), Prompts(folder)
    rng = random.Random(4)
    for sample, question in zip(generate(9, 12), questions(9, 12), strict=True):
        if order == BETWEEN and len(sample.images) == 1:
            continue
        files = [png(image) for image in sample.images]
        parts = [{"type": "image", "image": data} for data in files]
        pictures = prompts.pictures(sample.images)
        for conversation in (plain(question, order), in_json(question, order, rng)):
            prompt = processor.prepare(conversation.messages(parts), allow_paths=True)
            encoded = prompts.encode(conversation, pictures.grids)
            assert encoded.ids[: encoded.last] == prompt.token_ids
            placed = [(i.grid, i.offset, i.num_rows) for i in encoded.items]
            assert placed == [(i.grid, i.offset, i.num_rows) for i in prompt.items]
            assert all(h * w in (64, 80) for _, h, w in pictures.grids)
            assert torch.equal(torch.cat([processor.image.pixels(data)[0] for data in files]), pictures.pixels)
            ids, items = encoded.ids[: encoded.last], encoded.items
            sequences = prompts.pack([(ids, items)], [list(range(len(items)))], pictures.grids)
            merge = config.vision.spatial_merge_size
            assert torch.equal(sequences.positions, mrope_positions(len(ids), prompt.items, merge)[0])
            said = prompts.tokenizer.decode([*encoded.ids[encoded.last :], encoded.targets[-1]])
            assert said == conversation.exchanges[-1].answer.text
        content = plain(question, order).messages(parts)[0]["content"]
        texts = [part.get("text") for part in content]
        assert texts.index(sample.question) == {IMAGE_FIRST: len(files), TEXT_FIRST: 0, BETWEEN: 1}[order]


def test_tool_prompts_equal_the_processor(folder):
    config = read_config(folder)
    processor, prompts = Processor.from_folder(folder, config), Prompts(folder)
    lengths = set()
    for part, asked in tool_questions(5, 27):
        conversation = asked.conversation
        tools = list(conversation.tools)
        messages = conversation.messages([{"type": "image", "image": png(asked.images[0])}])
        prompt = processor.prepare(messages, tools=parse_tools(tools), allow_paths=True)
        encoded = prompts.encode(conversation, prompts.pictures(asked.images).grids)
        assert encoded.ids[: encoded.last] == prompt.token_ids, part
        assert [item.offset for item in encoded.items] == [item.offset for item in prompt.items]
        lengths.add(len(messages))
        call = read_call(asked.expected)
        if call is not None:
            [read] = read_calls(asked.expected[len("<tool_call>") : -len("</tool_call>")])
            assert (read.name, json.loads(read.arguments)) == call
            [tool] = [tool["function"] for tool in tools if tool["function"]["name"] == call[0]]
            assert list(call[1]) == tool["parameters"]["required"]
            kinds = {"string": str, "integer": int}
            assert all(isinstance(call[1][n], kinds[s["type"]]) for n, s in tool["parameters"]["properties"].items())
        else:
            assert part in ("answer beside tools", "after a result")
    assert lengths >= {1, 3, 5}


def test_calls_say_what_the_scene_has(folder):
    """The call's arguments, read from the text of the demand and the board alone."""
    seen = set()
    rng = random.Random(8)
    for _ in range(200):
        scene = random_scene(rng)
        conversation = tool_conversation(scene, rng)
        names = {tool["function"]["name"] for tool in conversation.tools}
        for exchange in conversation.exchanges:
            call = read_call(exchange.answer.text)
            if call is None:
                continue
            assert call[0] in names
            words = exchange.asked.rstrip(".").split()
            seen.add(words[0])
            values = list(call[1].values())
            if words[0] in ("Point", "Show"):
                assert [str(thing) for place, thing in zip(PLACES, scene, strict=True) if [place] == values] == [
                    " ".join(words[-2:])
                ]
            elif words[0] in ("Pick", "Take"):
                thing = scene[PLACES.index(exchange.asked.rstrip(".").partition("at the ")[2])]
                assert (call[1]["colour"], call[1]["shape"]) == thing
            else:
                noun = next(w for w in words if w in COLOURS or w in PLURALS.values())
                assert values == [sum(t is not None and noun in (t.colour, PLURALS[t.shape]) for t in scene)]
    assert seen == {"Point", "Show", "Pick", "Take", "Report"}


def test_each_tool_is_wanted_and_offered_beside_others():
    rng = random.Random(2)
    offered = [tuple(tool["function"]["name"] for tool in offer_tools("point", rng).values()) for _ in range(200)]
    assert {len(names) for names in offered} == {1, 2}
    assert all("point_at" in names for names in offered)
    assert {("point_at", "pick_up"), ("pick_up", "point_at"), ("report_number", "point_at")} < set(offered)
    wanted = {}
    for _ in range(300):
        conversation = tool_conversation(random_scene(rng), rng)
        for exchange in conversation.exchanges:
            call = read_call(exchange.answer.text)
            if call is not None:
                wanted[call[0]] = wanted.get(call[0], 0) + 1
    assert set(wanted) == {task.name for task in TASKS.values()}
    assert min(wanted.values()) > 100


@pytest.mark.parametrize("kind", list(KINDS))
def test_json_answers_are_what_json_dumps_writes(kind):
    rng = random.Random(6)
    decks = Decks(rng)
    for key in (None, "thing"):
        question = build_question(kind, rng, decks)
        text = json_answer(question, key).text
        value = json.loads(text)
        assert text == json.dumps(value)
        [(name, said)] = value.items()
        is_list = kind in ("row", "list", "pair_list")
        assert name == (key or ("cells" if is_list else "answer"))
        assert said == (
            question.answer.split(", ") if is_list else int(question.answer) if kind == "number" else question.answer
        )


def test_what_is_told_weighs_as_if_it_stood_alone(folder):
    prompts = Prompts(folder)
    alone, weights = prompts.answer(Reply.plain("top left"))
    assert weights == [len(alone) ** -0.5] * len(alone)
    ids, weights = prompts.answer(Reply((('{"answer": "', False), ("top left", True), ('"}', False))))
    told = [i for i, weight in enumerate(weights) if weight == 2**-0.5]
    assert prompts.tokenizer.decode([ids[i] for i in told]) == "top left"
    assert all(weight == len(ids) ** -0.5 for i, weight in enumerate(weights) if i not in told)


def test_groups_change_no_logit(folder):
    torch.manual_seed(1)
    model = Qwen3VLMoeForConditionalGeneration(read_config(folder)).eval()
    lesson = next(iter(Lessons(folder, seed=3, num_scenes=5, mix=SEEING)))
    assert len(GroupedBatch(lesson.sequences.seq_lens, None).groups) > 1
    assert max(lesson.sequences.seq_lens) > 400
    with torch.inference_mode():
        features = model.get_image_feature(lesson.pictures.pixels, lesson.pictures.grids)
        found = decode(model, features, lesson.sequences, lesson.logit_rows)
        alone, start, rows = [], 0, 0
        for length in lesson.sequences.seq_lens:
            ids = lesson.sequences.ids[start : start + length]
            num_rows = int((ids == model.config.image_token_id).sum())
            one = Sequences(
                ids,
                lesson.sequences.positions[:, start : start + length],
                [length],
                lesson.sequences.visual_rows[rows : rows + num_rows],
            )
            wanted = [row - start for row in lesson.logit_rows.tolist() if start <= row < start + length]
            alone.append(decode(model, features, one, torch.tensor(wanted)))
            start, rows = start + length, rows + num_rows
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_native_pictures_are_not_resized(folder):
    prompts = Prompts(folder)
    rng = random.Random(0)
    scene = build_question("list", rng, Decks(rng)).scenes[0]
    for width, height in ((128, 128), (160, 128), (128, 160)):
        grid = prompts.pictures([draw_scene(scene, (width, height), rng)]).grids[0]
        assert grid == (1, height // 16, width // 16)


def test_targets_follow_their_rows(folder):
    lesson = next(iter(Lessons(folder, seed=3, num_scenes=6, mix=SEEING)))
    ids, rows = lesson.sequences.ids, lesson.logit_rows
    end_id = Prompts(folder).end_id
    ends = set(torch.tensor(lesson.sequences.seq_lens).cumsum(0).tolist())
    for row, target in zip(rows.tolist(), lesson.targets.tolist(), strict=True):
        assert (target == end_id) if row + 1 in ends else (ids[row + 1] == target)
    assert lesson.sequences.visual_rows.max() + 1 == sum(t * h * w // 4 for t, h, w in lesson.pictures.grids)
    assert lesson.sequences.seq_lens == sorted(lesson.sequences.seq_lens)
    again = next(iter(Lessons(folder, seed=3, num_scenes=6, mix=SEEING)))
    assert torch.equal(ids, again.sequences.ids)
    assert torch.equal(lesson.pictures.pixels, again.pictures.pixels)


def test_every_batch_has_every_form(folder):
    lesson = next(iter(Lessons(folder, seed=5, num_scenes=32, mix=SEEING)))
    share = torch.bincount(lesson.forms, minlength=len(FORMS)) > 0
    assert share.all(), dict(zip(FORMS, share.tolist(), strict=True))


def test_loss_reaches_every_parameter_and_its_parts_add_up(folder):
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(read_config(folder))
    lesson = next(iter(Lessons(folder, seed=1, num_scenes=8, mix=SEARCHING)))
    loss, parts = lesson_loss(model, lesson)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    torch.testing.assert_close(parts[:, 0].sum() / parts[:, 1].sum(), loss.detach())
    of_tools = lesson.forms == FORMS.index(TOOL_FORM)
    torch.testing.assert_close(parts[FORMS.index(TOOL_FORM), 1], lesson.weights[of_tools].sum())
