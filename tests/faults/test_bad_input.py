"""Faults 10 to 17: whatever a user gets wrong is answered in one line, the same every time: the thing, its value, what
to do. The table holds that line for each case; `<...>` stands for the words of a library.
"""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended
from harness import fault

pytestmark = pytest.mark.faults
Command = Callable[..., Ended]


@dataclass(frozen=True)
class Case:
    """Files, a command on them, and how it ends; `{dir}` stands for their folder."""

    name: str
    fault: int
    code: int
    says: str
    words: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    command: str = "dpo-train"


CASES: list[Case] = []
SKIP = " (data.on_bad_row=skip counts and drops such rows)"


def J(**row: Any) -> bytes:  # noqa: N802 - a line of JSON, short in a long table
    return (json.dumps(row) + "\n").encode()


OK = b"".join(J(prompt=f"Say {n}.", chosen=f"Yes {n}.", rejected=f"No {n}.") for n in range(6))


def command_line(
    name: str, fault: int, code: int, says: str, words: list[str], files: dict[str, bytes] | None = None,
    command: str = "dpo-train",
) -> None:  # fmt: skip
    CASES.append(Case(name, fault, code, says, words, files or {}, command))


def data(name: str, fault: int, content: bytes, says: str, *words: str, file: str = "a.jsonl") -> None:
    """A file that is refused as a whole."""
    files, named = {file: content}, ["data=jsonl", f"data.train={{dir}}/{file}", *words]
    CASES.append(Case(name, fault, 3, f"{{dir}}/{file}: {says}", named, files))


def row(name: str, fault: int, content: bytes, says: str, *words: str, file: str = "a.jsonl") -> None:
    """A row that is refused, by its place in the file."""
    files, named = {file: content}, ["data=jsonl", f"data.train={{dir}}/{file}", *words]
    CASES.append(Case(name, fault, 3, f"{{dir}}/{file} {says}{SKIP}", named, files))


# fmt: off
# Fault 10: no file, no rows
command_line('missing file', 10, 3, '{dir}/trian.jsonl: no such file; did you mean {dir}/train.jsonl?', ['data=jsonl', 'data.train={dir}/trian.jsonl'], files={'train.jsonl': OK})
command_line('missing eval file', 10, 3, '{dir}/b.jsonl: no such file; did you mean {dir}/a.jsonl?', ['data=jsonl', 'data.train={dir}/a.jsonl', 'data.eval={dir}/b.jsonl'], files={'a.jsonl': OK})
data('empty file', 10, b'', 'the file is empty')
data('only blank lines', 10, b'\n\n  \n', 'has no pairs; name another file, or change data.eval_fraction')
command_line('a folder without data', 10, 3, '{dir}/x: is a folder without a file of these types: .jsonl, .jsonl.gz, .json, .csv, .parquet', ['data=jsonl', 'data.train={dir}/x'], files={'x/.a.jsonl': OK, 'x/a.txt': OK})
command_line('a pattern that matches nothing', 10, 3, '{dir}/x*.jsonl: no file matches this pattern', ['data=jsonl', 'data.train={dir}/x*.jsonl'], files={'a.jsonl': OK})
command_line('one file of a list missing', 10, 3, '{dir}/b.jsonl: no such file; did you mean {dir}/a.jsonl?', ['data=jsonl', 'data.train=[{dir}/a.jsonl,{dir}/b.jsonl]'], files={'a.jsonl': OK})
command_line('one file of a list empty', 10, 3, '{dir}/b.jsonl: the file is empty', ['data=jsonl', 'data.train=[{dir}/a.jsonl,{dir}/b.jsonl]'], files={'a.jsonl': OK, 'b.jsonl': b''})
command_line('a hub data set in a list', 10, 3, 'nobody/nothing: no such file; a list names files, data=mixture takes hub data sets', ['data=jsonl', 'data.train=[{dir}/a.jsonl,nobody/nothing]'], files={'a.jsonl': OK})
command_line('a held-out set missing', 10, 3, '{dir}/b.jsonl: no such file; did you mean {dir}/a.jsonl?', ['data=jsonl', 'data.train={dir}/a.jsonl', 'data.eval.code={dir}/b.jsonl'], files={'a.jsonl': OK})
data('empty JSON list', 10, b'[]', 'has no pairs; name another file, or change data.eval_fraction', file='a.json')
data('header only CSV', 10, b'prompt,chosen,rejected\n', 'has no pairs; name another file, or change data.eval_fraction', file='a.csv')
data('unknown ending', 10, OK, 'unknown file type; use one of .jsonl, .jsonl.gz, .json, .csv, .parquet', file='a.txt')
command_line('no data named', 10, 2, 'data.train=null: name a file (.jsonl, .json, .parquet, .csv) or a hub data set, for instance data.train=pairs.jsonl', ['data=jsonl'])
command_line('not on the hub', 10, 3, "nobody/nothing (split train): cannot be loaded from the hub (<...>); to read a local file, set data.train=PATH", ['data=jsonl', 'data.train=nobody/nothing'])

