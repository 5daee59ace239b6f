"""Mutants of what is read, judged, generated and stored: name, file, what stands there, what stands there instead, tests.

`mutants.py` runs them with its own.
"""

FORMATS, FILES, PREPARE = "dpo_cli/data/formats.py", "dpo_cli/data/files.py", "dpo_cli/data/prepare.py"
STORE, SPLITS = "dpo_cli/data/store.py", "dpo_cli/data/splits.py"
PROMPTS, SAMPLES, GAMES = "dpo_cli/data/prompts.py", "dpo_cli/data/samples.py", "dpo_cli/data/games.py"
TOKENS, BATCHES = "dpo_cli/data/tokens.py", "dpo_cli/data/batches.py"
JUDGES, JUDGEMENTS, SCREEN = (f"dpo_cli/labelling/{name}.py" for name in ("judges", "judgements", "screen"))
AGREEMENT = "dpo_cli/labelling/agreement.py"
DECODING, SAMPLER = "dpo_cli/generation/decoding.py", "dpo_cli/generation/sampler.py"
LINE_LOG, JOB_LOG, DURABLE = (f"dpo_cli/storage/{name}.py" for name in ("line_log", "job_log", "durable"))
LOCKS, HASHING = "dpo_cli/storage/locks.py", "dpo_cli/storage/hashing.py"
TEXT = "dpo_cli/console/text.py"
VERSIONS, COMMAND_LINE = "dpo_cli/config/versions.py", "dpo_cli/config/command_line.py"
CONFIG_FILES = "dpo_cli/config/files.py"

