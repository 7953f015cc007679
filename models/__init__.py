"""The model families that this runtime knows, found by the names that model files give themselves.

A family is one file with a FAMILY (see CONTRIBUTING, "add a model family"): how config.json is read and what differs
from Llama. huggingface.py and gguf.py hold what the families share of each file format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyruntime.config import Family, KeyReader, ModelConfig, show
from pyruntime.errors import ModelFileError, UnsupportedModelError

from . import llama, mistral, qwen2, qwen3

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)


def find_family(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is null or missing."""
    architectures = values.get("architectures")
    model_type = values.get("model_type")
    if architectures is not None and not (isinstance(architectures, list) and len(architectures) == 1):
        raise ModelFileError(f"{where}: 'architectures' is {show(architectures)}, expected a list of one name.")
    if architectures is None:
        found = [family for family in FAMILIES if family.model_type == model_type]
        named = f"'model_type' is {show(model_type)} and 'architectures' is missing"
        known = ", ".join(family.model_type for family in FAMILIES)
    else:
        found = [family for family in FAMILIES if family.architecture == architectures[0]]
        named = f"the architecture is {show(architectures[0])}"
        known = ", ".join(family.architecture for family in FAMILIES)
    if not found:
        raise UnsupportedModelError(f"{where}: {named}; supported are {known}.")
    if model_type is not None and model_type != found[0].model_type:
        raise UnsupportedModelError(
            f"{where}: 'model_type' is {show(model_type)}, expected {found[0].model_type!r} for {found[0].architecture}."
        )
    return found[0]


def find_gguf_family(architecture: str, where: str) -> Family:
    """The family of a GGUF file, by its `general.architecture`."""
    for family in FAMILIES:
        if family.gguf_architecture == architecture:
            return family
    known = ", ".join(family.gguf_architecture for family in FAMILIES if family.gguf_architecture)
    raise UnsupportedModelError(f"{where}: the architecture is {show(architecture)}; supported in GGUF are {known}.")


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """config.json -> ModelConfig, every key accounted for. `where` (the file's path) starts the message of an error."""
    return find_family(values, where).read_config(KeyReader(values, where))