# Fault 11: garbled bytes
row('not JSON', 11, OK + b'{oops}\n' + OK, 'line 7: not JSON (<...> at column 2): {oops}')
row('half a line', 11, OK + b'{"prompt": "p", "cho', 'line 7: not JSON (<...> at column 17): {"prompt": "p", "cho')
row('not UTF-8', 11, OK + b'{"prompt": "\xff\xfe", "chosen": "c", "rejected": "r"}\n', 'line 7: not UTF-8 at byte 13: {"prompt": "��", "chosen": "c", "rejected": "r"}')
row('UTF-16', 11, OK.decode().encode('utf-16'), 'line 1: not UTF-8 at byte 1: ��{\\x00"\\x00p\\x00r\\x00o\\x00m\\x00p\\x00t\\x00"\\x00:\\x00 \\x00"\\x00S\\x00a\\x00y\\x00 \\x000\\x00.\\x00"\\x00,\\x00 \\x00"\\x00c\\x00h\\x00o\\x00s\\x00e\\x00n\\x00"\\x00')
row('NaN literal', 11, b'{"prompt": NaN, "chosen": "c", "rejected": "r"}\n', 'line 1: not JSON (NaN is not JSON): {"prompt": NaN, "chosen": "c", "rejected": "r"}')
row('Infinity literal', 11, b'{"prompt": "p", "chosen": "c", "rejected": "r", "score": -Infinity}\n', 'line 1: not JSON (-Infinity is not JSON): {"prompt": "p", "chosen": "c", "rejected": "r", "score": -In')
row('nested too deeply', 11, b'[' * 100000 + b'\n', 'line 1: nested too deeply: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[')
row('nested objects too deeply', 11, b'{"a":' * 100000 + b'\n', 'line 1: nested too deeply: {"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":')
row('20 MB line', 11, b'{"prompt": "' + b'x' * (20 * 2 ** 20) + b'", "chosen": "c", "rejected": "r"}\n', 'line 1: the line is 20 MiB long; the limit is 16 MiB')
row('a list', 11, b'["p", "c", "r"]\n', 'line 1: not a JSON object: ["p", "c", "r"]')
row('a string', 11, b'"hello"\n', 'line 1: not a JSON object: "hello"')
row('a number', 11, b'42\n', 'line 1: not a JSON object: 42')
row('null', 11, b'null\n', 'line 1: not a JSON object: null')
row('NUL bytes', 11, b'\x00\x00\x00\x00\n', 'line 1: not JSON (<...> at column 1): \\x00\\x00\\x00\\x00')
row('lone surrogate', 11, b'{"prompt": "a\\ud800b", "chosen": "c", "rejected": "r"}\n', "line 1: 'prompt' holds half a surrogate pair (\\ud800 to \\udfff), which is not text")
row('escape codes', 11, b'\x1b]52;c;aGk=\x07\x1b[31m\n', 'line 1: not JSON (<...> at column 1): \\x1b]52;c;aGk=\\x07\\x1b[31m')
data('garbled gzip', 11, b'\x1f\x8b\x08\x00garbage', 'cannot be read (<...>)', file='a.jsonl.gz')
data('not gzip', 11, OK, 'cannot be read (<...>)', file='a.jsonl.gz')
data('cut gzip', 11, gzip.compress(OK * 100, mtime=0)[:-9], 'cannot be read (<...>)', file='a.jsonl.gz')
data('not Parquet', 11, b'PAR1 nothing', 'not Parquet (<...>)', file='a.parquet')
data('JSON with a row a line', 11, OK, 'not JSON (<...>); name a file with one row a line .jsonl', file='a.json')
data('JSON object', 11, b'{"rows": []}', 'must hold a JSON list of rows', file='a.json')
row('JSON list of numbers', 11, b'[1, 2]', 'row 1: not a JSON object', file='a.json')
data('CSV not UTF-8', 11, b'prompt,chosen,rejected\n\xff,a,b\n', 'not UTF-8 at byte 24', file='a.csv')
row('CSV with a short row', 11, b'prompt,chosen,rejected\nonly\n', "line 2: no 'chosen' key. A row needs prompt, chosen and rejected; it has prompt", file='a.csv')
row('U+2028 inside a string counts no line', 11, '{"prompt": "a\u2028b", "chosen": "c", "rejected": "r"}\n'.encode() * 3 + b'oops\n', 'line 4: not JSON (<...> at column 1): oops')

