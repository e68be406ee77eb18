"""Rows in one internal format: reading, adapting, filtering, mixing, rendering, tokenizing.

Imports neither torch nor transformers, so that a recipe's data can be checked at once.

pipeline          `load_rows`, `prepare_dataset`: all of the below, in order

Read:
  sources           files, saved `datasets`, the hub, built-in tasks
  json_file         rows of JSON and JSON lines
  csv_file          rows of CSV
  json_columns      lists and messages that a column holds as JSON text
  tasks             the table of built-in tasks
  quickstart        data and tokenizer of the quickstart, made here

Adapt to the internal format:
  rows              the internal format, and the checks of every row
  formats/          the known formats, a table for each kind of row
  detect            the format of a source by its columns
  adapt_rows        raw rows of any format → internal rows
  messages          messages in any spelling → role and content
  message_forms     tool calls, thinking and content as templates read them
  conversation      prompt and responses put together
  shared_columns    what every format reads: tools, system prompt, template variables
  columns           columns that no format reads

Choose:
  filters           rows by rewards, or by prompts that occur again
  duplicates        prompts that are the same, or nearly
  mix               mixtures by weight, and replay
  ratings           targets of a reward model; rows set aside for evaluation

Render and tokenize:
  templates         built-in chat templates, set on a tokenizer
  template_limits     time, memory and output length of a template
  template_variables  the variables that a template reads
  jinja_variables     the same of any Jinja text
  template_coverage   what a template leaves out of a row
  trained_spans     rows → text, which characters of it are trained, and the mask of its tokens
  turns             where the assistant's turns begin and end in a text
  turn_endings      end markers of turns, as the template writes them
  thinking_marks    the marks around thinking
  rendered          a rendered text with its trained spans and special-token text
  encode            text → token ids and masks
  tokenize          rows → tokenized examples in Arrow
  tokenize_batch    one batch of them
  parallel_map      batches on several processes

Count and show:
  audit             what was read, kept, dropped, and warned about
  audit_counts      its counts
  counts            rows by reason
  judge_bias        position and length bias of a judge
  token_view        tokens in colors
  sample_conversations  conversations to check a template with

Rows made one by one:
  resumable_rows    a file of rows that survives a kill, whole or absent
  partial_file      the unfinished results beside it
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
