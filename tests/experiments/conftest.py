from pathlib import Path

import pytest

from experiments.datasets import write_stand_in


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made-up images in Fashion-MNIST's file format."""
    folder = tmp_path_factory.mktemp("stand_in")
    write_stand_in(folder, train=600, test=100)
    return folder