# Fault 12: wrong columns or types
row('other columns', 12, J(question='q', good='g', bad='b'), "line 1: no 'chosen' key. A row needs prompt, chosen and rejected; it has question, good, bad; did you mean data.columns.chosen=good?")
row('near columns', 12, J(prompt='q', choosen='g', rejected='b'), "line 1: no 'chosen' key. A row needs prompt, chosen and rejected; it has prompt, choosen, rejected; did you mean data.columns.chosen=choosen?")
row('question instead of prompt', 12, J(question='q', chosen='g', rejected='b'), "line 1: no 'prompt' key. A row needs prompt, chosen and rejected; it has question, chosen, rejected; did you mean data.columns.prompt=question?; data=orca reads such rows")
row('no rejected', 12, J(prompt='q', chosen='g'), "line 1: no 'rejected' key. A row needs prompt, chosen and rejected; it has prompt, chosen")
row('null response', 12, J(prompt='q', chosen=None, rejected='b'), "line 1: 'chosen' must be text, it is null")
row('number response', 12, J(prompt='q', chosen=5, rejected='b'), "line 1: 'chosen' must be text, it is a number")
row('list of strings', 12, J(prompt='q', chosen=['a'], rejected=['b']), "line 1: 'chosen' message 0 must be an object with role and content")
row('message without role', 12, J(prompt=[{'content': 'q'}], chosen=[{'role': 'assistant', 'content': 'a'}], rejected=[{'role': 'assistant', 'content': 'b'}]), "line 1: 'prompt' message 0 must be an object with role and content")
row('message with content null', 12, J(prompt=[{'role': 'user', 'content': None}], chosen=[{'role': 'assistant', 'content': 'a'}], rejected=[{'role': 'assistant', 'content': 'b'}]), "line 1: 'prompt' message 0: content must be text, it is null")
row('response of the wrong role', 12, J(prompt=[{'role': 'user', 'content': 'q'}], chosen=[{'role': 'user', 'content': 'a'}], rejected=[{'role': 'assistant', 'content': 'b'}]), "line 1: 'chosen' must begin and end with an assistant message behind the prompt; it has user")
row('empty messages', 12, J(prompt=[], chosen=[{'role': 'assistant', 'content': 'a'}], rejected=[{'role': 'assistant', 'content': 'b'}]), 'line 1: the prompt must end with a user message before the responses begin (format=messages)')
row('hh without turns', 12, J(chosen='hello', rejected='there'), "line 1: chosen and rejected share no '\\n\\nAssistant:' turn, so there is no prompt (format=hh)", 'data.format=hh')
row('hh with different prompts', 12, J(chosen='\n\nHuman: a\n\nAssistant: b', rejected='\n\nHuman: c\n\nAssistant: d'), "line 1: chosen and rejected share no '\\n\\nAssistant:' turn, so there is no prompt (format=hh)")
row('standard asked, hh given', 12, J(chosen='\n\nHuman: a\n\nAssistant: b', rejected='\n\nHuman: a\n\nAssistant: d'), "line 1: no 'prompt' key. A row needs prompt, chosen and rejected; it has chosen, rejected", 'data.format=standard')
row('column that is not there', 12, OK, "line 1: no 'answer' key (data.columns.chosen); it has prompt, chosen, rejected; data=jsonl reads such rows", 'data.columns.chosen=answer')
command_line('column of no meaning', 12, 2, 'data.columns.good=answer: columns are prompt, system, history, chosen, rejected, responses, preferred, preference, scores, ranks, probability, source, tools, documents', ['data=jsonl', 'data.train={dir}/a.jsonl', 'data.columns.good=answer'])
row('ranked with one response', 12, J(prompt='q', responses=['a']), "line 1: 'responses' must hold at least two, it has 1 (format=ranked)")
row('ranked with too few scores', 12, J(prompt='q', responses=['a', 'b'], scores=[1]), "line 1: 'scores' has 1 numbers for 2 responses (format=ranked)")
row('ranked with a NaN score', 12, b'{"prompt": "q", "responses": ["a", "b"], "scores": [1, NaN]}\n', 'line 1: not JSON (NaN is not JSON): {"prompt": "q", "responses": ["a", "b"], "scores": [1, NaN]}')
row('empty object', 12, b'{}\n', "line 1: no 'chosen' key. A row needs prompt, chosen and rejected; it has nothing")

