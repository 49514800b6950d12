import shutil
from pathlib import Path

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
    assert shelf.offered() == ["base", "run:1e-03/epoch-2"]
    adapter = reciting_run.checkpoints(1e-3)[2]
    assert "an adapter trained on" in shelf.open(str(adapter))
    assert shelf.models[adapter.name] == adapter
    assert shelf.open("tiny") == "tiny: a base without checkpoints"
    assert list(shelf.models) == ["base"]


def test_an_adapter_by_itself_opens_its_base_and_needs_a_whole_configuration(reciting_run, tmp_path):
    adapter = Path(shutil.copytree(reciting_run.checkpoints(1e-3)[2], tmp_path / "base"))
    shelf = Shelf()
    assert "an adapter trained on" in shelf.open(str(adapter))
    assert list(shelf.models) == ["base", "base (2)"]
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "/gone'))
    with pytest.raises(InputError, match=r"its base, /gone.*is not here"):
        Shelf().open(str(adapter))
    shelf.open("tiny")
    (adapter / "adapter_config.json").write_text("{}")
    assert "a base that it does not name" in shelf.open(str(adapter))
    assert shelf.models == {"base": None, "base (2)": adapter}
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        shelf.open(str(adapter))
