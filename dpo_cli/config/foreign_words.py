"""Keys of other trainers' configs, and what each is here.

Of TRL (DPOConfig, ModelConfig, ScriptArguments, TrainingArguments), axolotl, LLaMA-Factory, torchtune, ms-swift and
Unsloth. An answer is one of our keys, which takes the same value, after other words that it needs; or a `Note`. Where
the answer depends on the value, a dict has one for each value, with our value in it, and under "" that for all others.
Where it depends on the command, "|" separates the answers: the first whose keys the command has is given.
"""

from collections.abc import Collection


class Note(str):
    """An answer in words: no key of ours replaces that key."""


LEAVE_OUT = Note("leave it out")
SHARDED_BY = Note("not needed: engine=fsdp shards every weight, engine.processes says on how many GPUs")
BITS = {
    **dict.fromkeys(("4", "nf4"), "model.quantization=nf4"),
    "8": "model.quantization=int8",
    "": Note("not supported yet: 4 bits are nf4 (model.quantization=nf4), 8 bits int8"),
}
DOUBLE = Note("not supported yet: the scales of nf4 stay float32, half a bit a weight")
BITSANDBYTES = Note("not needed: model.quantization=nf4 or int8 uses bitsandbytes")
KERNELS = Note("not supported yet: fused kernels of other packages")
FROZEN_PARTS = Note("not supported yet: only adapters train (lora.target_modules), or every weight (lora=off)")
ATTENTION = Note("not needed: the attention follows from the device and from layout")
PACKING = Note("not needed: layout=auto packs pairs without padding")
TEMPLATE = Note("not needed: data.template=chat takes the chat template of the model's tokenizer")
TRUNCATION = Note("not needed: the oldest part of a prompt is cut first (data.max_prompt_length)")
IN_MEMORY = Note("not needed: all pairs are tokenized before training and kept on disk")
PER_EPOCH = "not supported yet: give the steps between two, for instance {}=100"
EVALUATION = Note("not needed: evaluation has micro-batches of its own size")
ACCUMULATION = Note("not needed: batch_size counts the pairs of a step, micro_batch_size those of a forward pass")
ADAPTER_ONLY = Note("not needed: final/ holds the adapter alone")
OWN_DATA = "data=jsonl data.train"  # the default group would keep its own held-out pairs
MIXED = {"": "data=mixture data.sources"}
STOPS = {
    **dict.fromkeys(
        ("interleave_under", "first_exhausted"), Note("with data=mixture it is data.stop=first, the default")
    ),
    **dict.fromkeys(("interleave_over", "all_exhausted"), Note("with data=mixture it is data.stop=all")),
    "": "data=mixture data.sources",
}
UPLOAD = Note("not supported yet: final/ has PEFT's layout; upload it with the hub's own command")
DEFAULT_OBJECTIVE = Note("leave it out: DPO is the default (objective=dpo)")
OBJECTIVE: dict[str, str] = {"dpo": DEFAULT_OBJECTIVE, "rm": "objective=reward", "": "objective"}
ADAPTER = {
    "lora": "lora=all_linear",
    "full": "lora=off",
    "qlora": "lora=all_linear model.quantization=nf4",
    "freeze": FROZEN_PARTS,
    "": "lora",
}
CHECKPOINTING = {
    "true": "engine.gradient_checkpointing=true",
    "unsloth": "engine.gradient_checkpointing=true",
    "": "engine.gradient_checkpointing",
}
RESUME = {"true": "resume=auto", "false": LEAVE_OUT, "": "resume"}
ON_CPU = {"true": "device=cpu", "false": LEAVE_OUT, "": "device"}
SCHEDULES = {
    **{name: f"optimizer.schedule={name}" for name in ("cosine", "linear", "constant")},
    "constant_with_warmup": "optimizer.schedule=constant",
    "": "optimizer.schedule",
}
LOSSES = {
    **{name: f"loss={name}" for name in ("sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "exo_pair")},
    **{name: f"loss={name}" for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")},
    "": "loss",
}


def _dtype(**names: str) -> dict[str, str]:
    return {**{name: f"model.dtype={dtype}" for name, dtype in names.items()}, "": "model.dtype"}


def _steps(key: str) -> dict[str, str]:
    return {"no": f"{key}=0", "epoch": Note(PER_EPOCH.format(key)), "steps": Note(f"leave it out: {key} counts steps"),
            "": key}  # fmt: skip


# fmt: off
WORDS: dict[str, str | dict[str, str]] = {
    # The method
    "loss_type": LOSSES, "pref_loss": LOSSES, "dpo_loss": LOSSES,
    "loss._component_": {"": "loss"},
    "rl": {**OBJECTIVE, "ipo": "loss=ipo"},
    "rlhf_type": OBJECTIVE, "stage": OBJECTIVE,
    "rl_beta": "beta", "pref_beta": "beta", "dpo_beta": "beta",
    "rpo_alpha": "loss.sft_weight", "pref_ftx": "loss.sft_weight", "dpo_ftx": "loss.sft_weight",
    "dpo_label_smoothing": "loss.label_smoothing",
    "discopop_tau": "loss.temperature",
    "f_divergence_type": {"reverse_kl": LEAVE_OUT, "": Note("not supported yet: only reverse KL")},
    "reference_free": Note("not supported yet: every DPO loss compares with the reference"),
    "use_weighting": Note("not supported yet: every pair has the same weight"),
    "ld_alpha": Note("not supported yet: every token has the same weight"),
    "loss_weights": Note("not supported yet: one loss a run; loss.sft_weight adds the chosen responses' likelihood"),
    "sync_ref_model": Note("not supported yet: the reference never moves"),
    "ref_model": Note("not supported yet: the reference is the model that the policy starts from"),
    "precompute_ref_log_probs": {"true": "reference.cache=auto", "false": "reference.cache=off", "": "reference.cache"},
    "precompute_ref_batch_size": Note("not needed: micro-batches of the reference are those of training"),
    "force_use_ref_model": {"true": "reference=frozen", "false": LEAVE_OUT, "": "reference"},
    "disable_dropout": Note("not needed: the model's own dropout is off; lora.dropout is that of the adapters"),
    # The model
    "model_name_or_path": "model.name_or_path|checkpoint", "base_model": "model.name_or_path|checkpoint",
    "pretrained_model_name_or_path": "model.name_or_path|checkpoint", "model_id": "model.name_or_path|checkpoint",
    "checkpointer.checkpoint_dir": "model.name_or_path", "tokenizer.path": {"": "model.name_or_path"},
    "model_revision": "model.revision", "base_model_revision": "model.revision",
    "adapter_name_or_path": "model.adapter", "lora_model_dir": "model.adapter", "adapters": "model.adapter",
    "model._component_": {"": "model.name_or_path"},
    "model_type": Note("not needed: the model's own config.json says it"),
    "tokenizer_type": Note("not needed: the model's own files say it"),
    "base_model_config": Note("not needed: the model has its own"),
    "torch_dtype": "model.dtype",
    "dtype": _dtype(bf16="bfloat16", fp16="float16", fp32="float32"),
    "bf16": {**_dtype(true="bfloat16", auto="auto"), "false": LEAVE_OUT},
    "fp16": {**_dtype(true="float16", auto="auto"), "false": LEAVE_OUT},
    "tf32": Note("not needed: the dtype is chosen by measuring (model.dtype=auto)"),
    "load_in_4bit": {"true": "model.quantization=nf4", "": LEAVE_OUT},
    "load_in_8bit": {"true": "model.quantization=int8", "": LEAVE_OUT},
    "quantization_bit": BITS, "quant_bits": BITS, "bnb_4bit_quant_type": BITS,
    "quant_method": BITSANDBYTES, "quantization_method": BITSANDBYTES,
    "bnb_4bit_compute_dtype": "model.dtype", "bnb_4bit_quant_storage": Note("not needed: packed weights are bytes"),
    "bnb_4bit_use_double_quant": DOUBLE, "use_bnb_nested_quant": DOUBLE, "double_quantization": DOUBLE,
    "attn_implementation": ATTENTION, "attn_impl": ATTENTION, "flash_attn": ATTENTION, "flash_attention": ATTENTION,
    "sdp_attention": ATTENTION, "xformers_attention": ATTENTION,
    "use_liger_kernel": KERNELS, "use_liger_loss": KERNELS, "enable_liger_kernel": KERNELS, "use_unsloth": KERNELS,
    # LoRA
    "lora_r": "lora.r", "lora_rank": "lora.r", "lora.rank": "lora.r", "rank": "lora.r",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target": {"all": "lora.target_modules=all-linear", "": "lora.target_modules"},
    "lora_target_linear": {"true": "lora.target_modules=all-linear", "": LEAVE_OUT},
    "lora_attn_modules": "lora.target_modules",
    "adapter": ADAPTER, "finetuning_type": ADAPTER, "train_type": ADAPTER, "tuner_type": ADAPTER,
    "use_peft": {"true": "lora=all_linear", "false": "lora=off", "": "lora"},
    "lora_bias": Note("not supported yet: adapters have no bias"),
    "bias": Note("not supported yet: adapters have no bias"),
    "lora_modules_to_save": FROZEN_PARTS, "modules_to_save": FROZEN_PARTS, "unfrozen_parameters": FROZEN_PARTS,
    "use_rslora": Note("not supported yet: the update is scaled by lora.alpha / lora.r"),
    "use_dora": Note("not supported yet: plain LoRA only"), "loftq_config": Note("not supported yet: plain LoRA only"),
    "loraplus_lr_ratio": Note("not supported yet: one rate for all weights"),
    "lora_task_type": Note("not needed: it follows from objective"),
    # Data
    "dataset": OWN_DATA, "datasets": {"": OWN_DATA}, "dataset_name": OWN_DATA, "train_file": OWN_DATA,
    "dataset_name_or_path": OWN_DATA, "dataset.source": OWN_DATA, "dataset_path": OWN_DATA,
    "data_files": OWN_DATA, "dataset.data_files": OWN_DATA,
    "dataset_mixer": MIXED, "dataset_mixture": MIXED, "interleave_probs": MIXED, "interleave_prob": MIXED,
    "mix_strategy": {"concat": Note("data.train takes a list of files"), **STOPS}, "stopping_strategy": STOPS,
    "shuffle_merged_datasets": {"": "data.shuffle"},
    "dataset_dir": Note("not needed: data.train is a path"),
    "eval_dataset": "data.eval", "val_dataset": "data.eval", "test_datasets": {"": "data.eval"},
    "eval_file": "data.eval", "n_examples": "data.limit",
    "dataset_config": "data.subset", "dataset_config_name": "data.subset", "dataset_train_split": "data.train_split",
    "dataset.split": "data.train_split", "dataset_test_split": "data.eval_split",
    "val_set_size": "data.eval_fraction", "val_size": "data.eval_fraction", "test_size": "data.eval_fraction",
    "split_dataset_ratio": "data.eval_fraction", "max_samples": "data.limit", "max_train_samples": "data.limit",
    "max_eval_samples": "data.eval_limit", "cutoff_len": "data.max_length", "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "model_max_length": "data.max_length",
    "max_prompt_len": "data.max_prompt_length|max_prompt_length",
    "max_completion_length": Note("not needed: data.max_length limits prompt and response together"),
    "truncation_mode": TRUNCATION, "truncation_strategy": TRUNCATION,
    "chat_template": TEMPLATE, "prompt_template": TEMPLATE, "template": TEMPLATE,
    "system": Note("not supported yet: put the system message into the rows (data.format=messages)"),
    "streaming": IN_MEMORY, "dataset_streaming": IN_MEMORY,
    "dataset_num_proc": IN_MEMORY, "preprocessing_num_workers": IN_MEMORY, "dataloader_num_workers": IN_MEMORY,
    "dataset_prepared_path": IN_MEMORY, "overwrite_cache": IN_MEMORY,
    "remove_unused_columns": Note("not needed: data.columns names the columns that are read"),
    "group_by_length": PACKING, "padding_free": PACKING, "sample_packing": PACKING, "packing": PACKING,
    "neat_packing": PACKING, "pad_to_sequence_len": PACKING, "padding_value": PACKING, "label_pad_token_id": PACKING,
    "train_on_inputs": Note("not needed: only response tokens are trained on"),
    "special_tokens": Note("not needed: the tokenizer has its own"),
    # Batches and steps
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "batch_size", "global_batch_size": "batch_size",
    "gradient_accumulation_steps": ACCUMULATION,
    "per_device_eval_batch_size": EVALUATION, "eval_batch_size": EVALUATION,
    "auto_find_batch_size": {"true": "micro_batch_size=auto", "false": LEAVE_OUT, "": "micro_batch_size"},
    "dataloader_drop_last": Note("not needed: the last batch of an epoch may be smaller"),
    "num_train_epochs": "epochs", "num_epochs": "epochs", "n_epochs": "epochs",
    "max_steps_per_epoch": {"": "max_steps"},
    # Optimizer
    "learning_rate": "optimizer.lr", "adam_epsilon": "optimizer.eps",
    "adam_beta1": {"": "optimizer.betas"}, "adam_beta2": {"": "optimizer.betas"},
    "optim": {**dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "optimizer=adamw"),
              **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "optimizer=adamw8bit"),
              "paged_adamw_8bit": "optimizer=paged_adamw8bit",
              "paged_adamw_32bit": Note("not supported yet: there is optimizer=paged_adamw8bit"),
              "rmsprop": "optimizer=rmsprop", "sgd": "optimizer=sgd", "": "optimizer"},
    "optimizer._component_": {"torch.optim.adamw": "optimizer=adamw", "": "optimizer",
                              "bitsandbytes.optim.adamw8bit": "optimizer=adamw8bit",
                              "bitsandbytes.optim.pagedadamw8bit": "optimizer=paged_adamw8bit"},
    "lr_scheduler_type": SCHEDULES, "lr_scheduler": SCHEDULES, "lr_scheduler._component_": SCHEDULES,
    "num_warmup_steps": "optimizer.warmup_steps",
    "warmup_ratio": Note("not supported yet: give the number of steps, optimizer.warmup_steps=10"),
    "clip_grad_norm": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "neftune_noise_alpha": Note("not supported yet: noise on embeddings"),
    # Device and memory
    "gradient_checkpointing": CHECKPOINTING, "use_gradient_checkpointing": CHECKPOINTING,
    "enable_activation_checkpointing": "engine.gradient_checkpointing", "torch_compile": "engine.compile",
    "disable_gradient_checkpointing": {"true": LEAVE_OUT, "": "engine.gradient_checkpointing"},
    "gradient_checkpointing_kwargs": Note("not needed: engine.gradient_checkpointing=true is enough"),
    "enable_activation_offloading": Note("not supported yet: engine.gradient_checkpointing=true saves memory"),
    "use_cpu": ON_CPU, "no_cuda": ON_CPU,
    "device_map": {"auto": "device=auto", "": "device"},
    "deepspeed": SHARDED_BY, "fsdp": SHARDED_BY, "fsdp_config": SHARDED_BY,
    "tensor_parallel_dim": Note("not supported: engine=fsdp shards every weight"),
    "ddp_timeout": "engine.timeout", "num_processes": "engine.processes", "nproc_per_node": "engine.processes",
    "ddp_find_unused_parameters": Note("not needed: a weight without a gradient counts as 0"),
    "local_rank": Note("not needed: a launcher sets it in the environment"),
    "cpu_offload": "engine.cpu_offload", "fsdp_offload_params": "engine.cpu_offload",
    # The run, its checkpoints and logs
    "data_seed": "seed", "random_state": "seed", "logging_steps": "log_every", "log_every_n_steps": "log_every",
    "logging_strategy": _steps("log_every"),
    "logging_first_step": Note("not needed: step 0, before the first update, is logged"),
    "eval_steps": "eval_every",
    "do_eval": Note("not needed: held-out pairs are evaluated at the end, and every eval_every steps"),
    "do_train": Note("not needed: dpo-train trains, dpo-eval evaluates"),
    "eval_strategy": _steps("eval_every"),
    "evaluation_strategy": _steps("eval_every"),
    "evals_per_epoch": Note(PER_EPOCH.format("eval_every")), "saves_per_epoch": Note(PER_EPOCH.format("save_every")),
    "save_steps": "save_every", "save_strategy": _steps("save_every"),
    "save_total_limit": "keep_checkpoints",
    "load_best_model_at_end": "keep_best",
    "metric_for_best_model": {
        "eval_loss": "early_stop.metric=loss", "eval_rewards/accuracies": "early_stop.metric=accuracy",
        "eval_rewards/margins": "early_stop.metric=margin", "": "early_stop.metric",
    },
    "early_stopping_patience": "early_stop.patience",
    "save_safetensors": Note("not needed: weights are always saved in safetensors"),
    "save_only_model": ADAPTER_ONLY, "save_adapter_weights_only": ADAPTER_ONLY,
    "overwrite_output_dir": Note("not supported: a run is never overwritten; name another output_dir"),
    "resume_from_checkpoint": RESUME, "auto_resume_from_checkpoints": RESUME,
    "push_to_hub": UPLOAD, "hub_model_id": UPLOAD, "exp_name": {"": "output_dir"},
    "report_to": {"all": "tracker=[tensorboard,wandb,trackio]", "tensorboard": "tracker=tensorboard",
                  "wandb": "tracker=wandb", "trackio": "tracker=trackio", "none": "tracker=none", "": "tracker"},
    "use_wandb": {"true": "tracker=wandb", "false": LEAVE_OUT, "": "tracker"},
    "metric_logger._component_": {"": "tracker"},
    "wandb_project": "tracker=wandb tracker.wandb.project", "wandb_entity": "tracker=wandb tracker.wandb.entity",
    "wandb_name": "tracker=wandb tracker.wandb.name", "wandb_mode": "tracker=wandb tracker.wandb.mode",
    "run_name": "tracker=wandb tracker.wandb.name", "logging_dir": "tracker=tensorboard tracker.tensorboard.directory",
    "trackio_space_id": "tracker=trackio tracker.trackio.space_id",
    "generate_during_eval": Note("not supported yet: dpo-eval checkpoint=RUN samples=5 shows completions"),
    "full_determinism": "deterministic",
    "plot_loss": Note("not needed: a tracker draws curves (tracker=tensorboard)"),
    # Completions
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "num_return_sequences": "n",
    "num_generations": "n", "do_sample": Note("not needed: completions are sampled"),
    "top_k": Note("not supported yet: there is top_p"),
    # Flags of other command lines
    "config_name": Note("to read a file of overrides write --config FILE.yaml"),
    "config_path": Note("to use groups of your own write --config-dir DIR"),
}
# fmt: on


def answer(word: str, value: str | None, keys: Collection[str]) -> str | None:
    """What to write here instead of a key of another trainer, as words for the user.

    None if `word` is no such key, or its answer is not among `keys`, those of the command. `value` is the value that
    the user gave it; None if that is not known.
    """
    found = WORDS.get(word)
    if found is None:
        return None
    plain = None if value is None else value.strip("'\"").lower()
    if plain in ("", "null", "~"):
        return LEAVE_OUT
    if isinstance(found, dict):  # the answer has our value in it, or the value cannot be translated
        found, value = found.get(plain or "", found[""]), None
    if isinstance(found, Note):
        return LEAVE_OUT if plain in ("false", "none") else found
    for words in found.split("|"):
        if all(one.partition("=")[0] in keys for one in words.split()):
            return f"here it is {words}" + (f"={value}" if value is not None else "")
    return None
