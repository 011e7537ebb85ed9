from __future__ import annotations

import pickle

import pytest

from detoracle.reference.errors import DetoracleError, InputError, UpstreamRaises


@pytest.mark.parametrize("kind", [DetoracleError, InputError, UpstreamRaises])
def test_an_error_says_what_where_and_what_to_do(kind: type[DetoracleError]) -> None:
    error = kind("gt_boxes", expected="a", got="b", where="yolox.assign", fix="Do this.")
    assert str(error) == "yolox.assign: gt_boxes: expected a, got b. Do this."
    assert str(kind("gt_boxes", expected="a", got="b")) == "gt_boxes: expected a, got b."
    assert (error.what, error.expected, error.got, error.where, error.fix) == (
        "gt_boxes",
        "a",
        "b",
        "yolox.assign",
        "Do this.",
    )


@pytest.mark.parametrize("kind", [DetoracleError, InputError, UpstreamRaises])
def test_an_error_crosses_a_process_boundary(kind: type[DetoracleError]) -> None:
    error = kind("gt_boxes", expected="a", got="b", where="c", fix="d")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_bad_input_is_a_value_error_and_a_named_behaviour_is_not() -> None:
    assert issubclass(InputError, ValueError)
    assert not issubclass(UpstreamRaises, ValueError)
    assert UpstreamRaises("yolox.a", expected="b", got="c").behaviour == "yolox.a"
