"""The recipes that come with the package, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from timm_fsr.utils.errors import unknown

_PACKAGE = Path(__file__).parents[1]
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
"""Where they lie: in an installed package, and in a checkout."""

_FACTS = ("purpose", "cost", "measured")


@dataclass(frozen=True)
class RecipeEntry:
    """One recipe, as the comment on top of its file and its keys describe it.

    Attributes:
        name: of the file, without ".yaml".
        path: of the file.
        purpose: what it is for.
        data: where its images come from.
        network: what it trains, with the feature layer.
        cost: of the training.
        measured: where results are, or that there are none.
    """

    name: str
    path: Path
    purpose: str
    data: str
    network: str
    cost: str
    measured: str

    @classmethod
    def read(cls, path: Path) -> RecipeEntry:
        """The description in a recipe's file.

        Raises:
            ValueError: the comment on top lacks one of the lines "# purpose: ", "# cost: ", "# measured: ".
        """
        text = path.read_text(encoding="utf-8")
        comment = re.match(r"(?:#.*\n)*", text)
        lines = re.findall(r"^# (\w+): (.*)$", comment[0] if comment else "", re.MULTILINE)
        facts = {key: value for key, value in lines if key in _FACTS}
        missing = [key for key in _FACTS if key not in facts]
        if missing:
            raise ValueError(f"{path} does not say what it is: add '# {missing[0]}: ...' to the comment on top")
        values = yaml.safe_load(text)
        return cls(name=path.stem, path=path, data=_data(values), network=_network(values.get("model")), **facts)


def list_recipes() -> list[RecipeEntry]:
    """Every recipe that comes with the package, by name."""
    return [RecipeEntry.read(path) for path in sorted(_folder().glob("*.yaml"))]


def find_recipe(given: str | Path) -> Path:
    """The file of a recipe that is given by its path, or by the name of one that comes with the package.

    A file wins over a recipe of the same name. What trainings to be compared have in common has "compare/" in front.

    Raises:
        FileNotFoundError: there is neither; the message names the nearest.
    """
    path, name = Path(given), str(given).removesuffix(".yaml")
    if path.is_file():
        return path
    packaged = _folder() / f"{name}.yaml"
    if re.fullmatch(r"(compare/)?[\w-]+", name) and packaged.is_file():
        return packaged
    names = sorted(found.stem for found in _folder().glob("*.yaml"))
    if path.stem in names and path.stem != str(given):
        raise FileNotFoundError(f"there is no recipe {given}; one of this name comes with the package: {path.stem}")
    hint = "give the path of a YAML file, or a name that `timm-fsr recipes` lists"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no recipe {given}; {hint}")
    raise FileNotFoundError(f"there is no recipe {given}: {unknown('name', name, names)}; {hint}")


def _folder() -> Path:
    found = [folder for folder in FOLDERS if folder.is_dir()]
    if not found:
        raise FileNotFoundError(f"this installation of timm_fsr has no recipes ({FOLDERS[0]}); install it again")
    return found[0]


def _data(values: dict[str, Any]) -> str:
    data = values.get("data") or {}
    limit = data.get("limit_train")
    return f"{data.get('source', 'of the recipe before it')}{f', {limit:,} images' if limit else ''}"


def _network(model: dict[str, Any] | None) -> str:
    if model is None:
        return "of the recipe before it"
    return f"{model['name']} with {model['layer']}" if model.get("layer") else str(model["name"])
