"""What ``--help`` says of the commands: examples, and what exit status to expect."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Swap the attention of a pretrained language model for a sparse pattern, without training, and
measure what that costs and saves.
"""
EXAMPLES = """\
examples:
  sa-patch sweep demo                        # embedded model, our tasks, no download
  sa-patch report runs/demo                  # table and figures of that sweep
  sa-patch sweep configs/qwen3-8b.yaml --out runs/q8 --confirm-run-unsafe-code
  sa-patch generate smollm2-135m "The sea is" --method sa --window 64
  sa-patch calibrate smollm2-135m            # which layers to leave full
  sa-patch search smollm2-135m --share 1/8   # the composition that keeps most at that cost
  sa-patch analyze receptive                 # how far queries see through several layers
  sa-patch methods                           # patterns and backends, and what works here
  sa-patch bench --n 1K,4K --window 128      # how fast each of them is, beside its rivals
  sa-patch lm-eval --model sa-patch --tasks hellaswag \\
      --model_args pretrained=Qwen/Qwen3-8B,method=sa,window=128,seed=0

sa-patch COMMAND --help explains each command.
"""
SWEEP_EXAMPLES = """\
examples:
  sa-patch sweep demo
  sa-patch sweep demo --limit 5 --out runs/quick
  sa-patch sweep my.yaml --dry-run                       # the grid, and what is done of it
  sa-patch sweep ruler --limit 50 --metadata '{"max_seq_lengths": [4096]}'
  sa-patch sweep smollm2-seven --benchmarks data --confirm-run-unsafe-code
  sa-patch sweep my.yaml --ray                           # a cell per GPU of this machine
  sa-patch sweep my.yaml --ray 10.0.0.1:6379             # on all machines of a Ray cluster

A sweep can be stopped at any time (Ctrl-C, even kill -9): the same command does only what is
missing. exit status: 0 all cells done, 1 some failed (each with its reason), 2 the request itself
is wrong, 130 interrupted.

a sweep file:
  model: smollm2-135m              # or {pretrained: Qwen/Qwen3-8B, dtype: bfloat16}
  windows: [16, 32, 64]
  methods: [full, swa, {method: sa, seeds: [0, 1, 2]}, {method: moba, topk: 2}]
            # several patterns joined, and budgets shared out over sinks, a window and the rest:
            # {method: "sinks:4+swa:60+sa:64", seeds: [0, 1]},
            # {method: split, total: [64, 128], sinks: 4, local: 0.5, rest: psa, seeds: [0]},
            # of each family the largest pattern within a share of full attention's FLOPs at n
            # tokens (seeds are for the random ones; group: query heads per KV head, default 1):
            # {method: budget, families: ["sinks:4+swa:{}", "sinks:4+swa:60+psa:{}"], n: 4096,
            #  shares: [1/16, 1/8, 1/4], seeds: [0, 1, 2], group: 3},
            # layers that stay full, or take another pattern (or the file of sa-patch calibrate):
            # {method: "swa:64", layers: {0-3: full, 7: "swa:256"}}
  tasks: [lambada_openai, {task: mmlu, limit: 2}]        # any task of lm-eval, and ours
            # tasks whose documents are made for a length, a cell for each:
            # {task: niah_single_1, metadata: {max_seq_lengths: [4096, 8192]}}
            # and for each task or all: gen_kwargs, num_fewshot, apply_chat_template: true,
            # system_instruction, fewshot_as_multiturn, truncation: middle, max_prompt_tokens
  limit: 50                                              # items per task; leave out for all
  resources: {gpus: 1, cpus: 8}    # of each worker with --ray; a model can have its own
"""
REPORT_EXAMPLES = """\
examples:
  sa-patch report runs/demo
  sa-patch report runs/demo --x mean_keys           # against the keys that were really visible
  sa-patch report runs/a runs/b --out comparison    # several models or runs in one report

exit status: 0; 2 if a run cannot be read, or if a cell file in it is torn or foreign: then the
report is written without that cell.
"""
GENERATE_EXAMPLES = """\
examples:
  sa-patch generate smollm2-135m "The sea is"
  sa-patch generate smollm2-135m "Why is the sky blue?" --chat --method swa --window 256
  sa-patch generate smollm2-135m "Once" --method sinks:4+swa:252 --decode pattern --layers 2-29
  sa-patch generate Qwen/Qwen3-8B "Once upon a time" --method moba:block_size=64,topk=2 \\
      --dtype bfloat16 --device-map auto
"""

