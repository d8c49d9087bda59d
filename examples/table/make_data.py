"""Write records of pumps: data/train.csv, data/test.csv, and new_rows.csv, which has no states.

A pump's temperature and vibration depend on its maker, its age and its state. Some values were not measured, and some
pumps have no known maker.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

MAKERS = {"Ardent": 0.0, "Boreal": 6.0, "Calder": -4.0}
"""How many degrees warmer than others a maker's pumps run."""
STATES = ("good", "worn", "blocked")
COLUMNS = ("maker", "age_years", "temperature_c", "vibration_mm_s", "state")
NUM_ROWS = {"train": 4000, "test": 1000}


def row(generator: np.random.Generator) -> list[str]:
    """Return one pump, in the order of COLUMNS."""
    maker = str(generator.choice(list(MAKERS)))
    age = generator.uniform(0, 20)
    wears = 1 / (1 + np.exp(-(age - 11) / 2))
    state = "blocked" if generator.random() < 0.3 else "worn" if generator.random() < wears else "good"
    temperature = 50 + MAKERS[maker] + 0.3 * age + {"good": 0, "worn": 2, "blocked": 14}[state] + generator.normal(0, 2)
    vibration = {"good": 1.0, "worn": 2.4, "blocked": 1.0}[state] * (1 + 0.03 * age) * np.exp(generator.normal(0, 0.2))
    cells = [maker, f"{age:.1f}", f"{temperature:.1f}", f"{vibration:.2f}"]
    return ["" if generator.random() < 0.03 else cell for cell in cells] + [state]


def write(path: Path, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """Write a csv with a header."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def main() -> None:
    """Write the same tables each time."""
    generator = np.random.default_rng(0)
    for name, count in NUM_ROWS.items():
        write(Path("data", f"{name}.csv"), COLUMNS, [row(generator) for _ in range(count)])
    new = [["Boreal", "3.0", "57.1", "1.05"], ["", "15.5", "56.0", "3.60"], ["Calder", "8.0", "", "1.20"]]
    new.append(["Ardent", "6.0", "66.5", "1.10"])
    write(Path("new_rows.csv"), COLUMNS[:-1], new)


if __name__ == "__main__":
    main()
