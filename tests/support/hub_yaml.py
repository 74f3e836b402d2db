"""What the stand-in for the Hub has against the metadata of a card; the real one is stricter still."""

from __future__ import annotations

import re
from typing import Any

import yaml

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown"}
_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


def yaml_errors(content: str) -> list[str]:
    """One sentence for each thing that is wrong with the head of a README."""
    head = re.match(r"---\n(.*?\n)---\n", content, re.DOTALL)
    if head is None:
        return ["the file has no metadata"]
    try:
        data = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata are no mapping"]
    errors = [] if data.get("license") in LICENSES else [f'"license" must be one of {sorted(LICENSES)}']
    for key in ("datasets", "base_model"):
        given = data.get(key, [])
        for name in given if isinstance(given, list) else [given]:
            if not (isinstance(name, str) and re.fullmatch(_ID, name)):
                errors.append(f'"{key}" has {name!r}, no id')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    return errors + _index_errors(data.get("model-index", []))


def _index_errors(index: Any) -> list[str]:
    try:
        for model in index:
            assert isinstance(model["name"], str), '"model-index.name" must be a name'
            for result in model["results"]:
                dataset, metrics = result["dataset"], result["metrics"]
                assert isinstance(result["task"]["type"], str), '"task.type" must be a string'
                for key in ("type", "name"):
                    assert isinstance(dataset[key], str), f'"dataset.{key}" must be a string'
                assert re.fullmatch(_ID, dataset["type"]), '"dataset.type" must be an id'
                assert isinstance(dataset.get("split", ""), str), '"dataset.split" must be a string'
                assert metrics, '"metrics" must not be empty'
                for metric in metrics:
                    assert isinstance(metric["type"], str), '"metrics.type" must be a string'
                    assert isinstance(metric["value"], (int, float)), '"metrics.value" must be a number'
    except AssertionError as error:
        return [str(error)]
    except (KeyError, TypeError) as error:
        return [f'"model-index" lacks {error}']
    return []
