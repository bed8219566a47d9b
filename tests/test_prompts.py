"""Pools hold exactly the usable prompts, splits share nothing, rounds repeat nothing."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config_rollout import Prompts
from rlhf.errors import InputError
from rlhf.types import Message, Prompt
from rollout.imports import load_function, resolve_path
from rollout.prompts import Pools, load_pools, prompt_table, sample_round

GATE = [{"prompt": "gate question"}]
FINAL = [{"prompt": "final question"}]


def write_jsonl(path: Path, records: Sequence[Any]) -> str:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def load(
    folder: Path,
    train: Sequence[Any],
    gate: Sequence[Any] = GATE,
    final: Sequence[Any] = FINAL,
    *,
    encode: Any = None,
    seed: int = 0,
    source: dict[str, Any] | None = None,
    **settings: Any,
) -> Pools:
    pools = {"train": train, "gate": gate, "final": final}
    sections: dict[str, Any] = {
        split: {"path": write_jsonl(folder / f"{split}.jsonl", records)}
        for split, records in pools.items()
    }
    sections["train"] |= source or {}
    return load_pools(Prompts.model_validate({**sections, **settings}), seed, encode)


def refusal(folder: Path, train: Sequence[Any], **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, train, **settings)
    return str(caught.value)


def words(messages: Sequence[Message]) -> list[int]:
    return [len(word) for message in messages for word in message["content"].split()]


def pool(size: int) -> list[Prompt]:
    return [Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},)) for i in range(size)]


def ids(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_a_record_becomes_a_prompt_with_every_field(tmp_path: Path) -> None:
    record = {
        "prompt_id": 7,
        "prompt": "When?",
        "context": "Monday.",
        "reference": "On Monday.",
        "category": "delivery",
        "cluster": "article-1",
        "metadata": {"fact": ["monday"]},
        "source": "desk",
    }
    prompt = load(tmp_path, [record]).train[0]
    assert prompt == Prompt(
        "7",
        ({"role": "user", "content": "When?"},),
        "Monday.",
        "On Monday.",
        "delivery",
        "article-1",
        {"fact": ["monday"], "source": "desk"},
    )


def test_system_and_template_dress_plain_text_and_leave_chats_alone(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Own rules."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "When?"},
    ]
    pools = load(
        tmp_path,
        [{"prompt": "When?", "context": "{braces}"}, {"messages": chat}],
        [{"prompt": "gate", "context": "a"}],
        [{"prompt": "final", "context": "b"}],
        system="House rules.",
        template="Passage: {context}\nQuestion: {prompt}",
    )
    assert pools.train[0].messages == (
        {"role": "system", "content": "House rules."},
        {"role": "user", "content": "Passage: {braces}\nQuestion: When?"},
    )
    assert list(pools.train[1].messages) == chat


def test_missing_ids_are_stable_and_depend_on_messages_and_context(tmp_path: Path) -> None:
    records = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "context": "c"}]
    first = ids(load(tmp_path, records).train)
    again = ids(load(tmp_path, records[::-1]).train)
    assert again == first[::-1]
    assert len(set(first)) == 3


def test_prompts_about_one_passage_share_a_cluster_unless_told_otherwise(tmp_path: Path) -> None:
    records = [
        {"prompt": "a", "context": "The passage."},
        {"prompt": "b", "context": "The  passage.\n"},
        {"prompt": "c", "context": "Another."},
        {"prompt": "d", "prompt_id": "own"},
        {"prompt": "e", "context": "The passage.", "cluster": "given"},
    ]
    one, two, three, four, five = (p.cluster for p in load(tmp_path, records).train)
    assert one == two
    assert len({one, three, four, five}) == 4
    assert (four, five) == ("own", "given")


def test_parquet_dataset_and_function_give_the_same_prompts_as_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets: Any = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [
        {"prompt_id": "1", "messages": [{"role": "user", "content": "a"}], "tag": "x"},
        {"prompt_id": "2", "messages": [{"role": "user", "content": "b"}], "tag": "y"},
    ]
    expected = load(tmp_path, records).train
    pl.DataFrame(records).write_parquet(tmp_path / "pool.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    dictionary = datasets.DatasetDict({"validation": datasets.Dataset.from_list(records)})
    dictionary.save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", records)
    (tmp_path / "source.py").write_text(f"def records(split): return iter({records!r})\n")
    others = {
        "gate": {"path": write_jsonl(tmp_path / "gate.jsonl", GATE)},
        "final": {"path": write_jsonl(tmp_path / "final.jsonl", FINAL)},
    }
    for source in (
        {"path": str(tmp_path / "pool.parquet")},
        {"dataset": str(tmp_path / "saved")},
        {"dataset": str(tmp_path / "splits"), "split": "validation"},
        {"dataset": str(tmp_path / "folder")},
        {"function": f"{tmp_path / 'source.py'}:records"},
    ):
        config = Prompts.model_validate({"train": source, **others})
        assert load_pools(config, 0, None).train == expected, source


def test_a_missing_split_of_a_saved_dataset_names_those_there_are(tmp_path: Path) -> None:
    datasets: Any = importlib.import_module("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "saved"))
    source = {"path": None, "dataset": str(tmp_path / "saved")}
    message = refusal(tmp_path, [{"prompt": "a"}], source=source)
    assert "prompts.train.split" in message
    assert "['validation']" in message
    assert "'train'" in message


def test_a_function_gets_the_pools_name_unless_a_split_is_given(tmp_path: Path) -> None:
    module = tmp_path / "source.py"
    module.write_text("def records(split): return [{'prompt': f'about {split}'}]\n")
    source = {"function": f"{module}:records"}
    config = {"train": {**source, "split": "own"}, "gate": source, "final": source}
    pools = load_pools(Prompts.model_validate(config), 0, None)
    asked = [p.messages[0]["content"] for p in (*pools.train, *pools.gate, *pools.final)]
    assert asked == ["about own", "about gate", "about final"]


def test_a_function_that_raises_or_returns_text_is_bad_input(tmp_path: Path) -> None:
    module = tmp_path / "source.py"
    module.write_text(
        "def raises(split):\n    yield {'prompt': 'a'}\n    raise KeyError('passage')\n"
    )
    message = refusal(
        tmp_path, [{"prompt": "a"}], source={"path": None, "function": f"{module}:raises"}
    )
    assert "raised KeyError: 'passage'" in message
    assert "prompts.train.function" in message
    message = refusal(tmp_path, ["x"], source={"path": None, "function": "os.path:basename"})
    assert "must give records one by one, got str 'train'" in message


def test_columns_rename_fields_and_the_rest_is_metadata(tmp_path: Path) -> None:
    record = {"question": "When?", "answer": "Monday.", "prompt": "unused", "id": 3}
    columns = {"prompt": "question", "reference": "answer", "context": "answer"}
    prompt = load(tmp_path, [record], source={"columns": columns}).train[0]
    assert prompt.messages[-1]["content"] == "When?"
    assert (prompt.reference, prompt.context) == ("Monday.", "Monday.")
    assert prompt.metadata == {"prompt": "unused", "id": 3}


def test_unknown_fields_and_absent_columns_are_named(tmp_path: Path) -> None:
    train = [{"question": "When?"}]
    message = refusal(tmp_path, train, source={"columns": {"promt": "question"}})
    assert "did you mean 'prompt'" in message
    message = refusal(tmp_path, train, source={"columns": {"prompt": "questoin"}})
    assert "['questoin']" in message
    assert "['question']" in message


BAD = [
    ('{"prompt": "a"', "invalid JSON"),
    ('{"prompt": "a", "score": NaN}', "NaN is no JSON value"),
    ("[1]", "must be an object, got list [1]"),
    ("{}", "neither"),
    ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "both"),
    ('{"prompt": 3}', "prompt must be text, got int 3"),
    ('{"prompt": " "}', "prompt must not be empty"),
    ('{"prompt": "\\ud800"}', "valid Unicode"),
    ('{"messages": "hello"}', "messages must be a list"),
    ('{"messages": []}', "messages must not be empty"),
    ('{"messages": ["a"]}', "messages[0] must be an object"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "messages[0].role must be one of"),
    ('{"messages": [{"role": "user", "content": ""}]}', "messages[0].content must not be empty"),
    ('{"messages": [{"role": "user", "content": null}]}', "content must be text, got null"),
    ('{"messages": [{"role": "user", "content": "a", "name": "Z"}]}', "got also ['name']"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "last message must be the user's"),
    ('{"prompt": "a", "context": ["b"]}', "context must be text, got list"),
    ('{"prompt": "a", "prompt_id": true}', "prompt_id must be text, got bool"),
    ('{"prompt": "a", "metadata": "b"}', "metadata must be an object"),
    ('{"prompt": "a", "metadata": {"k": 1}, "k": 2}', "both have ['k']"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_an_error_with_its_file_and_line(
    tmp_path: Path, line: str, reason: str
) -> None:
    message = refusal(tmp_path, [{"prompt": "good"}, "", line])
    assert f"{tmp_path / 'train.jsonl'}:3: " in message
    assert reason in message


def test_bytes_that_are_not_utf8_are_reported_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    message = refusal(tmp_path, [{"prompt": "a"}], source={"path": str(path)})
    assert f"{path}:2: invalid JSON" in message


def test_the_first_ten_bad_lines_are_reported_together(tmp_path: Path) -> None:
    message = refusal(tmp_path, ["{}"] * 13)
    assert "13 records" in message
    assert all(f"train.jsonl:{line}: " in message for line in range(1, 11))
    assert "train.jsonl:11" not in message
    assert "and 3 more" in message


def test_a_bad_parquet_row_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    pl.DataFrame({"prompt": ["a", None, "c"]}).write_parquet(path)
    message = refusal(tmp_path, [{"prompt": "a"}], source={"path": str(path)})
    assert f"{path} row 2: " in message


def test_one_prompt_id_for_two_contents_is_refused_with_both_lines(tmp_path: Path) -> None:
    records = [{"prompt_id": "x", "prompt": "a"}, {"prompt_id": "x", "prompt": "b"}]
    message = refusal(tmp_path, records)
    assert "train.jsonl:2: prompt_id 'x'" in message
    assert "train.jsonl:1" in message
    again = [records[0], records[0]]
    assert load(tmp_path, again).counts["train"]["duplicates"] == 1


def test_a_template_with_context_refuses_a_record_without(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"prompt": "a"}], template="{context} {prompt}")
    assert "prompts.template uses {context}" in message


@pytest.mark.parametrize("name", ["absent.jsonl", "pool.csv", "broken.parquet"])
def test_unreadable_files_are_bad_input(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_text("question\n")
    message = refusal(tmp_path, [{"prompt": "a"}], source={"path": str(tmp_path / name)})
    assert "prompts.train.path" in message
    assert name in message


def test_duplicates_long_prompts_and_limits_are_counted(tmp_path: Path) -> None:
    records = [
        {"prompt": "one  two"},
        {"prompt": "one two\n"},
        {"prompt": "one two", "context": "another passage"},
        {"prompt": "one two three four"},
        {"prompt": "five"},
        {"prompt": "six"},
    ]
    pools = load(tmp_path, records, encode=words, max_tokens=3, source={"limit": 2})
    assert pools.counts["train"] == {
        "read": 6,
        "duplicates": 1,
        "near_duplicates": 0,
        "too_long": 1,
        "limited": 2,
        "kept": 2,
        "clusters": 2,
    }
    assert all(1 <= len(p.token_ids) <= 3 for p in pools.train)


def test_near_duplicates_fall_where_a_limit_says_so_and_what_measures_stands(
    tmp_path: Path,
) -> None:
    asked = "When will the refund for my last order arrive in my bank account"
    passage = "Refunds take five working days. " * 3
    train = [
        {"prompt": f"{asked}?", "prompt_id": "like gate"},
        {"prompt": "How do I reset the password of my account, please", "prompt_id": "first"},
        {"prompt": "How do I reset the password of my account, please!!", "prompt_id": "second"},
        {"prompt": f"{asked}!?", "context": passage, "prompt_id": "other context"},
        {"prompt": "Is it long?", "context": passage + "x", "prompt_id": "other question"},
        {"prompt": "Will it rain?", "context": passage, "prompt_id": "one more question"},
    ]
    gate = [{"prompt": asked, "prompt_id": "gate"}]
    system = "You answer questions of customers, briefly and politely. " * 4
    plain = load(tmp_path, train, gate, system=system)
    assert len(plain.train) == 6 and plain.counts["train"]["near_duplicates"] == 0
    pools = load(tmp_path, train, gate, system=system, max_similarity=0.8)
    assert {p.prompt_id for p in pools.train} == {
        "first", "other context", "other question", "one more question",
    }  # fmt: skip
    assert pools.counts["train"]["near_duplicates"] == 2
    assert [p.prompt_id for p in pools.gate] == ["gate"]


def test_a_prompt_of_exactly_max_tokens_is_kept(tmp_path: Path) -> None:
    records = [{"prompt": "a b c"}, {"prompt": "a b c d"}]
    pools = load(tmp_path, records, encode=words, max_tokens=3)
    assert [p.token_ids for p in pools.train] == [(1, 1, 1)]


def test_a_dry_run_has_no_token_ids_and_drops_nothing_as_long(tmp_path: Path) -> None:
    pools = load(tmp_path, [{"prompt": "a b c"}], max_tokens=1)
    assert pools.train[0].token_ids == ()
    assert pools.counts["train"]["too_long"] == 0


def test_the_limit_draws_by_seed_and_not_by_row_order(tmp_path: Path) -> None:
    records = [{"prompt": f"question {i}"} for i in range(40)]
    draw = {seed: load(tmp_path, records, seed=seed, source={"limit": 10}) for seed in (0, 1)}
    reordered = load(tmp_path, records[::-1], source={"limit": 10})
    assert set(ids(draw[0].train)) == set(ids(reordered.train))
    assert set(ids(draw[0].train)) != set(ids(draw[1].train))
    assert ids(draw[0].train) == ids(reordered.train)[::-1]


@pytest.mark.parametrize("records", [[], [""]])
def test_an_empty_pool_is_refused(tmp_path: Path, records: list[str]) -> None:
    assert "prompts.train must hold at least one prompt" in refusal(tmp_path, records)


def test_a_pool_that_drops_emptied_is_refused_with_its_counts(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"prompt": "a b"}], encode=words, max_tokens=1)
    assert "'read': 1" in message
    assert "'too_long': 1" in message


def test_a_cluster_in_two_splits_is_refused_naming_both(tmp_path: Path) -> None:
    train = [{"prompt": f"t{i}", "cluster": f"article-{i}"} for i in range(7)]
    gate = [{"prompt": f"g{i}", "cluster": f"article-{i}"} for i in range(7)]
    message = refusal(tmp_path, train, gate=gate)
    assert "clusters" in message
    assert "'article-0' in train and gate" in message
    assert "'article-5'" not in message
    assert "and 2 more" in message


def test_a_cluster_is_refused_even_where_the_limit_would_drop_it(tmp_path: Path) -> None:
    train = [{"prompt": f"t{i}", "cluster": "shared" if i == 0 else f"c{i}"} for i in range(30)]
    final = [{"prompt": "f", "cluster": "shared"}]
    for seed in range(5):
        message = refusal(tmp_path, train, final=final, seed=seed, source={"limit": 1})
        assert "'shared' in train and final" in message


def test_one_prompt_text_in_two_splits_is_refused_whatever_its_cluster(tmp_path: Path) -> None:
    train = [{"prompt": "Same  text", "cluster": "a", "context": "x"}]
    gate = [{"prompt": "Same text", "cluster": "b", "context": "y"}]
    message = refusal(tmp_path, train, gate=gate)
    assert "prompt texts" in message
    assert "train and gate" in message


def test_one_prompt_id_in_two_splits_is_refused(tmp_path: Path) -> None:
    train = [{"prompt_id": "1", "prompt": "a", "cluster": "a"}]
    gate = [{"prompt_id": "1", "prompt": "b", "cluster": "b"}]
    assert "prompt_ids" in refusal(tmp_path, train, gate=gate)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    per_round=st.integers(1, 45) | st.none(),
    seed=st.integers(0, 3),
    epochs=st.integers(1, 4),
)
def test_rounds_repeat_no_prompt_and_every_epoch_covers_the_pool(
    size: int, per_round: int | None, seed: int, epochs: int
) -> None:
    prompts = pool(size)
    step = size if per_round is None else min(per_round, size)
    rounds = [
        ids(sample_round(prompts, r, per_round, seed)) for r in range(-(-size * epochs // step))
    ]
    assert all(len(r) == step == len(set(r)) for r in rounds)
    sequence = [prompt_id for r in rounds for prompt_id in r]
    for epoch in range(epochs):
        assert set(sequence[epoch * size : (epoch + 1) * size]) == set(ids(prompts))


@settings(max_examples=30, deadline=None)
@given(rows=st.permutations(range(12)), round_index=st.integers(0, 5))
def test_a_round_depends_on_seed_and_ids_and_not_on_rows(rows: list[int], round_index: int) -> None:
    prompts = pool(12)
    shuffled = [prompts[row] for row in rows]
    assert sample_round(shuffled, round_index, 5, 3) == sample_round(prompts, round_index, 5, 3)


def test_seeds_and_epochs_give_different_orders() -> None:
    prompts = pool(30)
    orders = {tuple(ids(sample_round(prompts, r, None, s))) for r in range(3) for s in range(3)}
    assert len(orders) == 9


def test_rounds_of_equal_size_use_every_prompt_equally_often() -> None:
    rounds = [sample_round(pool(10), r, 4, 0) for r in range(15)]
    assert set(Counter(p.prompt_id for r in rounds for p in r).values()) == {6}


def test_the_prompt_table_shows_the_whole_conversation() -> None:
    prompt = Prompt(
        "p",
        ({"role": "system", "content": "Rules."}, {"role": "user", "content": "When?"}),
        reference="On Monday.",
    )
    table = prompt_table([prompt])
    assert table.to_dicts() == [
        {
            "prompt_id": "p",
            "category": "all",
            "cluster": "p",
            "prompt": "system: Rules.\n\nuser: When?",
            "context": None,
            "reference": "On Monday.",
        }
    ]
    assert prompt_table([]).schema == table.schema


def test_a_function_is_found_in_modules_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "CALLS = []\ndef one(): return CALLS\ndef two(): return CALLS\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_function("json:dumps", "f") is json.dumps
    one, two = load_function("own.py:one", "f"), load_function("./own.py:two", "f")
    assert one() is two(), "a file is loaded once"


def test_two_files_of_one_name_stay_two_modules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "verifiers.py").write_text(f"def which(): return {name!r}\n")
    found = [load_function(f"{tmp_path / n / 'verifiers.py'}:which", "f")() for n in ("a", "b")]
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("json", "must be `module:function`"),
        (":dumps", "must be `module:function`"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
        ("json:JSONDecodr", "did you mean 'JSONDecoder'"),
        ("json:__name__", "must name a function"),
        ("absent/file.py:f", "there is no file absent/file.py"),
        ("raising.py:f", "raised RuntimeError: not today"),
        ("exiting.py:f", "raised SystemExit: 3"),
        ("importing.py:f", "raised ModuleNotFoundError: No module named 'no_such_module_here'"),
    ],
)
def test_what_cannot_be_loaded_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, said: str
) -> None:
    (tmp_path / "raising.py").write_text("raise RuntimeError('not today')\n")
    (tmp_path / "exiting.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "importing.py").write_text("import no_such_module_here\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_function(spec, "judges.panel[0].function")
    assert said in str(caught.value)
    assert "judges.panel[0].function" in str(caught.value)


def test_a_file_inside_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_only"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "model.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:weights_only/model.gguf") == package / "model.gguf"
    assert "weights_only" not in sys.modules
    assert resolve_path("folder/model.gguf") == Path("folder/model.gguf")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("package:no_such_package/model.gguf", "'no_such_package' is not installed"),
        ("package:json/decoder.pz", "did you mean 'decoder.py'"),
        ("package:json", "must be `package:NAME/FILE`"),
    ],
)
def test_a_missing_package_or_file_is_named(spec: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_path(spec)
    assert said in str(caught.value)
