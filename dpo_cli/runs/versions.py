"""Files of earlier versions, read as if this one had written them."""

from typing import Any

LAYOUTS = {"segments": "packed_segments", "mask": "packed_mask"}  # version 1 -> 2; `padded` is the same


def migrated_state(found: dict[str, Any], version: int) -> dict[str, Any]:
    """The content of a checkpoint's state.json in the form of `version`; ValueError where it is newer."""
    written = found.get("version", 1)
    if written > version:
        raise ValueError("written by a newer dpo-cli")
    if written < 2:
        settled, fingerprint = dict(found.pop("settled")), found.pop("model_digest")
        settled["layout"] = LAYOUTS.get(settled["way"], settled.pop("way"))
        settled["max_pairs"] = settled.pop("pairs_a_pass")
        found = {**found, "settings": settled, "model_fingerprint": fingerprint}
    return {**found, "version": version}


def migrated_manifest(facts: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest.json of any version in the form of this one."""
    model, batches = facts.get("model"), facts.get("batches")
    if isinstance(model, dict) and "digest" in model:
        model = {("fingerprint" if key == "digest" else key): value for key, value in model.items()}
    if isinstance(batches, dict) and "way" in batches:
        layout = LAYOUTS.get(str(batches["way"]), batches["way"])
        batches = {"layout": layout, **{key: value for key, value in batches.items() if key != "way"}}
    return {**facts, **({"model": model} if model else {}), **({"batches": batches} if batches else {})}
