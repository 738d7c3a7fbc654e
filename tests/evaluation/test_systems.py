"""The systems that `isadca evaluate` chooses from, as what they are: the loop with their methods."""

from dataclasses import replace

import pytest
from conftest import DEMO

import isadca
from isadca.common.problem import Problem
from isadca.evaluation import systems


def draws(name, model, weights, steps=3):
    return systems.make_draw(systems.system_of(name), model, weights, steps)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_system_draws_the_same_picture_from_a_seed(demo, cat, name):
    draw = draws(name, demo, DEMO)
    once, again, other = (draw(cat, "a pig", seed) for seed in (1, 1, 2))
    assert once.size == (64, 64) and once.tobytes() == again.tobytes()
    assert (once.tobytes() == other.tobytes()) == systems.SYSTEMS[name].deterministic


def test_the_systems_are_the_loop_with_their_methods(demo, cat):
    ref = isadca.invert(demo, cat, 3)
    for name, method in {"rival": isadca.PRESETS["rival"], "isadca-attention": isadca.Method(mix="attention"),
                         "ip-adapter": replace(isadca.PRESETS["ip-adapter"], guidance=7.0)}.items():
        [expected] = isadca.vary(demo, ref, "a pig", method, (4,))
        assert draws(name, demo, DEMO)(cat, "a pig", 4).tobytes() == expected.tobytes(), name


def test_what_is_missing_is_named(demo, tmp_path):
    lacking = {name: systems.lacks(system, replace(demo, ip_adapter=None), tmp_path)
               for name, system in systems.SYSTEMS.items()}
    assert [name for name, why in lacking.items() if not why] == ["rival"]
    assert lacking["isadca"] == "has no IP-Adapter"
    assert not any(systems.lacks(system, demo, DEMO) for system in systems.SYSTEMS.values())
    with pytest.raises(Problem, match="system is 'dalle', expected one of rival, ip-adapter"):
        systems.system_of("dalle")
