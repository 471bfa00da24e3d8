"""Print what benchmarks/bench_*.py wrote: median times and their ratio, one line for each case.

Each file holds {"cases": [...], ...}. A case holds its options (words and whole numbers), the seconds of every
run as lists named NAME_s, and `ratio_of_medians`: how many times as fast as its reference the library is.
"""

import json
import statistics
import sys
from pathlib import Path


def line(name: str, case: dict) -> tuple[str, str, str, str]:
    "Benchmark, options, times and ratio of one case."
    options = ", ".join(f"{k}={v}" for k, v in case.items() if v is None or isinstance(v, str | int))
    runs = {k[:-2]: v for k, v in case.items() if k.endswith("_s") and isinstance(v, list)}
    times = ", ".join(f"{k} {statistics.median(v):.3g} s" for k, v in runs.items())
    return name, options, times, f"{case['ratio_of_medians']:.1f}"


def main(paths: list[str]) -> int:
    table = [("benchmark", "case", "median time", "times as fast")]
    for path in map(Path, paths):
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        table += [line(path.stem, case) for case in cases]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