# Fault 13: pairs that teach nothing
data('ranked with equal scores', 13, J(prompt='q', responses=['a', 'b'], scores=[1, 1]), 'no pair can be used: 1 pair whose two responses are equally good (a tie)')
data('all identical', 13, J(prompt='q', chosen='a', rejected='a') * 3, 'no pair can be used: 3 pairs whose two responses are the same text')
data('all empty', 13, J(prompt='q', chosen='', rejected='a') * 3, 'no pair can be used: 3 pairs with an empty response')
data('all blank', 13, J(prompt='q', chosen=' \n ', rejected='a') * 3, 'no pair can be used: 3 pairs with an empty response')
data('identical after truncation', 13, J(prompt='q' * 10, chosen='a' * 300 + 'b', rejected='a' * 300 + 'c') * 3, 'no pair can be used: 3 pairs whose responses are the same text after truncation; raise data.max_length', 'data.max_length=64')
data('prompt too long', 13, J(prompt='q' * 3000, chosen='a', rejected='b') * 3, 'no pair can be used: 3 pairs whose prompt leaves no room for a response; raise data.max_length')
data('everything skipped', 13, b'oops\n' * 3, 'no pair can be used: 3 rows that could not be read', 'data.on_bad_row=skip', 'data.max_bad_fraction=1')

# Fault 15: models and adapters that are not there
command_line('model that is not there', 15, 4, 'model.name_or_path={dir}/model: no such folder', ['model.name_or_path={dir}/model', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK})
command_line('model that is a file', 15, 4, 'model.name_or_path={dir}/m: no such folder', ['model.name_or_path={dir}/m', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK, 'm': b'x'})
command_line('model folder that is empty', 15, 4, 'model.name_or_path={dir}/m: holds no model: it has no config.json', ['model.name_or_path={dir}/m', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK, 'm/x': b''})
command_line('adapter that is not there', 15, 4, "{dir}/adapter: no such folder; a PEFT adapter's folder or hub id is needed", ['model.adapter={dir}/adapter', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK})
command_line('adapter without weights', 15, 4, '{dir}/ad: has no adapter_model.safetensors; only safetensors are read', ['model.adapter={dir}/ad', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK, 'ad/adapter_config.json': b'{}'})
command_line('modules that are not there', 15, 2, "lora.target_modules=['nope']: <...> (this model has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)", ['lora.target_modules=[nope]', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK})

# The command line
command_line('typo of a key', 0, 2, "unknown key 'beat' in 'beat=0.2'; did you mean 'beta'?", ['beat=0.2'])
command_line('plus typo', 0, 2, "unknown key 'bta' in '+bta=0.2'; did you mean 'beta'?", ['+bta=0.2'])
command_line('typo of a group', 0, 2, "model=qwn: no such choice; did you mean 'qwen'? (choices: llama, qwen, smollm2, tiny)", ['model=qwn'])
command_line('path as a group', 0, 2, 'data=my.jsonl: no such choice; for a file write data=jsonl data.train=my.jsonl (choices: <...>)', ['data=my.jsonl'])
command_line('no equals sign', 0, 2, "'beta': not of the form key=value; --help lists keys and groups", ['beta'])
command_line('removed key', 0, 2, "'~beta': a key cannot be removed; set it to null or to another choice", ['~beta'])
command_line('flag', 0, 2, "'--beta': values are given as key=value: beta=0.1", ['--beta', '0.1'])
command_line('beta of text', 0, 2, 'beta=high: must be a number', ['beta=high'])
command_line('beta zero', 0, 2, 'beta=0: must be above 0; 0.1 is usual, higher stays closer to the reference', ['beta=0'])
command_line('beta NaN', 0, 2, 'beta=nan: must be a finite number', ['beta=nan'])
command_line('negative rate', 0, 2, 'optimizer.lr=-1: must be above 0; 5e-5 is usual with LoRA', ['optimizer.lr=-1'])
command_line('batch of zero', 0, 2, 'batch_size=0: must be at least 1', ['batch_size=0'])
command_line('batch of half', 0, 2, 'batch_size=1.5: must be a whole number', ['batch_size=1.5'])
command_line("other trainer's name", 0, 2, "unknown key 'learning_rate' in 'learning_rate=1e-4'; here it is optimizer.lr=1e-4", ['learning_rate=1e-4'])
command_line('two values', 0, 2, "'beta=0.1,0.2': several values need -m: dpo-train -m beta=0.1,0.2", ['beta=0.1,0.2'])
command_line("Hydra's own", 0, 2, "'hydra.run.dir=x': Hydra's own settings are fixed here; output_dir= sets where a run goes", ['hydra.run.dir=x'])
command_line('target', 0, 2, "unknown key 'loss._target_' in '+loss._target_=os.system'; did you mean 'lora.target_modules'?", ['+loss._target_=os.system'])
command_line('interpolation of the environment', 0, 2, 'the command line does not compose: KeyError raised while resolving interpolation: "Environment variable \'NOT_THERE_1\' not found"', ['output_dir=${oc.env:NOT_THERE_1}'])
command_line('loss option of another loss', 0, 2, 'loss.temperature=1.0: the loss sigmoid does not use it; it is an option of discopop', ['loss.temperature=1'])
command_line('length below prompt', 0, 2, 'data.max_prompt_length=64: must be below data.max_length=64, or no response fits', ['data.max_length=64', 'data.max_prompt_length=64'])
command_line('adapter off without adapter', 0, 2, 'reference=adapter_off: needs an adapter to switch off; with lora=off choose reference=frozen', ['lora=off', 'reference=adapter_off'])
command_line('device that is not there', 0, 2, 'device=cuda:99: not on this machine; it has <...>', ['device=cuda:99', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK})
command_line('device that is none', 0, 2, 'device=tpu7: not on this machine; it has <...>', ['device=tpu7', 'data=jsonl', 'data.train={dir}/a.jsonl'], files={'a.jsonl': OK})
command_line('verify and resume', 0, 2, 'verify_resume=true: trains some steps of its own; leave resume and dry_run out', ['verify_resume=true', 'resume=auto', 'output_dir={dir}/x'])
command_line('eval typo', 0, 2, "unknown key 'checkpont' in 'checkpont=x'; did you mean 'checkpoint'?", ['checkpont=x'], command='dpo-eval')
command_line('eval name with a slash', 0, 2, 'name=../x: must be a plain folder name', ['checkpoint={dir}', 'name=../x'], command='dpo-eval')

