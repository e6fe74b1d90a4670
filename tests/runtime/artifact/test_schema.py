"""The JSON Schema of the manifest; tests/conftest.py checks the manifest of every export against it."""

import copy
import json

import msgspec
import pytest

from bonnx.runtime.artifact.manifest import Manifest
from bonnx.runtime.artifact.schema import SCHEMA_FILE, manifest_schema


def test_the_file_is_what_the_types_say():
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == manifest_schema(), (
        "run `python -m bonnx.runtime.artifact.schema`"
    )


@pytest.mark.parametrize("name", ["countdown", "small", "tiny"])
def test_a_manifest_follows_it(name, request, manifest_schema):
    manifest = json.loads((request.getfixturevalue(name) / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest_schema.iter_errors(manifest)) == []


DAMAGES = {
    "a newer version": lambda manifest: manifest.update(schema_version=3),
    "no seal": lambda manifest: manifest.pop("seal"),
    "a seal that is cut": lambda manifest: manifest.update(seal=manifest["seal"][:63]),
    "a field that no version has": lambda manifest: manifest["scoring"].update(agregation="last"),
    "an aggregation that no graph has": lambda manifest: manifest["scoring"].update(aggregation="median"),
    "a token as text": lambda manifest: manifest["scoring"].update(end_token="7"),
    "no file of a graph": lambda manifest: manifest["graphs"]["rank"].pop("file"),
    "an input without a type": lambda manifest: manifest["graphs"]["rank"]["inputs"][0].pop("dtype"),
    "an axis that is a list": lambda manifest: manifest["graphs"]["rank"]["inputs"][0].update(shape=[[1]]),
    "a size below 0": lambda manifest: manifest["files"]["onnx/weights.bin"].update(size=-1),
    "a limit that is missing": lambda manifest: manifest.update(limits=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_does_not(damage, countdown, manifest_schema):
    manifest = json.loads((countdown / "manifest.json").read_text(encoding="utf-8"))
    DAMAGES[damage](manifest)
    assert not manifest_schema.is_valid(manifest)


def test_it_refuses_whatever_bonnx_refuses(countdown, manifest_schema, rng):
    """A value of another kind, or none, anywhere in the manifest."""
    text = (countdown / "manifest.json").read_text(encoding="utf-8")
    refused = 0
    for _ in range(300):
        manifest = json.loads(text)
        holder, key = manifest, None
        while key is None or (isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8):
            holder = manifest if key is None else holder[key]
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = keys[int(rng.integers(len(keys)))]
        if isinstance(holder, dict) and rng.random() < 0.3:
            del holder[key]
        else:
            other = [None, True, -1, 1.5, "x", [], {}, [1], {"x": 1}]
            holder[key] = copy.deepcopy(other[int(rng.integers(len(other)))])
        try:
            msgspec.convert(manifest, Manifest)
            read = manifest["schema_version"] == 2
        except msgspec.ValidationError:
            read = False
        assert manifest_schema.is_valid(manifest) == read, manifest
        refused += not read
    assert refused > 50
