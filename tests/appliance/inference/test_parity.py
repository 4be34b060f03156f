"""A package's own slabs, asked for again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.governance.package import PARITY, Package, PackageError, Parity
from appliance.inference import parity
from appliance.inference.parity import check_parity
from appliance.inference.preprocess import window
from appliance.inference.triton import Output, TritonClient

from .conftest import Server, seeing

SEEN = [(0, 0, 1), (0, 1, 2), (1, 2, 2)]


def answer(slabs: NDArray[np.float32]) -> Output:
    """Stands for a model that says the mean of what it sees."""
    means = slabs.mean(axis=(1, 2, 3))
    return Output(np.repeat(means[:, None], 6, axis=1), np.broadcast_to(means[:, None, None], (len(means), 64, 64)))


@pytest.fixture
def published(reference: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package whose model sees neighbours, with what `answer` says of three slabs."""
    fields = np.random.default_rng(1).integers(-20, 90, (3, 256, 256)).astype(np.int16)
    windows = [window(field.astype(np.float32)) for field in fields]
    said = answer(np.stack([np.concatenate([windows[n] for n in one]) for one in SEEN]))
    path = tmp_path / PARITY
    np.savez(path, fields=fields, probabilities=said.probabilities, lesion_map=said.lesion_map[:, None])
    monkeypatch.setattr(parity, "verify", lambda package, name: (package.folder / name).read_bytes())
    package = replace(
        seeing(reference, 1), parity=Parity(0.01), files={**reference.files, PARITY: "sha256:" + 64 * "0"}
    )
    return replace(package, folder=tmp_path)


def test_the_published_model_agrees_with_itself(published: Package) -> None:
    found = check_parity(published, answer)
    assert (found.slabs, found.tolerance, found.holds) == (3, 0.01, True)
    assert max(found.probability, found.lesion_map) < 1e-6


@pytest.mark.parametrize("where", ["probabilities", "lesion_map"])
@pytest.mark.parametrize("off", [0.02, np.nan])
def test_another_model_is_found(published: Package, where: str, off: float) -> None:
    def other(slabs: NDArray[np.float32]) -> Output:
        said = answer(slabs)
        changed = np.array(getattr(said, where))
        changed[-1].flat[-1] += off
        return replace(said, **{where: changed})

    found = check_parity(published, other)
    assert not found.holds
    place = "subdural of slab 2" if where == "probabilities" else "row 63, column 63 of the lesion map of slab 2"
    assert f"most in {place}; 0.01 is allowed" in str(found)


@pytest.mark.parametrize("lost", ["fields", "probabilities", "lesion_map"])
def test_vectors_that_are_not_there_are_named(published: Package, lost: str) -> None:
    with np.load(published.folder / PARITY) as stored:
        kept = {key: stored[key] for key in stored.files if key != lost}
    np.savez(published.folder / PARITY, **kept)
    with pytest.raises(PackageError, match="does not hold the slabs") as told:
        check_parity(published, answer)
    assert told.value.where.endswith(PARITY)


def test_a_package_without_vectors_says_so(published: Package) -> None:
    with pytest.raises(PackageError, match="no parity vectors"):
        check_parity(replace(published, parity=None, files={"model.onnx": published.files["model.onnx"]}), answer)


@pytest.mark.interop
def test_a_real_server_serves_the_published_model(triton_server: Server, reference: Package) -> None:
    with TritonClient(triton_server.url) as client:
        assert check_parity(reference, lambda slabs: client.infer(reference, slabs)).holds
