"""What every part stands on: processes, files, memory, threads.

distributed     ranks: barriers, gathers, one error for all of them
ranks           `Ranks`: the processes that share a piece of work, for code that imports no torch
cores           CPU cores and threads of a process
memory          peak memory; freed blocks kept for the next step
lock_holder     the process that runs in a run directory
files           files written whole or not at all, and their digests
file_errors     what libraries raise about a damaged file, as a ModelError
json_records    dataclasses in JSON files, with their types checked
"""
