"""Real data sets as tensors in memory, standardised and split as the published protocols have them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
UCI_SETS = ("energy", "kin8nm", "power")


class Split(NamedTuple):
    x: Tensor
    y: Tensor


class Data(NamedTuple):
    train: Split
    val: Split
    test: Split

    def to(self, device: str) -> Data:
        return Data(*(Split(x.to(device), y.to(device)) for x, y in self))


def digits(seed: int = 0) -> Data:
    """scikit-learn's digits, 64 pixels standardised as one number: 1000 training, 397 validation, 400 test images."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.tensor(images[order], dtype=torch.float32)
    y = torch.tensor(labels[order], dtype=torch.int64)
    x = (x - x[:1000].mean()) / x[:1000].std()
    cuts = slice(0, 1000), slice(1000, 1397), slice(1397, None)
    return Data(*(Split(x[cut], y[cut]) for cut in cuts))


def clusters(seed: int = 0) -> Data:
    """Ten noisy patterns in the shape of `digits`, for machines without scikit-learn."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (1797,), generator=random)
    x = torch.randn(10, 64, generator=random)[y] + 2 * torch.randn(len(y), 64, generator=random)
    x = (x - x[:1000].mean()) / x[:1000].std()
    cuts = slice(0, 1000), slice(1000, 1397), slice(1397, None)
    return Data(*(Split(x[cut], y[cut]) for cut in cuts))


def fashion_mnist(data_dir: str | None = None) -> Data:
    """Fashion-MNIST, standardised per pixel over its training images; the last sixth of those (10,000) validates."""
    folder = find_fashion_mnist(data_dir)
    images, labels, test_images, test_labels = (_read_idx(folder, name) for name in IDX_FILES)
    x = torch.from_numpy(images).flatten(1).float()
    std, mean = torch.std_mean(x, dim=0, correction=0)
    std[std == 0] = 1
    x = x.sub_(mean).div_(std)
    test_x = torch.from_numpy(test_images).flatten(1).float().sub_(mean).div_(std)
    y, test_y = torch.from_numpy(labels).long(), torch.from_numpy(test_labels).long()
    cut = len(x) - len(x) // 6
    return Data(Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:]), Split(test_x, test_y))


def cifar10(data_dir: str | None = None) -> Data:
    """CIFAR-10 as images [n, 3, 32, 32], standardised per channel; the last tenth of the training images (5,000) validates.

    Raises:
        FileNotFoundError: neither in the folder nor to be downloaded.
    """
    from torchvision.datasets import CIFAR10

    root = data_dir or str(Path(torch.hub.get_dir()).parent / "datasets" / "vision")
    try:
        sets = [CIFAR10(root, train, download=data_dir is None) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"CIFAR-10 was not found: {str(error).splitlines()[0]}. Pass --data-dir with the folder that holds "
            "cifar-10-batches-py, as torchvision.datasets.CIFAR10 makes it, or let torchvision download it."
        ) from error
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(s.data).permute(0, 3, 1, 2).float(), torch.tensor(s.targets)) for s in sets
    )
    std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    x, test_x = ((each - mean) / std for each in (x, test_x))
    cut = len(x) - len(x) // 10
    return Data(Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:]), Split(test_x, test_y))


def find_fashion_mnist(data_dir: str | None = None, download: bool = True) -> Path:
    """The folder that holds the four IDX files (plain or .gz): given, cached, packaged by Debian, or downloaded.

    Raises:
        FileNotFoundError: naming every place that was looked in.
    """
    root = Path(torch.hub.get_dir()).parent / "datasets" / "vision"
    cached = [root / "FashionMNIST/raw", Path("data/FashionMNIST/raw")]
    given = [Path(data_dir), Path(data_dir, "FashionMNIST/raw"), Path(data_dir, "raw")] if data_dir else []
    places = given or [*cached, DEBIAN]
    for folder in places:
        if all(_idx_path(folder, name) for name in IDX_FILES):
            return folder
    failure = "not tried, because --data-dir was given" if data_dir else "not tried"
    if download and not data_dir:
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(str(root), download=True)
            return cached[0]
        except (OSError, RuntimeError) as error:
            failure = f"failed: {error}".splitlines()[0]
    looked = "\n".join(f"  {place}" for place in places)
    raise FileNotFoundError(
        f"Fashion-MNIST was not found. Looked for {', '.join(IDX_FILES)} (plain or .gz) in\n{looked}\n"
        f"Download by torchvision: {failure}.\n"
        "Pass --data-dir with the folder that holds them, or `apt-get install dataset-fashion-mnist` on Debian."
    )


def uci(name: str, data_dir: str | Path) -> tuple[Data, float]:
    """A regression set of the UCI repository from ``<data_dir>/<name>.npz``: x [n, d] and y [n], standardised.

    Mean and standard deviation of every input and of the output are those of training and validation rows together.

    Returns:
        the set, and the standard deviation of y: times its square a mean squared error is one in original units.

    Raises:
        FileNotFoundError: saying what the file has to hold.
    """
    path = Path(data_dir, f"{name}.npz")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} was not found. Pass --data-dir with a folder of {', '.join(f'{each}.npz' for each in UCI_SETS)}, each with "
            "arrays x [n, d], y [n] and split: the numbers of training, validation and test rows, which lie in that order."
        )
    with np.load(path) as file:
        x, y, split = torch.from_numpy(file["x"]).double(), torch.from_numpy(file["y"]).double(), file["split"].tolist()
    if sum(split) != len(x) or len(x) != len(y):
        raise ValueError(f"{path}: split {split} does not add up to the {len(x)} rows of x and {len(y)} of y")
    seen = split[0] + split[1]
    std, mean = torch.std_mean(x[:seen], dim=0, correction=0)
    y_std, y_mean = torch.std_mean(y[:seen], correction=0)
    std[std == 0] = 1
    parts = zip(((x - mean) / std).float().split(split), ((y - y_mean) / y_std).float().split(split))
    return Data(*(Split(*part) for part in parts)), float(y_std)


def write_idx(folder: Path, name: str, array: np.ndarray) -> None:
    """Write bytes as a gzipped IDX file, the format of the MNIST family."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    with gzip.open(folder / f"{name}.gz", "wb", compresslevel=1) as file:
        file.write(header + array.astype(np.uint8).tobytes())


def write_stand_in(folder: Path, train: int = 600, test: int = 100, seed: int = 0) -> None:
    """Ten noisy patterns in the form of Fashion-MNIST: for machines that have neither the set nor a network."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 156, size=(10, 28, 28))
    for count, (images, labels) in ((train, IDX_FILES[:2]), (test, IDX_FILES[2:])):
        y = rng.integers(0, 10, size=count)
        write_idx(folder, images, patterns[y] + rng.integers(0, 100, size=(count, 28, 28)))
        write_idx(folder, labels, y)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    path = _idx_path(folder, name)
    assert path is not None  # find_fashion_mnist saw it
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read()
    zero, kind, ndim = struct.unpack(">HBB", raw[:4]) if len(raw) >= 4 else (1, 0, 0)
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim]) if len(raw) >= 4 + 4 * ndim else ()
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)) if shape else np.empty(0, np.uint8)
    if (zero, kind) != (0, 8) or not shape or body.size != int(np.prod(shape)):
        raise ValueError(f"{path} is not a complete IDX file of bytes: delete it and fetch it again")
    return body.reshape(shape).copy()
