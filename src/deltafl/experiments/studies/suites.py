"""The studies by name."""

from collections.abc import Callable, Mapping
from typing import Any

from deltafl.experiments.studies.analogy import analogy
from deltafl.experiments.studies.data_heterogeneity import data_heterogeneity
from deltafl.experiments.studies.merging import Work
from deltafl.experiments.studies.negation import negation
from deltafl.experiments.studies.scaling_coef import scaling_coef
from deltafl.experiments.studies.study import Study
from deltafl.experiments.studies.training_heterogeneity import training_heterogeneity

STUDIES: Mapping[str, Callable[[Study, Work], dict[str, Any]]] = {
    "training-heterogeneity": training_heterogeneity,
    "data-heterogeneity": data_heterogeneity,
    "scaling-coef": scaling_coef,
    "negation": negation,
    "analogy": analogy,
}
