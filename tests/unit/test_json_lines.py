from __future__ import annotations

from pathlib import Path

import pytest

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.json_lines import JsonLines, read_json_lines


def test_a_line_that_a_kill_cut_short_is_skipped_and_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 10}\n{"samples": 20}\n{"sam')
    assert [line["samples"] for line in read_json_lines(path)] == [10, 20]
    JsonLines(path, lambda line: line["samples"] <= 10).append({"samples": 15})
    assert path.read_text() == '{"samples": 10}\n{"samples": 15}\n'


def test_lines_behind_one_that_is_damaged_are_not_dropped_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"samples": 10}\n\0\0ples": 20}\n{"samples": 30}\n'
    path.write_text(text)
    with pytest.raises(RunError, match=r"jsonl is damaged: line 2 cannot be read, but line 3 after it can"):
        read_json_lines(path)
    with pytest.raises(RunError, match=r"line 2 cannot be read"):
        JsonLines(path, lambda line: line["samples"] <= 30)
    assert path.read_text() == text
    JsonLines(path, lambda line: line["samples"] <= 20)  # all that is behind it will be done again
    assert path.read_text() == '{"samples": 10}\n'


@pytest.mark.parametrize("samples", ["1" + "0" * 400, str(2**63), "1.0", "true", '"1"', "null"])
def test_a_sample_counter_is_a_whole_number_of_64_bits(tmp_path: Path, samples: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"samples": {2**63 - 1}}}\n{{"samples": {samples}}}\n')
    with pytest.raises(RunError, match=r"line 2 is not an object with a whole number of samples"):
        read_json_lines(path)


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", lambda line: True)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be written: Is a directory"):
        lines.append({"samples": 1})
