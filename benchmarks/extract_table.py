"""results/extract.md from what benchmarks/extract.py measured."""

import statistics


def report(results: list[dict], rank: int) -> str:
    """Everything that was measured, on CPUs and on GPUs."""
    lines = ["# Making a direction: time, memory, size\n", f"`python -m benchmarks.extract`, rank {rank}."]
    for device, text in (
        ("cpu", "On a CPU: {}, which did other things too (so processor time stands beside the wall's); every process "
         "on one thread."),
        ("cuda", "On a GPU (`--device cuda`): {}. All but reading computes on the GPU; this reads files that were "
         "just read."),
    ):  # fmt: skip
        mine = [found for found in results if found["device"] == device]
        if mine:
            lines += ["", text.format("; ".join(sorted({found["machine"] for found in mine}))), *_times(mine), ""]
            lines += _memory(mine)
    return "\n".join([*lines, *_sizes(results, rank), "", NOTES, ""])


def _times(results: list[dict]) -> list[str]:
    lines = [
        "\n| shapes of | pair | clock | this | full-SVD loop | ratio | authors' way | reading both | this / reading |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in results:
        for clock, word in (("seconds", "wall"), ("processor", "processor")):
            if word == "processor" and found["device"] == "cuda":
                continue  # it waits there
            took = found[clock]
            lines.append(
                f"| {found['title']}, {found['layers']} layers | {found['pair'] / 1e9:.1f} GB | {word} | "
                f"{_seconds(took['ours'])} | {_seconds(took['svd'])} | {took['svd'] / took['ours']:.1f} | "
                f"{_seconds(took['authors'])} | {took['reading']:.1f} s | {_times_as_much(took)} |"
            )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _times_as_much(took: dict) -> str:
    ratio = took["ours"] / took["reading"]
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _memory(results: list[dict]) -> list[str]:
    on_gpu = any(found["device"] == "cuda" for found in results)
    lines = [
        "| shapes of | peak memory of this | of which Python and torch | of the full-SVD loop | authors' way keeps |"
        + " on the GPU |" * on_gpu,
        "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * on_gpu,
    ]
    for found in results:
        lines.append(
            f"| {found['title']} | {found['peak'] / 2**20:.0f} MiB | {found['imports'] / 2**20:.0f} MiB | "
            f"{found['svd_peak'] / 2**20:.0f} MiB | {found['authors_memory'] / 2**30:.1f} GiB |"
            + (f" {found['on_gpu'] / 2**20:.0f} MiB |" if on_gpu else "")
        )
    return lines


def _sizes(results: list[dict], rank: int) -> list[str]:
    lines = [
        f"\n| shapes of | U at rank {rank} | U and V | 1 % tolerance, at most 256 | directions then | bound then |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in results:
        if "one_percent" in found:
            ranks, bounds = found["one_percent"]["ranks"], found["one_percent"]["bounds"]
            lines.append(
                f"| {found['title']} | {found['U'] / 1e6:.0f} MB | {found['UV'] / 1e6:.0f} MB | "
                f"{found['tolerance'] / 1e6:.0f} MB | {min(ranks)} to {max(ranks)}, median "
                f"{statistics.median(ranks):.0f} | {max(bounds):.2g} |"
            )
    return lines


NOTES = """\
- this: `extract_direction(..., output=...)`, from opening the checkpoints to the verified file. Of the 7B model one
  decoder layer was made and multiplied by 32, on a GPU eight and by 4; of the others all layers.
- full-SVD loop: load, subtract, `torch.linalg.svd`, keep the leading ones; one matrix of every shape, multiplied by how
  many there are.
- authors' way: both models in memory in fp32, and d d^T / ||d|| of every matrix; one decoder layer, multiplied. What it
  keeps is counted, not measured: two fp32 copies and an out x out matrix for each.
- reading both: once, from disk, not from the operating system's cache.
- peak memory: the most that the process had resident, with the pages of the checkpoints that are mapped at the time.
- at the shapes of SmolLM2-135M every decomposition is exact (smaller side up to 1536), as the loop's."""
