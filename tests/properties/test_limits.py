"""What docs/exam.md says is known to be missing: a test that fails here is good news, and its line there goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detoracle.properties.checking import cases
from detoracle.properties.comparison import expect
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.outputs import perform
from detoracle.properties.systems import find_operation


def found_wrong(name: str, call: Callable[..., Tensor]) -> set[str]:
    """Scenes of the catalogue on which a callable is called wrong."""
    system, operation = find_operation(name)
    asked = [(scene.name, case.arguments) for scene in edge_cases() for case in cases(system, operation, scene)]
    return {
        scene
        for scene, arguments in asked
        if expect(system, operation, arguments).judge(perform(operation, call, arguments)).wrong
    }


@pytest.mark.parametrize(("least", "caught"), [(3.9e-5, False), (1e-3, True)])
def test_an_ssd_union_clamped_below_the_smallest_prior_escapes(least: float, caught: bool) -> None:
    def clamped(*, boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
        corners = boxes_a[:, None], boxes_b[None]
        low, high = torch.maximum(*(c[..., :2] for c in corners)), torch.minimum(*(c[..., 2:] for c in corners))
        intersection = (high - low).clamp(min=0).prod(-1)
        areas = [(c[..., 2:] - c[..., :2]).prod(-1) for c in corners]
        return intersection / (areas[0] + areas[1] - intersection).clamp(min=least)

    assert bool(found_wrong("ssd.jaccard", clamped)) == caught
