"""Sampled answers on disk: what dpo-sample writes and dpo-label reads.

A row is a prompt with several answers to it. Its id is a hash of both, so that a judgement is of these very texts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.data.files import RowInFile, read_rows
from dpo_cli.data.formats import BadRowError, Prompt, prompt_of, text_of
from dpo_cli.errors import DataError
from dpo_cli.storage.hashing import fingerprint


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers drawn to it."""

    id: str
    prompt: Any  # as it stands in the file: text, or a list of messages
    responses: tuple[str, ...]
    finished: tuple[bool, ...] = ()  # False: that response was cut at the limit; empty where the file says nothing

    def is_finished(self, place: int) -> bool:
        """Whether a response ended by itself."""
        return not self.finished or self.finished[place]

    @property
    def read(self) -> Prompt:
        """The prompt in both readings, as messages and as plain text."""
        return prompt_of({"prompt": self.prompt})


def sample_id(prompt: Any, responses: Sequence[str]) -> str:
    """32 hexadecimal digits that stand for these very texts, whatever file they are in."""
    return fingerprint([prompt, *responses])


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, each once, in their order; DataError names the line that is none, half a one included."""
    samples: dict[str, Sample] = {}
    for row in read_rows(path):
        sample = _sample_of(row)
        samples.setdefault(sample.id, sample)
    if not samples:
        raise DataError(f"{safe_text(path)}: holds no samples")
    return list(samples.values())


def templates_of(path: Path) -> set[str]:
    """The templates that answers were drawn under, where the file says so."""
    found = {row.value.get("template") for row in read_rows(path) if row.value is not None}
    return {template for template in found if isinstance(template, str)}


def _sample_of(row: RowInFile) -> Sample:
    if row.value is None:
        raise DataError(f"{row.place}: {row.problem}")
    responses = row.value.get("responses")
    if isinstance(responses, list) and len(responses) == 1:
        raise DataError(f"{row.place}: has one answer; two are compared, so sample with n=2 or more")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
        has = ", ".join(map(str, row.value)) or "nothing"
        raise DataError(
            f"{row.place}: no 'responses', a list of two texts or more; it has {safe_text(has, 120)}. Samples are what "
            "dpo-sample writes"
        )
    try:
        prompt_of({name: cell for name, cell in row.value.items() if name == "prompt"})
        for text in responses:
            text_of(text, "responses")
    except BadRowError as error:
        raise DataError(f"{row.place}: {safe_text(error, limit=300)}") from None
    finished = row.value.get("finished") or []
    if not isinstance(finished, list) or not all(isinstance(one, bool) for one in finished):
        raise DataError(f"{row.place}: 'finished' must be a list of true or false")
    if finished and len(finished) != len(responses):
        raise DataError(f"{row.place}: 'finished' has {len(finished)} entries for {len(responses)} responses")
    prompt = row.value["prompt"]
    if isinstance(prompt, list):  # whatever else its messages carry is not asked
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    return Sample(sample_id(prompt, responses), prompt, tuple(responses), tuple(finished))


def as_stored(prompt: Any, answer: str) -> str:
    """An answer as it stands in a file of samples.

    Messages rendered as plain text end in a colon, behind which an answer begins with a space: it is no part of it.
    """
    return answer.removeprefix(" ") if isinstance(prompt, list) else answer


def as_drawn(prompt: Any, response: str) -> str:
    """The other way round: a response as it follows its prompt."""
    return f" {response}" if isinstance(prompt, list) else response


def fingerprint_of(samples: Iterator[Sample] | Sequence[Sample]) -> str:
    """A hash of the samples in their order: labels of other samples have another."""
    digest = hashlib.sha256()
    for sample in samples:
        cut = [str(place) for place in range(len(sample.responses)) if not sample.is_finished(place)]
        digest.update(sample.id.encode("ascii") + ",".join(cut).encode("ascii"))
    return digest.hexdigest()[:32]
