"""Figures on public judgements equal other libraries'; planted judges get their due."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    f1_score,
    precision_score,
    recall_score,
)

from launch.cli import main
from rlhf.calibration import Finding, Use, calibrate
from rlhf.config_calibration import Calibration, Thresholds
from rlhf.judged import collect
from rlhf.judgements import WINNERS, Gold, Order, Verdict

Array = np.ndarray[Any, Any]
QUICK = Calibration(bootstrap=400)
FLOOR = Use(floor=0.6)
ORDERS: tuple[Order, Order] = ("ab", "ba")


def data(name: str) -> Path:
    if "PAIRLOOP_DATA" not in os.environ:
        pytest.skip(f"PAIRLOOP_DATA is unset: it names the folder that holds {name}")
    return Path(os.environ["PAIRLOOP_DATA"]) / name


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def command(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    verdicts: Iterable[Mapping[str, Any]],
    gold: Iterable[Mapping[str, Any]],
    *flags: str,
) -> dict[str, dict[str, Any]]:
    """What `pairloop judge calibrate --json` prints, by judge."""
    files = [
        "--verdicts", jsonl(folder / "verdicts.jsonl", verdicts),
        "--gold", jsonl(folder / "gold.jsonl", gold),
    ]  # fmt: skip
    assert main(["judge", "calibrate", *files, "--json", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert isinstance(printed, list)
    return {found["judge"]: found for found in printed}


def values(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name, having checked what every metric must hold."""
    assert {"judge", "dimension", "n", "metrics", "verdict", "reasons"} <= set(found)
    assert found["verdict"] in ("granted", "refused")
    assert (found["verdict"] == "refused") == bool(found["reasons"])
    for name, metric in found["metrics"].items():
        assert {"value", "low", "high", "n", "detectable"} == set(metric), name
        assert metric["low"] <= metric["value"] <= metric["high"], name
        assert metric["n"] > 0
    return {name: metric["value"] for name, metric in found["metrics"].items()}


def vote(labels: Sequence[str]) -> str | None:
    label, votes = Counter(labels).most_common(1)[0]
    return label if 2 * votes > len(labels) else None


def kappa_of(one: Sequence[str | None], other: Sequence[str | None]) -> float:
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return float(cohen_kappa_score(*zip(*both, strict=True)))


def test_pandalm_against_three_annotators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data("pandalm_human_judgements")
    humans = json.loads((folder / "human.json").read_text(encoding="utf-8"))
    machines = rows(folder / "judges.jsonl")
    words = {"0": "tie", "Tie": "tie", "1": "a", "2": "b", "garbage": None}
    people = [[words[str(row[f"annotator{k}"])] for row in humans] for k in (1, 2, 3)]
    judges = {
        name: [words[str(row[f"{name}_result"])] for row in machines]
        for name in ("gpt35", "pandalm7b")
    }
    found = command(
        tmp_path,
        capsys,
        (
            {"item_id": row["idx"], "judge": name, "dimension": "quality", "winner": winner}
            for name, winners in judges.items()
            for row, winner in zip(machines, winners, strict=True)
        ),
        (
            {"item_id": row["idx"], "dimension": "quality", "annotator": k, "winner": label}
            for k, labels in enumerate(people)
            for row, label in zip(humans, labels, strict=True)
        ),
    )
    gold = [vote(labels) for labels in zip(*people, strict=True)]
    rest = [[vote(two) for two in zip(*others, strict=True)] for others in without_one(people)]
    for name, winners in judges.items():
        settled = [(g, str(w)) for g, w in zip(gold, winners, strict=True) if g is not None]
        decided = [(g, w) for g, w in settled if g != "tie"]
        expected = {
            "accuracy": accuracy_score(*zip(*settled, strict=True)),
            "within_prompt_accuracy": accuracy_score(*zip(*decided, strict=True)),
            "kappa": kappa_of(gold, winners),
            "human_kappa": fmean(kappa_of(*two) for two in combinations(people, 2)),
            "human_vs_rest": fmean(
                kappa_of(person, others) for person, others in zip(people, rest, strict=True)
            ),
            "kappa_vs_rest": fmean(kappa_of(winners, others) for others in rest),
        }
        assert values(found[name]) == pytest.approx(expected, abs=1e-9)
        assert found[name]["n"] == 500
        assert found[name]["left_out"]["abstained"] == winners.count(None)
        assert found[name]["left_out"]["no_majority"] == gold.count(None)


