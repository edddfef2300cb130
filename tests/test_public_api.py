"""What `import deltafl` promises."""

import deltafl
from deltafl.algebra import aggregate
from deltafl.merge import task_vector

PUBLIC = "Source TaskVector Update __version__ aggregate cclip fedavg fedgma fednova median step task_arithmetic"


def test_the_public_names_are_these_and_no_more():
    assert sorted(deltafl.__all__) == PUBLIC.split()
    assert dir(deltafl) == deltafl.__all__
    assert not hasattr(deltafl, "task_vector")
    held: dict[str, object] = {}
    exec("from deltafl import *", held)
    assert held.keys() >= {*deltafl.__all__}
    homes = vars(task_vector) | {name: vars(aggregate)[name] for name in ("aggregate", "step")}
    assert all(held[name] is homes[name] for name in {*deltafl.__all__} - {"__version__"})
