"""Checks of preference data: planted faults give known values; filter takes what analyze counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import cli
from rlhf.errors import InputError
from rlhf.pair_filter import RULES, apply_rules, default_rules, write_kept
from rlhf.pair_formats import Preferences, read_preferences
from rlhf.quality import CRITICAL, TARGETS, Check, Report, analyze

TOPICS = ("tides", "bread", "glaciers", "chess", "violins", "ferries", "moss", "lenses")


def pair(number: int, **other: Any) -> dict[str, Any]:
    """A pair with nothing wrong; prompts of different numbers are not alike."""
    topic = TOPICS[number % 8]
    return {
        "prompt": f"{number * 7919} {topic}: what should {number * 104729} people know of {topic}?",
        "chosen": f"They are worth {number} hours.",
        "rejected": f"Nobody knows a {number}.",
        "score_chosen": 4.0,
        "score_rejected": 3.0,
        **other,
    }


def write(folder: Path, records: Sequence[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(folder: Path, records: Sequence[dict[str, Any]]) -> Preferences:
    return read_preferences(write(folder, records))


def found(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_clean_pairs_pass_and_nothing_is_found(tmp_path: Path) -> None:
    report = analyze([read(tmp_path, [pair(i) for i in range(40)])])
    assert report.failed == ()
    assert (report.rows, report.prompts) == (40, 40)
    for name in ("identical", "inverted", "duplicate", "near_duplicate", "contradiction", "empty"):
        assert found(report, name).value == 0.0, name
    assert report.examples == {}
    assert found(report, "delta").value == pytest.approx(1.0)
    assert found(report, "revised_wins").verdict == "not measured"


def test_planted_faults_give_their_shares(tmp_path: Path) -> None:
    clean = [pair(i) for i in range(40)]
    faults = [
        pair(50, chosen="The  same", rejected="The same "),
        pair(51, score_chosen=1.0, score_rejected=4.5),
        {**clean[3], "prompt": clean[3]["prompt"].upper()},
        {**clean[4], "chosen": clean[4]["rejected"], "rejected": clean[4]["chosen"]},
        pair(54, prompt=clean[5]["prompt"] + "!"),
        pair(55, chosen="As an AI language model, I can't say."),
        pair(56, chosen="I'm sorry, but I can't help with that."),
        pair(57, rejected="  "),
    ]
    report = analyze([read(tmp_path, clean + faults)])
    rows = 48
    for name, count in (
        ("identical", 1), ("inverted", 1), ("duplicate", 1), ("contradiction", 2),
        ("near_duplicate", 1), ("refusal", 1), ("empty", 1), ("meta_commentary", 1),
    ):  # fmt: skip
        assert found(report, name).count == count, name
        assert len(report.examples[name]) == count, name
        if name != "meta_commentary":
            assert found(report, name).value == pytest.approx(count / rows), name
    assert report.examples["identical"][0]["where"].endswith("pairs.jsonl:41")
    assert found(report, "delta").value == pytest.approx((47 * 1.0 - 3.5) / 48)


@pytest.mark.parametrize(("same", "verdict"), [(4, "pass"), (5, "fail"), (6, "fail")])
def test_a_target_is_met_only_beyond_it(same: int, verdict: str, tmp_path: Path) -> None:
    records = [
        pair(i, **({"chosen": "x", "rejected": "x"} if i < same else {})) for i in range(100)
    ]
    report = analyze([read(tmp_path, records)])
    assert found(report, "identical").verdict == verdict
    assert [check.name for check in report.failed] == (["identical"] if verdict == "fail" else [])


@pytest.mark.parametrize("told", ["both", "one"])
def test_who_is_chosen_where_sources_tell(told: str, tmp_path: Path) -> None:
    def sources(revised: bool) -> dict[str, str]:
        chosen = "revised" if revised else "base"
        if told == "one":
            return {"source": chosen}
        return {"chosen_source": chosen, "rejected_source": "base" if revised else "revised"}

    records = [pair(i, **sources(i % 10 < 7)) for i in range(50)]
    if told == "both":
        records.append(pair(60, chosen_source="base", rejected_source="base"))
    check = found(analyze([read(tmp_path, records)]), "revised_wins")
    assert check.value == pytest.approx(0.7)
    assert (check.of, check.verdict) == (50, "pass")
    assert check.low is not None
    assert check.high is not None
    assert check.low < 0.7 < check.high


def test_length_bias_is_the_share_of_longer_ones_that_are_chosen(tmp_path: Path) -> None:
    long, short, equal = "long " * 20, "short", "equal"
    records = [pair(i, chosen=long, rejected=short) for i in range(30)]
    records += [pair(i, chosen=short, rejected=long) for i in range(30, 40)]
    records += [pair(40, chosen="abcde", rejected=equal)]
    check = found(analyze([read(tmp_path, records)]), "longer_chosen")
    assert check.value == pytest.approx(0.75)
    assert check.of == 40


def test_balance_counts_rows_and_deltas_by_value(tmp_path: Path) -> None:
    records = [pair(i, category="a", principle=None) for i in range(6)]
    records += [pair(i, category="b", score_chosen=6.0, principle="be kind") for i in range(6, 8)]
    balance = analyze([read(tmp_path, records)]).balance
    assert balance["category"] == [
        {"value": "a", "rows": 6, "share": 0.75, "delta": 1.0},
        {"value": "b", "rows": 2, "share": 0.25, "delta": 3.0},
    ]
    assert [row["value"] for row in balance["principle"]] == ["(none)", "be kind"]


def test_leaks_between_files_are_prompts_near_prompts_and_clusters(tmp_path: Path) -> None:
    train = [pair(i, cluster=f"c{i}") for i in range(10)]
    test = [
        pair(20, prompt=train[0]["prompt"], cluster="c20"),
        pair(21, prompt=train[1]["prompt"] + "?", cluster="c21"),
        pair(22, cluster="c2"),
        pair(23, cluster="c23"),
    ]
    files = [
        read_preferences(write(tmp_path, records, name))
        for records, name in ((train, "train.jsonl"), (test, "test.jsonl"))
    ]
    report = analyze(files, examples=10)
    check = found(report, "leaks")
    assert (check.count, check.of, check.verdict) == (6, 14, "fail")
    reasons = {Path(e["where"]).name: e["reason"] for e in report.examples["leaks"]}
    assert "the same prompt is in" in reasons["test.jsonl:1"]
    assert "like that of" in reasons["test.jsonl:2"]
    assert "its cluster is in" in reasons["test.jsonl:3"]
    assert "test.jsonl:4" not in reasons
    one = read(tmp_path, [pair(i, split="train" if i else "test") for i in range(5)])
    assert found(analyze([one]), "leaks").verdict == "pass"


def test_meta_commentary_is_judged_by_what_its_detector_can_tell(tmp_path: Path) -> None:
    def verdict(flagged: int) -> Check:
        answer = "As an AI language model, I like tea."
        records = [
            pair(i, **({"chosen": f"{answer} {i}"} if i < flagged else {})) for i in range(200)
        ]
        return found(analyze([read(tmp_path, records)], examples=0), "meta_commentary")

    assert verdict(0).verdict == "pass"
    three = verdict(3)
    assert three.value is not None
    assert three.value > 3 / 200, "some of it goes unseen"
    assert three.verdict == "inconclusive"
    assert verdict(8).verdict == "fail"


def test_labels_have_checks_of_their_own(tmp_path: Path) -> None:
    records = [
        {
            "prompt": pair(i)["prompt"],
            "completion": f"Answer {i}" + " long" * (i % 2),
            "label": i % 2 == 1,
        }
        for i in range(20)
    ]
    records.append({**records[1], "label": False})
    report = analyze([read(tmp_path, records)])
    assert found(report, "good").value == pytest.approx(10 / 21)
    longer = found(report, "longer_good").value
    assert longer == pytest.approx((10 * 10 + 9 + 0.5) / (10 * 11), abs=0.1)
    assert found(report, "contradiction").count == 2
    assert {"identical", "delta"}.isdisjoint(check.name for check in report.checks)


def test_pairs_and_labels_are_not_analysed_together(tmp_path: Path) -> None:
    labels = write(tmp_path, [{"prompt": "a", "completion": "b", "label": True}], "labels.jsonl")
    with pytest.raises(InputError, match="both"):
        analyze([read(tmp_path, [pair(1)]), read_preferences(labels)])


def test_a_target_for_what_there_is_not_is_refused(tmp_path: Path) -> None:
    data = [read(tmp_path, [pair(1)])]
    with pytest.raises(InputError, match="got 'lenght'"):
        analyze(data, {**TARGETS, "lenght": 0.1})
    with pytest.raises(InputError, match="duplicate has no target"):
        analyze(data, TARGETS, (*CRITICAL, "duplicate"))


def test_filter_takes_what_analyze_counted_and_says_why(tmp_path: Path) -> None:
    records = [pair(i) for i in range(10)] + [
        pair(20, chosen="x", rejected="x"),
        pair(0),
        pair(21, score_chosen=1.0),
    ]
    data = read(tmp_path, records)
    filtered = apply_rules(data, default_rules(data))
    assert filtered.stay.to_list() == list(range(10))
    assert [s["lost"] for s in filtered.funnel["steps"]] == [0, 1, 1, 1, 0]
    assert filtered.funnel["steps"][-1]["left"] == 10
    reasons = {r["rule"]: r["reason"] for r in filtered.fallen.iter_rows(named=True)}
    assert reasons["identical"] == "chosen and rejected are equal"
    assert reasons["inverted"] == "chosen scores 1.0, rejected 3.0"
    assert reasons["duplicate"].endswith("pairs.jsonl:1")


RULE_TEXTS = [name if name != "min_delta" else "min_delta=0.1" for name in RULES]


@settings(max_examples=20)
@given(
    st.lists(
        st.fixed_dictionaries({
            "prompt": st.sampled_from(["a", "b", "long enough to have shingles", " "]),
            "chosen": st.sampled_from(["x", "y", "I'm just an AI.", ""]),
            "rejected": st.sampled_from(["x", "y", "I can't help with that."]),
            "score_chosen": st.floats(0, 1),
            "score_rejected": st.floats(0, 1),
        }),
        min_size=1, max_size=8,
    ),
    st.lists(st.sampled_from(RULE_TEXTS), unique=True, max_size=4),
)  # fmt: skip
def test_no_row_is_lost_without_a_reason(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], rules: list[str]
) -> None:
    data = read(tmp_path_factory.mktemp("rows"), records)
    filtered = apply_rules(data, rules)
    assert filtered.stay.len() + filtered.fallen.height == len(records)
    assert filtered.fallen["reason"].null_count() == 0
    stays = data.table["where"].gather(filtered.stay)
    assert set(stays) | set(filtered.fallen["where"]) == set(data.table["where"])
    lost = [step["lost"] for step in filtered.funnel["steps"]]
    assert sum(lost) == filtered.fallen.height
    again = apply_rules(data, rules)
    assert again.stay.equals(filtered.stay)


def test_kept_records_are_as_they_were(tmp_path: Path) -> None:
    odd = '{"rejected":"x",  "prompt": "p", "chosen": "x", "kept": {"as": [1, "is"]}}'
    good = '{"prompt": "q",   "chosen": "y", "rejected": "z", "kept": {"as": [1, "is"]}}'
    path, out = tmp_path / "pairs.jsonl", tmp_path / "kept.jsonl"
    path.write_text(f"{odd}\n{good}\n")
    data = read_preferences(path)
    write_kept(data, apply_rules(data, ["identical"]).stay, out)
    assert out.read_text() == f"{good}\n"
    table = pl.DataFrame([{"prompt": "p", "chosen": "x", "rejected": "x", "ids": [1, 2]},
                          {"prompt": "p", "chosen": "x", "rejected": "y", "ids": [3]}])  # fmt: skip
    table.write_parquet(tmp_path / "pairs.parquet")
    data = read_preferences(tmp_path / "pairs.parquet")
    write_kept(data, apply_rules(data, ["identical"]).stay, tmp_path / "kept.parquet")
    assert pl.read_parquet(tmp_path / "kept.parquet").equals(table[1:])
    with pytest.raises(InputError, match="pairs convert"):
        write_kept(data, pl.Series([0]), out)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["identcal"], "got 'identcal'"),
        (["identical=2"], "takes no value"),
        (["min_delta=much"], "needs a number"),
        (["min_delta"], "needs a value"),
        (["near_duplicate=7"], "above 0 and at most 1"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(
    rules: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        apply_rules(read(tmp_path, [pair(1), pair(2)]), rules)


def test_the_command_says_exits_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path, [pair(i, chosen="x", rejected="x") for i in range(3)] + [pair(9)]))
    out = str(tmp_path / "kept.jsonl")
    assert cli.main(["pairs", "analyze", path]) == 3
    shown = capsys.readouterr()
    assert "explicit, 4 pairs of 4 prompts" in shown.out
    assert "critical checks failed: identical is 75.0%, must be < 5.0%" in shown.err
    assert cli.main(["pairs", "analyze", path, "--critical", "none", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["failed"]) == (4, [])
    assert {"name", "value", "low", "high", "target", "verdict"} <= report["checks"][0].keys()
    assert cli.main(["pairs", "analyze", path, "--target", "identical=0.8"]) == 0
    assert cli.main(["pairs", "analyze", path, "--critical", "revised_wins"]) == 2
    assert "can't be measured" in capsys.readouterr().err
    fallen = str(tmp_path / "fallen.jsonl")
    assert cli.main(["pairs", "filter", path, out, "--fallen", fallen]) == 0
    assert "1 of 4 (25.0%) written" in capsys.readouterr().out
    assert len(Path(fallen).read_text().splitlines()) == 3
    assert cli.main(["pairs", "filter", path, path]) == 2
    other = str(tmp_path / "other.jsonl")
    for wrong in (other, str(tmp_path / "fell.csv")):
        assert cli.main(["pairs", "filter", path, other, "--fallen", wrong]) == 2
        assert not Path(other).exists(), "nothing is written where something is refused"
    (tmp_path / "folder.jsonl").mkdir()
    for taken in ("folder.jsonl", "kept.jsonl/below.jsonl"):
        assert cli.main(["pairs", "filter", path, str(tmp_path / taken)]) == 2
        assert "must be a file or folder that can be written" in capsys.readouterr().err
    chat = str(tmp_path / "chat.parquet")
    assert cli.main(["pairs", "convert", out, chat, "--to", "explicit-chat"]) == 0
    assert "nothing is lost" in capsys.readouterr().out
    assert cli.main(["pairs", "convert", out, chat, "--to", "chat"]) == 2
    assert cli.main(["pairs", "analyze", str(tmp_path / "absent.jsonl")]) == 2
    assert cli.main(["pairs", "analyze", path, "--rollout.temperature", "1"]) == 2