def without_one(people: Sequence[Any]) -> list[list[Any]]:
    return [[p for p in people if p is not person] for person in people]


def test_llmbar_accuracy_and_order_consistency_of_every_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = rows(data("llmbar") / "llmbar_judgements.jsonl")
    words = {"1": "a", "2": "b"}
    names = list(items[0]["judgements"])
    found = command(
        tmp_path,
        capsys,
        (
            {
                "item_id": item["id"],
                "judge": name,
                "dimension": "instruction",
                "order": order,
                "winner": words.get(winner),
            }
            for item in items
            for name in names
            for order, winner in zip(("ab", "ba"), item["judgements"][name], strict=True)
        ),
        (
            {"item_id": i["id"], "dimension": "instruction", "winner": words[str(i["label"])]}
            for i in items
        ),
    )
    assert list(found) == names
    for name in names:
        said = [item["judgements"][name] for item in items]
        labels = [str(item["label"]) for item in items]
        right = [one == other == label for (one, other), label in zip(said, labels, strict=True)]
        answered = [two for two in said if None not in two]
        first = [(one == "1", other == "2") for one, other in said]
        expected = {
            "accuracy": fmean(right),
            "within_prompt_accuracy": fmean(right),
            "order_consistency": fmean(one == other for one, other in answered),
            "first_position_rate": sum(map(sum, first))
            / sum(winner is not None for two in said for winner in two),
        }
        got = values(found[name])
        assert {n: got[n] for n in expected} == pytest.approx(expected, abs=1e-9)
    assert found["GPT-4/CoT"]["verdict"] == "granted"
    assert found["Falcon/Vanilla"]["verdict"] == "refused"


