"""`pairloop judge`: what judges are worth, before their scores train anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
