"""Markdown tables of a results file. Every time is a median; the noise is how far the two rounds of ours lay apart."""

from __future__ import annotations

from typing import Any

from bench.harness import results

Cases = dict[str, dict[str, Any]]
CLOCKS = {
    "device_us": "device time, a graph of calls on cold inputs",
    "stream_us": "eager calls on the device, gaps included",
    "cpu_us": "processor time of one thread",
    "wall_us": "wall time",
}
EAGER = "stream_us"  # the one metric that every variant of prune_sequence has on a GPU
OURS = ("ours", "ours static", "ours one launch", "ours overlapped", "ours, cuda")
COMPILED = ("literal compiled", "folded compiled")


def summary(content: dict[str, Any]) -> str:
    """Parts and cases in a few lines, for a terminal."""
    lines = [f"{name}: {part['status']}, {part['summary']}" for name, part in content["parts"].items()]
    return "\n".join([*lines, "", blocks(content)])


def blocks(content: dict[str, Any]) -> str:
    """All tables of a file: one block for each number of threads (a GPU has one block)."""
    groups: dict[str, Cases] = {}
    for key, case in content["cases"].items():
        name, _, threads = key.partition("@")
        if "error" not in case:
            groups.setdefault(threads, {})[name] = case
    return "\n\n".join(block(content, groups[threads]) for threads in sorted(groups)) or "Nothing measured yet."


def block(content: dict[str, Any], cases: Cases) -> str:
    """Caption; the two ops that read V (on a GPU prune_sequence in eager calls), the two that do not; decode."""
    run = content["runs"][next(iter(cases.values()))["run"]]
    gpu = run["environment"]["type"] == "cuda"
    scale, unit = (1.0, "us") if gpu else (1e-3, "ms")
    tables = [scoring_table(cases, scale), moving_table(cases, scale), *decode_tables(cases, scale)]
    tables += [caller_table(cases)] if gpu else []
    return "\n\n".join([caption(content, cases, unit), *(table for table in tables if table.count("\n") > 1)])


def caption(content: dict[str, Any], cases: Cases, unit: str) -> str:
    runs = [content["runs"][number] for number in sorted({case["run"] for case in cases.values()})]
    place, ceiling = runs[-1]["environment"], runs[-1]["ceiling"]
    loads = sorted({run["environment"]["load"] for run in runs})
    load = " to ".join(str(value) for value in loads[:: max(len(loads) - 1, 1)])  # lowest and highest
    software = ", ".join(f"{name} {place[name]}" for name in ("torch", "triton", "transformers") if place[name])
    machine = (
        f"driver {place['driver']}" if place["type"] == "cuda" else f"{place['threads']} of {place['cores']} cores"
    )
    clock = CLOCKS[next(iter(cases.values()))["variants"]["ours"]["primary"]]
    commits = ", ".join(sorted({run["environment"]["commit"] for run in runs}))
    return (
        f"{place['device']}, {machine}, {software}, commit {commits}, {place['time'][:10]}; load {load} when started; "
        f"a large copy moved {ceiling['copy_gbs']} GB/s. Medians in {unit} of {clock}.\n`{runs[-1]['command']}`"
    )


def scoring_table(cases: Cases, scale: float) -> str:
    head = ("size", "dtype", "score_tokens", "literal eager", "folded eager", "torch.compile", "noise",
            "prune_sequence", "literal eager", "folded slices", "noise")  # fmt: skip
    rows = []
    for key, score in cases.items():
        op, shape, dtype = key.split("/")
        prune = cases.get(f"prune_sequence/{shape}/{dtype}")
        if op == "score_tokens":
            row = [shape, dtype, *(cell(score, name, scale) for name in ("ours", "literal eager", "folded eager"))]
            row += [best(score, COMPILED, scale), noise(score)]
            row += [cell(prune, name, scale, EAGER) for name in ("ours", "literal eager", "folded slices")]
            rows.append([*row, noise(prune)])
    return markdown(head, rows)


def moving_table(cases: Cases, scale: float) -> str:
    head = ("size", "dtype", "gather_rows", "indexing", "torch.gather", "copy of K rows", "noise",
            "select_tokens", "topk and sort", "stable sort", "noise")  # fmt: skip
    rows = []
    for key, gather in cases.items():
        op, shape, dtype = key.split("/")
        select = cases.get(f"select_tokens/{shape}/float32")
        if op == "gather_rows":
            names = ("ours", "indexing", "torch.gather", "copy of K rows")
            row = [shape, dtype, *(cell(gather, name, scale) for name in names), noise(gather)]
            row += [cell(select, name, scale) for name in ("ours", "topk and sort", "stable sort")]
            rows.append([*row, noise(select)])
    return markdown(head, rows)


