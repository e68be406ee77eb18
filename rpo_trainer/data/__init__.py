"""Data: read, convert to one internal format, filter, mix, render and tokenize.

Importing this package does not import torch or transformers, so that the data of a recipe can be checked
quickly.

pipeline          `load_rows`, `prepare_dataset`: all steps below, in order

Read:
  sources           files, saved `datasets`, the Hugging Face Hub, built-in tasks
  json_file         JSON and JSON lines files
  csv_file          CSV files
  json_columns      lists and messages stored as JSON text in a column
  tasks             table of built-in tasks
  quickstart        data and tokenizer of the quickstart, generated

Convert to the internal format:
  rows              the internal format and its checks
  formats/          known formats, one table for each kind of row
  detect            detect the format of a source from its columns
  adapt_rows        raw rows of any format → internal rows
  messages          messages in any known spelling → role and content
  message_forms     tool calls, thinking and content in the form that templates read
  conversation      combine prompt and responses
  shared_columns    columns that every format reads: tools, system prompt, template variables
  columns           columns that no format reads

Select:
  filters           filter rows by reward or by repeated prompt
  duplicates        equal and nearly equal prompts
  mix               mixtures by weight, and replay
  ratings           targets of a reward model; rows held out for evaluation

Render and tokenize:
  templates         built-in chat templates, set on a tokenizer
  template_limits     limits of a template's time, memory and output length
  template_variables  variables that a chat template reads
  jinja_variables     variables that any Jinja text reads
  template_coverage   parts of a row that a template omits
  trained_spans     rows → text, trained characters, and token masks
  turns             start and end of the assistant turns in a text
  turn_endings      end-of-turn markers that the template writes
  thinking_marks    markers around thinking
  rendered          rendered text with its trained spans and special-token text
  encode            text → token ids and masks
  tokenize          rows → tokenized examples in Arrow
  tokenize_batch    tokenize one batch of rows
  tokenized_shards  tokenized examples in a directory, memory-mapped
  parallel_map      run batches in several processes

Read tokenized examples:
  example_view      examples, lengths, flat values and digest, from the buffers of an Arrow table
  example_table     tokenized examples of others → Arrow
  arrow_rows        rows of any Arrow table, with lists of integers as slices of its buffers
  ragged            lists of numbers of different lengths in two arrays

Count and show:
  audit             report of rows read, kept and dropped, and of warnings
  audit_counts      the counts of the audit
  audit_json        the audit as JSON and back
  counts            counts by reason, and their texts
  judge_bias        position and length bias of a judge
  token_view        colored view of tokens
  sample_conversations  conversations for checking a template

Keep on disk:
  store             a directory of prepared data, an entry per content key, complete or absent
  audit_json        an audit as JSON
  tokenizer_digest  digest of a tokenizer

Rows generated one by one:
  resumable_rows    a row file that survives interruption: complete or absent
  partial_file      its unfinished results
"""

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.encode import encode_prompt, end_token_ids
from rpo_trainer.data.filters import filter_rows
from rpo_trainer.data.mix import add_replay, mix_sources
from rpo_trainer.data.pipeline import load_rows, prepare_dataset
from rpo_trainer.data.ratings import hold_out, rating_targets
from rpo_trainer.data.templates import set_chat_template
from rpo_trainer.data.tokenize import tokenize_rows

__all__ = [
    "Audit",
    "add_replay",
    "encode_prompt",
    "end_token_ids",
    "filter_rows",
    "hold_out",
    "load_rows",
    "mix_sources",
    "prepare_dataset",
    "rating_targets",
    "set_chat_template",
    "tokenize_rows",
]
