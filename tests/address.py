"""Write the project's address, `project.urls` in pyproject.toml, into the notebooks: `make readme`.

A notebook that is opened on Colab comes alone, so its first cell has to know where the rest of the kit is.
"""

import re
import tomllib

from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
BEFORE = r"colab\.research\.google\.com/github/|mybinder\.org/v2/gh/|git\+https://github\.com/"


def address() -> str:
    """OWNER/NAME on GitHub."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def addressed(text: str, place: str) -> str:
    """A notebook's text with all its links to GitHub, Colab and Binder for the repository `place`.

    >>> addressed("[Binder](https://mybinder.org/v2/gh/OWNER/kit/main?urlpath=lab)", "ada/kit-2")
    '[Binder](https://mybinder.org/v2/gh/ada/kit-2/main?urlpath=lab)'
    """
    return re.sub(rf"({BEFORE})[\w.-]+/[\w.-]+", rf"\g<1>{place}", text)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        text = addressed(path.read_text(encoding="utf-8"), address())
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