def decode_tables(cases: Cases, scale: float) -> list[str]:
    """One step's attention without and with scores; the eviction of a quarter of the slots in all layers; other
    methods' ops."""
    plain = ("ours", "ours, any slots", "SDPA flash", "SDPA flash, packed", "SDPA cuDNN", "SDPA cuDNN, packed",
             "SDPA math", "FlexAttention", "flash-attn")  # fmt: skip
    scored = ("ours", "ours, no scores", "ours, any slots", "ours, from lse", "eager")
    moved = ("ours", "hole-fill by layer", "gathers")
    tables = []
    columns: dict[str, tuple[str, ...]] = {"attend": plain, "attend_scores": scored, "move_slots": moved}
    columns |= dict.fromkeys(("attention_column_sums", "cosine_matrix"), ("ours", "eager"))
    columns |= dict.fromkeys(("farthest_points", "dpp_map", "drop_similar"), ("ours", "reference"))
    for op, known in columns.items():
        found = {key: case for key, case in cases.items() if key.split("/")[0] == op}
        names = tuple(name for name in known if any(name in case["variants"] for case in found.values()))
        rows = []
        for key, case in found.items():
            cells = [cell(case, name, scale) for name in names]
            rows.append([*key.split("/")[1:], *cells, noise(case), str(case["variants"]["ours"]["gbs"])])
        tables.append(markdown((f"{op}: size", "dtype", *names, "noise", "GB/s"), rows))
    return tables


def caller_table(cases: Cases) -> str:
    """Our ops on a GPU: device time on cold and on warm inputs, eager calls with their gaps, and the host's share."""
    metrics = ("device_us", "warm_us", "stream_us", "caller_us")
    rows = []
    for key, case in cases.items():
        copy: dict[str, Any] = next((entry for name, entry in case["variants"].items() if name.startswith("copy")), {})
        op, *size = key.split("/")
        for name in OURS:
            ours = case["variants"].get(name)
            if ours is not None and "primary" in ours:
                times = [format(ours[metric]["median"], ".1f") if metric in ours else "-" for metric in metrics]
                label = op + name.removeprefix("ours")
                rows.append([label, *size, *times, str(ours["gbs"]), str(copy.get("gbs", "-"))])
    head = ("op", "size", "dtype", *metrics, "GB/s", "copy of the same size, GB/s")
    return markdown(head, rows)


def cell(case: dict[str, Any] | None, name: str, scale: float, metric: str = "") -> str:
    """The time of a variant by ``metric`` where it has that, else by its primary one."""
    variant = {} if case is None else case["variants"].get(name, {})
    value = variant[metric]["median"] if metric in variant else results.time_us(variant)
    return "-" if value is None else digits(value * scale)


def best(case: dict[str, Any], names: tuple[str, ...], scale: float) -> str:
    times = [results.time_us(case["variants"][name]) for name in names if name in case["variants"]]
    return min((digits(time * scale) for time in times if time is not None), key=float, default="-")


def noise(case: dict[str, Any] | None) -> str:
    return "-" if case is None else f"{results.spread(case['variants']['ours']):.0%}"


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def generate_blocks(content: dict[str, Any]) -> str:
    """End-to-end results: a caption and a table for each model and batch."""
    blocks = []
    head = ("keep", "prompt tokens", "time to first token, ms", "range", "merge, ms", "prune, ms",
            "prune / prefill", "K/V, MiB", "peak memory, MiB", "new tokens/s")  # fmt: skip
    for key, case in content["cases"].items():
        run = content["runs"][case["run"]]
        place = run["environment"]
        software = ", ".join(f"{name} {place[name]}" for name in ("torch", "transformers"))
        machine = f"driver {place['driver']}" if place["type"] == "cuda" else f"{place['threads']} threads"
        caption = (
            f"{key}, random weights; {place['device']}, {machine}, {software}, commit {place['commit']}, "
            f"{place['time'][:10]}, load {place['load']} when started; medians of {case['rounds']} rounds in turn.\n"
            f"`{run['command']}`"
        )
        rows = []
        for ratio, row in case["ratios"].items():
            low, high = (digits(value) for value in row["first_token_range_ms"])
            rows.append([ratio, str(row["tokens"]), digits(row["first_token_ms"]), f"{low} to {high}"])
            if float(ratio) < 1:
                shares = [digits(row["merge_ms"]), digits(row["prune_ms"]), f"{row['prune_share_of_prefill']:.2%}"]
            else:
                shares = ["-"] * 3  # nothing of ours runs
            rows[-1] += [*shares, str(row["kv_mib"]), digits(row["peak_mib"]), digits(row["tokens_per_second"])]
        blocks.append(f"{caption}\n\n{markdown(head, rows)}")
    return "\n\n".join(blocks) or "Nothing measured yet."
