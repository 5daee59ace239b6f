"""Hashes: the `sha256` of a file, and the `fingerprint` that identifies a value or texts, whatever file they are in."""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits for a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()[:32]


def fingerprint_of_texts(*texts: str) -> str:
    """64 hexadecimal digits for texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)  # the length keeps "ab","c" from "a","bc"
    return digest.hexdigest()
