"""``sa-patch analyze``: the parsers of its subcommands, and what each of them calls.

As in `sa_patch.cli.command`, everything heavy is imported where it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_patch.cli.help_texts import ANALYZE_EXAMPLES
from sa_patch.errors import UserError

if TYPE_CHECKING:
    from sa_patch.analysis.reports.report import Report
    from sa_patch.patterns import Pattern

METHODS = "sa:32,swa:32,psa:32,sinks:4+swa:28,full"


def add_analyze(parser: argparse.ArgumentParser) -> None:
    """Give the parser of ``sa-patch analyze`` its subcommands."""
    parser.description = "Why a pattern behaves as it does, from its visibility graph."
    parser.epilog = ANALYZE_EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)

    own = _kind(kinds, "receptive", "receptive field against depth, and layers to full coverage")
    _add_methods(own, METHODS)
    _add_numbers(own, n="2048", depth="100", queries="256", draws="50", seed="0")

    own = _kind(kinds, "graph", "path lengths, clustering, small worlds, spectral gaps, mixing")
    _add_methods(own, METHODS)
    _add_numbers(own, n="2048", layers="8", sample="256", seed="0")
    own = _kind(kinds, "propositions", "what theory predicts of SA, checked by Monte Carlo")
    _add_numbers(own, n="2048", windows="8,16,32,64,128,256", draws="4000", coverage_draws="200")

    own = _kind(kinds, "cost", "attention FLOPs against length")
    _add_methods(own, "sa:256,swa:256,moba:window=256,block_topk:4;34;4;16,full")
    _add_numbers(own, n="1K,2K,4K,8K,16K,32K,64K,128K", head_dim="64", group="1")

    own = _kind(kinds, "attention", "a head's attention weights under each pattern")
    own.add_argument("model", help="hub id, folder, or smollm2-135m")
    own.add_argument("prompt", help="the text to read")
    _add_methods(own, "full,swa:16,sa:16,sinks:4+swa:8+sa:8")
    own.add_argument("--layer", type=int, required=True, help="counted from 0")
    own.add_argument("--head", type=int, required=True, help="query head, counted from 0")
    _add_loading(own)

    own = _kind(kinds, "model-graph", "a model's attention weights as graphs, beside its loss")
    own.add_argument("model", help="hub id, folder, or smollm2-135m")
    _add_methods(own, "full,swa:32,sa:32,psa:32,sinks:4+swa:28,sinks:4+moba:8;4")
    _add_numbers(own, n="256", sources="64", seed="0")
    own.add_argument("--layers", help="those to measure, such as 0,10,20-25 (default: all)")
    own.add_argument("--text", type=Path, help="a file to read (default: a module of Python's own)")
    _add_loading(own)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto: the weights' own; GGUF: float32")
    parser.add_argument("--gguf-file", help="a GGUF file's name in that folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


_MEANINGS = {
    "n": "tokens; K stands for 1,024",
    "depth": "layers at most",
    "queries": "how many the average is taken over",
    "layers": "layers laid on top of each other at most",
    "sample": "tokens from which paths are followed and around which triangles are counted",
    "windows": "windows of SA",
    "draws": "draws of SA's permutations that are averaged over",
    "coverage_draws": "stacks of layers behind each coverage depth",
    "head_dim": "width of a head",
    "group": "query heads that share a KV head",
    "sources": "tokens from which paths are followed",
    "seed": "of samples, random graphs, and random queries and keys; patterns have their own",
}


def _kind(kinds: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=purpose)
    parser.description = purpose[0].upper() + purpose[1:] + "."
    out = f"runs/analysis/{name}"
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"where to write (default: {out})"
    )
    parser.set_defaults(run=_run)
    return parser


def _add_methods(parser: argparse.ArgumentParser, value: str) -> None:
    parser.add_argument(
        "--methods",
        default=value,
        metavar="LIST",
        help="text forms of patterns between commas, ';' within one (default: %(default)s)",
    )


def _add_numbers(parser: argparse.ArgumentParser, **defaults: str) -> None:
    for name, value in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=value,
            metavar="LIST" if "," in value else "NUMBER",
            help=f"{_MEANINGS[name]} (default: %(default)s)",
        )


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from sa_patch.files.artifacts import check_folder, start_provenance, write_artifacts

    prepared = _PREPARE[options.analysis](options)
    check_folder(options.out)
    provenance = start_provenance(options.command_line)
    with Console(stderr=True).status("measuring"):
        report = prepared()
    table = Table(title=report.name, title_justify="left")
    # Numbers stay whole: a narrow screen folds the names of patterns.
    table.add_column(report.columns[0], overflow="fold", min_width=12)
    for column in report.columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        # A file or a pipe has no width that the table would have to be folded into.
        wide = console.options.update(max_width=400)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    if report.note:
        console.print(report.note)
    for path in write_artifacts(
        options.out, report.name, report.content, report.figure, provenance
    ):
        print(path)
    return 0


def _patterns(options: argparse.Namespace) -> list[Pattern]:
    from sa_patch.benchmark.arguments import split_names
    from sa_patch.patterns import parse_pattern

    found = [parse_pattern(text) for text in split_names(options.methods)]
    if not found:
        raise UserError("--methods names no pattern; give for example sa:32,swa:32")
    return list(dict.fromkeys(found))


def _number(options: argparse.Namespace, name: str) -> int:
    from sa_patch.benchmark.arguments import read_size

    return read_size(str(getattr(options, name)), f"--{name.replace('_', '-')}")


def _receptive(options: argparse.Namespace) -> Callable[[], Report]:
    from sa_patch.analysis.reports.receptive import check_receptive_report, receptive_report

    patterns = _patterns(options)
    n, depth, queries = (_number(options, name) for name in ("n", "depth", "queries"))
    draws, seed = _number(options, "draws"), _number(options, "seed")
    check_receptive_report(patterns, n, depth, queries, draws, seed)
    return lambda: receptive_report(patterns, n, depth, queries, draws, seed)


def _graph(options: argparse.Namespace) -> Callable[[], Report]:
    from sa_patch.analysis.reports.graph import check_graph_report, graph_report

    patterns = _patterns(options)
    n, layers, sample, seed = (_number(options, x) for x in ("n", "layers", "sample", "seed"))
    check_graph_report(patterns, n, layers, sample, seed)
    return lambda: graph_report(patterns, n, layers, sample, seed)


def _propositions(options: argparse.Namespace) -> Callable[[], Report]:
    from sa_patch.analysis.propositions import check_numbers
    from sa_patch.analysis.reports.propositions import propositions_report
    from sa_patch.benchmark.arguments import read_sizes

    windows = sorted(set(read_sizes(options.windows, "--windows")))
    n, draws, stacks = (_number(options, x) for x in ("n", "draws", "coverage_draws"))
    check_numbers(n, windows, draws, stacks)
    return lambda: propositions_report(n, windows, draws, stacks)


def _cost(options: argparse.Namespace) -> Callable[[], Report]:
    from sa_patch.analysis.cost import check_lengths
    from sa_patch.analysis.reports.cost import cost_report
    from sa_patch.benchmark.arguments import read_sizes

    patterns = _patterns(options)
    lengths = sorted(set(read_sizes(options.n, "--n")))
    head_dim, group = _number(options, "head_dim"), _number(options, "group")
    check_lengths(lengths, head_dim, group)
    return lambda: cost_report(patterns, lengths, head_dim, group)


def _attention(options: argparse.Namespace) -> Callable[[], Report]:
    from sa_patch.analysis.attention_maps import check_tokens, head_inputs
    from sa_patch.analysis.prompt import prepare_prompt
    from sa_patch.analysis.reports.attention import attention_report

    patterns = _patterns(options)
    prompt = prepare_prompt(
        options.model,
        options.prompt,
        layer=options.layer,
        head=options.head,
        dtype=options.dtype,
        gguf_file=options.gguf_file,
        revision=options.revision,
    )

    check_tokens(prompt.tokens.shape[1])

    def measure() -> Report:
        model = prompt.load()
        inputs = head_inputs(model, prompt.tokens.to(model.device), options.layer)
        about = {
            "model": options.model,
            "model_identity": prompt.identity,
            "dtype": str(model.dtype).removeprefix("torch."),
            "prompt": options.prompt,
        }
        return attention_report(inputs, patterns, options.layer, options.head, about)

    return measure


def _model_graph(options: argparse.Namespace) -> Callable[[], Report]:
    from sa_patch.analysis.model_graph import check_graph_request, measure_head_graphs
    from sa_patch.analysis.prompt import prepare_text
    from sa_patch.analysis.reports.model_graph import model_graph_report
    from sa_patch.analysis.seeds import check_seed
    from sa_patch.models.layer_check import layer_count
    from sa_patch.patching.layers import parse_layers

    patterns = _patterns(options)
    n, sources, seed = (_number(options, name) for name in ("n", "sources", "seed"))
    check_seed(seed)
    prompt = prepare_text(
        options.model,
        options.text,
        n,
        dtype=options.dtype,
        gguf_file=options.gguf_file,
        revision=options.revision,
    )
    count = layer_count(prompt.source)
    # A configuration that does not say is left to the model itself.
    available = None if count is None else range(count)
    layers = available if options.layers is None else sorted(parse_layers(options.layers))
    check_graph_request(prompt.tokens.shape[1], layers, sources, available)

    def measure() -> Report:
        model = prompt.load()
        tokens = prompt.tokens.to(model.device)
        found = [
            measure_head_graphs(model, tokens, pattern, layers, sources=sources, seed=seed)
            for pattern in patterns
        ]
        about = {
            "model": options.model,
            "model_identity": prompt.identity,
            "dtype": str(model.dtype).removeprefix("torch."),
            "text": str(options.text or "a module of Python's standard library"),
            "n": n,
            "sources": sources,
            "seed": seed,
        }
        return model_graph_report(found, about)

    return measure


_PREPARE: dict[str, Callable[[argparse.Namespace], Callable[[], Report]]] = {
    "receptive": _receptive,
    "graph": _graph,
    "propositions": _propositions,
    "cost": _cost,
    "attention": _attention,
    "model-graph": _model_graph,
}
