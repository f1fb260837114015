"""What keeps the DeepSpeed engine from a run is said before anything starts, with the setting and the fix."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from tests.support.cases import perturbed_model, small_run


def deepspeed_run() -> Run:
    small = small_run("fp32")
    return small.model_copy(update={"optim": small.optim.model_copy(update={"engine": "deepspeed"})})


def refusal(run: Run) -> str:
    model = perturbed_model(run, Mesh.single())
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    started = dist.is_initialized()
    with pytest.raises(UserError) as raised:
        make_engine(model, run, Mesh.single())
    # Nothing was started, and the model is as it was.
    assert dist.is_initialized() == started
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    return str(raised.value)


def test_a_missing_deepspeed_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    text = refusal(deepspeed_run())
    assert "does not import" in text
    assert "pip install deepspeed==0.19.8" in text


def test_a_broken_deepspeed_is_told_with_its_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('built for another torch')")
    assert "does not import (built for another torch)" in refusal(deepspeed_run())


def test_a_version_whose_insides_may_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.20.1"))
    text = refusal(deepspeed_run())
    assert "found 0.20.1" in text
    assert "pip install deepspeed==0.19.8" in text
