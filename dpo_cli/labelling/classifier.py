"""Reward models of others, as the hub has them: a whole sequence-classification model with one label."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.data.formats import Message
from dpo_cli.errors import CheckpointError
from dpo_cli.models.loading import ModelSource, disable_dropout

AT_ONCE = 16  # texts a forward pass


def is_classifier(source: ModelSource) -> bool:
    """Whether a model's config names a sequence-classification model; CheckpointError where it has not one label."""
    config = _read(AutoConfig, source)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return False
    if config.num_labels != 1:
        raise CheckpointError(f"{safe_text(source.name)}: has {config.num_labels} labels; a reward model has one")
    return True


def load_classifier(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in eval mode."""
    model = _read(AutoModelForSequenceClassification, source, dtype=dtype, use_safetensors=True)
    disable_dropout(model)
    return model.to(device).eval()


def _read(kind: Any, source: ModelSource, **more: Any) -> Any:
    try:
        return kind.from_pretrained(
            source.path, revision=source.config.revision, trust_remote_code=source.config.trust_remote_code, **more
        )
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise CheckpointError(
            f"{safe_text(source.name)}: cannot be loaded ({safe_text(first_line(error), limit=200)})"
        ) from None


def conversation_ids(tokenizer: Any, prompt: Sequence[Message], text: str, answer: str) -> list[int]:
    """An answered prompt as such models are trained on it.

    By the chat template as a whole conversation; without a template as the prompt's plain text and the answer, paired.
    """
    ids: list[int]
    if not tokenizer.chat_template:
        ids = tokenizer(text, answer).input_ids
        return ids
    turns = [{"role": message.role, "content": message.content} for message in prompt]
    try:
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    except Exception as error:  # raised by the template, a program of the model's author
        raise CheckpointError(f"the judge's chat template refuses a prompt ({safe_text(error, limit=120)})") from None
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    return ids


def scores(
    model: Any, sequences: Sequence[list[int]], device: torch.device, poll: Callable[[], None] = lambda: None
) -> list[float]:
    """The model's one output for each sequence of token ids, in their order; those of like length are read together."""
    found = [0.0] * len(sequences)
    for places in _batches(sequences, padded=hasattr(model, "score")):
        poll()
        some = [sequences[place] for place in places]
        used = {token for ids in some for token in ids}
        # Decoders read the score at the last token that is not padding: so padding is a token that none of these holds,
        # whatever the config says of it (often EOS, which would then be skipped where it closes the answer).
        padding = next(token for token in range(len(used) + 1) if token not in used)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
        width = max(map(len, some))
        ids = torch.tensor([one + [padding] * (width - len(one)) for one in some], device=device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in some], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for place, value in zip(places, logits[:, 0].float().tolist(), strict=True):
            found[place] = value
    return found


def _batches(sequences: Sequence[list[int]], padded: bool) -> list[list[int]]:
    """The sequences by number, together where they are of like length; of one length where none may be padded.

    Padding on the right moves nothing in a decoder. Encoders may count positions by it.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(sequences)), key=lambda place: len(sequences[place])):
        fits = padded or (batches and len(sequences[batches[-1][0]]) == len(sequences[place]))
        if batches and fits and len(batches[-1]) < AT_ONCE:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