MUTANTS_OF_FILES = [
    # Rows and what becomes of them
    ("a tie of scores is a preference", FORMATS, "tied=scores[better] == scores[worse]", "tied=False",
     "tests/test_formats.py -k scores"),
    ("without scores the last response is the best", FORMATS, "range(len(responses), 0, -1)", "range(len(responses))",
     "tests/test_formats.py -k ranked"),
    ("finish reasons of a ranked pair changed over", FORMATS, "(reasons[better], reasons[worse])",
     "(reasons[worse], reasons[better])", "tests/test_formats.py -k finish_reasons"),
    ("of two turns of one speaker the first is lost", FORMATS, 'f"{turns[-1].content}\\n\\n{content.strip()}"',
     "content.strip()", "tests/test_formats.py -k two_turns"),
    ("text before the first turn is lost", FORMATS, 'Message("system", before)] * bool(before and turns)',
     'Message("system", before)] * 0', "tests/test_parsers.py -k conversation"),
    ("a response that begins otherwise is cut", FORMATS, "chosen.startswith(prompt) and rejected.startswith(prompt):",
     "chosen.startswith(prompt):", "tests/test_formats.py -k prompt"),
    ("a cell too many in CSV is dropped", FILES, "        if more:", "        if False:", "tests/test_files.py"),
    ("rows after a bad line of JSON are lost", FILES,
     'yield SourceRow(index, f"{shown} line {number}", value, problem)\n            index += 1',
     'yield SourceRow(index, f"{shown} line {number}", value, problem)\n            if problem:\n                '
     "return\n            index += 1", "tests/test_files.py -k bad_line"),
    ("bad rows are dropped unasked", PREPARE, 'if config.on_bad_row == "error":', "if False:", "tests/test_pairs.py -k bad_row"),
    ("one row more than the limit", PREPARE, "row.index < limit", "row.index <= limit", "tests/test_pairs.py -k limit"),
    ("pairs of one text are trained on", PREPARE, "elif rendered.chosen == rendered.rejected:", "elif False:",
     "tests/test_pairs.py -k dropped"),
    ("pairs that truncation made one text are trained on", PREPARE, "elif cut.chosen == cut.rejected:", "elif False:",
     "tests/test_pairs.py -k dropped"),
    ("the data's fingerprint skips rejected responses", SPLITS, "for ids in (pair.prompt, pair.chosen, pair.rejected):",
     "for ids in (pair.prompt, pair.chosen):", "tests/test_pairs.py -k fingerprint"),
    ("a prompt's own limit is not kept", "dpo_cli/data/truncation.py", "allowed = min(allowed, max_prompt_length)",
     "allowed = max(allowed, max_prompt_length)", "tests/test_tokens.py -k limit_of_its_own"),
    ("room for the shorter response", "dpo_cli/data/truncation.py", "longer = max(len(encoded.chosen)",
     "longer = min(len(encoded.chosen)",
     "tests/test_tokens.py -k prompt_loses"),
    ("BOS twice under a chat template", TOKENS, 'self.opening if self.kind == "plain" and not brings_its_own else []',
     "self.opening",
     "tests/test_tokens.py -k bos"),
    ("the last short batch is no step", BATCHES, "math.ceil(self.pairs / self.batch_size)",
     "math.floor(self.pairs / self.batch_size)", "tests/test_pairs.py -k batches"),
    ("pairs of a ranked row are scattered", SPLITS, "return np.diff(starts, append=len(index)).astype(np.int32)", "return None",
     "tests/test_pairs.py -k ranked"),
    ("padded rows count half their tokens", BATCHES, "2 * longest * (len(", "longest * (len(",
     "tests/test_pairs.py -k budget"),
    ("prompts that come twice are completed twice", PROMPTS, "elif key in seen:", "elif False:",
     "tests/test_sample.py -k dropped_prompts"),
    ("samples in another order are the same sample", SAMPLES, "fingerprint([prompt, *responses])",
     "fingerprint([prompt, *sorted(responses)])", "tests/test_durable.py -k another_order"),
    ("a tie is a whole win", GAMES, "wins[first, second] += count / 2 if tie else count", "wins[first, second] += count",
     "tests/test_rank_games.py -k tie"),
    # Judges and judgements
    ("rewards of the neighbour", JUDGES, "found[number][first], found[number][second] =",
     "found[number][second], found[number][first] =", "tests/test_label.py -k dpo_eval"),
    ("implicit rewards without beta", JUDGES, "self.objective.beta * chosen, self.objective.beta * rejected",
     "chosen, rejected", "tests/test_label.py -k dpo_eval"),
    ("responses of a sample follow different parts of its prompt", JUDGES, "max(self.max_length - longest[number],",
     "max(self.max_length - max(len(one.chosen), len(one.rejected)),", "tests/test_label.py -k same_part"),
    ("a long conversation loses its end", JUDGES, "one[-self.max_length :]", "one[: self.max_length]",
     "tests/test_classifier.py -k long_conversation"),
    ("chance agreement of the first annotator alone", AGREEMENT, "float(first @ second)", "float(first @ first)",
     "tests/test_bradley_terry.py -k kappa"),
    ("left and right changed over in judgements", JUDGEMENTS, '{"left": self.left, "right": self.right}',
     '{"left": self.right, "right": self.left}', "tests/test_annotate.py -k agreement"),
    ("undo takes the judgement of another annotator", JUDGEMENTS, "if judgement.annotator == annotator), None)",
     "if judgement), None)", "tests/test_annotate.py -k undo"),
    ("a stored undo takes the judgement of another annotator", JUDGEMENTS, "if key[:2] == (annotator, sample)",
     "if key[1] == sample", "tests/test_annotate.py -k undo"),
    ("the arrow keys changed over", SCREEN, '"<left>": "left", "2": "right", "<right>": "right"',
     '"<left>": "right", "2": "right", "<right>": "left"', "tests/test_annotate.py -k on_its_side"),
    ("the note of a cut answer on the other side", SCREEN,
     "(question.left, question.left_cut), (question.right, question.right_cut)",
     "(question.left, question.right_cut), (question.right, question.left_cut)", "tests/test_annotate.py -k below_that_answer"),
    # Completions
    ("the nucleus stops before top_p", DECODING, "best.masked_fill(before >= top_p", "best.masked_fill(before + best >= top_p",
     "tests/test_decoding.py -k nucleus"),
    ("the nucleus is not normalized", DECODING, "[:, None] * cumulative[:, -1:]", "[:, None]",
     "tests/test_decoding.py -k uniform_number"),
    ("temperature upside down", DECODING, "relative / self.params.temperature", "relative * self.params.temperature",
     "tests/test_decoding.py -k temperature"),
    ("EOS of the model's config stops nothing", DECODING, "return {closing} | (set(configured) if isinstance(configured, list) "
     "else {configured} - {None})", "return {closing}", "tests/test_decoding.py -k stop_token"),
    ("a stopped row writes on", DECODING, "            if not self._stopped(row):\n                completion.token_ids",
     "            if token not in self.stop_ids:\n                completion.token_ids", "tests/test_decoding.py -k generate_gives"),
    ("a resumed job makes other batches", SAMPLER, 'parts[0]["batch_size"] if parts else options.batch_size',
     "options.batch_size", "tests/test_sample.py -k keeps_the_batch"),
    ("the seed of a command is not used", SAMPLER, "options.n, options.params, options.seed,", "options.n, options.params, 0,",
     "tests/test_sample.py -k seed"),
    # Storage
    ("a line that may not be on disk stays in the log", LINE_LOG, "                os.ftruncate(self._descriptor, status.st_size)",
     "                pass", "tests/test_durable.py -k may_not_be_on_disk"),
    ("any line counts as one of metrics", LINE_LOG, "            if not _is_record(line):", "            if False:",
     "-m faults tests/faults/test_storage.py -k not_the_runs_own"),
    ("a file is renamed before the next is written", DURABLE, "                os.fsync(file.fileno())\n        for path in files:\n",
     "                os.fsync(file.fileno())\n            os.replace(beside[path], path)\n        for path in ():\n",
     "tests/test_durable.py -k written_together"),
    ("files of others are swept away", DURABLE, "if not OURS.fullmatch(path.name):", "if False:",
     "tests/test_durable.py -k swept_away"),
    ("a lock outlives its owner in a forked process", LOCKS, "                unlock_descriptor(descriptor)",
     "                pass", "tests/test_durable.py -k forked"),
    ("texts run into each other in a hash", HASHING, 'len(data).to_bytes(8, "little") + data', "data",
     "tests/test_durable.py -k told_apart"),
    ("parts of another job are taken", JOB_LOG, "elif lines[0] != header:", "elif False:",
     "tests/test_sample.py -k another_job"),
    ("half a part stays in the job log", JOB_LOG, "        log.cut(end)\n", "", "tests/test_parsers.py -k job_log"),
    ("the output of another job counts as done", JOB_LOG, "if before != json.loads(json.dumps(job)):", "if False:",
     "tests/test_sample.py -k taken_as_done"),
    # Text on the screen
    ("ASCII escapes reach the screen", TEXT, "raw.isascii() and raw.isprintable()", "raw.isascii()",
     "tests/test_console.py -k text"),
    ("text may run backwards on the screen", TEXT, '{"Cc", "Cf", "Cs",', '{"Cc", "Cs",', "tests/test_console.py -k text"),
    ("a secret that is cut is shown in part", TEXT, '    raw = redacted(str(text))\n    if limit is not None and len(raw) > limit:\n'
     '        raw = raw[: max(0, limit - 3)] + "..."\n', '    raw = str(text)\n    if limit is not None and len(raw) > limit:\n'
     '        raw = raw[: max(0, limit - 3)] + "..."\n    raw = redacted(raw)\n', "tests/test_console.py -k text"),
    # Config
    ("a key that a config has is set back", VERSIONS, "values.setdefault(self.key, self.value)",
     "values[self.key] = self.value", "tests/test_versions.py -k each_kind"),
    ("an old run's layout is forgotten", VERSIONS, 'Renamed("batching", "layout"),', 'Removed("batching"), Added("layout", "auto"),',
     "tests/test_versions.py -k names_of_today"),
    ("a config of a newer version is guessed at", VERSIONS, "if version > VERSION:", "if False:",
     "tests/test_versions.py -k unknown_version"),
    ("a user's file lets a model run code", COMMAND_LINE, 'if key in keys and key.endswith("trust_remote_code") and trusts:', "if False:",
     "tests/test_cli.py -k no_way_of_writing"),
    ("a replay lets a model run code", COMMAND_LINE, "if earlier.model.trust_remote_code and not again:", "if False:",
     "-m faults tests/faults/test_hostile.py -k cannot_decide"),
    ("a replay with other keys is called a replay", COMMAND_LINE, 'if key not in (*FREE_KEYS, "device", trusted):', "if False:",
     "tests/test_reproduce.py -k no_other_dial"),
    ("text in quotes is a number", CONFIG_FILES, 'if getattr(node, "style", None) is not None:', "if False:",
     "tests/test_cli.py -k no_way_of_writing"),
    ("of a key that stands twice the last counts", CONFIG_FILES, "        if key in seen:", "        if False:",
     "tests/test_cli.py -k no_way_of_writing"),
]  # fmt: skip
