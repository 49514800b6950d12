import shutil

import pytest

from mini_symposium.errors import InputError
from mini_symposium.playground.shelf import Shelf


def test_the_shelf_says_what_it_finds(reciting_run, tmp_path):
    shelf = Shelf()
    with pytest.raises(InputError, match=r"a run.*a model"):
        shelf.open(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(reciting_run.recipe_file, empty)
    assert "no checkpoints on" in shelf.open(str(empty))
    assert list(shelf.models) == ["base"]
    assert "3 checkpoints" in shelf.open(str(reciting_run.path))
    assert shelf.newest() == ["base", "run:1e-03/epoch-2"]
    adapter = reciting_run.checkpoints(1e-3)[2]
    assert "an adapter trained on" in shelf.open(str(adapter))
    assert shelf.models[adapter.name] == adapter
    assert shelf.open("tiny") == "tiny: a base without checkpoints"
    assert list(shelf.models) == ["base"]
