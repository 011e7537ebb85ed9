"""The pytest plugin at an adopter's: one test a clause, and none where nobody asked."""

from __future__ import annotations

import sys

import pytest

from detoracle.clause_tests import clauses_named
from detoracle.properties.edge_cases import edge_cases
from detoracle.properties.scenefile import read_scene

pytest_plugins = ["pytester"]

STRANGER = """
from detoracle.reference import yolox

right = yolox.decode

def wrong(raw, strides):
    return right(raw, strides) * 2

def wrong_without_ground_truths(raw, strides):
    return wrong(raw, strides) if raw[0].shape[0] > 1 else right(raw, strides)

def raises(**_):
    raise RuntimeError("on purpose")
"""
CLAUSES = len(clauses_named("yolox.decode"))
DECODE = "--detoracle=yolox.decode=stranger:"


@pytest.fixture
def adopter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with callables and strict settings; ten scenes of the catalogue and three random ones, for speed."""
    pytester.makepyfile(stranger=STRANGER)
    pytester.makeini(
        "[pytest]\npythonpath = .\nfilterwarnings = error\nxfail_strict = true\n"
        "addopts = --strict-markers --strict-config --detoracle-examples=3 -p no:cacheprovider\n"
    )
    monkeypatch.setattr("detoracle.clause_tests.edge_cases", lambda: edge_cases()[:10])
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return pytester


def known(
    adopter: pytest.Pytester, clause: str, expires: str = "2999-01-31", scene: str = "*", setting: str = "*"
) -> str:
    where = f'clause="{clause}"\nscene="{scene}"\nsetting="{setting}"\n'
    text = f'{where}reason="ties"\nlink="ours/17"\nexpires={expires}\n'
    (adopter.path / "known.toml").write_text(f"[[known-failure]]\n{text}")
    return "--detoracle-known-failures=known.toml"


def test_a_right_callable_passes_every_clause_without_a_test_file(adopter: pytest.Pytester) -> None:
    found = adopter.runpytest_inprocess(f"{DECODE}right", "-v")
    found.assert_outcomes(passed=CLAUSES)
    found.stdout.fnmatch_lines(["stranger:right::yolox.decode[[]predictions[]] PASSED*"])
    assert not (adopter.path / ".detoracle").exists()


def test_a_wrong_callable_fails_with_a_scene_that_replays(adopter: pytest.Pytester) -> None:
    found = adopter.runpytest_inprocess(f"{DECODE}wrong", "-k", "yolox.decode[predictions] or yolox.decode[returns]")
    found.assert_outcomes(passed=1, failed=1, deselected=CLAUSES - 2)
    [file] = (adopter.path / ".detoracle").iterdir()
    found.stdout.fnmatch_lines(
        [
            "yolox.decode[[]predictions[]] fails on * of * cases; simplified, on *:",
            "  yolox.decode[[]predictions[]] at (*): expected *, got *",
            f"  replay: detoracle replay .detoracle/{file.name}",
            "*- Captured detoracle scene call -*",
            "strides = [[]8[]]",
        ]
    )
    scene = read_scene(file)
    assert (scene.operation, scene.implementation) == ("yolox.decode", "stranger:wrong")
    assert scene.arguments["raw"][0].shape[0] == 1


def test_what_was_never_judged_fails(adopter: pytest.Pytester) -> None:
    """A callable that only raises is asked nothing but to return: no other clause may pass in silence."""
    found = adopter.runpytest_inprocess(f"{DECODE}raises")
    found.assert_outcomes(failed=CLAUSES)
    found.stdout.fnmatch_lines(
        [
            "*RuntimeError: on purpose",
            "*yolox.decode[[]split[]] was never judged in * cases; violated first: *[[]returns[]]",
        ]
    )


def test_an_optional_output_that_does_not_come_is_skipped(adopter: pytest.Pytester) -> None:
    adopter.makepyfile(
        stranger="""
        from detoracle.reference import yolox

        def pair(**arguments):
            found = yolox.assign(**arguments)
            return found.gt_index, found.quality
        """
    )
    found = adopter.runpytest_inprocess("--detoracle=yolox.assign=stranger:pair", "-k", "quality or dynamic_k", "-rs")
    outcomes = found.parseoutcomes()
    assert (outcomes["passed"], outcomes["skipped"]) == (1, 1)
    found.stdout.fnmatch_lines(["*optional output, which the implementation does not return*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detoracle=yolox.decode"], "*--detoracle: expected OPERATION=package.module:callable*"),
        (["--detoracle=yolox.decod=stranger:right"], "*expected one of yolox.decode*"),
        ([f"{DECODE}missing"], "*expected 'stranger:missing' to be importable*"),
        ([f"{DECODE}right", "--detoracle-known-failures=missing.toml"], "*missing.toml: expected TOML*"),
    ],
)
def test_a_wrong_call_is_an_error_before_anything_runs(
    arguments: list[str], message: str, adopter: pytest.Pytester
) -> None:
    found = adopter.runpytest_inprocess(*arguments)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([message])


def test_a_known_failure_is_expected_until_it_expires_or_is_gone(adopter: pytest.Pytester) -> None:
    predictions = "yolox.decode[predictions]"
    only = ["-k", predictions]
    found = adopter.runpytest_inprocess(f"{DECODE}wrong", known(adopter, predictions), "-rx", *only)
    found.assert_outcomes(xfailed=1, deselected=CLAUSES - 1)
    found.stdout.fnmatch_lines(["XFAIL stranger:wrong::yolox.decode[[]predictions[]] - *ties (ours/17)"])
    for callable_, options, message in [
        ("wrong", {"expires": "1999-01-31"}, "*expired on 1999-01-31: ties (ours/17)"),
        ("right", {}, "*matches no failure: remove it"),
        ("wrong", {"scene": "no such scene"}, "*fails on * of * cases*"),
        ("wrong", {"setting": "no such setting"}, "*fails on * of * cases*"),
    ]:
        found = adopter.runpytest_inprocess(DECODE + callable_, known(adopter, predictions, **options), *only)
        found.assert_outcomes(failed=1, deselected=CLAUSES - 1)
        found.stdout.fnmatch_lines([message])


def test_a_known_failure_of_no_clause_is_an_error(adopter: pytest.Pytester) -> None:
    found = adopter.runpytest_inprocess(f"{DECODE}right", known(adopter, "yolox.decode[nonsense]"))
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*known.toml: expected clauses such as *, got yolox.decode[[]nonsense[]]*"])


FIXTURES = """
import detoracle
import pytest
import stranger

