"""Break the program on purpose, one small way at a time, and report which tests notice.

    python scripts/mutants.py [NAME ...]

Each mutant is one replacement in one file of a copy of the tree: a sign, a shift, a forgotten factor, the silent
mistakes of preference training. A mutant that no test kills is a hole in the tests; the exit code counts them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutants_of_files import MUTANTS_OF_FILES

ROOT = Path(__file__).resolve().parent.parent
LOSSES, METRICS = "dpo_cli/theory/losses.py", "dpo_cli/theory/metrics.py"
LOGPS, HEAD, TOKENS = "dpo_cli/models/logps.py", "dpo_cli/models/head.py", "dpo_cli/data/tokens.py"
ATTENTION, CACHE = "dpo_cli/models/attention.py", "dpo_cli/models/reference_cache.py"
LOGPS_FILE, PRECOMPUTE = "dpo_cli/storage/logps_file.py", "dpo_cli/models/precompute.py"
MERGING, OF_EXPORT = "dpo_cli/models/merging.py", "tests/test_export.py"
EXPORT, EXPORTED_FOLDER = "dpo_cli/commands/export.py", "dpo_cli/commands/exported_folder.py"
RUNNER, SCORES = "dpo_cli/training/runner.py", "dpo_cli/evaluation/scores.py"
BUILD, START = "dpo_cli/training/build.py", "dpo_cli/training/start.py"
REFERENCE_LOGPS = "dpo_cli/training/reference_logps.py"
RECORDS, PROBE = "dpo_cli/training/records.py", "dpo_cli/training/memory_probe.py"
DURABLE, CHECKPOINT = "dpo_cli/storage/durable.py", "dpo_cli/runs/checkpoint.py"
DIRECTORY, LINE_LOG = "dpo_cli/runs/run_directory.py", "dpo_cli/storage/line_log.py"
QUANTIZATION = "dpo_cli/models/quantization.py"
LOCKS = "dpo_cli/storage/locks.py"
MAPPING, DECODING = "dpo_cli/data/mapping.py", "dpo_cli/generation/decoding.py"
STATISTICS, HISTORY = "dpo_cli/theory/statistics.py", "dpo_cli/objectives/history.py"
CHOICE, ANSWERS = "dpo_cli/training/choice.py", "dpo_cli/generation/answers.py"
OF_ENDING, OF_ANSWERS = "tests/test_early_stop.py", "tests/test_answers.py"
OF_REWARDS, OF_DECODING = "tests/test_reward.py", "tests/test_decoding.py"
OF_STATISTICS, OF_VERDICTS = "tests/test_statistics.py", "tests/test_monitor.py"
OF_FAULTS, OF_RANKS = "-m faults tests/faults/", "tests/test_engine.py"
DDP, HARNESS = "dpo_cli/engine/ddp.py", "dpo_cli/commands/harness.py"
OF_LOSSES = "tests/test_losses.py tests/test_theorem.py"
OF_RUNS = "tests/test_training.py tests/test_evaluate.py tests/test_preflight.py"


@dataclass(frozen=True)
class Mutant:
    """One mistake: what stands in a file, what stands there instead, and the tests that should see it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("a packed weight unpacked by half its scale", QUANTIZATION, "absmax=absmax, shape", "absmax=absmax / 2, shape",
           "tests/test_quantization.py -k sixteen"),
    Mutant("the backward pass takes the packed bits", QUANTIZATION, "upstream[0] @ ctx.layer.full_weight(upstream[0].dtype)",
           "upstream[0] @ ctx.layer.full_weight(upstream[0].dtype).flip(0)", "tests/test_quantization.py -k dropout"),
    Mutant("the backward pass of LoRA forgets the packed base", "dpo_cli/models/lora_function.py",
           "(g @ full).addmm_", "(g @ full).mul_(ctx.packed is None).addmm_", "tests/test_quantization.py -k twin"),
    Mutant("the scales are no part of the fingerprint", QUANTIZATION, 'self.register_buffer("absmax", absmax)',
           'self.register_buffer("absmax", absmax, persistent=False)', "tests/test_quantization.py -k packed_bits"),
    Mutant("an 8-bit state starts anew on resume", CHECKPOINT, "held.copy_(value)", "held.zero_()",
           "tests/test_quantization.py -k same_bits"),
    Mutant("sign of the loss", LOSSES, "-(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.log",
           "-(1 - label_smoothing) * F.logsigmoid(-logits) - label_smoothing * F.log", OF_LOSSES),
    Mutant("sign of the margin", LOSSES, "return self.chosen - self.rejected", "return self.rejected - self.chosen",
           OF_LOSSES),
    Mutant("beta forgotten", LOSSES, "    logits = beta * ratios.margin\n    return -(1", "    logits = ratios.margin\n"
           "    return -(1", OF_LOSSES),
    Mutant("reference forgotten", LOSSES, "chosen=policy.chosen - reference.chosen", "chosen=policy.chosen", OF_LOSSES),
    Mutant("smoothing on the wrong side", LOSSES, "- label_smoothing * F.logsigmoid(-logits)\n\n\ndef robust",
           "- label_smoothing * F.logsigmoid(logits)\n\n\ndef robust", OF_LOSSES),
    Mutant("robust not rescaled", LOSSES, " / (1 - 2 * label_smoothing)", "", OF_LOSSES),
    Mutant("ipo on sums", LOSSES, "    chosen, rejected = _per_token(ratios)\n    return (chosen - rejected - 1",
           "    chosen, rejected = ratios.chosen, ratios.rejected\n    return (chosen - rejected - 1", OF_LOSSES),
    Mutant("gradient weight of the chosen response alone", LOSSES, "slopes[0].abs() + slopes[1].abs()",
           "slopes[0].abs()", OF_LOSSES),
    Mutant("gradient weight not by the start", LOSSES, " / (2 * _slope(loss, start))", " / 2", OF_LOSSES),
    Mutant("pairs taken as independent", STATISTICS, "np.asarray(prompts, dtype=np.uint64), return_inverse",
           "np.arange(len(prompts)), return_inverse", OF_STATISTICS),
    Mutant("jackknife not scaled", STATISTICS, " * (self.prompts - 1) / self.prompts", " / self.prompts", OF_STATISTICS),
    Mutant("a share counts every pair", STATISTICS, "min(trials, self.pairs), self.pairs", "self.pairs, self.pairs",
           OF_STATISTICS),
    Mutant("few prompts as if many", STATISTICS, "student_quantile(max(1, int(self.effective + 1e-9) - 1))", "Z95",
           OF_STATISTICS),
    Mutant("all prompts count alike", STATISTICS, "self.pairs**2 / float((self._sizes**2).sum())",
           "float(self.prompts)", OF_STATISTICS),
    Mutant("calibration forgets the prompts", "dpo_cli/theory/calibration.py", "Clusters(of_prompts[members])",
           "Clusters(range(int(members.sum())))", "tests/test_calibration.py"),
    Mutant("an improvement with the wrong sign", SCORES,
           "objective(scores.reference, scores.reference).losses - metrics[\"loss\"]",
           "metrics[\"loss\"] - objective(scores.reference, scores.reference).losses",
           "tests/test_evaluate.py -k interval"),
    Mutant("green within the interval", HISTORY, "self.at_end(IMPROVEMENT).low > 0", "self.at_end(IMPROVEMENT).mean > 0",
           OF_VERDICTS),
    Mutant("green whatever the size", HISTORY, "(self.margin >= MATTERS[0] and", "(self.margin >= 0 and", OF_VERDICTS),
    Mutant("green at the accuracy of chance", HISTORY, "self.at_end(ACCURACY).low > 0.5", "True", OF_VERDICTS),
    Mutant("worse within the interval", HISTORY, "self.at_end(IMPROVEMENT).high < 0", "self.at_end(IMPROVEMENT).mean < 0",
           OF_VERDICTS),
    Mutant("the start taken from the end", HISTORY, "float(held_out[0][\"loss\"]) + float(held_out[0][IMPROVEMENT])",
           "float(held_out[0][\"loss\"])", OF_VERDICTS),
    Mutant("apo_down read as damage", "dpo_cli/objectives/findings.py", "limits = LIMITS.get(loss, USUAL)", "limits = USUAL", OF_VERDICTS),
    Mutant("ruin by the token alone", "dpo_cli/objectives/alarms.py",
           "chosen_per_token < -token and chosen_nats < -response", "chosen_per_token < -token", OF_VERDICTS),
    Mutant("equal lengths read as longer", "dpo_cli/objectives/drift.py", "(gap.sign() + 1).mean() / 2",
           "(gap >= 0).double().mean()", OF_VERDICTS),
    Mutant("gradient weight upside down", LOSSES, "_slope(loss, ratios) / (2 * _slope(loss, start))",
           "_slope(loss, start) / (2 * _slope(loss, ratios))", OF_LOSSES),
    Mutant("a tie counts nothing", METRICS, "0.5 * (differences == 0)", "0.0 * (differences == 0)", "tests/test_theory.py"),
    Mutant("mean of batch means", METRICS, "self.pairs += next(iter(metrics.values())).shape[0]", "self.pairs += 1",
           "tests/test_theory.py"),
    Mutant("mask shifted by one", LOGPS, "np.arange(len(prompt) - 1, end - 1)", "np.arange(len(prompt), end)",
           "tests/test_logps.py"),
    Mutant("mask shifted by one in packed rows", LOGPS, "[[start + prompt - 1], end + np",
           "[[start + prompt], end + np", "tests/test_packing.py"),
    Mutant("mean for sum", LOGPS, "micro_batch.owners, logps.to(wide)).float()",
           "micro_batch.owners, logps.to(wide)).float() / micro_batch.tokens", "tests/test_logps.py"),
    Mutant("rejected positions go on behind chosen", LOGPS,
           "positions_in_group.append(prompt + np.arange(len(response)))",
           "positions_in_group.append(end - start + np.arange(len(response)))", "tests/test_packing.py"),
    Mutant("rejected does not see the prompt", ATTENTION, "torch.cat([prompt_keys, next(keys)], dim=2)",
           "torch.cat([prompt_keys * (number == 0), next(keys)], dim=2)", "tests/test_packing.py"),
    Mutant("a response sees what follows", ATTENTION, "(distance >= 0) & ", "(distance >= -1) & ",
           "tests/test_packing.py"),
    Mutant("the mask lets sisters see each other", ATTENTION, "& same_group & shared", "& same_group",
           "tests/test_packing.py"),
    Mutant("soft cap forgotten", ATTENTION, "scores = torch.tanh(scores / softcap) * softcap", "scores = scores",
           "tests/test_packing.py"),
    Mutant("the self-check takes any numbers", "dpo_cli/models/packing.py", "if not found.within(noise):", "if False:",
           "tests/test_packing.py"),
    Mutant("the self-check sees no leak", "dpo_cli/models/packing.py",
           "if not leak.within(_Noise(noise.mean / 8, noise.largest / 8)):", "if False:", "tests/test_packing.py"),
    Mutant("gradient of LoRA's A not scaled", "dpo_cli/models/lora_function.py",
           "(g @ b.to(g.dtype)).mul_(ctx.scaling)", "(g @ b.to(g.dtype))", "tests/test_lora_function.py"),
    Mutant("cached values of any length of response", TOKENS, "_tokens_key(self.prompt, ids, *",
           "_tokens_key(self.prompt, ids[:1], *", "tests/test_reference_cache.py"),
    Mutant("damaged records are used", LOGPS_FILE, 'return checks(records) == records["check"]',
           "return np.ones(len(records), dtype=np.bool_)", "tests/test_reference_cache.py"),
    Mutant("half of a key is compared", LOGPS_FILE, 'same = here["key"][:, 1] == words[left, 1]', "same = left >= 0",
           "tests/test_logps_file.py -k first_that_knows"),
    Mutant("a record goes to a file that was replaced", LOGPS_FILE, "            if there:\n", "            if True:\n",
           "tests/test_logps_file.py -k waited"),
    Mutant("a value in use changes in a merge", CACHE, "merged([*ours, *sorted_runs(blocks_of(there.tail), scratch)]",
           "merged([*sorted_runs(blocks_of(there.tail), scratch), *ours]", "tests/test_logps_file.py -k value_that_was_used"),
    Mutant("the cache drops what is in use", "dpo_cli/storage/cache_folder.py", "entry.path not in keep and ", "",
           "tests/test_cache_folder.py"),
    Mutant("the cache drops what was used last", "dpo_cli/storage/cache_folder.py", "(entry.used, ", "(-entry.used, ",
           "tests/test_cache_folder.py"),
    Mutant("another model's values are used", PRECOMPUTE, "if how.loaded is not None and found.some:",
           "if False:",
           "tests/test_reference_cache.py"),
    Mutant("the cache does not know the dtype", CACHE, "[VERSION, model, str(dtype), ", "[VERSION, model, ",
           "tests/test_reference_cache.py"),
    Mutant("the cache does not know the weights", "dpo_cli/models/loading.py",
           "{hashlib.sha256(content.data).hexdigest()}", "",
           "tests/test_reference_cache.py"),
    Mutant("a healthy step behind a bad one moves the weights", "dpo_cli/training/guard.py",
           "torch.maximum(self._bad, bad)", "bad", "tests/test_guard.py"),
    Mutant("the deferred guard never looks", "dpo_cli/training/guard.py", "if len(self._unseen) >= UNSEEN:", "if False:",
           "tests/test_guard.py"),
    Mutant("the monitor forgets after a few batches", "dpo_cli/training/monitor.py", "WINDOW = 256", "WINDOW = 64",
           "tests/test_monitor.py -k odd_batches"),
    Mutant("no memory for layers computed again", "dpo_cli/models/memory.py", "2.5 if checkpointed else 1.25", "1.25",
           "tests/test_memory.py -k bytes_of_a_token"),
    Mutant("no memory for gradients", "dpo_cli/models/memory.py", "2.5 if checkpointed else 1.25",
           "2.5 if checkpointed else 1.0", "tests/test_memory.py -k bytes_of_a_token"),
    Mutant("the system message is left out", "dpo_cli/data/formats.py",
           '_said(message) if message.role in OPENING_ROLES else _turn(message) for message in messages]',
           '_turn(message) for message in messages if message.role != "system"]', "tests/test_formats.py -k system"),
    Mutant("fields of a message are lost", "dpo_cli/data/formats.py", '"content": self.content, **self.more}',
           '"content": self.content}', "tests/test_formats.py -k lost"),
    Mutant("tools are lost", "dpo_cli/data/formats.py", "self.prompt_text, self.tools, self.documents)",
           "self.prompt_text)", "tests/test_formats.py -k tools"),
    Mutant("tool results are scored", LOGPS, "scored[start:stop] = False", "pass", "tests/test_logps.py -k unscored"),
    Mutant("unscored tokens count in the length", LOGPS, 'np.bincount(numbers["owners"], minlength=len(responses))',
           "np.array([len(response) for response in responses.values()])", "tests/test_logps.py -k unscored"),
    Mutant("cached values of other scored tokens", TOKENS, "*([spans] if len(spans) else [])", "",
           "tests/test_logps.py -k keys"),
    Mutant("the closing token of a turn is not scored", "dpo_cli/data/chat_template.py",
           "[: len(text) - len(self.tail)] + self.ending + closing", "[: len(text) - len(self.tail)] + self.ending",
           "tests/test_chat_templates.py -k later_turns"),
    Mutant("spelled special tokens close turns", "dpo_cli/data/chat_template.py",
           'if self.special_tokens_in_text != "escape" or', "if True or", "tests/test_chat_templates.py -k special"),
    Mutant("a call is cut from its result", "dpo_cli/data/truncation.py", "for start in calls[1:]]",
           "for start in range(last_question + 2, len(spoken))]", "tests/test_chat_templates.py -k no_call_loses"),
    Mutant("no scale", "dpo_cli/models/adapters.py", "scale * usual for", "usual for", "tests/test_scales.py"),
    Mutant("a scale that stays", "dpo_cli/models/adapters.py", "            layer.scaling.update(usual)", "            pass",
           "tests/test_scales.py"),
    Mutant("token ratios of the other sign", "dpo_cli/evaluation/token_ratios.py",
           "token_logps_of(policy, micro_batch) - reference", "-token_logps_of(policy, micro_batch) + reference",
           "tests/test_scales.py"),
    Mutant("green by accuracy alone", "dpo_cli/evaluation/summary.py", "accuracy.low > 0.5 and lower.low > 0",
           "accuracy.low > 0.5", "tests/test_scales.py"),
    Mutant("difference with the wrong sign", "dpo_cli/evaluation/comparison.py", "prompts, after - before, share",
           "prompts, before - after, share", "tests/test_compare.py -k second_less"),
    Mutant("pairs joined by index", "dpo_cli/evaluation/comparison.py", "model.indices[key] for key in keys]",
           "index for index in range(len(keys))]", "tests/test_compare.py -k only_shared"),
    Mutant("a pair is one vote", "dpo_cli/theory/paired.py", "sums = prompts.sums(differences)",
           "sums = np.asarray(differences)", "tests/test_compare.py -k follow_from"),
    Mutant("paired interval over pairs", "dpo_cli/theory/paired.py", "estimate = prompts.mean(differences)",
           "estimate = Clusters(range(prompts.pairs)).mean(differences)", "tests/test_compare.py -k follow_from"),
    Mutant("Holm without the running maximum", "dpo_cli/theory/paired.py", "highest = max(highest, min(",
           "highest = max(0.0, min(", "tests/test_compare.py -k holm"),
    Mutant("report of other weights", "dpo_cli/commands/compare.py", "known is not None and known ==",
           "known is not None or known ==", "tests/test_compare.py -k scored_once"),
    Mutant("benchmarks of a reference with its adapter", HARNESS, 'with adapter_off(policy) if role == "reference"',
           'with adapter_off(policy) if role == "neither"', "tests/test_harness.py -k answers"),
    Mutant("benchmarks the wrong way round", HARNESS, 'compared(found["policy"], found["reference"])',
           'compared(found["reference"], found["policy"])', "tests/test_harness.py -k answers"),
    Mutant("calibration of any loss", "dpo_cli/commands/evaluate.py", " if objective.is_calibrated else []", "",
           "tests/test_evaluate.py -k calibration"),
    Mutant("softmax part of the head's gradient lost", HEAD, ".exp_().neg_()", ".exp_().mul_(0.0)",
           "tests/test_logps.py"),
    Mutant("head in chunks drops the gradient", HEAD, "return (gradients * upstream[0][:, None])", "return (gradients)",
           "tests/test_logps.py"),
    Mutant("EOS missing", TOKENS, "return [*ids, closing] if self._closes(", "return ids if self._closes(",
           "tests/test_tokens.py"),
    Mutant("EOS after finish reason length", TOKENS, "return self.always_closes or finish_reason", "return True or finish_reason",
           "tests/test_tokens.py"),
    Mutant("EOS twice", TOKENS, "if ids and ids[-1] == self.closing:", "if False:", "tests/test_tokens.py"),
    Mutant("BOS missing", TOKENS, "self.opening = [bos] if adds_bos else []", "self.opening = []",
           "tests/test_tokens.py"),
    Mutant("the prompt's end is cut", "dpo_cli/data/truncation.py", "return ids[max(0, len(ids) - number) :]",
           "return ids[:number]", "tests/test_tokens.py"),
    Mutant("a cut prompt loses BOS", "dpo_cli/data/truncation.py", "opening = ids[:1] if ids[0] == bos else []",
           "opening = ids[:0]", "tests/test_chat_templates.py"),
    Mutant("the white space before an answer is not trained", "dpo_cli/data/chat_template.py",
           "behind = whole[len(prompt) : len(whole) - len(self.tail)] +",
           "behind = whole[len(prompt) : len(whole) - len(self.tail)].lstrip() +", "tests/test_chat_templates.py"),
    Mutant("a token straddles the border", TOKENS, "if whole[: len(prompt)] == prompt:", "if True:",
           "tests/test_tokens.py"),
    Mutant("prompt ends at the common prefix", "dpo_cli/data/formats.py",
           "cut = chosen.rfind(ASSISTANT, 0, shared_length(chosen, rejected))",
           "cut = shared_length(chosen, rejected) - len(ASSISTANT)", "tests/test_formats.py"),
    Mutant("reference not frozen", "dpo_cli/models/reference.py", "model.eval().requires_grad_(False)", "model.eval()",
           OF_RUNS),
    Mutant("the policy is its own reference", BUILD, "return FrozenReference(engine.shard(model, device))",
           "return FrozenReference(policy)", OF_RUNS),
    Mutant("adapter left on in the reference", "dpo_cli/models/reference.py", "with adapter_off(self.policy):",
           "with torch.no_grad():", "tests/test_identities.py tests/test_training.py"),
    Mutant("reduction by micro-batch", RUNNER, "(outcome.losses.sum() * counts / len(batch)).backward()",
           "outcome.losses.mean().backward()", OF_RUNS),
    Mutant("a short batch counts as a full one", RUNNER, "(outcome.losses.sum() * counts / len(batch)).backward()",
           "(outcome.losses.sum() / context.config.batch_size).backward()", OF_RUNS),
    Mutant("gradients pile up", RUNNER,
           "        learner.optimizer.step()\n    learner.optimizer.zero_grad(set_to_none=True)\n",
           "        learner.optimizer.step()\n", OF_RUNS),
    Mutant("gradients averaged over ranks", DDP, "weight.grad = summed.view_as(weight)",
           "weight.grad = summed.view_as(weight) / self.world_size", OF_RANKS),
    Mutant("shares of ranks overlap", DDP, "            if rank == self.rank:\n", "            if rank >= self.rank:\n",
           OF_RANKS),
    Mutant("a rank without pairs counts another's", DDP, "return ((one, bool(own)) for one in own or [spare])",
           "return ((one, True) for one in own or [spare])", OF_RANKS),
    Mutant("ranks agree on the smallest", DDP, "torch.tensor(value), dist.ReduceOp.MAX",
           "torch.tensor(value), dist.ReduceOp.MIN", OF_RANKS),
    Mutant("a rank that differs is not noticed", DDP, "if first and other and first != other:", "if False:", OF_RANKS),
    Mutant("gradients of shards averaged", "dpo_cli/engine/fsdp.py", "part.set_gradient_divide_factor(1.0)",
           "part.set_gradient_divide_factor(2.0)", OF_RANKS),
    Mutant("void micro-batches of shards count", "dpo_cli/engine/fsdp.py", "((spare, False) for _ in range(void))",
           "((spare, True) for _ in range(void))", OF_RANKS),
    Mutant("whole weights stay after a pass of shards", "dpo_cli/engine/fsdp.py", "                model.reshard()\n",
           "                pass\n", OF_RANKS),
    Mutant("every rank drops the same values", RUNNER, "[context.config.seed, progress.step, engine.rank]",
           "[context.config.seed, progress.step]", OF_RANKS),
    Mutant("the line of a step is lost with a rank", RECORDS, "if self.is_logged and self.progress.window.metrics.pairs:",
           "if False:", OF_FAULTS + "test_ranks.py"),
    Mutant("no clipping", RUNNER, "engine.clip(weights, context.config.max_grad_norm)",
           "engine.clip(weights, float('inf'))", OF_RUNS),
    Mutant("warm-up begins at zero", "dpo_cli/theory/schedules.py", "return (update + 1) / warmup_steps",
           "return update / warmup_steps", "tests/test_theory.py"),
    Mutant("every epoch in one order", "dpo_cli/data/batches.py", "key=[seed, epoch]", "key=[seed, 0]",
           "tests/test_pairs.py"),
    Mutant("the split ignores the seed", "dpo_cli/data/splits.py", 'f"split {seed}"', '"split"', "tests/test_pairs.py"),
    Mutant("prefixes of a dialogue on both sides", "dpo_cli/data/splits.py", 'np.unique(store.numbers("group")',
           'np.unique(store.numbers("hash")',
           "tests/test_leaks.py"),
    Mutant("a leak ends in green", "dpo_cli/objectives/findings.py", "lambda h: bool(h.leaks)", "lambda h: False",
           "tests/test_monitor.py"),
    Mutant("dropout in evaluation", SCORES, "    policy.eval()\n", "", "tests/test_evaluate.py"),
    Mutant("resume forgets the optimizer", CHECKPOINT,
           "        optimizer.state[parameter][key] = restored\n", "", "tests/test_training.py"),
    Mutant("resume forgets the generators", START, "        set_rng_states(restored.rng)\n", "", "tests/test_training.py"),
    Mutant("a stop in an evaluation saves nothing", RUNNER, "    except StoppedError:\n        recorder.save(rng)\n",
           "    except ZeroDivisionError:\n        recorder.save(rng)\n", "tests/test_training.py"),
    Mutant("the log is not cut back", START, "    directory.metrics.cut(records)\n", "", "tests/test_training.py"),
    Mutant("named columns ignored", "dpo_cli/data/prepare.py", "read = canonical(row.value, mapping)", "read = row.value",
           "tests/test_pairs.py"),
    Mutant("a signed preference turned round", MAPPING, "[-preference, preference]", "[preference, -preference]",
           "tests/test_mapping.py"),
    Mutant("the highest rank is the best", MAPPING, "[-rank for rank", "[rank for rank", "tests/test_mapping.py"),
    Mutant("the label of the other response", MAPPING, "int(value == written)", "int(value != written)",
           "tests/test_mapping.py"),
    Mutant("a soft label of the other response", LOSSES, "w * loss(ratios) + (1 - w) * loss(ratios.swapped)",
           "(1 - w) * loss(ratios) + w * loss(ratios.swapped)", "tests/test_soft_labels.py"),
    Mutant("soft labels lost on the way to the loss", LOGPS, "                      probabilities=soft_labels(examples, device), **tensors)",
           "                      **tensors)", "tests/test_soft_labels.py"),
    Mutant("a sampled label read as a soft one", "dpo_cli/labelling/labels.py", '("sampled_with_probability" if pair.sampled else "probability")',
           '"probability"', "tests/test_whole_way.py -k sampled_labels"),
    Mutant("the chosen response left in the prompt", MAPPING, "return messages[:-1], [last]", "return messages, [last]",
           "tests/test_mapping.py"),
    Mutant("parts of a message lost in silence", MAPPING, "turn[key] if key not in known else None", "None",
           "tests/test_mapping.py"),
    Mutant("ties trained on", "dpo_cli/data/prepare.py", " for pair in pairs if not pair.tied]", " for pair in pairs]", "tests/test_mapping.py"),
    Mutant("chosen stands for rejected in a batch", LOGPS, "index_of[key] for key in example.response_keys]",
           "index_of[key] for key in example.response_keys[:1] * 2]", "tests/test_logps.py"),
    Mutant("a checkpoint that is not flushed", DURABLE, "        for file in beside.iterdir():\n            sync(file)\n        "
           "sync(beside)\n", "", OF_FAULTS + "test_kills.py -k protocol"),
    Mutant("an old checkpoint removed in sight", DURABLE, "        os.rename(folder, doomed)\n    except OSError:\n        "
           "return\n    shutil.rmtree(doomed, ignore_errors=True)", "        shutil.rmtree(folder)\n    except OSError:\n        "
           "return", OF_FAULTS + "test_kills.py -k any_write_point"),
    Mutant("a checkpoint is not looked into", CHECKPOINT, "        if sha256_of(file) != sha256:", "        if False:",
           OF_FAULTS + "test_storage.py -k damaged_file_is_named"),
    Mutant("an optimizer's state of any shape is taken", CHECKPOINT, "if shapes is not None and shapes[", "if False and shapes[",
           OF_FAULTS + "test_hostile.py -k wrong_shape"),
    Mutant("what is known is asked for again", PRECOMPUTE, "if how.engine.retries and not cache.missing(micro_batch.examples):", "if False:",
           "tests/test_reference_cache.py"),
    Mutant("the best checkpoint is pruned", CHECKPOINT, "[] if best is None else [best[0]]", "[]",
           "tests/test_reproduce.py"),
    Mutant("the chosen checkpoint is pruned", CHECKPOINT, "[] if chosen is None else [folder / checkpoint_name(chosen)]", "[]",
           OF_ENDING + " -k pruned"),
    Mutant("no budget is exceeded", CHOICE, "not line[metric] <= limit", "line[metric] < 0", OF_ENDING + " -k beyond_its_budget"),
    Mutant("the best loss is the highest", "dpo_cli/config/schema.py", '"loss": ("loss", -1)', '"loss": ("loss", 1)', OF_ENDING + " -k best_metric"),
    Mutant("patience never ends", CHOICE, "            waited += 1", "            waited += 0", OF_ENDING + " -k patience_counts"),
    Mutant("final is the last step, whatever was chosen", RECORDS, "if final.step != progress.step:", "if False:",
           OF_ENDING + " -k ends_the_run"),
    Mutant("the verdict is of the last step", RECORDS, 'if final is None or record["step"] <= final.step]', "]", OF_ENDING + " -k ends_the_run"),
    Mutant("what ended an answer is not scored", ANSWERS, "[*completion.token_ids, *ended_by]", "[*completion.token_ids, *ended_by][:1]",
           OF_ANSWERS + " -k log_ratio"),
    Mutant("the policy answers for the reference", ANSWERS, "    with adapter_off(reference.policy):", "    if True:", OF_ANSWERS + " -k base_whose"),
    Mutant("the answers' length ratio upside down", ANSWERS, "ours[kept].sum() / theirs[kept].sum()", "theirs[kept].sum() / ours[kept].sum()",
           OF_ANSWERS + " -k by_hand"),
    Mutant("a model that loops is green", "dpo_cli/objectives/answers.py", "lambda of: _repeats(of) or _alike(of)", "lambda of: False", OF_VERDICTS),
    Mutant("reference values of another run", REFERENCE_LOGPS, "resumed and not cache.adopt(own)",
           "resumed and not own.exists()", OF_FAULTS + "test_storage.py -k another_run_left"),
    Mutant("reference values beside other pairs", PRECOMPUTE, "(how.batcher, batch, compute, how.engine)",
           "(how.batcher, cache.missing(batch), compute, how.engine)", "tests/test_reference_cache.py"),
    Mutant("the lock is not taken", LOCKS, "owned = lock_descriptor(descriptor, blocking=in_use is None)", "owned = True",
           OF_FAULTS + "test_storage.py -k second_run"),
    Mutant("links are written through", DIRECTORY, "            if file.is_symlink():", "            if False:",
           OF_FAULTS + "test_hostile.py -k link_in_a_run_directory"),
    Mutant("half a line of metrics stays", LINE_LOG, "            os.ftruncate(descriptor, end)", "            pass",
           OF_FAULTS + "test_storage.py -k metrics_without_room"),
    Mutant("metrics are not flushed before a save", RECORDS,
           "        self.directory.metrics.flush()\n        return", "        return", OF_FAULTS + "test_storage.py -k counts_no_line"),
    Mutant("a skipped update is made", RUNNER, "    if not bad:\n        learner.optimizer.step()", "    if True:\n        "
           "learner.optimizer.step()", OF_FAULTS + "test_numbers.py -k skipped"),
    Mutant("a state that is not finite is saved", RECORDS, "        require_finite(trained, progress.step, self.engine)\n", "",
           OF_FAULTS + "test_numbers.py -k never_saved"),
    Mutant("half a gradient stays after memory ran out", PROBE,
           "        learner.optimizer.zero_grad(set_to_none=True)\n        set", "        set", OF_FAULTS + "test_numbers.py -k memory_that_runs_out"),
    Mutant("random numbers drawn twice after memory ran out", PROBE, "        set_rng_states(rng)\n", "",
           OF_FAULTS + "test_numbers.py -k memory_that_runs_out"),
    Mutant("a file decides that code runs", "dpo_cli/runs/model_ref.py", "    if run.model.trust_remote_code and not given",
           "    if False and not given", OF_FAULTS + "test_hostile.py -k a_file_cannot_decide"),
    Mutant("secrets are shown", "dpo_cli/console/text.py", "sorted(named, key=len, reverse=True)", "[]",
           OF_FAULTS + "test_hostile.py -k secrets"),
    Mutant("other weights are taken on resume", BUILD,
           "if state is not None and not same_weights(state.model_fingerprint, fingerprint):",
           "if False:", OF_FAULTS + "test_hostile.py -k other_weights"),
    Mutant("a reward read one token early", LOGPS, "ends.append(end - 1)", "ends.append(end - 2)", OF_REWARDS),
    Mutant("a reward read one token early in padded rows", LOGPS, "[one[-1] + 1 for one in positions]",
           "[one[-1] for one in positions]", OF_REWARDS),
    Mutant("rewards are not centred", "dpo_cli/objectives/reward.py", "    head.center += torch",
           "    head.center += 0 * torch", OF_REWARDS),
    Mutant("a resumed reward model forgets its head", CHECKPOINT, "        objective.load(policy, checkpoint)\n", "",
           OF_REWARDS),
    Mutant("one random stream for all completions", DECODING, "counter=[0, 0, self.index, 0]", "counter=[0, 0, 0, 0]",
           OF_DECODING),
    Mutant("random numbers by the row of the batch", DECODING, "self.uniforms[self.active, step]",
           "self.uniforms[: len(self.active), step]", OF_DECODING),
    Mutant("temperature upside down", DECODING, "relative / self.params.temperature", "relative * self.params.temperature",
           OF_DECODING),
    Mutant("the nucleus is one token short", DECODING, "before >= top_p", "before + best >= top_p", OF_DECODING),
    Mutant("positions one further at every step", DECODING, "self.slots.lengths[:, None], self.slots.lengths + 1",
           "self.slots.lengths[:, None] + 1, self.slots.lengths + 1", OF_DECODING),
    Mutant("the worse answer is chosen", "dpo_cli/commands/label.py", "return scores[second] > scores[first]",
           "return scores[second] < scores[first]", "tests/test_whole_way.py -k rule_labels"),
    Mutant("finish reason of the other response", "dpo_cli/commands/label.py",
           "chosen_finish_reason=sample.finish_reason(chosen)", "chosen_finish_reason=sample.finish_reason(rejected)",
           "tests/test_label.py -k finish_reason"),
    Mutant("no warning of chosen responses without EOS", "dpo_cli/commands/label.py", "chosen - rejected > LENGTH_LIMITED",
           "rejected - chosen > LENGTH_LIMITED", "tests/test_label.py -k without_eos"),
    Mutant("a judge puts EOS after finish reason length", "dpo_cli/labelling/judges.py",
           "chosen_finish_reason=sample.finish_reason(first)", "chosen_finish_reason=FinishReason.STOP",
           "tests/test_label.py -k finish_reason"),
    Mutant("a match stores the space after the colon", "dpo_cli/labelling/match.py",
           "as_stored(prompt.written, completion.text, template)", "completion.text", "tests/test_rank_checkpoints.py -k colon"),
    Mutant("the completions of another model are taken", "dpo_cli/generation/sampler.py",
           ' if part["model_index"] == model_index]', "]",
           "tests/test_rank_checkpoints.py -k played_again"),
    Mutant("a match of other weights is taken", "dpo_cli/runs/model_ref.py", "        if name and files and", "        if False and",
           "tests/test_rank_checkpoints.py -k played_again"),
    Mutant("a tie is a win for both", "dpo_cli/labelling/match.py", "higher + 0.5 * same", "higher + same",
           "tests/test_whole_way.py -k tie"),
    Mutant("the first answer always stands on the left", "dpo_cli/labelling/annotate.py", ".digest()[0] & 1 else",
           ".digest()[0] & 0 else", "tests/test_annotate.py"),
    Mutant("confidence counted from 0", "dpo_cli/theory/calibration.py", "(confidence - 0.5) * 2 * BINS", "confidence * BINS",
           "tests/test_calibration.py"),
    Mutant("a joined adapter without its scaling", MERGING, "LoraMatrices(a.detach().float().cpu(), scaling * b.detach().float().cpu(), False)",
           "LoraMatrices(a.detach().float().cpu(), b.detach().float().cpu(), False)", OF_EXPORT),
    Mutant("merged weights rounded to the nearest", MERGING, "if at_random and dtype != torch.float32:", "if False:", OF_EXPORT),
    Mutant("a tied weight merged", MERGING, "holders.get(id(weight), 0) > 1", "holders.get(id(weight), 0) > 9", OF_EXPORT),
    Mutant("an export that is never refused", "dpo_cli/evaluation/agreement.py", "        if not fits:", "        if False:", OF_EXPORT),
    Mutant("the stop token of training left out", EXPORTED_FOLDER, "    if closing not in stops:", "    if False:", OF_EXPORT),
    Mutant("an upload without yes", EXPORT, "        elif config.yes:", "        elif True:", OF_EXPORT),
    Mutant("a repository that is public", "dpo_cli/commands/hub.py", "private=private", "private=False", OF_EXPORT),
    Mutant("metrics of other weights on the card", "dpo_cli/runs/export_card.py",
           ' and report.get("weights_sha256") == weights', "", OF_EXPORT),
    *(Mutant(*one) for one in MUTANTS_OF_FILES),
]  # fmt: skip


def killers(mutant: Mutant) -> tuple[list[str], float]:
    """The tests that fail under a mutant (at most three), and how long it took, in seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for part in ("dpo_cli", "conf", "tests", "scripts"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, tree / name)
        file = tree / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: stands {text.count(mutant.old)} times in {mutant.file}, not once")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider", *mutant.tests.split()],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode not in (0, 1):
            # An import that fails is no test that noticed.
            raise SystemExit(f"{mutant.name}: the tests did not run\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    found = re.findall(r"^FAILED \S+?::(\S+)", ended.stdout, re.M)
    return found, time.monotonic() - started


def main() -> int:
    """Run every mutant, or those whose names contain a word given; the number that survived."""
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.name for word in sys.argv[1:])]
    survived = 0
    for mutant in wanted:
        tests, seconds = killers(mutant)
        survived += not tests
        first = tests[0] if tests else "SURVIVED"
        print(f"{mutant.name:<42} {seconds:5.0f} s  {len(tests)} {first}", flush=True)
    print(f"{len(wanted)} mutants, {len(wanted) - survived} killed, {survived} survived")
    return survived


if __name__ == "__main__":
    sys.exit(main())