# Fault 17: nothing to resume from
command_line('resume without a place', 17, 2, 'resume=auto: name the run directory with output_dir, for instance output_dir=outputs/my-run', ['resume=auto'])
command_line('resume from nowhere', 17, 4, 'resume={dir}/nowhere: no such checkpoint or run directory', ['resume={dir}/nowhere'])
command_line('resume from a folder', 17, 4, 'resume={dir}/x: neither a run directory nor one of its checkpoints/step-*', ['resume={dir}/x'], files={'x/a': b''})
command_line('replay of nothing', 17, 4, '{dir}/nowhere/config.yaml: no such file; a run directory holds a config.yaml', ['replay={dir}/nowhere'])
command_line('home that is not there', 17, 3, '~nobody-here/a.jsonl: cannot be looked at (Could not determine home directory.)', ['data=jsonl', 'data.train=~nobody-here/a.jsonl'])
command_line('eval of nothing', 17, 4, 'checkpoint={dir}/nowhere: no such directory; name a run directory, checkpoints/step-*, final/, a PEFT adapter directory or a model', ['checkpoint={dir}/nowhere'], command='dpo-eval')
command_line('eval without a checkpoint', 17, 2, 'checkpoint=null: name a run directory, a checkpoint, an adapter or a model, for instance checkpoint=outputs/...', [], command='dpo-eval')
command_line('eval of a folder', 17, 4, 'checkpoint={dir}/x: neither a run, nor a checkpoint, adapter or model (no checkpoints/, adapter_config.json or config.json in it)', ['checkpoint={dir}/x'], files={'x/a': b''}, command='dpo-eval')
command_line('eval of a file', 17, 4, 'checkpoint={dir}/x: no such directory; name a run directory, checkpoints/step-*, final/, a PEFT adapter directory or a model', ['checkpoint={dir}/x'], files={'x': b''}, command='dpo-eval')
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_wrong_is_said_in_one_line(command: Command, tmp_path: Path, case: Case) -> None:
    for name, content in case.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    words = [word.replace("{dir}", str(tmp_path)) for word in case.words]
    if case.command == "dpo-train":
        named = any(word.startswith(("output_dir=", "resume=")) for word in words)
        place = [] if named else [f"output_dir={tmp_path / 'run'}"]
        model = [] if any(word.startswith("model=") for word in words) else ["model=tiny"]
        words = [*model, "model.dtype=float32", *place, *words]
    with fault(case.fault):
        ended = command(case.command, *words)
        expected = re.escape(f"error: {case.says}\n".replace("{dir}", str(tmp_path))).replace("<\\.\\.\\.>", ".*")
        assert re.fullmatch(expected, ended.err), ended.err
        assert ended.code == case.code
        assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_there_are_at_least_sixty_of_them() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)
