"""What a stage trains on, prepared once for `run`, `check`, `plan` and `preview`."""
