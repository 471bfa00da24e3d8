"""Time exact leave-group-out ridge against scikit-learn's GridSearchCV, side by side in one process.

python benchmarks/bench_decoding.py --out FILE.json

Both choose a ridge penalty from 9 by 5 folds of groups: 600 rows, 1200 features, 12 targets, float64. The
library decomposes the features once and leaves folds out by an identity; scikit-learn fits 45 times. Nested
choice (the penalty for each test fold from the other folds) is timed against five such searches. Both run in
turn, `--repeats` times; the ratio is that of the medians. himalaya's kernel ridge is timed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import numpy as np
from himalaya.kernel_ridge import KernelRidgeCV
from side_by_side import timed
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from cortexlit.core import provenance, rng, write_json
from cortexlit.evaluation.decoding import decompose, leave_group_out, nested_ridge

ROWS, FEATURES, TARGETS, FOLDS = 600, 1200, 12, 5
PENALTIES = np.geomspace(1e1, 1e5, 9)


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Features, targets, and folds of whole groups (120 concepts, five rows each)."
    generator = rng(0, "bench_decoding")
    features = generator.normal(size=(ROWS, FEATURES))
    targets = features[:, :40] @ generator.normal(size=(40, TARGETS)) + 10 * generator.normal(
        size=(ROWS, TARGETS)
    )
    folds = generator.permutation(np.arange(120) % FOLDS)[np.arange(ROWS) % 120]
    return features, targets, folds


def search(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> GridSearchCV:
    "scikit-learn's search without the final fit."
    return GridSearchCV(
        Ridge(),
        {"alpha": PENALTIES},
        cv=PredefinedSplit(folds),
        scoring="neg_mean_squared_error",
        refit=False,
    ).fit(features, targets)


def himalaya_search(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> np.ndarray:
    "The same choice by himalaya's kernel ridge."
    model = KernelRidgeCV(alphas=PENALTIES, cv=PredefinedSplit(folds))
    return model.fit(features - features.mean(0), targets - targets.mean(0)).cv_scores_


def compare(nested: bool, repeats: int) -> dict[str, object]:
    "Both ways on the same arrays."
    features, targets, folds = problem()

    def library() -> np.ndarray:
        if nested:
            return nested_ridge(decompose(features), targets, folds, PENALTIES).predictions
        return np.square(leave_group_out(decompose(features), targets, folds, PENALTIES) - targets).mean(
            (1, 2)
        )

    def reference() -> np.ndarray:
        if not nested:
            return -search(features, targets, folds).cv_results_["mean_test_score"]
        out = np.empty(targets.shape)  # one penalty for all targets: scikit-learn has no other with groups
        for fold in range(FOLDS):
            rest = folds != fold
            inner = np.unique(folds[rest], return_inverse=True)[1]
            best = search(features[rest], targets[rest], inner).best_params_["alpha"]
            out[~rest] = Ridge(alpha=best).fit(features[rest], targets[rest]).predict(features[~rest])
        return out

    library()
    library_s, reference_s, himalaya_s = [], [], []
    for _ in range(repeats):
        seconds, expected = timed(reference)
        reference_s.append(seconds)
        for _ in range(3):
            seconds, found = timed(library)
            library_s.append(seconds)
        if not nested:
            himalaya_s.append(timed(lambda: himalaya_search(features, targets, folds))[0])
    case: dict[str, object] = {
        "what": "penalty for each test fold and target" if nested else "error of every penalty",
        "rows": ROWS,
        "features": FEATURES,
        "targets": TARGETS,
        "penalties": len(PENALTIES),
        "folds": FOLDS,
        "gridsearch_s": reference_s,
        "library_s": library_s,
        "ratio_of_medians": statistics.median(reference_s) / statistics.median(library_s),
    }
    if not nested:
        case["largest_relative_difference"] = float(np.abs(found / expected - 1).max())
    if himalaya_s:
        case["himalaya_s"] = himalaya_s
    return case


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of scikit-learn (3 of the library's to each)"
    )
    args = parser.parse_args()
    cases = [compare(False, args.repeats), compare(True, max(1, args.repeats // 2))]
    extra = {"omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    write_json(args.out, {"cases": cases, "provenance": provenance(**extra)})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if not k.endswith("_s")}))


if __name__ == "__main__":
    main()
