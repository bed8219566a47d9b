"""`pairloop judge`: what judges are worth, before their scores train anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from rlhf.config import RunConfig

app = App(
    name="judge",
    help="Say what judges are worth, before their scores train anything.",
    help_format="plaintext",
)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Places:
    """Files that calibration reads, each overriding the config's, and where results go."""

    verdicts: Path | None = None
    """JSONL file: item_id, judge, dimension, and score, or winner (a, b, tie) of a pair."""
    gold: Path | None = None
    """JSONL file: item_id, dimension, and score or winner; optional annotator."""
    registry: Path | None = None
    """Folder for the certificates; default calibration.registry of a config."""
    report: Path | None = None
    """HTML page with plots; default a file beside the certificates."""


@app.command
def calibrate(
    config: Path | None = None,
    /,
    *,
    places: Places | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    overrides: Annotated[tuple[tuple[str, str], ...], Parameter(parse=False)] = (),
) -> int:
    """Measure how far judges agree with gold labels, and write their certificates.

    Give a config that names both files (calibration.verdicts and calibration.gold), or the files.

    Parameters
    ----------
    config
        YAML file of a run: its floors, weights and thresholds decide.
    json
        Print a JSON list, one object a judge and dimension.
    """
    from launch.calibrate import run

    loaded: RunConfig | None = None
    if config is not None:
        from rlhf import config_io

        loaded, overrides = config_io.load([config], overrides), ()
    return run(loaded, places or Places(), overrides, json)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Wanted:
    """What `sample` draws."""

    items: int = 500
    """Pairs to draw."""
    split: Literal["train", "gate"] = "train"
    """Answers that pairs are made of (train), or held-out ones, which audit judges see (gate)."""
    round: int | None = None
    """Only this round's answers; default all rounds'."""
    dimension: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    """Ask about this dimension; may be given again. Default: all that judges scored."""
    seed: int = 0
    """Another one draws other pairs."""


@app.command
def sample(
    run_folder: Path,
    /,
    *,
    wanted: Wanted = Wanted(),
    out: Path | None = None,
) -> int:
    """Draw pairs of a run's answers, and write them as a blind A/B sheet for people to label.

    Stratified by category, score band and disagreement; the run may be going on. Writes sheet.html
    and sheet.csv to hand out, and key.json and verdicts.jsonl, the judges' own, to keep.

    Parameters
    ----------
    run_folder
        Folder of the run, such as runs/demo.
    out
        Folder for the files; default sheet in the run's folder.
    """
    from launch.sample import sample as draw

    return draw(run_folder, wanted, out)


@app.command
def gold(folder: Path, /, *sheets: Path, out: Path | None = None) -> int:
    """Read labelled sheets back as gold labels for `pairloop judge calibrate`.

    Parameters
    ----------
    folder
        What `pairloop judge sample` wrote: its key.json says what was asked.
    sheets
        Files of any number of people: sheet.csv filled in, or what sheet.html saved.
    out
        JSONL file to write; default gold.jsonl in the folder.
    """
    from launch.sample import gold as read

    return read(folder, sheets, out)


@app.command
def audit(run_folder: Path, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Show how often audit judges and people prefer what each round chose, of the pairs drawn.

    People label the sheets in the run's folder sheets; `pairloop judge gold` hands them in.

    Parameters
    ----------
    run_folder
        Folder of the run, such as runs/demo.
    json
        Print a list, an entry for each round and judge or person.
    """
    from launch.audit import show

    return show(run_folder, json)


@app.command
def cache(
    path: Path,
    /,
    *,
    judge: str | None = None,
    model: str | None = None,
    older_than: float | None = None,
    prune: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show the verdicts that a run or a shared cache keeps, or remove them.

    Parameters
    ----------
    path
        A run's folder, or the file that judges.cache names.
    judge
        Only this judge's.
    model
        Only this model's.
    older_than
        Only those given more than so many days ago.
    prune
        Remove them: they would be asked for again.
    """
    from launch.verdicts import show

    return show(path, judge, model, older_than, prune)
