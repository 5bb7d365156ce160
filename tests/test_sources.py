"""Sources on files made here in the exact on-disk formats.

CIFAR's pickles, archive and download, and Fashion-MNIST's IDX.
"""

import gzip
import hashlib
import http.server
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from bikd import sources
from bikd.data import draw_split, load_split, long_tailed_counts
from bikd.sources import get_source, load_cifar, load_fashion_mnist


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        "Say nothing."


@contextmanager
def served(folder):
    "A folder over HTTP, on the loopback interface."
    handler = partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def four_at_once(load, fetch, monkeypatch):
    "What four threads get that load the same images at once, and how often they were fetched."
    real, fetched = getattr(sources, fetch), []

    def counted(*args):
        fetched.append(args)
        return real(*args)

    monkeypatch.setattr(sources, fetch, counted)
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: load(), range(4))), len(fetched)


def make_cifar(root, cls, monkeypatch, per_batch=60):
    """An unpacked CIFAR folder and its archive, as python-pickled batches.

    The checksums torchvision compares are those of the files made.
    """
    rng, fine = np.random.default_rng(0), cls is datasets.CIFAR100
    C, key = (100, "fine_labels") if fine else (10, "labels")
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    truth = {}
    for part in ("train_list", "test_list"):
        pixels, labels, listed = [], [], []
        for name, _ in getattr(cls, part):
            n = per_batch * (5 if fine and part == "train_list" else 1)
            entry = dict(
                data=rng.integers(0, 256, (n, 3072), dtype=np.uint8),
                filenames=[f"{i}.png" for i in range(n)],
                batch_label=name,
            )
            entry[key] = [i % C for i in range(n)]
            (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
            pixels.append(entry["data"])
            labels += entry[key]
            listed.append([name, md5(folder / name)])
        truth[part] = np.vstack(pixels).reshape(-1, 3, 32, 32), labels
        monkeypatch.setattr(cls, part, listed)
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [f"class {c}" for c in range(C)]}, protocol=2))
    monkeypatch.setattr(cls, "meta", dict(cls.meta, md5=md5(meta)))
    archive = root / "shelf" / cls.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cls.base_folder)
    monkeypatch.setattr(cls, "tgz_md5", md5(archive))
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/" + cls.filename)
    return folder, archive, truth


@pytest.mark.parametrize(
    "name,cls", [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)]
)
def test_cifar_is_read_from_folder_archive_and_download(name, cls, tmp_path, monkeypatch):
    folder, archive, truth = make_cifar(tmp_path, cls, monkeypatch)
    for where in (tmp_path, folder, archive, archive.parent):
        pool, test = load_cifar(name, where)
        for images, part in ((pool, "train_list"), (test, "test_list")):
            assert torch.equal(images.pixels, torch.from_numpy(truth[part][0]))
            assert images.labels.tolist() == truth[part][1]
    with served(archive.parent) as url:  # the real download code, from a server on this machine
        monkeypatch.setattr(cls, "url", f"{url}/{cls.filename}")
        monkeypatch.setenv("BIKD_DATA", str(tmp_path / "new" / "home"))
        got, fetched = four_at_once(lambda: load_cifar(name), "_fetch_cifar", monkeypatch)
    assert fetched == 1
    pixels = torch.from_numpy(truth["train_list"][0])
    assert all(torch.equal(pool.pixels, pixels) for pool, _ in got)


def test_cifar_split_follows_the_protocol(tmp_path, monkeypatch):
    make_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    source = replace(get_source("cifar10"), n_max=20, n_val=10)
    pool, test = source.load(tmp_path)[:2]
    split = draw_split(source, pool, test, rho=10, seed=0)
    assert split.n_per_class == long_tailed_counts(20, 10, 10)
    assert split.val.labels.bincount().tolist() == [10] * 10
    words = "class 0 of cifar10 has 30 images, but 100 for val and 4900 for train"
    with pytest.raises(ValueError, match=words):
        load_split("cifar10", 10, data_dir=tmp_path)


