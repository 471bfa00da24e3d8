"""Print what benchmarks/bench_*.py wrote: median times and their ratio, one line for each case.

Each file holds {"cases": [...], ...}. A case holds its options (words and whole numbers), the seconds of every
run as lists named NAME_s, and `ratio_of_medians`: how many times as fast as its reference the library is. It may
hold rates named NAME_per_s, `extra_mib` and `ratio_of_memory`: how many times less memory it takes than the reference.
A file whose cases have no such ratio holds no timings, and is named below the table.
"""

import json
import statistics
import sys
from pathlib import Path

HEAD = ("benchmark", "case", "median time", "rate", "extra memory (times less)", "times as fast")


def line(name: str, case: dict) -> tuple[str, ...]:
    "One case under `HEAD`."
    options = ", ".join(f"{k}={v}" for k, v in case.items() if v is None or isinstance(v, str | int))
    runs = {k[:-2]: v for k, v in case.items() if k.endswith("_s") and isinstance(v, list)}
    times = ", ".join(f"{k} {statistics.median(v):.3g} s" for k, v in runs.items())
    rates = ", ".join(
        f"{v:.4g} {k.removesuffix('_per_s')}/s" for k, v in case.items() if k.endswith("_per_s")
    )
    memory = (
        f"{case['extra_mib']:.0f} MiB ({case['ratio_of_memory']:.1f})" if "ratio_of_memory" in case else ""
    )
    return name, options, times, rates, memory, f"{case['ratio_of_medians']:.1f}"


def main(paths: list[str]) -> int:
    table, others = [HEAD], []
    for path in map(Path, paths):
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        timed = [case for case in cases if "ratio_of_medians" in case]
        table += [line(path.stem, case) for case in timed]
        if len(timed) < len(cases):
            others.append(f"{path.stem}: {len(cases) - len(timed)} cases are no timings")
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(*others, sep="\n", end="\n" * bool(others))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
