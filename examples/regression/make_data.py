"""Write records of houses: data/train.csv, data/test.csv, and new_rows.csv, which has no targets.

Price and heating cost follow from area, age, distance and insulation, with noise.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

COLUMNS = ("area_m2", "age_years", "distance_km", "insulation", "price_eur", "heating_eur")
INSULATION = {"none": 1.0, "roof": 0.75, "full": 0.45}
"""Heating cost with each kind of insulation, relative to a house without insulation."""
NUM_ROWS = {"train": 4000, "test": 1000}


def row(generator: np.random.Generator) -> list[str]:
    """Return one house, in the order of COLUMNS."""
    area, age, distance = generator.uniform(40, 220), generator.uniform(0, 90), generator.uniform(0, 30)
    insulation = str(generator.choice(list(INSULATION)))
    price = area * (4200 * np.exp(-distance / 15) + 900) * (1 - 0.004 * age) * np.exp(generator.normal(0, 0.05))
    heating = area * (6 + 0.12 * age) * INSULATION[insulation] * np.exp(generator.normal(0, 0.05))
    return [f"{area:.0f}", f"{age:.0f}", f"{distance:.1f}", insulation, f"{price:.0f}", f"{heating:.0f}"]


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
    write(Path("new_rows.csv"), COLUMNS[:4], [["120", "10", "2.0", "full"], ["60", "70", "25.0", "none"]])


if __name__ == "__main__":
    main()
