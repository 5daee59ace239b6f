"""The group of a prompt: which pairs must not be on both sides of a split, and are not independent of each other.

One idea to keep in mind: a dialogue and each prefix of it begin with the same human turn, and the longer one may hold
the response of the shorter one. So the first human turn alone decides, without case, white space and Unicode form.
"""

import hashlib
import re
import unicodedata

from dpo_cli.data.formats import HUMAN, Prompt

# Characters without width: soft hyphen, joiners, direction marks, variation selectors, byte order mark.
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")


def normalised(text: str) -> str:
    """The text in NFKC_Casefold, without characters of no width, each run of white space as one space.

    Texts become equal that differ only in case, in composed or decomposed accents, or in a trailing space.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFD", _INVISIBLE.sub("", text))
        for _ in range(2):  # NFKC_Casefold, section 3.13 of the Unicode standard: a second pass makes it stable
            text = unicodedata.normalize("NFKC", text.casefold())
    return " ".join(text.casefold().split())


def first_human_turn(prompt: Prompt) -> str:
    """What the user says first; of a prompt without such a turn, the whole text.

    Text in HH form is split into turns even where it is one message, has the line breaks of Windows, or lost those
    before its first `Human:` or one of those before the last `Assistant:`.
    """
    said = next((message.content for message in prompt.messages if message.role == "user"), prompt.text)
    said = said.replace("\r\n", "\n")
    opened = "\n\n" + said.lstrip() if said.lstrip().startswith(HUMAN.strip()) else said
    if HUMAN not in opened:
        return said
    return re.split(r"\n\n(?:Human|Assistant):|\nAssistant:\s*$", opened.split(HUMAN, 1)[1], maxsplit=1)[0]


def prompt_group(prompt: Prompt) -> int:
    """64 bits of BLAKE2b of the normalised first human turn: the same in every file, run and process.

    Prompts with the same first turn ("hi", or an empty one) are one group, whatever follows. So one side of a split may
    get more pairs than needed, but no dialogue is on both sides.
    """
    digest = hashlib.blake2b(normalised(first_human_turn(prompt)).encode("utf-8"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
