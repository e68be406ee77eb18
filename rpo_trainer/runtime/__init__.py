"""What every part stands on: processes, files, memory, threads."""
