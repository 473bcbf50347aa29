"""A Gemma, a data set and trained models for the training tests.

The __init__.py in this folder keeps this module from having the same name as ../conftest.py.
"""
import pytest
from conftest import tiny_gemma
from starting import write_models
from tiny_shards import numbered


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """The folder of a Gemma with random weights and 2 layers."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny_gemma(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 3 shards of 8 numbered samples."""
    return numbered(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def models(gemma, data, tmp_path_factory):
    """A folder with run/, a run of 4 steps, and released/, its export."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, gemma, data)
    return folder
