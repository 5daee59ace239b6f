"""Reward models from the hub: sequence-classification models with one label."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.data.formats import Message
from dpo_cli.engine.engine import SINGLE, Engine, in_turns
from dpo_cli.errors import CheckpointError
from dpo_cli.models.loading import ModelSource, disable_dropout, model_config

BATCH_SIZE = 16  # sequences in a forward pass


def is_classifier(source: ModelSource) -> bool:
    """Whether a model's config is of a sequence-classification model; CheckpointError unless it has one label."""
    config = _read(source, lambda: model_config(source))
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return False
    if config.num_labels != 1:
        raise CheckpointError(f"{safe_text(source.name)}: has {config.num_labels} labels; a reward model has one")
    return True


def load_classifier(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in eval mode."""
    given = source.config
    model = _read(
        source,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            source.path,
            config=model_config(source),
            revision=given.revision,
            trust_remote_code=given.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
        ),
    )
    disable_dropout(model)
    return model.to(device).eval()


def _read(source: ModelSource, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise CheckpointError(
            f"{safe_text(source.name)}: cannot be loaded ({safe_text(first_line(error), limit=200)})"
        ) from None


def conversation_ids(tokenizer: Any, prompt: Sequence[Message], text: str, response: str) -> list[int]:
    """Token ids of a prompt with a response, in the form that such models are trained on.

    With a chat template the whole conversation; without one the prompt's plain text and the response as a text pair.
    """
    ids: list[int]
    if not tokenizer.chat_template:
        ids = tokenizer(text, response).input_ids
        return ids
    turns = [{"role": message.role, "content": message.content} for message in prompt]
    try:
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
    except Exception as error:  # raised by the template, code of the model's author
        raise CheckpointError(f"the judge's chat template refuses a prompt ({safe_text(error, limit=120)})") from None
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    return ids


def scores(
    model: Any,
    sequences: Sequence[list[int]],
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
    engine: Engine = SINGLE,
) -> list[float]:
    """The model's output for each sequence of token ids, in order; sequences of similar length share a batch.

    The ranks share the batches, and each knows all scores.
    """

    def score(indices: list[int]) -> list[float]:
        batch = [sequences[index] for index in indices]
        used = {token for ids in batch for token in ids}
        # Decoders read the score at the last token that is not padding. So padding is a token that is in none of these
        # sequences, not the config's pad token: often that is EOS, which also closes the response.
        padding = next(token for token in range(len(used) + 1) if token not in used)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
        width = max(map(len, batch))
        ids = torch.tensor([one + [padding] * (width - len(one)) for one in batch], device=device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in batch], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        found: list[float] = logits[:, 0].float().tolist()
        return found

    batches = _batches(sequences, padded=hasattr(model, "score"))
    values = {
        index: value
        for some in in_turns(engine, batches, score, poll)
        for indices, found in some
        for index, value in zip(indices, found, strict=True)
    }
    return [values[index] for index in range(len(sequences))]


def _batches(sequences: Sequence[list[int]], padded: bool) -> list[list[int]]:
    """Indices of the sequences in batches of similar length; of equal length unless `padded`.

    Padding on the right changes nothing in a decoder. An encoder may count it as positions.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index])):
        fits = padded or (batches and len(sequences[batches[-1][0]]) == len(sequences[index]))
        if batches and fits and len(batches[-1]) < BATCH_SIZE:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