def test_prometheus_test_retest_and_pearson(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of GPT-4 against a third."""
    items = rows(data("prometheus_mtbench_scores") / "mtbench_absolute_scores.jsonl")
    scores = np.array([item["gpt4_score"] for item in items])
    verdicts = [
        {
            "item_id": place,
            "judge": "gpt4",
            "dimension": "quality",
            "prompt_id": item["idx"],
            "run": run,
            "score": item["gpt4_score"][run],
        }
        for place, item in enumerate(items)
        for run in (0, 1)
    ]
    gold = [
        {"item_id": place, "dimension": "quality", "score": item["gpt4_score"][2]}
        for place, item in enumerate(items)
    ]
    third, mean = scores[:, 2], scores[:, :2].mean(axis=1)
    found = command(tmp_path, capsys, verdicts, gold)["gpt4"]
    expected = {
        "retest_sd": math.sqrt(fmean(np.var(scores[:, :2], axis=1, ddof=1))),
        "pearson": stats.pearsonr(mean, third).statistic,
        "spearman": stats.spearmanr(mean, third).statistic,
        "kendall": stats.kendalltau(mean, third).statistic,
        "within_prompt_accuracy": ordered([i["idx"] for i in items], mean, third),
    }
    assert values(found) == pytest.approx(expected, abs=1e-9)
    assert found["votes"] == 2

    once = command(tmp_path, capsys, verdicts, gold, "--calibration.repeats", "first")["gpt4"]
    first = scores[:, 0]
    expected |= {
        "pearson": stats.pearsonr(first, third).statistic,
        "spearman": stats.spearmanr(first, third).statistic,
        "kendall": stats.kendalltau(first, third).statistic,
        "within_prompt_accuracy": ordered([i["idx"] for i in items], first, third),
        "kappa": cohen_kappa_score(first, third),
        "kappa_quadratic": cohen_kappa_score(first, third, weights="quadratic"),
    }
    assert values(once) == pytest.approx(expected, abs=1e-9)


def ordered(prompts: Sequence[Any], judged: Iterable[float], gold: Iterable[float]) -> float:
    """Share of same-prompt pairs with different gold that are ordered as gold does."""
    groups = defaultdict(list)
    for prompt, score, label in zip(prompts, judged, gold, strict=True):
        groups[prompt].append((score, label))
    hits = [
        (one[0] - other[0]) * (one[1] - other[1]) > 0
        for group in groups.values()
        for one, other in combinations(group, 2)
        if one[1] != other[1]
    ]
    return fmean(hits)


@pytest.mark.slow
def test_frank_metrics_as_judges_of_factuality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = rows(data("frank_factuality") / "frank_human_vs_metrics.jsonl")
    names = list(items[0]["metrics"])
    found = command(
        tmp_path,
        capsys,
        (
            {
                "item_id": f"{item['hash']}/{item['model_name']}",
                "judge": name,
                "dimension": "factuality",
                "prompt_id": item["hash"],
                "score": item["metrics"][name],
            }
            for name in names
            for item in items
        ),
        (
            {
                "item_id": f"{item['hash']}/{item['model_name']}",
                "dimension": "factuality",
                "score": item["human_factuality"],
            }
            for item in items
        ),
        "--selection.floors.factuality",
        "0.7",
    )
    prompts = [item["hash"] for item in items]
    human = np.array([item["human_factuality"] for item in items])
    for name in names:
        score = np.array([item["metrics"][name] for item in items], dtype=float)
        known = ~np.isnan(score)
        expected = {
            "within_prompt_accuracy": ordered(prompts, score, human),
            "pearson": stats.pearsonr(score[known], human[known]).statistic,
            "spearman": stats.spearmanr(score[known], human[known]).statistic,
            "kendall": stats.kendalltau(score[known], human[known]).statistic,
        }
        if score[known].max() <= 1 and score[known].min() >= 0:
            good, passed = human >= 0.7, np.nan_to_num(score, nan=-1.0) >= 0.7
            if passed.any():
                expected |= {
                    "precision": precision_score(good, passed),
                    "f1": f1_score(good, passed),
                }
            expected["recall"] = recall_score(good, passed)
            if not passed.any():
                expected["f1"] = 0.0
        assert values(found[name]) == pytest.approx(expected, abs=1e-9), name
    bleu = " ".join(found["Bleu"]["reasons"])
    assert "floor 0.7: a floor is a score in [0, 1], but scores run from" in bleu


# Planted judges: 150 prompts with four answers each, gold in [0, 1].
PROMPTS, ANSWERS = 150, 4


def answers(seed: int = 0) -> tuple[Array, Array, Array]:
    """Gold, length and prompt of every answer; gold is spread between prompts and within them."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(PROMPTS), ANSWERS)
    gold = rng.uniform(0.1, 0.6, PROMPTS)[prompts] + rng.uniform(0, 0.3, len(prompts))
    return gold, rng.integers(10, 200, len(prompts)).astype(float), prompts


def finding(
    score: Array,
    gold: Array,
    lengths: Array,
    prompts: Array,
    use: Use = FLOOR,
    settings: Calibration = QUICK,
) -> Finding:
    verdicts = [
        Verdict(str(i), "planted", "correctness", False, float(s), f"p{p}", length=float(n))
        for i, (s, n, p) in enumerate(zip(score, lengths, prompts, strict=True))
    ]
    labels = [Gold(str(i), "correctness", False, float(g)) for i, g in enumerate(gold)]
    (found,) = calibrate(verdicts, labels, settings, lambda dimension: use)
    return found


def test_gold_with_a_little_noise_is_granted_everything() -> None:
    gold, lengths, prompts = answers()
    noise = np.random.default_rng(1).normal(0, 0.05, len(gold))
    found = finding(np.clip(gold + noise, 0, 1), gold, lengths, prompts)
    assert (found.verdict, found.reasons) == ("granted", ())
    assert found.purposes == {"pairs": "granted", "floor": "granted"}


def test_a_constant_offset_is_fine_for_pairs_and_refused_as_a_floor() -> None:
    gold, lengths, prompts = answers()
    found = finding(gold * 0.99 + 0.1, gold, lengths, prompts)
    assert found.purposes == {"pairs": "granted", "floor": "refused"}
    assert found.verdict == "refused"
    assert all(
        reason.startswith("floor 0.6: precision may be as low as") for reason in found.reasons
    )
    for_pairs = finding(gold * 0.99 + 0.1, gold, lengths, prompts, Use())
    assert (for_pairs.verdict, for_pairs.purposes) == ("granted", {"pairs": "granted"})


def test_an_offset_the_other_way_fails_on_recall() -> None:
    gold, lengths, prompts = answers()
    found = finding(gold * 0.99 - 0.1, gold, lengths, prompts)
    assert found.purposes == {"pairs": "granted", "floor": "refused"}
    assert "floor 0.6: recall may be as low as" in found.reasons[0]


def test_right_across_prompts_and_wrong_within_them_is_refused() -> None:
    gold, lengths, prompts = answers()
    mean = np.bincount(prompts, gold)[prompts] / ANSWERS
    found = finding(2 * mean - gold, gold, lengths, prompts, Use())
    assert found.metrics["pearson"].value > 0.5
    assert found.metrics["within_prompt_accuracy"].value == 0.0
    assert found.verdict == "refused"
    assert found.reasons[0].startswith("pairs: within_prompt_accuracy may be as low as 0.000")


def test_a_random_judge_is_refused() -> None:
    gold, lengths, prompts = answers()
    found = finding(np.random.default_rng(3).uniform(0, 1, len(gold)), gold, lengths, prompts)
    assert found.purposes == {"pairs": "refused", "floor": "refused"}
    assert "within_prompt_accuracy" in " ".join(found.reasons)


def test_the_longer_answer_is_refused_for_its_bias() -> None:
    gold, lengths, prompts = answers()
    found = finding(lengths / 200, gold, lengths, prompts, Use())
    assert found.metrics["length_bias"].value > 0.95
    assert any(reason.startswith("length_bias may be +1.000") for reason in found.reasons)
    assert any("within_prompt_accuracy" in reason for reason in found.reasons)


def test_a_judge_that_passes_everything_is_no_floor() -> None:
    """With nine good answers in ten its precision and recall look fine."""
    gold, lengths, prompts = answers()
    found = finding(np.full(len(gold), 0.9), np.where(gold > 0.3, 0.9, 0.1), lengths, prompts)
    assert found.metrics["precision"].low > 0.8
    assert any("no better than letting every answer pass" in reason for reason in found.reasons)


def test_a_noisy_judge_is_refused_by_its_retest() -> None:
    gold, _, prompts = answers()
    rng = np.random.default_rng(5)
    verdicts = [
        Verdict(str(i), "noisy", "style", False, g + rng.normal(0, 0.4), f"p{p}", run=str(run))
        for i, (g, p) in enumerate(zip(gold, prompts, strict=True))
        for run in range(12)
    ]
    labels = [Gold(str(i), "style", False, float(g)) for i, g in enumerate(gold)]
    (found,) = calibrate(verdicts, labels, QUICK, lambda d: Use())
    assert found.metrics["retest_sd"].value == pytest.approx(0.4, abs=0.02)
    assert found.purposes == {"pairs": "refused"}
    assert found.reasons[0].startswith("retest_sd may be as high as")


def pairs(
    judge: Callable[[str, float, str], str | None], number: int = 300
) -> tuple[list[Verdict], list[Gold]]:
    """Verdicts in both orders of a judge of (better answer, a's surplus length, order)."""
    rng = np.random.default_rng(8)
    verdicts, gold = [], []
    for i in range(number):
        better, longer = rng.choice(["a", "b"]), float(rng.integers(-50, 51))
        gold.append(Gold(str(i), "quality", True, WINNERS[better]))
        for order in ORDERS:
            said = judge(better, longer, order)
            value = None if said is None else WINNERS[said]
            verdicts.append(
                Verdict(str(i), "j", "quality", True, value, f"p{i}", order, length=longer)
            )
    return verdicts, gold


def of_pairs(judge: Callable[[str, float, str], str | None]) -> Finding:
    (found,) = calibrate(*pairs(judge), QUICK, lambda d: Use())
    return found


def test_always_a_is_refused() -> None:
    found = of_pairs(lambda better, longer, order: "a")
    assert found.metrics["accuracy"].value == pytest.approx(0.5, abs=0.1)
    assert found.metrics["order_consistency"].value == 1.0
    assert found.metrics["first_position_rate"].value == 0.5
    assert found.verdict == "refused"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith("pairs: within_prompt_accuracy may be")


def test_always_the_first_shown_is_refused_for_its_position_bias() -> None:
    found = of_pairs(lambda better, longer, order: order[0])
    assert found.metrics["accuracy"].value == 0.0
    assert found.metrics["order_consistency"].value == 0.0
    assert found.metrics["first_position_rate"].value == 1.0
    assert [reason.split(" may be ")[0] for reason in found.reasons] == [
        "order_consistency",
        "first_position_rate",
        "pairs: within_prompt_accuracy",
    ]


def test_the_longer_of_two_is_refused() -> None:
    found = of_pairs(lambda better, longer, order: "a" if longer > 0 else "b")
    assert any(reason.startswith("length_bias may be +") for reason in found.reasons)
    assert found.verdict == "refused"


def test_a_judge_of_pairs_that_knows_is_granted_and_is_no_floor() -> None:
    rng = np.random.default_rng(4)
    other = {"a": "b", "b": "a"}

    def judge(better: str, longer: float, order: str) -> str:
        return better if rng.random() < 0.9 else other[better]

    assert of_pairs(judge).verdict == "granted"
    (found,) = calibrate(*pairs(judge), QUICK, lambda d: Use(floor=0.6))
    assert found.purposes == {"pairs": "granted", "floor": "refused"}
    assert found.reasons == ("floor 0.6: verdicts on pairs don't say which answers pass a floor",)


@pytest.mark.parametrize("good", ["pairs", "answers"])
def test_gold_on_pairs_decides_about_pairs_and_gold_on_answers_about_the_floor(good: str) -> None:
    other = {"a": "b", "b": "a"}
    knows = good == "pairs"
    verdicts, labels = pairs(lambda better, _, __: better if knows else other[better])
    (dimension,) = {verdict.dimension for verdict in verdicts}
    rng = np.random.default_rng(9)
    grades = rng.integers(0, 2, 300)
    for place, grade in enumerate(grades):
        item, prompt = f"answer {place}", f"prompt {place % 60}"
        score = float(grade if not knows else 1 - grade)
        verdicts.append(Verdict(item, verdicts[0].judge, dimension, False, score, prompt))
        labels.append(Gold(item, dimension, False, float(grade)))
    (found,) = calibrate(verdicts, labels, QUICK, lambda d: Use(floor=0.6))
    granted, refused = ("pairs", "floor") if knows else ("floor", "pairs")
    assert found.purposes == {granted: "granted", refused: "refused"}
    assert found.metrics["within_prompt_accuracy"].value == float(knows)
    assert found.metrics["precision"].value == float(not knows)
    assert found.n == 300 + len({v.item_id for v in verdicts if v.pairwise})


def test_few_labels_refuse_what_more_of_them_grant() -> None:
    gold, _, prompts = answers()
    lengths = np.ones(len(gold))
    noise = np.random.default_rng(1).normal(0, 0.13, len(gold))
    few = prompts < 8
    score = gold + noise
    small = finding(score[few], gold[few], lengths[few], prompts[few], Use())
    large = finding(score, gold, lengths, prompts, Use())
    assert small.metrics["within_prompt_accuracy"].value > 0.6
    assert small.verdict == "refused"
    assert len(small.reasons) == 1
    assert small.reasons[0].startswith("pairs: within_prompt_accuracy may be as low as")
    assert large.verdict == "granted"
    assert (
        small.metrics["within_prompt_accuracy"].detectable
        > 2 * large.metrics["within_prompt_accuracy"].detectable
    )


def test_without_prompts_the_question_of_selection_is_not_answered() -> None:
    gold, _, _ = answers()
    verdicts = [Verdict(str(i), "j", "style", False, float(g)) for i, g in enumerate(gold)]
    labels = [Gold(str(i), "style", False, float(g)) for i, g in enumerate(gold)]
    (found,) = calibrate(verdicts, labels, QUICK, lambda d: Use())
    assert "within_prompt_accuracy" not in found.metrics
    assert found.verdict == "refused"
    assert "no prompt_id has two items" in found.reasons[0]


def test_further_agreement_can_be_asked_for() -> None:
    gold, lengths, prompts = answers()
    asked = Calibration(bootstrap=400, thresholds=Thresholds(agreement={"spearman": 0.9999}))
    noise = np.random.default_rng(1).normal(0, 0.05, len(gold))
    found = finding(gold + noise, gold, lengths, prompts, Use(), asked)
    assert found.reasons[0].startswith("spearman may be as low as")
    kappa = Calibration(bootstrap=400, thresholds=Thresholds(agreement={"kappa": 0.4}))
    found = finding(gold + noise, gold, lengths, prompts, Use(), kappa)
    assert found.reasons[0].startswith("kappa can't be measured")


def test_items_without_a_majority_are_left_out_and_counted() -> None:
    verdicts = [Verdict(str(i), "j", "q", True, 1.0, f"p{i}") for i in range(12)]
    gold = [Gold(str(i), "q", True, 1.0, name) for i in range(12) for name in ("x", "y")]
    gold = [g for g in gold if (g.item_id, g.annotator) != ("3", "y")]
    gold.append(Gold("3", "q", True, -1.0, "y"))
    gold.append(Gold("unjudged", "q", True, -1.0, "y"))
    verdicts.append(Verdict("unlabelled", "j", "q", True, 1.0))
    (found,) = calibrate(verdicts, gold, QUICK, lambda d: Use())
    assert found.n == 12
    assert found.metrics["accuracy"].n == 11
    assert found.left_out == {"no_gold": 1, "no_verdict": 1, "abstained": 0, "no_majority": 1}


def test_orders_that_disagree_are_a_tie_and_runs_vote() -> None:
    def said(*values: tuple[str, Order, float | None]) -> float | None:
        verdicts = [
            Verdict("i", "j", "q", True, value, None, order, run) for run, order, value in values
        ]
        (judged,) = collect(verdicts, [Gold("i", "q", True, 1.0)], "mean")
        value = float(judged.values[0])
        return None if math.isnan(value) else value

    assert said(("0", "ab", 1.0), ("0", "ba", 1.0)) == 1.0
    assert said(("0", "ab", 1.0), ("0", "ba", -1.0)) == 0.0
    assert said(("0", "ab", 1.0), ("0", "ba", None)) is None
    assert said(("0", "ab", 1.0), ("1", "ab", 1.0), ("2", "ab", -1.0)) == 1.0
    assert said(("0", "ab", 1.0), ("1", "ab", -1.0)) == 0.0
    assert said(("0", "ab", 1.0), ("1", "ab", None)) == 1.0


@pytest.mark.slow
def test_thousands_of_items_take_seconds() -> None:
    """4000 answers with every metric of scores and 2000 resamples."""
    rng = np.random.default_rng(0)
    gold = rng.integers(1, 6, 4000).astype(float)
    score = np.clip(gold + rng.integers(-1, 2, 4000), 1, 5)
    lengths, prompts = rng.integers(1, 500, 4000), np.arange(4000) // 4
    started = time.process_time()
    found = finding((score - 1) / 4, (gold - 1) / 4, lengths, prompts, settings=Calibration())
    assert len(found.metrics) == 10
    assert time.process_time() - started < 20
