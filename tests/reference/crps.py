r"""Writes crps.json: fair CRPSs of small ensembles by scoringrules, which the tests compare with.

pip install scoringrules==0.10.0 && python crps.py
"""

import json
from pathlib import Path

import numpy as np
import scoringrules

rng = np.random.default_rng(0)
cases = []

for members in (2, 3, 8, 17):
    x = rng.normal(0.5, 2.0, (members, 5)).round(3)
    x[1, 0] = x[0, 0]  # a tie,
    truth = rng.normal(0.0, 1.0, 5).round(3)
    truth[1] = x[1, 1]  # a hit,
    truth[2] = 100.0  # and an outlier
    scores = scoringrules.crps_ensemble(truth, x, m_axis=0, estimator="fair", backend="numpy")
    cases.append({"x": x.tolist(), "truth": truth.tolist(), "crps": scores.tolist()})

lines = ",\n".join(map(json.dumps, cases))
Path(__file__).with_name("crps.json").write_text(f"[\n{lines}\n]\n")