CALLS = []

@detoracle.conforms("yolox.decode")
@pytest.fixture(params=["right", "wrong"])
def decoder(request):
    CALLS.append(request.param)
    return getattr(stranger, request.param)

class TestMine:
    @pytest.fixture
    @detoracle.conforms("yolox.decode")
    def decoder(self):
        return lambda raw, strides: stranger.right(raw, strides)

def test_it_remains_a_fixture(decoder):
    assert callable(decoder)
"""


def test_a_marked_fixture_is_judged_for_each_of_its_parameters(adopter: pytest.Pytester) -> None:
    adopter.makepyfile(test_mine=FIXTURES)
    found = adopter.runpytest_inprocess("-v", "-k", "predictions or remains")
    found.assert_outcomes(passed=4, failed=1, deselected=3 * (CLAUSES - 1))
    found.stdout.fnmatch_lines(
        [
            "test_mine.py::decoder_conforms[[]right-yolox.decode[[]predictions[]][]] PASSED*",
            "test_mine.py::decoder_conforms[[]wrong-yolox.decode[[]predictions[]][]] FAILED*",
            "test_mine.py::TestMine::decoder_conforms[[]yolox.decode[[]predictions[]][]] PASSED*",
            "test_mine.py::test_it_remains_a_fixture[[]right[]] PASSED*",
            "  replay: detoracle replay .detoracle/*.scene.json",
        ],
    )


def test_what_is_no_fixture_is_an_error(adopter: pytest.Pytester) -> None:
    adopter.makepyfile(
        test_mine="import detoracle\n@detoracle.conforms('yolox.decode')\ndef test_mine(): ...\n",
        test_other="import detoracle, pytest\n@detoracle.conforms('yolo')\n@pytest.fixture\ndef other(): ...\n",
    )
    found = adopter.runpytest_inprocess()
    found.assert_outcomes(errors=2)
    found.stdout.fnmatch_lines(
        ["test_mine: expected a fixture under detoracle.conforms*", "other: operation: expected one of *"]
    )


def test_tests_of_one_callable_share_one_run(adopter: pytest.Pytester) -> None:
    adopter.makepyfile(
        stranger="""
        from pathlib import Path
        from detoracle.reference import yolox

        def counted(raw, strides):
            with Path("calls").open("a") as file:
                file.write(".")
            return yolox.decode(raw, strides)
        """
    )
    for clauses in ("yolox.decode[returns]", "yolox.decode"):
        adopter.runpytest_inprocess(f"{DECODE}counted", "-k", clauses)
        calls = (adopter.path / "calls").read_text()
        (adopter.path / "calls").unlink()
        assert 30 < len(calls) < 60


def test_ids_and_outcomes_are_the_same_under_xdist(adopter: pytest.Pytester) -> None:
    adopter.makeconftest(
        """
        import detoracle.clause_tests
        few = detoracle.clause_tests.edge_cases()[:4]
        detoracle.clause_tests.edge_cases = lambda: few
        """
    )
    adopter.makepyfile(test_mine=FIXTURES)
    options = [f"{DECODE}right", "-k", "returns or predictions", "-v", "-n2", "--dist=loadscope"]
    found = adopter.runpytest_subprocess(*options, "--detoracle-examples=0")
    found.assert_outcomes(passed=7, failed=1)
    mine = [line for line in found.outlines if "PASSED stranger:right::yolox.decode[" in line]
    assert len(mine) == 2
    assert len({line.split()[0] for line in mine}) == 1  # on one worker, which ran the callable once
    assert len(list((adopter.path / ".detoracle").iterdir())) == 1


def test_tests_of_one_callable_are_a_group_of_xdist(adopter: pytest.Pytester) -> None:
    """Its `--dist=loadgroup` keeps them on one worker."""
    adopter.makepyfile(test_mine=FIXTURES)
    items, _ = adopter.inline_genitems(f"{DECODE}right")
    found = [(item.nodeid.split("::")[-2], item.get_closest_marker("xdist_group")) for item in items]
    groups = {(place, mark and mark.kwargs["name"]) for place, mark in found}
    assert groups == {
        ("test_mine.py", "test_mine.py::decoder"),
        ("TestMine", "test_mine.py::TestMine::decoder"),
        ("stranger:right", "stranger:right"),
        ("test_mine.py", None),  # the project's own test
    }


def test_a_run_without_it_imports_nothing_heavy(adopter: pytest.Pytester) -> None:
    adopter.makepyfile(
        test_mine="""
        import sys

        def test_mine(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("detoracle")
            assert "detoracle.pytest_plugin" in sys.modules
            assert not {"torch", "hypothesis.strategies", "detoracle.clause_tests"} & set(sys.modules)
        """
    )
    found = adopter.runpytest_subprocess("-W", "error")
    found.assert_outcomes(passed=1)
