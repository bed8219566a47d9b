"""`pairloop pairs select` and `dedupe`: data in many files, on this machine or past its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Flag = Parameter(negative="")


def select(
    config: Path, folder: Path, out: Path, /, *, round: int = 0, ray: Annotated[bool, Flag] = False
) -> int:
    """Make pairs of stored completions and scores, by a run's selection rules.

    Parameters
    ----------
    config
        YAML file of a run. Noise that certificates or canaries tell is not looked up: for
        min_margin auto of judges with one vote give selection.retest_sd.
    folder
        As a round leaves it: completions/ and scores/ (Parquet parts of the same names, all answers
        to a prompt in one), prompts.parquet.
    out
        Folder to make: pairs.parquet and funnel.json.
    round
        The round that selection.strategy best_random draws for.
    ray
        Select parts side by side under Ray Data, on the cluster of RAY_ADDRESS or on this machine;
        pairs may be larger than memory, too. They are the same.
    """
    from contextlib import nullcontext

    from rlhf.config_io import load
    from rlhf.errors import InputError
    from rlhf.files import atomic_folder, named, write_json, write_tables
    from rlhf.rules import Rules
    from rlhf.selection_shards import in_turn, shards_of
    from rlhf.types import pairs_schema

    if round < 0:
        raise InputError(f"--round must be at least 0, got {round}")
    rules = Rules.of(load([config]))
    _refuse_existing(out)
    # Tasks of Ray have a working directory of their own.
    shards = shards_of(folder.absolute() if ray else folder)
    if ray:
        from launch import ray_data
    with ray_data.cluster() if ray else nullcontext(), named(out), atomic_folder(out) as staging:
        if ray:
            funnel, tables = ray_data.select(shards, rules, round)
        else:
            selected = in_turn(shards, rules, round)
            funnel, tables = selected.funnel, iter([selected.pairs])
        write_tables(tables, pairs_schema(rules.needed), staging / "pairs.parquet")
        write_json(staging / "funnel.json", funnel)
    first, last = funnel["steps"][0], funnel["steps"][-1]
    print(
        f"{folder}: {first['completions']} completions of {first['prompts']} prompts\n"
        f"{funnel['pairs']} pairs of {last['prompts']} prompts written to {out}"
    )
    return 0


def dedupe(
    pool: Path,
    out: Path,
    /,
    *,
    text: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    similarity: float = 0.8,
    fallen: Path | None = None,
    ray: Annotated[bool, Flag] = False,
) -> int:
    """Take out records that repeat an earlier one, exactly or nearly, of prompts or preferences.

    One that falls is more than SIMILARITY like one that stays, in each text by itself and in all
    together; case and spacing don't count.

    Parameters
    ----------
    pool
        Parquet file, or a folder of them; earlier ones by name come first.
    out
        Parquet file to write.
    text
        A column to compare, text or messages; may be given several times. Default: prompt, messages
        and context, those of them that there are.
    similarity
        Share of the runs of five characters in common. With 1 only equal records fall.
    fallen
        Also write which records fell, the one that stands for each and how alike they are (JSON
        lines or Parquet); records are counted from 1.
    ray
        Compare slice by slice under Ray Data, on the cluster of RAY_ADDRESS or on this machine,
        where the texts are larger than memory. The same records fall.
    """
    import polars as pl

    from rlhf.duplicate_shards import Alike, records, slices_of, text_columns, whole
    from rlhf.errors import InputError
    from rlhf.files import named, write_tables
    from rlhf.pair_files import check_target, write_records

    if not 0 < similarity <= 1:
        raise InputError(f"--similarity must be above 0 and at most 1, got {similarity:g}")
    if check_target(out) != ".parquet":
        raise InputError(f"{out} must end in .parquet, as what is read is Parquet")
    _refuse_existing(out)
    if fallen is not None:
        check_target(fallen)
        _refuse_existing(fallen)
        if fallen.absolute() == out.absolute():
            raise InputError(f"--fallen must not be {out}, where the others go; name another")
    # Tasks of Ray have a working directory of their own.
    slices = slices_of(pool.absolute() if ray else pool)
    rule = Alike(text_columns(slices, text), similarity)
    if ray:
        from launch import ray_data

        with ray_data.cluster():
            found = ray_data.repeating(slices, rule)
    else:
        found = whole(slices, rule)
    numbered = found.with_row_index("record")
    stays = numbered["kept"] == numbered["record"]
    left = (records(part).filter(stays[part.first : part.first + part.records]) for part in slices)
    with named(out):
        write_tables(left, pl.Schema(pl.read_parquet_schema(slices[0].path)), out)
    fell = numbered.filter(~stays)
    if fallen is not None:
        counted = fell.select(pl.col("record", "kept") + 1, "similarity")
        write_records(fallen, counted)
    equal = fell.filter(pl.col("similarity") == 1).height
    print(
        f"{pool}: {found.height} records, compared by {', '.join(rule.columns)}\n"
        f"{found.height - fell.height} stay in {out}; {fell.height} fall, {equal} of them without "
        "any difference"
    )
    return 0


def _refuse_existing(path: Path) -> None:
    from rlhf.errors import InputError

    if path.exists():
        raise InputError(f"{path} must not exist yet; name another, or remove it")
