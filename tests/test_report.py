"""`report.html` says what the run's folder holds, whatever state it is in, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from report_runs import Runs, make_config

from launch.cli import main
from rlhf.document import visible
from rlhf.errors import InputError
from rlhf.files import sha256_tree, write_parquet
from rlhf.report import data, render, write_report
from rlhf.report.answers import mark_pairs
from rlhf.report.prompts import EXTREMES, browser
from rlhf.rounds import RunStore
from rlhf.run_view import RunView
from rlhf.summary import write_summary
from rlhf.verdict import stamps, verdict


class Page(HTMLParser):
    """What a browser makes of a page, as far as these tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "script":
            self.scripts.append(found)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag in ("td", "th"):
            self.handle_data(" ")
        if tag not in ("meta", "link", "input"):
            self._open.append((tag, found.get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, "elements are nested and closed"

    def handle_data(self, text: str) -> None:
        for _, key in self._open:
            if key:
                self.texts[key] = self.texts.get(key, "") + text

    @property
    def data(self) -> Any:
        """The JSON of the browser of prompts."""
        return json.loads(self.texts["data"])


@pytest.fixture(scope="module")
def improved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, both better than the start, the second the best."""
    return Runs(make_config(tmp_path_factory.mktemp("improved")), [0.4, 0.6, 0.7]).finish()


@pytest.fixture
def page(improved: Path) -> Page:
    return Page(render(RunView(improved)))


def without_pairs(runs: Runs) -> Path:
    runs.start()
    runs.sample(1, flat=True)
    assert runs.select(1) == 0
    runs.store.status("failed", reason="round 1: no pair is left of 24 prompts")
    return runs.close()


def interrupted(runs: Runs) -> Path:
    runs.start()
    runs.go_round(1)
    runs.sample(2)
    reason = "stopped at a safe point by SIGTERM; run the same command to resume"
    runs.store.status("interrupted", reason=reason, best_round=1, promoted=[1])
    return runs.close()


def broken(runs: Runs) -> Path:
    runs.start()
    runs.store.status("failed", reason="a generator does not serve version 1.\nmore about it")
    return runs.close()


def under_way(runs: Runs) -> Path:
    runs.start()
    runs.go_round(1)
    runs.sample(2)
    runs.store.status("running", best_round=1, promoted=[1])
    return runs.close()


ENDINGS = {
    "improved": ([0.4, 0.6, 0.7], Runs.finish, r"The policy improved: .*final split round 2 "),
    "unclear": ([0.5, 0.5, 0.501], Runs.finish, r"The policy shows no certain change: "),
    "worse": ([0.9, 0.6, 0.6], Runs.finish, r"The policy got worse: .*final split round 1 "),
    "failed": ([0.6, 0.3, 0.3], Runs.finish, r"A gate stopped the run at round 1 of 2 \(corr"),
    "stopped": ([0.4, 0.7, 0.3], Runs.finish, r"A gate stopped the run at round 2 of 2 .* split"),
    "failed, no pairs": (
        [0.4] * 3,
        without_pairs,
        r"for want of pairs: none is left of the 24 prompts of round 1, .*\(24\) fell at margin",
    ),
    "interrupted": ([0.4] * 3, interrupted, r"was interrupted after 1 of 2 rounds: .*SIGTERM"),
    "failed, broken": (
        [0.4] * 3,
        broken,
        r"The run failed: a generator does not serve version 1\.",
    ),
    "unfinished": (
        [0.4, 0.6, 0.6],
        under_way,
        r"is not finished: 1 of 2 rounds judged, .* round 1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_first_sentence_says_how_the_run_ended(ending: str, tmp_path: Path) -> None:
    levels, end, says = ENDINGS[ending]
    lenient = {"max_drop": 1.0} if ending in ("unclear", "worse", "interrupted") else {}
    config = make_config(tmp_path, gates=lenient)
    folder = end(Runs(config, levels))
    run = RunView(folder)
    assert verdict(run).tone == ending.split(",", maxsplit=1)[0]
    sentence = verdict(run).sentence
    assert re.search(says, sentence), sentence
    assert Page(render(run)).texts["verdict"] == sentence
    with RunStore.open(config) as store:
        write_summary(store, config)
    assert f"\n\n**{sentence}**\n" in (folder / "summary.md").read_text()


def states(folder: Path, copy: Path) -> Iterator[list[str]]:
    """States that a run of one round can be found in: artifacts come in the order of making."""
    shutil.copytree(folder, copy)
    (copy / "status.json").unlink()
    manifests = {
        path: json.loads(path.read_text())
        for path in (copy / "rounds/0000/manifest.json", copy / "rounds/0001/manifest.json")
    }
    names = [(path, name) for path, kept in manifests.items() for name in kept["artifacts"]]
    start = len(manifests[copy / "rounds/0000/manifest.json"]["artifacts"])
    for count in (0, 1, 3, *range(start, len(names) + 1)):
        for path, manifest in manifests.items():
            done = [name for where, name in names[:count] if where == path]
            artifacts = {name: manifest["artifacts"][name] for name in done}
            path.write_text(json.dumps({**manifest, "artifacts": artifacts}))
        yield [name for _, name in names[:count]]


@pytest.mark.slow
def test_a_run_in_any_state_can_be_reported(tmp_path: Path) -> None:
    runs = Runs(make_config(tmp_path), [0.4, 0.6, 0.6], prompts=6)
    runs.start()
    runs.go_round(1)
    seen = []
    for done in states(runs.close(), tmp_path / "copy"):
        text = render(RunView(tmp_path / "copy"))
        seen.append(verdict(RunView(tmp_path / "copy")).sentence)
        assert "The run is not finished" in text, done
    assert "the start is not evaluated yet" in seen[0]
    assert "1 of 2 rounds judged" in seen[-1]
    (tmp_path / "copy" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "copy" / "rounds")
    assert "No prompt has been answered yet" in render(RunView(tmp_path / "copy"))


def test_reading_neither_locks_nor_changes_a_run_that_goes_on(tmp_path: Path) -> None:
    runs = Runs(make_config(tmp_path), [0.4, 0.6, 0.6], prompts=6)
    runs.start()
    with (runs.store.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 1, "stage": "train", "st')
    before = sha256_tree(runs.store.folder)
    out = tmp_path / "elsewhere" / "page.html"
    assert write_report(runs.store.folder, out) == out
    assert sha256_tree(runs.store.folder) == before
    runs.go_round(1)
    runs.close()


@pytest.mark.slow
def test_the_same_folder_gives_the_same_bytes(improved: Path) -> None:
    assert render(RunView(improved)) == render(RunView(improved))


def test_what_an_older_run_did_not_keep_is_left_out(improved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(improved, folder)
    for path in folder.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        for name in ("prompts", "pools", "greedy/completions", "greedy/scores"):
            manifest["artifacts"].pop(name, None)
        path.write_text(json.dumps(manifest))
    found = Page(render(RunView(folder))).data["entries"]
    in_pairs = [entry for entry in found if "margin" in entry]
    assert in_pairs
    assert all("question" in entry["prompt"] for entry in in_pairs)
    assert all("prompt" not in entry for entry in found if entry["split"] == "gate")


def test_the_numbers_are_those_of_the_run(improved: Path, page: Page) -> None:
    def stored(name: str) -> Any:
        return json.loads((improved / name).read_text())

    claim = stored("final/evaluation.json")["change"]
    for name in ("reward", "correctness", "style", "audit.words"):
        assert f"{claim[name]['difference']:+.3f}" in page.texts["scores"]
        assert f"{claim[name]['smallest_detectable']:.3f}" in page.texts["scores"]
    for index in (1, 2):
        (gate,) = stored(f"rounds/000{index}/gates.json")["gates"]
        shown = " ".join(page.texts["gates"].split())
        bounds = f"{gate['low']:+.3f} to {gate['high']:+.3f} {gate['threshold']:+.3f}"
        assert f"{gate['value']:+.3f} {bounds}" in shown
        assert f"{gate['smallest_detectable']:.3f} ▲ pass" in shown
        funnel = stored(f"rounds/000{index}/funnel.json")
        for step in funnel["steps"]:
            assert step["step"] in page.texts["funnel"]
            if step["lost_completions"]:
                assert step["why"] in page.texts["funnel"]
        assert f"keeps {funnel['yield']['largest_admissible']} pairs" in page.texts["funnel"]
        for name, found in stored(f"rounds/000{index}/drift.json").items():
            assert f"{found['value']:.3f} (" in page.texts["training"], name
    assert "style (the chosen answers score lower on average)" in page.texts["pairs"]
    assert page.texts["pairs"].count("▼ inverted") >= 2


def test_chosen_minus_rejected_is_the_mean_over_pairs(improved: Path) -> None:
    pairs = pl.read_parquet(improved / "rounds/0001/pairs.parquet")
    found = data.pairs(RunView(improved))[0]
    gaps = pairs.select(
        pl.col("scores_chosen").struct.field("style")
        - pl.col("scores_rejected").struct.field("style")
    ).to_series()
    assert found.dimensions["style"].value == pytest.approx(gaps.to_numpy().mean())
    assert found.inverted["style"] == pytest.approx(float((gaps < 0).to_numpy().mean()))
    assert found.margin[2] == pytest.approx(float(pairs["margin"].to_numpy().mean()), abs=0.2)
    longer = pairs["chosen_token_ids"].list.len() > pairs["rejected_token_ids"].list.len()
    assert found.chosen_longer == pytest.approx(float(longer.to_numpy().mean()))


def test_the_loops_share_is_what_passed_between_the_stages(improved: Path) -> None:
    run = RunView(improved)
    found = data.timing(run, run.metrics(), data.pairs(run))
    stages = sum(len(stage.by_round) for stage in found.stages)
    # Each of them took 2.0 s and was logged 0.5 s after the one before.
    assert found.loop == pytest.approx(0.5 * stages)
    assert found.wall == pytest.approx(2.5 * stages)
    assert "added 20.0% of it" in render(run)
    silent = [{k: v for k, v in line.items() if k != "loop_seconds"} for line in run.metrics()]
    assert data.timing(run, silent, []).loop is None


def test_long_curves_are_means_that_lose_no_step() -> None:
    lines = [
        {"round": 1 + step // 700, "stage": "train", "step": 1 + step % 700, "loss": float(step)}
        for step in range(1000)
    ]
    rows, size = data.curves(lines)
    assert size == 5
    assert len(rows) <= data.CURVE_POINTS
    assert [row["at"] for row in rows][-1] == 1000
    assert rows[0]["loss"] == pytest.approx((0 + 1 + 2 + 3 + 4) / 5)
    assert rows[0]["grad_norm"] is None
    assert {row["round"] for row in rows} == {1, 2}


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "]]> <!-- <b>",
    "a\u202eb\u0000c\u2028d",
    "{{ 7 * 7 }} & &lt;",
)


@pytest.fixture(scope="module")
def hostile(improved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose answers, prompts and categories try to leave their place."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(improved, folder)
    for path in folder.rglob("completions/*.parquet"):
        table = pl.read_parquet(path, hive_partitioning=False)
        said = [HOSTILE[i % len(HOSTILE)] for i in range(table.height)]
        write_parquet(table.with_columns(text=pl.Series(said)), path)
    for path in folder.rglob("prompts.parquet"):
        table = pl.read_parquet(path, hive_partitioning=False)
        # As in an SVG, in an attribute, and in the middle of a script.
        evil = [
            pl.lit(text) for text in ("<svg onload=alert(1)>", HOSTILE[0], '"><b>' + HOSTILE[3])
        ]
        columns = dict(zip(("category", "prompt", "reference"), evil, strict=True))
        write_parquet(table.with_columns(**columns), path)
    return folder


@pytest.mark.slow
def test_what_a_model_wrote_is_text(hostile: Path) -> None:
    text = render(RunView(hostile))
    page = Page(text)
    assert [script.get("type") for script in page.scripts] == ["application/json", None]
    assert not re.search("[<>&\u2028]", page.texts["data"]), "nothing in it can end the script"
    assert "onload" not in re.sub(r"<script.*", "", text.replace("&lt;svg onload", ""), flags=re.S)
    shown = {a["text"] for e in page.data["entries"] for g in e["groups"] for a in g["answers"]}
    assert shown == set(HOSTILE)
    assert {entry["category"] for entry in page.data["entries"]} == {"<svg onload=alert(1)>"}
    assert "\u202e" not in page.texts["filters"]
    assert visible("a\u202eb\x00\n") == "a⟨U+202E⟩b⟨U+0000⟩\n"


@pytest.mark.slow
def test_names_of_a_config_are_text_in_plots_too(tmp_path: Path) -> None:
    evil = "</svg><script>alert(1)</script>$x$"
    config = make_config(
        tmp_path,
        judges={"audit": [{"name": "onlooker", "function": "a:c", "dimensions": ["words"]}]},
    )
    folder = Runs(config, [0.4, 0.6, 0.7], prompts=6).finish()
    for path in folder.rglob("evaluation.json"):
        path.write_text(path.read_text().replace("audit.words", f"audit.{evil}"))
    page = Page(render(RunView(folder)))
    assert len(page.scripts) == 2
    assert evil in page.texts["scores"]


@pytest.mark.slow
def test_the_page_loads_nothing_and_its_ids_are_its_own(improved: Path, page: Page) -> None:
    assert all(link.startswith(("#", "data:,")) for link in page.loads), page.loads
    assert len(set(page.ids)) == len(page.ids)
    text = render(RunView(improved))
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) >= 12
    for plot in plots:
        assert 'role="img" aria-label="' in plot
        assert "glyph" not in plot
        assert len(plot) < 40_000
        for used in re.findall(r'xlink:href="(#[^"]+)"|url\((#[^)]+)\)', plot):
            assert f'id="{(used[0] or used[1])[1:]}"' in plot
    assert not re.search(r"20\d\d-\d\d-\d\d", "".join(plots))


@pytest.mark.slow
def test_a_reader_is_told_what_weakens_the_run(tmp_path: Path) -> None:
    early = Runs(make_config(tmp_path / "a"), [0.4, 0.7, 0.3]).finish()
    assert [stamp.name for stamp in stamps(RunView(early))] == ["Stopped early"]
    assert "Stopped early" in render(RunView(early))
    runs = Runs(
        make_config(
            tmp_path / "b",
            judges={"audit": []},
            gates={"max_drop": 0.0, "on_inconclusive": "promote"},
        ),
        [0.5, 0.5, 0.5],
    )
    unproved = RunView(runs.finish())
    assert [stamp.name for stamp in stamps(unproved)] == [
        "No audit judge", "Promoted without proof",
    ]  # fmt: skip
    assert "Uncertified judges" in [stamp.name for stamp in stamps(unproved, ["a grader"])]


LARGE = 12_500


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    """12,500 training prompts with four answers, as many gate prompts with two of two versions."""
    config = make_config(tmp_path_factory.mktemp("large"), rounds={"count": 1})
    return RunView(Runs(config, [0.4, 0.42], prompts=LARGE, characters=600).finish())


@pytest.mark.slow
def test_a_large_run_is_sampled_and_says_so(large: RunView) -> None:
    text = render(large)
    assert len(text.encode()) < 15_000_000
    page = Page(text)
    said = " ".join(page.texts["sampled"].split())
    assert "of 25,000 prompts (with 100,000 answers in all)" in said
    for kind in ("that got worse", "largest and smallest margins", "drawn at random"):
        assert kind in said
    assert len(page.data["entries"]) > 1000


def test_a_sample_keeps_what_matters_most(large: RunView) -> None:
    found = browser(large, budget=1_000_000)
    assert found is not None
    assert len(found.json.encode()) < 1_010_000
    assert found.json == getattr(browser(large, budget=1_000_000), "json", None)
    entries = json.loads(found.json)["entries"]
    worse = sorted(
        e["change"] for e in entries if e.get("change", 0) is not None and e.get("change", 0) < 0
    )
    tables = [
        pl.read_parquet(large.folder / f"rounds/{r}/evaluation/per_prompt.parquet")
        for r in ("0000", "0001")
    ]
    drops = (tables[1]["reward"] - tables[0]["reward"]).sort()
    # The worst are there without a gap; at random come others.
    assert worse[:50] == pytest.approx(drops[:50].to_list(), abs=1e-4)
    margins = pl.read_parquet(large.folder / "rounds/0001/pairs.parquet")["margin"].sort()
    shown = sorted(e["margin"] for e in entries if "margin" in e)
    assert shown[:EXTREMES] == pytest.approx(margins[:EXTREMES].to_list(), abs=1e-4)
    assert shown[-EXTREMES:] == pytest.approx(margins[-EXTREMES:].to_list(), abs=1e-4)
    assert len(shown) > 2 * EXTREMES, "a random rest stands beside the extremes"


def test_a_prompt_is_one_entry_however_many_pairs_are_made_of_it(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        rounds={"count": 1},
        selection={"floors": {"correctness": 0.3}, "strategy": "all_pairs"},
    )
    run = RunView(Runs(config, [0.4, 0.5]).finish())
    pairs = pl.read_parquet(run.folder / "rounds/0001/pairs.parquet")
    assert pairs.height > pairs["prompt_id"].n_unique()
    found = browser(run, budget=10_000_000)
    assert found is not None
    assert found.shown == found.total == 2 * 24
    entries = json.loads(found.json)["entries"]
    assert len({(e["split"], e["id"]) for e in entries}) == len(entries) == found.shown


def test_escaped_text_counts_with_what_it_takes(improved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(improved, folder)
    for path in folder.rglob("completions/*.parquet"):
        table = pl.read_parquet(path, hive_partitioning=False)
        write_parquet(table.with_columns(text=pl.lit("<&>" * 1000)), path)
    found = browser(RunView(folder), budget=300_000)
    assert found is not None
    assert 200_000 < len(found.json.encode()) < 301_000
    assert 0 < found.shown < found.total


@pytest.mark.slow
def test_a_long_text_is_cut_and_says_by_how_much(improved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(improved, folder)
    path = folder / "rounds/0001/completions/part-00000.parquet"
    table = pl.read_parquet(path, hive_partitioning=False)
    write_parquet(table.with_columns(text=pl.lit("x" * 4100)), path)
    entries = Page(render(RunView(folder))).data["entries"]
    (text,) = {
        tuple(a["text"]) for e in entries if e["split"] == "1" for a in e["groups"][0]["answers"]
    }
    assert text == ("x" * 4000, 100)


@pytest.mark.slow
def test_the_command_writes_it_where_it_is_told(
    improved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(improved), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text() == render(RunView(improved))


@pytest.mark.slow
def test_what_is_no_run_is_refused(
    improved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["report", str(improved), "--out", str(tmp_path)]) == 2
    assert "--out must be a file" in capsys.readouterr().err
    assert main(["report", str(improved), "--rollout.top_p", "1"]) == 2
    shutil.copytree(improved, tmp_path / "run")
    (tmp_path / "run/config.json").write_text('{"modle": {}}')
    with pytest.raises(InputError, match="must be a config of this version"):
        RunView(tmp_path / "run")


def test_an_answer_of_several_pairs_says_so() -> None:
    def pair(chosen: int, rejected: int, margin: float, style: float) -> dict[str, Any]:
        return {
            "margin": margin,
            "chosen_sample": chosen,
            "rejected_sample": rejected,
            "scores_chosen": {"correctness": 1.0, "style": style},
            "scores_rejected": {"correctness": 0.0, "style": 0.5},
        }

    answers: list[dict[str, Any]] = [{"sample": sample} for sample in range(4)]
    told = mark_pairs(answers, [pair(0, 2, 0.6, 0.5), pair(0, 1, 0.4, 0.25), pair(1, 2, 0.2, 1.0)])
    assert told == {"pairs": 3, "margin": 0.6, "inverted": ["style"]}
    assert [(a.get("chosen"), a.get("rejected")) for a in answers] == [
        (2, None),
        (1, 1),
        (None, 2),
        (None, None),
    ]
    assert mark_pairs(answers, []) == {}
