"""Write a report as files."""

from __future__ import annotations

from pathlib import Path

from hvd_batchgrow.messages.errors import RunError, unwritable
from hvd_batchgrow.messages.suggest import near_folder
from hvd_batchgrow.reports.csv_files import csv_files
from hvd_batchgrow.reports.document import Document, FigureRow
from hvd_batchgrow.reports.html import html_text
from hvd_batchgrow.reports.markdown import markdown_text
from hvd_batchgrow.reports.pictures import pictures
from hvd_batchgrow.storage.atomic import write_file


def write_html(document: Document, path: Path) -> int:
    """Write the report as one HTML file; return its size in bytes.

    Raises:
        RunError: it cannot be written.
    """
    content = html_text(document).encode()
    _write(path, content)
    return len(content)


def write_folder(document: Document, folder: Path) -> int:
    """Write report.md, CSV files and figures/NAME.png and .svg into a folder; return the number of files.

    Files of these names are replaced; others in the folder stay.

    Raises:
        RunError: a file cannot be written.
    """
    _require_folder(folder.parent, folder)
    files = {"report.md": markdown_text(document).encode()}
    files |= {name: text.encode() for name, text in csv_files(document).items()}
    for row in document.blocks(FigureRow):
        for figure in row.figures:
            files |= {f"figures/{name}": content for name, content in pictures(figure).items()}
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    for name, content in files.items():
        _write(folder / name, content)
    return len(files)


def _write(path: Path, content: bytes) -> None:
    _require_folder(path.parent, path)
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file in it: {path / 'report.html'}")
    write_file(path, content)


def _require_folder(folder: Path, path: Path) -> None:
    if not folder.is_dir():
        raise RunError(f"{path} cannot be written: the folder {folder} does not exist{near_folder(folder)}")
