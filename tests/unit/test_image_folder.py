from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.held_out import held_out_ids
from hvd_batchgrow.data.images import image_folder
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.helpers import labels_of
from tests.pictures import FOLDER, NUM_TRAIN, NUM_VAL, Picture, assert_holds, picture, pictures, write_folder

pytestmark = pytest.mark.usefixtures("cache")


def test_a_folder_is_read_in_the_order_of_names_whatever_lies_in_it(tmp_path: Path) -> None:
    images = dict(zip(["b/9.PNG", "b/10.png", "b/sub/deep/1.png", "a/Z.Jpeg", "a/y.jpg"], pictures(5), strict=True))
    for name, image in images.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(image.data)
    for name in ("a/notes.txt", "a/jpg", "readme.md", "loose.png"):
        (tmp_path / "train" / name).write_bytes(picture(3).data)
    write_folder(tmp_path, "val", [])
    (tmp_path / "val" / "b").mkdir(parents=True)
    (tmp_path / "val" / "b" / "link.png").symlink_to(tmp_path / "train" / "b" / "9.PNG")
    source = FOLDER.read(tmp_path)
    order = ["a/Z.Jpeg", "a/y.jpg", "b/10.png", "b/9.PNG", "b/sub/deep/1.png"]
    assert_holds(source.train, [replace(images[name], label="ab".index(name[0])) for name in order])
    assert_holds(source.test, [replace(images["b/9.PNG"], label=1)])
    assert source.train.locate(4) == str(tmp_path / "train/b/sub/deep/1.png")


def test_the_order_is_the_same_however_the_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "_BLOCK", 1)
    monkeypatch.setattr(image_folder, "_NUM_THREADS", 2)
    train = pictures(NUM_TRAIN)
    assert_holds(FOLDER.read(FOLDER.make(tmp_path, train)).train, FOLDER.expected(train))


def _add(folder: Path) -> None:
    (folder / "cat" / "new.png").write_bytes(picture(1).data)


def _remove(folder: Path) -> None:
    (folder / "cat" / "000.jpg").unlink()


def _rename(folder: Path) -> None:
    (folder / "cat" / "000.jpg").rename(folder / "cat" / "zzz.jpg")


def _move(folder: Path) -> None:
    (folder / "cat" / "000.jpg").rename(folder / "dog" / "000.jpg")


def _new_class(folder: Path) -> None:
    (folder / "ant").mkdir()
    (folder / "ant" / "000.jpg").write_bytes(picture(0).data)


@pytest.mark.parametrize("change", [_add, _remove, _rename, _move, _new_class])
def test_a_folder_is_indexed_again_when_its_tree_changes(tmp_path: Path, change: Callable[[Path], None]) -> None:
    root = FOLDER.make(tmp_path / "data", pictures(NUM_TRAIN))
    FOLDER.read(root)
    change(root / "train")
    expected = []
    for label, folder in enumerate(sorted((root / "train").iterdir())):
        expected += [Picture(path.read_bytes(), label, "") for path in sorted(folder.iterdir())]
    source = FOLDER.read(root)
    assert_holds(source.train, expected)
    shift = change is _new_class  # of the classes, and so of the test labels too
    assert labels_of(source.test) == sorted(image.label + shift for image in pictures(NUM_VAL, first=20))


def test_the_test_folder_is_val_else_test_else_what_the_job_says(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "val").rename(root / "test")
    assert len(FOLDER.read(root).test) == NUM_VAL
    write_folder(root, "val", pictures(3))
    assert len(FOLDER.read(root).test) == 3
    assert len(FOLDER.read(root, test="test").test) == NUM_VAL
    swapped = FOLDER.read(root, train="val", test="train")
    assert (len(swapped.train), len(swapped.test)) == (3, NUM_TRAIN)


