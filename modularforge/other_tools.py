"""Words that other tools have for our settings, and how their settings files are told from ours: for hints alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS = {
    **dict.fromkeys(("learning_rate", "lr", "max_lr", "peak_lr"), "backbone.peak_learning_rate"),
    **dict.fromkeys(("min_lr", "lr_min_ratio"), "backbone.final_learning_rate_ratio"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_epochs"), "backbone.steps"),
    **dict.fromkeys(("max_steps", "max_iters", "num_steps", "total_steps", "train_steps"), "backbone.steps"),
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "per_device_train_batch_size"), "backbone.batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), "backbone.accumulation_steps"),
    **dict.fromkeys(("warmup", "warmup_ratio", "lr_warmup_steps", "num_warmup_steps"), "backbone.warmup_steps"),
    **dict.fromkeys(("sequence_len", "sequence_length", "seq_len", "seq_length"), "model.context_length"),
    **dict.fromkeys(("max_seq_len", "max_seq_length", "block_size", "cutoff_len", "n_ctx"), "model.context_length"),
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "n_embd", "dim", "embed_dim"), "model.width"),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), "model.layers"),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), "model.heads"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "n_query_groups"), "model.kv_heads"),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff"), "model.ffn_width"),
    **dict.fromkeys(("max_position_embeddings",), "model.max_positions"),
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name", "checkpoint_dir"), "model.pretrained"),
    **dict.fromkeys(("dataset", "datasets", "train_files", "train_file", "dataset_name"), "data.sources"),
    **dict.fromkeys(("val_set_size", "val_fraction", "val_size", "validation_split"), "data.heldout_fraction"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "gradient_clip_val"), "training.clip_norm"),
    **dict.fromkeys(("bf16", "fp16", "mixed_precision", "torch_dtype"), "training.precision"),
    **dict.fromkeys(("logging_steps", "log_interval", "log_every_n_steps", "log_freq"), "training.log_every"),
    **dict.fromkeys(("eval_steps", "eval_interval", "val_check_interval", "eval_every"), "training.validate_every"),
    **dict.fromkeys(("save_steps", "save_interval", "save_every", "checkpoint_interval"), "training.checkpoint_every"),
    **dict.fromkeys(("save_total_limit", "keep_last"), "training.keep_checkpoints"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_experts"), "experts.count"),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k"), "assembly.experts_per_token"),
    **dict.fromkeys(("lora_r", "lora_rank"), "experts.lora.rank"),
    **dict.fromkeys(("lora_alpha",), "experts.lora.alpha"),
    **dict.fromkeys(("lora_target_modules", "lora_target", "target_modules"), "experts.lora.targets"),
    **dict.fromkeys(("sample_packing",), "training.packing"),
    **dict.fromkeys(("out_dir", "save_dir", "output_path"), "output_dir"),
    **dict.fromkeys(("random_seed",), "seed"),
    **dict.fromkeys(("report_to", "use_wandb", "use_mlflow", "logger_name"), "metrics.writers"),
    **dict.fromkeys(("torch_compile",), "training.compile"),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version", "deepspeed", "zero_stage"), "training.parallel"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "training.recompute"),
}
"""By the word of Hugging Face, axolotl, litgpt, torchtune, nanoGPT or Lightning, the setting here."""

SIGNS = {
    "a study (start it with `modularforge study`)": ("base", "recipes", "variants"),
    "axolotl": ("base_model", "datasets", "sequence_len", "micro_batch_size", "num_epochs", "adapter", "val_set_size",
                "load_in_4bit", "lora_r", "sample_packing", "wandb_project", "flash_attention"),
    "LLaMA-Factory": ("model_name_or_path", "stage", "do_train", "finetuning_type", "template", "cutoff_len", "dataset",
                      "lora_target", "per_device_train_batch_size"),
    "litgpt": ("checkpoint_dir", "out_dir", "train", "eval", "model_name", "model_config", "tokenizer_dir", "devices"),
    "torchtune": ("tokenizer", "checkpointer", "optimizer", "loss", "metric_logger", "max_steps_per_epoch",
                  "lr_scheduler", "dataset"),
    "mergekit": ("merge_method", "slices", "models", "base_model", "tokenizer_source"),
    "NeMo": ("trainer", "exp_manager", "restore_from_path"),
    "nanoGPT": ("n_layer", "n_head", "n_embd", "block_size", "max_iters", "eval_interval", "out_dir"),
    "the Hugging Face Trainer": ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "eval_strategy",
                                 "gradient_accumulation_steps", "save_steps", "logging_steps"),
    "transformers (a model's config.json)": ("architectures", "hidden_size", "num_hidden_layers", "model_type",
                                             "num_attention_heads", "torch_dtype"),
}  # fmt: skip
"""By tool, names at the top of its settings files that no file of ours has there."""
LEAST_SIGNS = 2


def tool_of(values: Any) -> str | None:
    """The tool whose settings these seem to be, or None."""
    if not isinstance(values, Mapping):
        return None
    found = {tool: sum(name in values for name in signs) for tool, signs in SIGNS.items()}
    tool = max(found, key=lambda name: found[name])
    return tool if found[tool] >= LEAST_SIGNS else None
