"""What is cut where a pair is too long: whole turns of the prompt, the oldest first; then the end of a response."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from dpo_cli.data.formats import HUMAN, OPENING_ROLES, BadRowError, Message, Prompt


@dataclass
class Truncation:
    """What max_length cost, counted over all pairs that were kept."""

    prompts_cut: int = 0
    responses_cut: int = 0  # each lost its closing EOS with the cut


@dataclass(frozen=True)
class Encoded:
    """A pair's token ids before truncation."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_unscored: tuple[int, ...] = ()  # start, stop, start, stop, ...: what the assistant did not write
    rejected_unscored: tuple[int, ...] = ()
    # The prompt in at most so many tokens; None: its last tokens.
    shorten: Callable[[int], list[int]] | None = field(default=None, compare=False, repr=False)

    def by_tokens(self) -> "Encoded":
        """The same, of which the prompt loses its oldest tokens: how configs of version 3 and earlier cut."""
        return replace(self, shorten=None)

    def shortened(self, length: int) -> list[int]:
        """The prompt in at most `length` tokens."""
        if len(self.prompt) <= length:
            return self.prompt
        return self.shorten(length) if self.shorten is not None else last(self.prompt, length)


def last(ids: list[int], number: int) -> list[int]:
    """The last `number` ids; all where there are fewer."""
    return ids[max(0, len(ids) - number) :]


def truncate(encoded: Encoded, max_length: int, max_prompt_length: int | None, tally: Truncation) -> Encoded | None:
    """A pair cut to `max_length` tokens (prompt + longer response), or None if the prompt leaves no room.

    1. A prompt over `max_prompt_length` is shortened to it; without that limit one of max_length tokens or more is
       refused.
    2. If prompt and longer response do not fit, the prompt is shortened, at most to half of max_length. A prompt that
       loses whole turns may become shorter than it must.
    3. Only then is the end of a response cut, and its closing EOS with it: to train on an EOS after a cut would
       teach the model to stop in mid-sentence. What would then end with a part that the assistant did not write ends
       before it.
    """
    allowed = len(encoded.prompt)
    if max_prompt_length is not None:
        allowed = min(allowed, max_prompt_length)
    elif allowed >= max_length:
        return None
    longer = max(len(encoded.chosen), len(encoded.rejected))
    if allowed + longer > max_length:
        allowed = max(max_length - longer, min(allowed, max_length // 2))
    prompt = encoded.shortened(allowed)
    room = max_length - len(prompt)
    chosen, chosen_unscored = _up_to(room, encoded.chosen, encoded.chosen_unscored)
    rejected, rejected_unscored = _up_to(room, encoded.rejected, encoded.rejected_unscored)
    tally.prompts_cut += len(prompt) < len(encoded.prompt)
    tally.responses_cut += len(chosen) < len(encoded.chosen)
    tally.responses_cut += len(rejected) < len(encoded.rejected)
    return Encoded(prompt, chosen, rejected, chosen_unscored, rejected_unscored)


def _up_to(room: int, response: list[int], unscored: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    """The beginning of a response in at most `room` tokens, its last one scored."""
    ranges = list(zip(unscored[::2], unscored[1::2], strict=True))
    end = min(room, len(response))
    end = next((start for start, stop in ranges if start < end <= stop), end)
    return response[:end], tuple(chain.from_iterable((start, stop) for start, stop in ranges if stop < end))


def shorten(
    prompt: Prompt, length: int, encode: Callable[[Prompt], list[int]], as_text: bool, bos: int | None
) -> list[int]:
    """A prompt in at most `length` tokens: without its oldest turns, else without the oldest tokens of its last turn.

    `encode` gives the ids of a prompt, of its text or of its messages, and raises BadRowError for one that the chat
    template refuses. A system message stays, unless it would fill more than half; BOS stays.
    """

    def encoded(part: Prompt) -> list[int]:
        try:
            return encode(part)
        except BadRowError:
            return []

    def fits(number: int) -> bool:
        return 0 < len(encoded(shorter[number])) <= length

    shorter = _texts_by_turn(prompt) if as_text else _messages_by_turn(prompt)
    number = bisect_left(range(len(shorter)), True, key=fits)
    if number < len(shorter):
        return encoded(shorter[number])
    newest = shorter[-1] if shorter else prompt
    for part in (newest, _without_system(newest)):
        ids = encoded(part)
        if 0 < len(ids) <= length:
            return ids
        probes = [encoded(_with_other_words(part, words, as_text)) for words in ("0", "x")]
        head = _shared(ids, *probes)
        if ids and len(head) <= length // 2:
            return head + last(ids, length - len(head))
    ids = encode(prompt)
    opening = ids[:1] if ids[0] == bos else []
    return opening + last(ids, length - len(opening))


def _messages_by_turn(prompt: Prompt) -> list[Prompt]:
    """The prompt from its second turn on, from its third on, and so on, each with the system message.

    Then the last question without the oldest calls and results behind it: a call stays with its results.
    """
    system, spoken = _split(prompt.messages)
    users = [index for index, message in enumerate(spoken) if message.role == "user"]
    last_question = users[-1] if users else 0
    calls = [index for index, message in enumerate(spoken) if message.role == "assistant" and index > last_question]
    kept = [spoken[start:] for start in users if start > 0]
    kept += [(spoken[last_question], *spoken[start:]) for start in calls[1:]]
    return [replace(prompt, messages=(*system, *messages), text="") for messages in kept]


def _texts_by_turn(prompt: Prompt) -> list[Prompt]:
    """The same for a text in HH form; what stands before its first turn is the system message."""
    system, *turns = prompt.text.split(HUMAN)
    return [Prompt((), system + HUMAN + HUMAN.join(turns[start:])) for start in range(1, len(turns))]


def _without_system(part: Prompt) -> Prompt:
    _, human, spoken = part.text.rpartition(HUMAN)
    return replace(part, messages=_split(part.messages)[1], text=human + spoken)


def _split(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system messages that a conversation begins with, and the rest."""
    is_turn = (index for index, message in enumerate(messages) if message.role not in OPENING_ROLES)
    number = next(is_turn, len(messages))
    return tuple(messages[:number]), tuple(messages[number:])


def _with_other_words(part: Prompt, words: str, as_text: bool) -> Prompt:
    """The last turn with other words: what both have in common at their beginning is no part of what was said."""
    if as_text:
        before, human, _ = part.text.rpartition(HUMAN)
        return Prompt((), f"{before}{human} {words}" if human else words)
    system, spoken = _split(part.messages)
    other = (Message(spoken[0].role, words), *spoken[1:]) if spoken else ()
    return replace(part, messages=(*system, *other), text="")


def _shared(*sequences: list[int]) -> list[int]:
    """What all begin with."""
    number = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        number += 1
    return sequences[0][:number]
