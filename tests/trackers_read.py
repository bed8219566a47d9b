"""What trackers kept, read back: wandb's own records and TensorBoard's own reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = 7


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: LevelDB's log format, each a protobuf message of wandb's.

    A last record that a kill tore is left out.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEADER:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind == 0 or len(part) < length:
            return
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            # Generated code, whose names only exist once it runs.
            record = vars(wandb_internal_pb2)["Record"]()
            record.ParseFromString(whole)
            yield record


def wandb_lines(files: list[Path]) -> list[dict[str, Any]]:
    """What was logged, line by line, with wandb's own `_step`; files in the order given."""
    lines = []
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                line = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in items
                }
                lines.append({"_step": record.history.step.num, **line})
    return lines


def wandb_ids(files: list[Path]) -> set[str]:
    """The run ids that these files belong to."""
    return {
        record.run.run_id
        for file in files
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "run"
    }


def tensorboard(folder: Path) -> Any:
    """TensorBoard's reader of a folder, with everything loaded."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()
