"""What a benchmark found, as a table for people and as JSON for machines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Unit = Literal["us", "ms", "s", "requests/s", "MB/s", "MiB"]


@dataclass(frozen=True)
class Row:
    """One measured figure beside its baseline of the same run. `reach` is what it is to keep to."""

    what: str
    against: str
    unit: Unit
    measured: float
    baseline: float | None
    reach: str
    reached: bool
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """measured / baseline."""
        return self.measured / self.baseline if self.baseline else None


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which `percent` of the sorted values lie."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def p50(values: Sequence[float]) -> float:
    return percentile(values, 50)


def p95(values: Sequence[float]) -> float:
    return percentile(values, 95)


def p99(values: Sequence[float]) -> float:
    return percentile(values, 99)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; a figure that falls short says so."""
    heads = ("what", "measured", "unit", "against", "baseline", "ratio", "reach", "")
    lines = [heads] + [
        (
            row.what,
            _number(row.measured),
            row.unit,
            row.against,
            _number(row.baseline),
            f"{row.ratio:.2f}x" if row.ratio is not None else "-",
            row.reach,
            "ok" if row.reached else "FALLS SHORT",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"{row.what}: {row.note}" for row in rows if row.note]
    return "\n".join([*text, "", *notes]).rstrip()


def write_json(path: Path, rows: Sequence[Row], environment: dict[str, str]) -> None:
    """Writes `{"environment": {...}, "rows": [{..., "ratio": n}]}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n")
