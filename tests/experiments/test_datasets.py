import gzip

import numpy as np
import pytest
import torch

from experiments import datasets

PUBLISHED_MEAN = 0.2860  # of Fashion-MNIST's training pixels in [0, 1], to four digits


def test_digits_are_split_once_and_the_same_every_time():
    data = datasets.digits()
    assert [len(split.y) for split in data] == [1000, 397, 400]
    assert all(torch.equal(a.x, b.x) for a, b in zip(data, datasets.digits()))
    # Rows of the three splits together are the whole set: no image is in two of them by construction of the cuts.
    from sklearn.datasets import load_digits

    whole = np.bincount(load_digits(return_X_y=True)[1], minlength=10)
    assert torch.bincount(torch.cat([split.y for split in data])).tolist() == whole.tolist()


def test_idx_files_are_standardised_per_pixel_and_the_last_sixth_validates(stand_in):
    data = datasets.fashion_mnist(str(stand_in))
    assert [tuple(split.x.shape) for split in data] == [(500, 784), (100, 784), (100, 784)]
    both = torch.cat([data.train.x, data.val.x])
    torch.testing.assert_close(both.mean(0), torch.zeros(784), atol=1e-5, rtol=0)
    torch.testing.assert_close(both.std(0, correction=0), torch.ones(784), atol=1e-5, rtol=0)
    assert data.train.y.dtype == torch.int64


def test_a_pixel_that_never_changes_does_not_divide_by_zero(tmp_path):
    datasets.write_stand_in(tmp_path, train=60, test=10)
    images = np.zeros((60, 28, 28))
    datasets.write_idx(tmp_path, datasets.IDX_FILES[0], images)
    assert torch.equal(datasets.fashion_mnist(str(tmp_path)).train.x, torch.zeros(50, 784))


def test_plain_files_and_torchvision_s_folder_are_found(stand_in, tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in datasets.IDX_FILES:
        (raw / name).write_bytes(gzip.decompress((stand_in / f"{name}.gz").read_bytes()))
    assert datasets.find_fashion_mnist(str(tmp_path)) == raw
    assert torch.equal(datasets.fashion_mnist(str(tmp_path)).val.x, datasets.fashion_mnist(str(stand_in)).val.x)


def test_a_missing_set_is_an_error_that_lists_the_places_and_the_ways_out(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        datasets.find_fashion_mnist(str(tmp_path))
    for expected in (str(tmp_path), "--data-dir", "dataset-fashion-mnist", "train-images-idx3-ubyte"):
        assert expected in str(error.value)


def test_a_failed_download_is_reported_with_the_places(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    with pytest.raises(FileNotFoundError, match="no network") as error:
        datasets.find_fashion_mnist()
    assert str(tmp_path / "debian") in str(error.value)


def test_a_torn_file_is_named(stand_in, tmp_path):
    for name in datasets.IDX_FILES:
        (tmp_path / name).write_bytes(gzip.decompress((stand_in / f"{name}.gz").read_bytes())[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a complete IDX file"):
        datasets.fashion_mnist(str(tmp_path))


def test_the_real_set_has_its_published_size_and_mean():
    try:
        folder = datasets.find_fashion_mnist(download=False)
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist")
    data = datasets.fashion_mnist(str(folder))
    assert [tuple(split.x.shape) for split in data] == [(50_000, 784), (10_000, 784), (10_000, 784)]
    assert torch.bincount(torch.cat([data.train.y, data.val.y])).tolist() == [6000] * 10
    images = datasets._read_idx(folder, datasets.IDX_FILES[0])
    assert images.mean() / 255 == pytest.approx(PUBLISHED_MEAN, abs=5e-5)
