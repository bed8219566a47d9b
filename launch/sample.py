"""`pairloop judge sample` and `gold`: pairs of a run as a blind sheet, and labels back from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.judge import Wanted
from rlhf.blind_sheet import Question, Sampled, Sheet, read_key, sample_pairs, write_sheet
from rlhf.blind_sheet.labels import as_lines, read_labels
from rlhf.certificates import IDENTITIES
from rlhf.config import RunConfig
from rlhf.config_judges import EnsembleSpec, LlmSpec
from rlhf.errors import InputError
from rlhf.files import atomic_write
from rlhf.pair_files import write_lines
from rlhf.run_pairs import STRATA, Offer, judged_answers, offered, verdicts_of
from rlhf.run_view import RunView
from rollout.judges.rubric import load, packaged

VERDICTS, GOLD = "verdicts.jsonl", "gold.jsonl"
FOLDER = "sheet"


def sample(folder: Path, wanted: Wanted, out: Path | None) -> int:
    """Write a blind sheet of a run's pairs, its key and the judges' own verdicts; 0.

    Raises InputError where the run has nothing to offer, or `out` holds another sheet.
    """
    for name, value, least in (("items", wanted.items, 1), ("seed", wanted.seed, 0)):
        if value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    run = RunView(folder)
    answers = judged_answers(run, wanted.split, wanted.round)
    asked = _dimensions(wanted.dimension, answers.dimensions)
    offer = offered(answers, asked, wanted.seed)
    if offer.candidates.is_empty():
        raise InputError(
            f"{folder} must offer a prompt with two different answers, found none among "
            f"{offer.answers} answers to {offer.prompts} prompts"
        )
    drawn = sample_pairs(offer.candidates, wanted.items, STRATA, wanted.seed)
    questions = [Question(d, _question(run.config, d), bar=d in run.config.floors) for d in asked]
    sheet = Sheet.of(drawn.pairs, questions, wanted.seed)
    target = folder / FOLDER if out is None else out
    paths = write_sheet(target, sheet, run.config.run.name)
    said = verdicts_of(sheet.pairs, answers, questions)
    write_lines(target / VERDICTS, [json.dumps(line, ensure_ascii=False) for line in said])
    known = folder / "judges" / IDENTITIES
    if known.is_file():
        # Who gave them, which the config may say otherwise by the time they are compared.
        atomic_write(target / IDENTITIES, known.read_bytes())
    _show(drawn, offer, wanted.items)
    hand_out, key = paths[:2], paths[2:]
    print(f"hand out one of: {', '.join(map(str, hand_out))}")
    print(f"keep: {', '.join(map(str, [*key, target / VERDICTS]))}")
    print(f"then: pairloop judge gold {shlex.quote(str(target))} LABELLED_SHEET...")
    return 0


def gold(folder: Path, sheets: Sequence[Path], out: Path | None) -> int:
    """Read labelled sheets back into one gold file; 0.

    Raises InputError with file and line of what can't be used; then nothing is written.
    """
    if not sheets:
        raise InputError(
            "SHEET must name at least one labelled sheet, found none: a sheet.csv that was filled "
            "in, or a file that sheet.html saved"
        )
    labels = read_labels(sheets, read_key(folder))
    target = folder / GOLD if out is None else out
    write_lines(target, [json.dumps(line, ensure_ascii=False) for line in as_lines(labels)])
    who = f" by {', '.join(labels.annotators)}" if labels.annotators else ""
    print(f"{target}: {len(labels.gold)} labels{who}")
    print(f"left out: {labels.cant_tell} that could not be told, {labels.blank} left blank")
    verdicts, config = folder / VERDICTS, folder.parent / "config.yaml"
    if verdicts.is_file():
        known = [config] if config.is_file() else []
        files = [*known, "--verdicts", verdicts, "--gold", target]
        print(f"then: pairloop judge calibrate {shlex.join(map(str, files))}")
    return 0


def _dimensions(wanted: Sequence[str], scored: Sequence[str]) -> tuple[str, ...]:
    if unknown := [d for d in wanted if d not in scored]:
        raise InputError(
            f"--dimension must be one that a judge of the run scored ({', '.join(scored)}), got "
            f"{', '.join(unknown)}"
        )
    return tuple(dict.fromkeys(wanted)) or tuple(scored)


def _question(config: RunConfig, dimension: str) -> str:
    """What the run's judge is asked; else the packaged rubric's question, where there is one."""
    for judge in _models(config):
        if dimension in judge.dimensions:
            name = judge.rubrics.get(dimension, dimension)
            return load(name, f"judge {judge.name}: rubrics.{dimension}").question
    if dimension in packaged():
        return load(dimension, dimension).question
    return ""


def _models(config: RunConfig) -> Iterator[LlmSpec]:
    for judge in [*config.judges.panel, *config.judges.audit]:
        for spec in judge.members if isinstance(judge, EnsembleSpec) else [judge]:
            if isinstance(spec, LlmSpec):
                yield spec


def _show(drawn: Sampled, offer: Offer, items: int) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(title="Strata", title_justify="left")
    for column in STRATA:
        table.add_column(column, overflow="fold")
    for column in ("pairs offered", "drawn"):
        table.add_column(column, justify="right")
    for stratum in drawn.strata:
        table.add_row(*stratum.values.values(), str(stratum.candidates), str(stratum.drawn))
    console.print(table)
    print(
        f"drawn {drawn.pairs.height} of {drawn.candidates} pairs, on "
        f"{drawn.pairs['prompt_id'].n_unique()} prompts; the run has {offer.answers} answers to "
        f"{offer.prompts} prompts, of which {offer.alike} say what another one says and "
        f"{offer.empty} nothing; an answer is in one pair at most"
    )
    if drawn.candidates < items:
        print(
            f"fewer than the {items} that were asked for: intervals will be wide; later rounds, "
            "or more prompts or samples a prompt, offer more"
        )