def test_damaged_or_missing_cifar_ends_in_one_clear_message(tmp_path, monkeypatch):
    folder, archive, _ = make_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    # never unpickled: its checksum is wrong
    batch = folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    words = "cifar-10-python.tar.gz into a folder and name that folder with data_dir"
    with pytest.raises(RuntimeError, match=words):
        load_cifar("cifar10", folder)
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(RuntimeError, match="is not complete"):
        load_cifar("cifar10", archive)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_cifar("cifar10", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "name,kind",
    [
        ("../out", tarfile.REGTYPE),
        ("cifar-10-batches-py/../../out", tarfile.REGTYPE),
        ("/tmp/bikd-out", tarfile.REGTYPE),
        ("cifar-10-batches-py/link", tarfile.SYMTYPE),
        ("cifar-10-batches-py/hard", tarfile.LNKTYPE),
        ("cifar-10-batches-py/pipe", tarfile.FIFOTYPE),
    ],
)
def test_an_archive_that_reaches_out_of_its_folder_is_not_unpacked(
    name, kind, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    home.mkdir()
    cls = datasets.CIFAR10
    archive = home / cls.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/first"))
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "../../out"
        tar.addfile(entry)
    monkeypatch.setattr(cls, "tgz_md5", md5(archive))  # the checksum is right
    words = f"was not unpacked: its member '{name}' is a link, a device or outside"
    with pytest.raises(sources.DataError, match=words):
        load_cifar("cifar10", home)
    left = {p.name for p in tmp_path.rglob("*")}
    assert left == {"home", cls.filename, ".bikd-fetch.lock"}
    assert not Path("/tmp/bikd-out").exists()


def make_fashion(folder, monkeypatch, zipped=True):
    "Four IDX files of 30 and 20 images; the known SHA-256 sums are those of the files made."
    folder.mkdir(parents=True)
    sums, rng = {}, np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 20)):
        for kind, a in (
            ("images-idx3", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)),
            ("labels-idx1", np.arange(n, dtype=np.uint8) % 10),
        ):
            raw = bytes([0, 0, 8, a.ndim]) + np.array(a.shape, ">i4").tobytes() + a.tobytes()
            name = f"{part}-{kind}-ubyte"
            sums[name] = hashlib.sha256(raw).hexdigest()
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    monkeypatch.setattr(sources, "FASHION_SHA256", sums)


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_is_read_flat_or_as_torchvision_keeps_it(where, zipped, tmp_path, monkeypatch):
    make_fashion(tmp_path / "home" / where, monkeypatch, zipped)
    pool, test = load_fashion_mnist(tmp_path / "home")
    assert pool.pixels.shape == (30, 1, 28, 28)
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    (path,) = (tmp_path / "home" / where).glob("train-images*")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # cut short
    with pytest.raises(sources.DataError, match="train-images.*damaged"):
        load_fashion_mnist(tmp_path / "home")
    path.write_bytes(gzip.compress(b"other") if zipped else b"other")
    with pytest.raises(sources.DataError, match="damaged or not the expected one"):
        load_fashion_mnist(tmp_path / "home")


def test_a_fashion_download_is_whole_or_absent_and_fetched_once(tmp_path, monkeypatch):
    shelf, home, cls = tmp_path / "shelf", tmp_path / "home", datasets.FashionMNIST
    make_fashion(shelf, monkeypatch)
    home.mkdir()
    monkeypatch.setattr(
        cls, "resources", [(p.name, md5(p)) for p in sorted(shelf.iterdir(), reverse=True)]
    )
    last = shelf / cls.resources[-1][0]
    sound = last.read_bytes()
    with served(shelf) as url:
        monkeypatch.setattr(cls, "mirrors", [f"{url}/"])
        for ill in (sound[:-9], None):  # the last file is cut short, then missing
            if ill:
                last.write_bytes(ill)
            else:
                last.unlink()
            with pytest.raises(sources.DataError, match="and could not be downloaded"):
                load_fashion_mnist(home)
            assert not (home / "FashionMNIST").exists()
        last.write_bytes(sound)
        got, fetched = four_at_once(lambda: load_fashion_mnist(home), "_fetch_fashion", monkeypatch)
    assert fetched == 1
    assert all(len(pool) == 30 and len(test) == 20 for pool, test in got)
    assert {p.name for p in home.iterdir()} == {"FashionMNIST", ".bikd-fetch.lock"}


# Of each setting of Table 1 (n_max, classes, rho): all counts, or the first of each tenth and the
# last; their sum; batches of 100 and of 128.
TABLE = {
    (4900, 10, 1): ([4900] * 10, 49000, 490, 383),
    (4900, 10, 10): ([4900, 3793, 2937, 2274, 1760, 1363, 1055, 817, 632, 490], 20021, 201, 157),
    (4900, 10, 50): ([4900, 3172, 2054, 1330, 861, 557, 361, 233, 151, 98], 13717, 138, 108),
    (4900, 10, 100): ([4900, 2937, 1760, 1055, 632, 379, 227, 136, 81, 49], 12156, 122, 95),
    (490, 100, 1): ([490] * 11, 49000, 490, 383),
    (490, 100, 10): ([490, 388, 307, 243, 193, 153, 121, 96, 76, 60, 49], 19183, 192, 150),
    (490, 100, 50): ([490, 330, 222, 149, 100, 67, 45, 30, 20, 13, 9], 12354, 124, 97),
    (490, 100, 100): ([490, 307, 193, 121, 76, 47, 30, 18, 11, 7, 4], 10626, 107, 84),
}


@pytest.mark.parametrize("setting", TABLE)
def test_counts_of_all_eight_settings(setting):
    counts, (want, total, at100, at128) = long_tailed_counts(*setting), TABLE[setting]
    seen = counts if setting[1] == 10 else counts[::10] + counts[-1:]
    assert (seen, sum(counts), -(-total // 100), -(-total // 128)) == (want, total, at100, at128)
