"""A run's record: one JSON line per logged step in `log.jsonl`, and TensorBoard events where it is installed."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any

from sda_fast.atomic import write_text_atomic

logger = logging.getLogger(__name__)


class RunLog:
    """Appends records with a `step` to a JSON-lines file; a resumed run first drops what lies beyond its checkpoint.

    Args:
        folder: where `log.jsonl` and, if the package tensorboard is installed, `tensorboard/` are.
        after_step: records of steps beyond this one are dropped (0 = start afresh), and so is a torn last line.
        tensorboard: write events too.
    """

    def __init__(self, folder: Path, *, after_step: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / "log.jsonl"
        kept = [record for record in read_log(self.path) if record["step"] <= after_step]
        write_text_atomic(self.path, "".join(_line(record) for record in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, **values: float | int) -> None:
        """Append one record; it reaches the operating system before this returns."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl` in order; [] where there is no file. A line cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            logger.warning("%s: leaving out an incomplete line", path)
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN: a value that is not finite is written as null.
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
    return json.dumps(finite) + "\n"