CALIBRATE_EXAMPLES = """\
examples:
  sa-patch calibrate smollm2-135m --full-layers 6
  sa-patch calibrate smollm2-135m --method sinks:4+swa:124 --compare   # beside rules of thumb
  sa-patch calibrate Qwen/Qwen3-8B --text mine.txt --dtype bfloat16 --out qwen.yaml
  sa-patch generate Qwen/Qwen3-8B "Once" --method sinks:4+swa:124 --layers qwen.yaml
  sa-patch calibrate smollm2-135m --full-heads 18                  # which heads to leave full
  sa-patch calibrate smollm2-135m --pattern "prism:{},32" --share 1/8 --n 2048   # a threshold

Each layer alone goes sparse while the others stay full; what the loss rises by ranks them. The text
is generated (pass words hidden in filler, of which the answers count, and Python's own sources, of
which the last quarter counts) or a file of yours. A run can be stopped at any time: the same
command goes on, and another budget or comparison is found in what is known.

With --full-heads those KV heads stay full that pay most attention to hidden answers where they are
asked for, and all others take the pattern (DuoAttention's idea, without its training). With --share
the number in the place of {} is sought that spends most within the share on these texts, in about a
dozen passes over all of them.

Beside the schedule (YAML) lies all that was measured (JSON).
"""
SEARCH_EXAMPLES = """\
examples:
  sa-patch search smollm2-135m --share 1/8 --n 2048
  sa-patch search smollm2-135m --share 1/4 --n 1024 --cost visited --trials 12 --documents 2
  sa-patch search smollm2-135m --n 1024 --layer-trials 10 --out runs/found
  sa-patch generate smollm2-135m "Once" --pattern runs/found/found.yaml

Each candidate is a core (a window, SA, MoBA, block choices, methods of others), joined to first
tokens, a window and a dense tail, and made as large as the budget allows; what does not fit is not
run. First come the named methods, then what Optuna's TPE proposes. A candidate reads one short text
of each kind, then 1, 2, 4, ... of --n tokens; at each step the worse half stops. The score is the
mean recovery of language modelling (NLL of full attention over the candidate's, on Python's sources
or --text) and of retrieval (probability of a hidden pass word among all that there are, where it is
asked for at the end). In the end the winner and the best named method read held-out texts. Random
patterns are measured with one seed; the number of a threshold is fitted on one text.

A search can be stopped at any time: the same command goes on and finds what it would have found in
one go; more --trials add to it. The folder holds found.yaml (goes wherever a pattern goes; after
--layer-trials perhaps wherever layers go), search.json (all trials) and study.journal (Optuna's).
Needs: pip install 'sa_patch[search]'.
exit status: 0; 2 if the request is wrong; 130 interrupted.
"""
BENCH_EXAMPLES = """\
examples:
  sa-patch bench                                     # CPU: 8/2 heads of 64, 1K to 16K, minutes
  sa-patch bench --n 2K,8K --methods sa,swa --backends banded --threads 2
  sa-patch bench --device cuda --methods sa,moba:block_size=512,topk=3
  sa-patch bench --tune                              # launch parameters of this GPU, for auto
  sa-patch bench --heads 9 --kv-heads 3 --dtype bfloat16 --window 64,256

No time is printed before the same call has passed its check against float64 on a sample of
queries. exit status: 0; 1 if a result was wrong or a call failed; 2 if the request is wrong; 130
interrupted (what was measured is kept).
"""
ANALYZE_EXAMPLES = """\
examples:
  sa-patch analyze receptive --n 2048 --methods sa:32,swa:32
  sa-patch analyze receptive --n 128K --methods sa:256,swa:256 --depth 6
  sa-patch analyze graph --layers 4
  sa-patch analyze propositions --windows 16,64
  sa-patch analyze cost --methods "full,sa:256,block_topk:4;34;4;16"
  sa-patch analyze attention smollm2-135m "The sea is wide." --layer 10 --head 3
  sa-patch analyze model-graph smollm2-135m --methods "full,swa:32,sinks:4+swa:28"

Each writes its numbers with their provenance (JSON) and a figure (PNG and SVG) into --out.
exit status: 0; 2 if the request is wrong; 130 interrupted.
"""


def with_examples(parser: argparse.ArgumentParser, examples: str) -> argparse.ArgumentParser:
    """The parser, with its examples below the options."""
    parser.epilog = examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser
