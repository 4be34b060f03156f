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

# The client's warm-up, of zeros; the published slabs of a package, to compare; the benchmarks' own.
OTHERS = {"inference/triton.py", "models_cli.py", "bench/latency.py", "bench/model.py"}


def calls(name: str) -> set[str]:
    """The files of the box that name an attribute so, called or handed on, or write its name for getattr."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr == name
            if named or (isinstance(node, ast.Constant) and node.value == name):
                found.add(path.relative_to(SOURCE).as_posix())
    return found


def test_only_the_pipeline_asks_the_client_for_a_study() -> None:
    assert calls("infer") - OTHERS == {"inference/stream.py"}


def test_nothing_but_the_client_knows_a_server_or_runs_a_model() -> None:
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            modules = names if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""] if names else []
            for module in modules:
                if module.split(".")[0] in ("tritonclient", "onnxruntime", "tensorrt", "torch"):
                    found.setdefault(path.relative_to(SOURCE).as_posix(), set()).update({module, *names})
    assert found.pop("inference/triton.py") >= {"tritonclient.grpc"}
    # Of a configuration it only knows the form.
    assert found.pop("inference/served.py") == {"tritonclient.grpc", "model_config_pb2"}
    assert set(found) <= {"inference/plan.py", "inference/server.py"}, found


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
