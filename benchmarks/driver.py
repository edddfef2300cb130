"""Time one merge after all imports, in one process: python driver.py OUT BASE MODEL..."""

import json
import sys
import time

from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge

out, base, *models = sys.argv[1:]
started = time.perf_counter()
run_merge(plan_merge(MergeRecipe.of(base=base, models=models, scaling_coef=0.3)), out)
print(json.dumps({"seconds": time.perf_counter() - started}))
