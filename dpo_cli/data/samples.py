"""Samples on disk: what dpo-sample writes and dpo-label reads.

A row is a prompt with several responses. Its id is a hash of both, so that a judgement belongs to these exact texts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.data.files import SourceRow, read_rows
from dpo_cli.data.formats import BadRowError, FinishReason, Prompt, finish_reasons, prompt_of, text_of
from dpo_cli.errors import DataError
from dpo_cli.storage.hashing import fingerprint


@dataclass(frozen=True)
class Sample:
    """A prompt with several responses."""

    id: str
    prompt: Any  # as in the file: text, or a list of messages
    responses: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...] = ()  # of each response; empty where the file has none

    def finish_reason(self, index: int) -> FinishReason:
        """The finish reason of a response, `stop` where the file has none."""
        return self.finish_reasons[index] if self.finish_reasons else FinishReason.STOP

    @property
    def read(self) -> Prompt:
        """The prompt in both forms, as messages and as plain text."""
        return prompt_of({"prompt": self.prompt})


def sample_id(prompt: Any, responses: Sequence[str]) -> str:
    """32 hexadecimal digits of a hash of the texts: the same in every file."""
    return fingerprint([prompt, *responses])


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, each once, in their order; DataError names a line that is not a sample."""
    samples: dict[str, Sample] = {}
    for row in read_rows(path):
        sample = _sample_of(row)
        samples.setdefault(sample.id, sample)
    if not samples:
        raise DataError(f"{safe_text(path)}: has no samples; make them with dpo-sample")
    return list(samples.values())


def templates_of(path: Path) -> set[str]:
    """The templates that the file names for its responses."""
    found = {row.value.get("template") for row in read_rows(path) if row.value is not None}
    return {template for template in found if isinstance(template, str)}


def _sample_of(row: SourceRow) -> Sample:
    if row.value is None:
        raise DataError(f"{row.location}: {row.problem}")
    responses = row.value.get("responses")
    if isinstance(responses, list) and len(responses) == 1:
        raise DataError(f"{row.location}: has one response, and labels need two; sample with n=2 or more")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        has = ", ".join(map(str, row.value)) or "nothing"
        raise DataError(
            f"{row.location}: no 'responses' key with a list of two texts or more; it has {safe_text(has, 120)}. "
            "Make samples with dpo-sample"
        )
    try:
        read = prompt_of({name: cell for name, cell in row.value.items() if name == "prompt"})
        for text in responses:
            text_of(text, "responses")
        reasons = finish_reasons(row.value, len(responses))
    except BadRowError as error:
        raise DataError(f"{row.location}: {safe_text(error, limit=300)}") from None
    prompt = row.value["prompt"]
    if isinstance(prompt, list):  # other keys of a message are ignored
        prompt = [message.as_dict() for message in read.messages]
    return Sample(sample_id(prompt, responses), prompt, tuple(responses), reasons)


def as_stored(prompt: Any, completion: str, template: str) -> str:
    """A completion as it is stored in a file of samples.

    Messages rendered as plain text end with a colon, after which a completion begins with a space. It is not stored.
    """
    return completion.removeprefix(" ") if isinstance(prompt, list) and template == "plain" else completion


def as_continuation(prompt: Any, response: str) -> str:
    """A response as it follows its prompt's text: a chat template takes the space away again."""
    return f" {response}" if isinstance(prompt, list) else response


def samples_fingerprint(samples: Iterator[Sample] | Sequence[Sample]) -> str:
    """A hash of the samples in their order, with their finish reasons."""
    digest = hashlib.sha256()
    for sample in samples:
        cut = [
            str(index) for index in range(len(sample.responses)) if sample.finish_reason(index) is FinishReason.LENGTH
        ]
        digest.update(sample.id.encode("ascii") + ",".join(cut).encode("ascii"))
    return digest.hexdigest()[:32]
