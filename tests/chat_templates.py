"""Toy tokenizers with chat templates in the forms that models have: what they render is known by heart."""

from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATES = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
LLAMA_2 = ALTERNATES + (
    "{% if m.role == 'user' %}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = ALTERNATES + (
    "{% if m.role == 'user' %}[INST] {% if loop.first and system %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Calls as JSON with `parameters`, closed by a token of their own; results come from `ipython`.
LLAMA_3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = 'today' %}{% endif %}"
    "{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nDate: {{ date_string }}. Functions:"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% endfor %}<|eom_id|>'
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system message holds the tools; adjacent tool results are one turn of the user.
QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
)
QWEN_RESULT = (
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\n' if said or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {% if call.function.arguments is string %}'
    "{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}\n</tool_call>"
    "{% endfor %}"
)
QWEN_2_5 = (
    QWEN_TOOLS + "{% else %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set said = m.content or '' %}{% if m.role == 'system' %}" + QWEN_RESULT +
    "{% else %}<|im_start|>{{ m.role }}\n{{ said }}" + QWEN_CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
# Thoughts stand before an answer that no question follows, an empty thought before the last one.
QWEN_3 = (
    QWEN_TOOLS + "{% endif %}{% set ns = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'system' %}" + QWEN_RESULT +
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ said }}<|im_end|>\n{% else %}<|im_start|>assistant\n"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].replace('<think>', '') %}"
    "{% set said = said.split('</think>')[1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.question and (loop.last or thought) %}"
    "<think>\n{{ thought | trim }}\n</think>\n\n{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    + QWEN_CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # fmt: skip
# Tools stand before the newest question; calls are a JSON list; ids have nine characters.
MISTRAL_TOOLS = (
    "{% set ns = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.question %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}" + CHATML
# Arguments are joined to text as they are.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|output|>{{ m.content }}"
    "{% elif m.tool_calls is defined %}<|Assistant|>{% for call in m.tool_calls %}"
    "{{ '<|call|>' + call.function.name + '\n' + call.function.arguments }}{% endfor %}{{ eos_token }}"
    "{% else %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
# Template, BOS, EOS, other special tokens.
FORMS: dict[str, tuple[str, str | None, str, list[str]]] = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"]),
    "llama-2": (LLAMA_2, "<s>", "</s>", []),
    "mistral": (MISTRAL, "<s>", "</s>", []),
    "llama-3": (LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "qwen-2.5": (QWEN_2_5, None, "<|im_end|>", ["<|im_start|>"]),
    "qwen-3": (QWEN_3, None, "<|im_end|>", ["<|im_start|>"]),
    "mistral-tools": (MISTRAL_TOOLS, "<s>", "</s>", ["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "phi-3": (PHI_3, None, "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "smollm": (SMOLLM, None, "<|im_end|>", ["<|im_start|>"]),
    "deepseek": (DEEPSEEK, "<s>", "</s>", ["<|User|>", "<|Assistant|>", "<|call|>", "<|output|>"]),
}


def chat_tokenizer(form: str) -> Any:
    """A tokenizer of bytes, in which a space and the letter behind it are one token, with a chat template."""
    from string import ascii_letters

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, bos, eos, more = FORMS[form]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{letter}" for letter in ascii_letters)]
    merges = [("Ġ", letter) for letter in ascii_letters]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=more,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer
