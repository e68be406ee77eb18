"""Settings that our trainers and TRL's share in the comparisons of their steps."""

SETTINGS = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
    "max_length": None,
}
