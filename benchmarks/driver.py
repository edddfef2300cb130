"""Time one merge after all imports, in one process: python driver.py OUT BASE MODEL..."""

import json
import os
import sys
import time

import torch

from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge

out, base, *models = sys.argv[1:]
before = time.perf_counter()
plan = plan_merge(MergeRecipe.of(base=base, models=models, scaling_coef=0.3))
planned = time.perf_counter()
sync, synced = os.fsync, [0.0]


def timed_fsync(handle: int) -> None:
    started = time.perf_counter()
    sync(handle)
    synced[0] += time.perf_counter() - started


os.fsync = timed_fsync
run_merge(plan, out)
done = time.perf_counter()
print(
    json.dumps(
        {
            "seconds": done - before,
            "plan": planned - before,
            "fsync": synced[0],
            "torch": torch.__version__,
        }
    )
)
