"""A Gemma and a data set that the tests of training share. (__init__.py lies beside this file so
that its module is not called conftest, as the one above is.)"""
import pytest
from conftest import tiny_gemma
from tiny_shards import numbered


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """The folder of a random Gemma of 2 layers."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of 3 shards of 8 numbered samples."""
    return numbered(tmp_path_factory.mktemp("data"))