def test_folders_that_make_no_source_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path}/train is not a folder; {tmp_path} is empty"):
        FOLDER.read(tmp_path)
    FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    with pytest.raises(RunError, match=r"/trian is not a folder; there is train/, …"):
        FOLDER.read(tmp_path, train="trian")
    (tmp_path / "val" / "dgo").mkdir()
    (tmp_path / "val" / "dgo" / "1.png").write_bytes(picture(1).data)
    head = r"1 folder is not among the 3 classes of .*train:"
    with pytest.raises(RunError, match=rf"{head}\n  .*val/dgo, nearest: dog"):
        FOLDER.read(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(picture(1).data)
    with pytest.raises(RunError, match=r"flat has no class folders; move the 1 images in it to .*flat/<class>"):
        FOLDER.read(tmp_path, test="flat")


def test_one_folder_of_classes_is_divided_by_the_seed(tmp_path: Path) -> None:
    train = pictures(NUM_TRAIN)
    root = FOLDER.make(tmp_path / "data", train)
    remedy = "; data.test_fraction = 0.1 holds out a tenth of the training images for testing"
    shutil.rmtree(root / "val")
    with pytest.raises(RunError, match=rf"val is not a folder; there is train/{remedy}"):
        FOLDER.read(root)
    sources = [FOLDER.read(folder, test_fraction=0.25) for folder in (root, root / "train")]
    with pytest.raises(
        RunError, match=r"train is not a folder; there is .*; if these are the classes, data.test_fraction"
    ):
        FOLDER.read(root / "train")
    unused = [[note for note in source.notes if "not used" in note] for source in sources]
    assert unused == [[], []]
    shutil.copytree(root / "train", root / "val")
    note = f"{root}/val is not used: data.test_fraction = 0.25 holds out a part of the training set"
    assert note in FOLDER.read(root, test_fraction=0.25).notes
    every = [path.read_bytes() for path in sorted((root / "train").rglob("*.*"))]
    held_out = held_out_ids(NUM_TRAIN, 0.25, 0, 2)
    assert len(held_out) == NUM_TRAIN // 4
    for source in sources:
        found = [bytes(image) for image in source.test.fetch(np.arange(len(source.test)))]
        assert found == [every[k] for k in held_out]
        rest = [bytes(image) for image in source.train.fetch(np.arange(len(source.train)))]
        assert rest == [data for k, data in enumerate(every) if k not in held_out]
    with pytest.raises(JobError, match=r"data.test_fraction: 0.99 of .* samples, rounded up: no sample would be left"):
        FOLDER.read(root, test_fraction=0.99)


def test_test_images_that_are_the_training_images_are_noted(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    assert FOLDER.read(root).notes == ()
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val", copy_function=shutil.copyfile)
    fault = (
        f"{root}/val has the same files as {root}/train, by name and size: the test images are those of the training"
    )
    assert FOLDER.read(root).notes == (fault,)


def test_a_dangling_link_is_a_bad_image(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "train" / "cat" / "0.png").symlink_to("gone.png")
    with pytest.raises(RunError, match=r"1 of 13 images .*\n  sample 0: .*cat/0.png"):
        FOLDER.read(root)


@pytest.mark.parametrize("target", [".", "itself"])
def test_links_that_go_round_in_circles_are_refused(tmp_path: Path, target: str) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "train" / "cat" / "itself").symlink_to(target)
    with pytest.raises(RunError, match=r"train/cat/.*itself cannot be read: Too many levels of symbolic links"):
        FOLDER.read(root)


# --- what is passed over ---------------------------------------------------------------------------


def test_files_that_are_not_images_are_counted_and_named_in_one_line(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    for name in ("cat/a.gif", "cat/b.GIF", "dog/c.jfif", "dog/deep/notes.txt", "cat/._000.jpg", "eel/plain", "x.md"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(b"something")
    source = FOLDER.read(root)
    assert len(source.train) == NUM_TRAIN
    (note,) = source.notes
    assert note.startswith(f"skipped 7 files in {root}/train that are not images of a class: .gif 2, ")
    for part in (".jfif 1", ".txt 1", "hidden 1", "such as ", "only .jpg, .jpeg, .png"):
        assert part in note
    with pytest.raises(RunError, match=r"num_samples = 19, but 12 training samples were found.*\n  skipped 7 files"):
        load_source(
            DataSection(source="image_folder", root=str(root), num_samples=19, image_size=8), 0, lambda *_: None
        )


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", "__MACOSX", "._cat", "@eaDir", ".git", "lost+found", "$RECYCLE.BIN", "#recycle", "empty"],
)
@pytest.mark.parametrize("where", ["train", "val"])
def test_a_folder_that_is_not_a_class_is_ignored_with_a_line(tmp_path: Path, where: str, name: str) -> None:
    train = pictures(NUM_TRAIN)
    root = FOLDER.make(tmp_path, train)
    (root / where / name).mkdir()
    if name != "empty":
        (root / where / name / "copy.jpg").write_bytes(picture(0).data)
        (root / where / "cat" / name).mkdir()
        (root / where / "cat" / name / "copy.jpg").write_bytes(picture(0).data)
    source = FOLDER.read(root)
    assert source.num_classes == 3
    assert_holds(source.train, FOLDER.expected(train))
    assert len(source.test) == NUM_VAL
    named = "empty (no images)" if name == "empty" else ", ".join(sorted([name, f"cat/{name}"]))
    count = "1 folder" if name == "empty" else "2 folders"
    (note,) = source.notes
    assert note == f"ignored {count} in {root / where} that are not classes: {named}"


def test_a_class_whose_files_have_another_extension_is_not_ignored(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "train" / "fox").mkdir()
    (root / "train" / "fox" / "1.jfif").write_bytes(picture(0).data)
    with pytest.raises(RunError, match=r"/train: the images of 1 folder are not named .jpg.*:\n  fox: .jfif 1"):
        FOLDER.read(root)


def test_classes_without_test_images_are_named(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN), [image for image in pictures(NUM_VAL) if image.label != 1])
    assert FOLDER.read(root).notes == (f"{root}/val has no images of 1 of the 3 classes: dog",)


def test_a_folder_of_folders_without_images_is_refused(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "other" / "cat").mkdir(parents=True)
    with pytest.raises(RunError, match=r"other has no class folder that contains images \(.jpg, "):
        FOLDER.read(root, train="other")
