"""The commands that serve an exported folder, to copy: only those that are right for what was exported."""

import re
import shlex
from dataclasses import dataclass

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Served:
    """What is to be served: a folder or hub id, its short name, and for an adapter its base and rank."""

    place: str
    name: str
    adapter: bool
    base: str = ""
    rank: int = 0  # 0: not LoRA


def serving_commands(served: Served) -> list[tuple[str, list[str]]]:
    """For each program the commands, quoted for a shell; files and models are named so that every program takes it."""
    place, name = shlex.quote(served.place), re.sub(r"[^A-Za-z0-9._-]+", "-", served.name).strip("._-") or "model"
    gguf = f"{name}.gguf"
    if not served.adapter:
        model = shlex.quote(f"FROM ./{gguf}")
        return [
            ("vLLM", [f"vllm serve {place}"]),
            ("llama.cpp", [f"python convert_hf_to_gguf.py {place} --outfile {gguf}", f"llama-server -m {gguf}"]),
            ("Ollama", [f"echo {model} > Modelfile", f"ollama create {name} -f Modelfile", f"ollama run {name}"]),
        ]
    if not served.rank:
        return []
    base = shlex.quote(served.base)
    rank = next((rank for rank in VLLM_RANKS if rank >= served.rank), served.rank)
    module = shlex.quote(f"{name}={served.place}")
    lora, from_base = f"{name}-lora.gguf", "printf 'FROM ./base.gguf\\nADAPTER ./%s\\n'"
    return [
        ("vLLM", [f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {module}"]),
        (
            "llama.cpp",
            [
                f"python convert_hf_to_gguf.py {base} --outfile base.gguf",
                f"python convert_lora_to_gguf.py {place} --base {base} --outfile {lora}",
                f"llama-server -m base.gguf --lora {lora}",
            ],
        ),
        ("Ollama", [f"{from_base} {lora} > Modelfile", f"ollama create {name} -f Modelfile", f"ollama run {name}"]),
    ]
