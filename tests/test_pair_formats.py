"""Preference files: every format read as the same thing, round trips, and lines that are wrong."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import InputError
from rlhf.pair_convert import TARGETS, convert
from rlhf.pair_files import read_records, write_records
from rlhf.pair_formats import Preferences, read_preferences
from rlhf.types import pairs_schema

PAIR_TARGETS = [target for target in TARGETS if not target.startswith("labels")]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def asked(preferences: Preferences) -> list[tuple[Any, ...]]:
    """Prompts and answers, and the label where there is one."""
    label = [] if preferences.paired else ["label"]
    return preferences.table.select("prompt", *preferences.answers, *label).rows()


Q, A, B = turn("user", "Which way?"), turn("assistant", "Left."), turn("assistant", "Right.")
MEANT = [([Q], [A], [B])]

SAME: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": "Which way?", "chosen": "Left.", "rejected": "Right."},
    "explicit-chat": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "implicit": {
        "chosen": "\n\nHuman: Which way?\n\nAssistant: Left.",
        "rejected": "\n\nHuman: Which way?\n\nAssistant: Right.",
    },
    "implicit-chat": {"chosen": [Q, A], "rejected": [Q, B]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Which way?"}],
        "chosen": {"from": "gpt", "value": "Left."},
        "rejected": {"from": "gpt", "value": "Right."},
    },
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_format_of_pairs_says_the_same(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([SAME[name]]))
    elif suffix == "parquet":
        pl.DataFrame([SAME[name]]).write_parquet(path)
    else:
        path.write_text(json.dumps(SAME[name]) + "\n")
    read = read_preferences(path)
    assert read.format == name
    assert asked(read) == MEANT


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"prompt": "Which way?", "completion": "Left.", "label": True}, "labels"),
        ({"prompt": "Which way?", "completion": "Left.", "label": 1}, "labels"),
        ({"prompt": [Q], "completion": [A], "label": True}, "labels-chat"),
        ({"messages": [Q, A], "label": True}, "labels-chat"),
    ],
)
def test_every_format_of_labels_says_the_same(
    record: dict[str, Any], format: str, tmp_path: Path
) -> None:
    read = read_preferences(write(tmp_path, "labels.jsonl", [record]))
    assert (read.format, asked(read)) == (format, [([Q], [A], True)])


def test_a_runs_pairs_keep_scores_category_and_roles(tmp_path: Path) -> None:
    row = {
        "prompt_id": "p1", "category": "way", "cluster": "c1", "chosen": "Left.",
        "prompt": "system: Be brief.\n\nuser: Which way?", "rejected": "Right.",
        "reward_chosen": 0.9, "reward_rejected": 0.4, "margin": 0.5, "source": "on_policy",
    }  # fmt: skip
    path = tmp_path / "pairs.parquet"
    pl.DataFrame([row], schema=pairs_schema(["style"])).write_parquet(path)
    read = read_preferences(path)
    assert read.format == "pairloop"
    assert asked(read) == [([turn("system", "Be brief."), Q], [A], [B])]
    told = read.table.select("score_chosen", "score_rejected", "category", "cluster").row(0)
    assert told == (0.9, 0.4, "way", "c1")
    lost = convert(read, "explicit").lost
    assert any("chosen_token_ids" in loss and "scores_chosen" in loss for loss in lost)


@pytest.mark.engine
def test_text_without_markers_is_split_as_trl_does(tmp_path: Path) -> None:
    from trl.data_utils import extract_prompt

    records = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "No prompt", "rejected": "at all"},
    ]
    read = read_preferences(write(tmp_path, "implicit.jsonl", records))
    for (prompt, chosen, rejected), record in zip(asked(read), records, strict=True):
        theirs = extract_prompt(record)
        assert prompt == ([turn("user", theirs["prompt"])])
        assert chosen == [turn("assistant", theirs["chosen"])]
        assert rejected == [turn("assistant", theirs["rejected"])]
    assert "2 records" in read.notes[0]


def test_identical_implicit_answers_are_answers_not_prompts(tmp_path: Path) -> None:
    records = [
        {"chosen": [Q, A], "rejected": [Q, A]},
        {"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]},
        {"chosen": [Q, A], "rejected": [Q, A, Q, B]},
    ]
    chat = write(tmp_path, "chat.jsonl", records)
    assert asked(read_preferences(chat)) == [
        ([Q], [A], [A]),
        ([Q, A, Q], [A], [B]),
        ([Q], [A], [A, Q, B]),
    ]
    text = write(tmp_path, "text.jsonl", [{"chosen": "Left.", "rejected": "Left."}])
    (row,) = asked(read_preferences(text))
    assert row[1:] == ([A], [A])


def test_a_prompt_beside_whole_chats_is_not_read_twice(tmp_path: Path) -> None:
    record = {"prompt": "Which way?", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 8}
    read = read_preferences(write(tmp_path, "ultra.jsonl", [record]))
    assert (read.format, asked(read)) == ("implicit-chat", MEANT)
    assert read.table["score_chosen"].to_list() == [8.0]


def test_columns_of_other_names(tmp_path: Path) -> None:
    record = {"question": "Which way?", "a": "Left.", "b": "Right.", "topic": "way", "stars": 4}
    path = write(tmp_path, "own.jsonl", [record])
    names = {"prompt": "question", "chosen": "a", "rejected": "b", "category": "topic"}
    read = read_preferences(path, columns={**names, "score_chosen": "stars"})
    assert asked(read) == MEANT
    assert read.table.select("category", "score_chosen").row(0) == ("way", 4.0)
    with pytest.raises(InputError, match="did you mean 'category'"):
        read_preferences(path, columns={"categry": "topic"})
    with pytest.raises(InputError, match=r"no such column.*question"):
        read_preferences(path, columns={"prompt": "quest"})


WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1e\x1f"), max_size=12)
CLEAN = WORD.filter(lambda text: "Human:" not in text and "Assistant:" not in text)
FILLED = CLEAN.filter(bool)


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    opening = [turn("system", draw(FILLED))] if draw(st.booleans()) else []
    turns = [turn("user", draw(CLEAN))]
    for _ in range(draw(st.integers(0, 2))):
        turns += [turn("assistant", draw(FILLED)), turn("user", draw(CLEAN))]
    chosen, rejected = draw(CLEAN), draw(CLEAN)
    return {
        "prompt": [*opening, *turns],
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
        "score_chosen": draw(st.none() | st.floats(-10, 10)),
        "score_rejected": draw(st.none() | st.floats(-10, 10)),
        "category": draw(st.none() | CLEAN),
        "topic": draw(st.none() | CLEAN),
    }


def through(folder: Path, read: Preferences, target: str, suffix: str = "jsonl") -> Preferences:
    path = folder / f"{target}.{suffix}"
    write_records(path, convert(read, target).table)
    return read_preferences(path, target)


@pytest.mark.slow
@given(st.lists(chats(), min_size=1, max_size=4), st.sampled_from(PAIR_TARGETS))
def test_pairs_come_back_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], target: str
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    read = read_preferences(write(folder, "start.jsonl", records))
    back = through(folder, read, target, "parquet" if len(records) % 2 else "jsonl")
    assert asked(back) == asked(read)
    kept = ("score_chosen", "score_rejected", "category")
    assert back.table.select(kept).rows() == read.table.select(kept).rows()
    assert convert(read, target).lost == ()


@pytest.mark.slow
@given(st.lists(chats(), min_size=1, max_size=4))
def test_labels_of_pairs_become_the_same_pairs(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    read = read_preferences(write(folder, "start.jsonl", records))
    labels = through(folder, read, "labels-chat")
    assert labels.table.height == 2 * len(records)
    back = through(folder, labels, "explicit-chat")
    assert asked(back) == asked(read)
    kept = ("score_chosen", "score_rejected", "category")
    assert back.table.select(kept).rows() == read.table.select(kept).rows()


def test_what_a_format_cannot_hold_is_said_and_counted(tmp_path: Path) -> None:
    tool = turn("tool", "7 degrees")
    records: list[dict[str, Any]] = [
        {"prompt": [Q, tool], "chosen": [A, A], "rejected": [B], "notes": {"by": "me"}},
        {"prompt": [turn("user", "Say\n\nAssistant:")], "chosen": [A], "rejected": [B]},
    ]
    read = read_preferences(write(tmp_path, "odd.jsonl", records))
    lost = " | ".join(convert(read, "explicit").lost)
    assert "nested or mixed values: notes" in lost
    assert "2 prompts whose turns" in lost
    assert "1 answers with several messages" in lost
    lost = " | ".join(convert(read, "labels-chat").lost)
    assert "which of 4 answers were compared" in lost


def test_labels_without_a_counterpart_are_counted(tmp_path: Path) -> None:
    records = [
        {"prompt": "Which way?", "completion": "Left.", "label": True},
        {"prompt": "Other?", "completion": "Yes.", "label": True},
        {"prompt": "Which way?", "completion": "Right.", "label": False},
        {"prompt": "Which way?", "completion": "Up.", "label": False},
    ]
    read = read_preferences(write(tmp_path, "labels.jsonl", records))
    converted = convert(read, "explicit")
    assert converted.table.rows() == [("Which way?", "Left.", "Right.")]
    assert converted.lost == ("2 of 4 answers, whose prompt has none of the other label",)
    with pytest.raises(InputError, match="no pair to make"):
        convert(read_preferences(write(tmp_path, "good.jsonl", records[:2])), "explicit")


@pytest.mark.engine
def test_trl_reads_what_is_written_for_it(tmp_path: Path) -> None:
    """TRL's own functions see the roles and prompts that were meant."""
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_extract_prompt

    read = read_preferences(write(tmp_path, "pairs.jsonl", [SAME["explicit"]]))
    for target in ("explicit-chat", "implicit-chat"):
        path = tmp_path / f"{target}.jsonl"
        write_records(path, convert(read, target).table)
        cache = str(tmp_path / "cache")
        data = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        example = maybe_extract_prompt(data[0])
        assert is_conversational(example)
        assert (example["prompt"], example["chosen"], example["rejected"]) == MEANT[0]


GOOD = json.dumps(SAME["explicit"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"prompt": "x", '], r"pairs\.jsonl:2 must be JSON"),
        ([GOOD, "", "[1]"], r"pairs\.jsonl:3 must be a JSON object, got a list"),
        ([GOOD, '{"prompt": "x", "chosen": "y"}'], r"pairs\.jsonl:2 must have rejected"),
        ([GOOD, '{"prompt": "x", "chosen": ["y"], "rejected": "z"}'],
         r"chosen must be text.*pairs\.jsonl:1 has a string, .*pairs\.jsonl:2 has a list"),
        (['{"prompt": "x", "chosen": [{"role": "assistant", "content": ["y"]}], "rejected": []}'],
         r"pairs\.jsonl:1 has something else than messages"),
        ([GOOD.replace("}", ', "score_chosen": NaN}')], r"pairs\.jsonl:1 must be JSON: NaN"),
        ([GOOD, GOOD.replace("Left.", "\\ud800")], r"pairs\.jsonl:2: chosen must be text"),
        ([GOOD.replace("}", ', "score_chosen": "high"}')], r"score_chosen must be a number"),
        (["{}"], r"must hold chosen and rejected"),
        ([], r"must hold at least one record"),
        (['{"prompt": "x", "completion": "y", "label": "good"}'], r"label must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        read_preferences(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "6*7?", "chosen": 42, "rejected": 41}, "chosen must be text, or messages"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "prompt must be text, or messages"),
        ({"prompt": "q", "completion": True, "label": True}, "completion must be text, or mess"),
        ({"prompt": "q", "messages": "a", "label": True}, "must be lists of messages"),
    ],
)
def test_answers_that_are_no_text_are_refused(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_preferences(write(tmp_path, "odd.jsonl", [record]))


def test_a_score_that_is_no_number_is_none(tmp_path: Path) -> None:
    path = tmp_path / "scored.parquet"
    scores = {"score_chosen": [0.9, 0.8], "score_rejected": [float("nan"), 0.1]}
    pl.DataFrame({"prompt": ["p", "q"], "chosen": "a", "rejected": "b", **scores}).write_parquet(
        path
    )
    given = read_preferences(path)
    assert given.table["score_rejected"].to_list() == [None, 0.1]
    write_records(tmp_path / "out.jsonl", convert(given, "explicit").table)
    again = read_preferences(tmp_path / "out.jsonl")
    assert again.table["score_rejected"].to_list() == [None, 0.1]


def test_what_json_has_no_type_for_becomes_text_or_is_refused(tmp_path: Path) -> None:
    path, base = tmp_path / "dated.parquet", {"prompt": "p", "chosen": "a", "rejected": "b"}
    pl.DataFrame({**base, "made": [date(2026, 1, 2)]}).write_parquet(path)
    write_records(tmp_path / "out.jsonl", convert(read_preferences(path), "explicit-chat").table)
    assert json.loads((tmp_path / "out.jsonl").read_text())["made"] == "2026-01-02"
    pl.DataFrame({**base, "image": [b"png"]}).write_parquet(path)
    with pytest.raises(InputError, match="column image is binary"):
        write_records(tmp_path / "other.jsonl", convert(read_preferences(path), "explicit").table)
    assert not (tmp_path / "other.jsonl").exists()


def test_columns_with_names_of_the_other_format_are_said_to_be_lost(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score": 3, "messages": [Q, A]}
    pair |= {"chosen_source": "large", "rejected_source": "small", "annotator": "one"}
    labels = convert(read_preferences(write(tmp_path, "pairs.jsonl", [pair])), "labels")
    assert labels.table["source"].to_list() == ["large", "small"]
    assert labels.table["annotator"].to_list() == ["one", "one"]
    assert {"column messages", "column score, which there means something else"} < {*labels.lost}
    written = write(tmp_path, "labels.jsonl", [])
    write_records(written, labels.table)
    back = convert(read_preferences(written), "explicit")
    assert back.table.select("chosen_source", "rejected_source").rows() == [("large", "small")]
    assert back.lost == ()
    rows = [
        {"prompt": "p", "completion": "a", "label": True, "annotator": "one", "score_chosen": 1},
        {"prompt": "p", "completion": "b", "label": False, "annotator": "two", "score_chosen": 1},
    ]
    pairs = convert(read_preferences(write(tmp_path, "own.jsonl", rows)), "explicit")
    assert pairs.table["annotator"].to_list() == ["one"]
    assert pairs.lost == (
        "column score_chosen, which there means something else",
        "annotator of 1 rejected answers, which is not their chosen one's",
    )


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('[{"prompt": 1},\n {"prompt": ]')
    (tmp_path / "latin.jsonl").write_bytes(b'{}\n{"prompt": "\xe4"}\n')
    (tmp_path / "fake.parquet").write_bytes(b"no parquet")
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, message in (
        ("broken.json", r"broken\.json:2 must be JSON"),
        ("latin.jsonl", r"latin\.jsonl:2 must be UTF-8"),
        ("fake.parquet", "must be a Parquet file"),
        ("table.csv", "must end in .jsonl"),
        ("absent.jsonl", "there is none"),
        ("", "it is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            read_records(tmp_path / name)


@pytest.mark.parametrize("format", ["labels", "implicit-chat", "sharegpt", "csv"])
def test_a_format_that_the_file_is_not_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--format"):
        read_preferences(write(tmp_path, "pairs.jsonl", [SAME["explicit"]]), format)
