"""Basics for every part: processes, devices, files, memory, threads.

distributed     ranks: barriers, gathers, one error for all of them
ranks           `Ranks`: processes that share work, for code that does not import torch
cores           CPU cores and threads of a process
devices         the device of this process: CUDA, MPS or CPU, and its dtypes
memory          peak memory; freed blocks reused in the next step
lock_holder     the process that runs in a run directory
files           atomic writes and digests
file_errors     library errors about damaged files, as a ModelError
hub_access      which names can be on the Hugging Face Hub, and whether it answers
terminal        the console that log lines and progress bars share; lines wrapped at words
row_progress    bars or log lines for work on many rows
harmless_lines  lines of other libraries that are hidden, by logger and text
json_records    dataclasses in JSON files, with type checks
"""
