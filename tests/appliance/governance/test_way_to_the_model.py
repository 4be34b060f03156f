"""There is one way to a model for a study, and an admission stands in it."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any, cast, get_args

import pytest

import appliance
from appliance.governance.indication import CRITERIA, Admission, Criterion, Outcome
from appliance.governance.package import load_configured
from appliance.inference.stream import Pipeline
from appliance.settings import Settings

SOURCE = Path(appliance.__file__).parent

# The client's warm-up, of zeros; the published slabs of a package, to compare; the benchmark's own.
OTHERS = {"inference/triton.py", "models_cli.py", "bench/latency.py"}


def calls(name: str) -> set[str]:
    """The files of the box that call something of that name."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                found.add(path.relative_to(SOURCE).as_posix())
    return found


def test_only_the_pipeline_asks_the_client_for_a_study() -> None:
    assert calls("infer") - OTHERS == {"inference/stream.py"}


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_the_pipeline_lets_through_what_further_slices_can_still_mend_and_nothing_else(outcome: Outcome) -> None:
    (package,) = load_configured(Settings())
    pipeline = Pipeline(cast(Any, None))
    try:
        for wrong in CRITERIA:
            admission = Admission(tuple(
                Criterion(name, "", "", "", outcome if name == wrong else "met") for name in CRITERIA
            ))  # fmt: skip
            passes = outcome in ("met", "excepted") or wrong in ("coverage", "slabs", "gaps", "spacing")
            assert admission.promising is passes
            if passes:
                continue
            with pytest.raises(ValueError, match="was not admitted"):
                ask(pipeline, package, admission)
        with pytest.raises(ValueError, match="was not admitted"):
            ask(pipeline, package, Admission(()))
    finally:
        pipeline.close()


def ask(pipeline: Pipeline, package: Any, admission: Admission) -> None:
    pipeline.ask(package, admission, [], owner=1, urgency=1)


def test_one_criterion_that_is_not_met_refuses_whatever_the_others_are() -> None:
    for outcomes in itertools.product(get_args(Outcome), repeat=3):
        admission = Admission(tuple(Criterion(str(n), "", "", "", one) for n, one in enumerate(outcomes)))
        assert admission.admitted == (set(outcomes) <= {"met", "excepted"})
        assert bool(admission.reason) == bool(admission.said) == (not admission.admitted)
    assert not Admission(()).admitted
