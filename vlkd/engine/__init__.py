"""One visible training loop and what stands around it: settings, checkpoints, logs, evaluation, the run itself."""
