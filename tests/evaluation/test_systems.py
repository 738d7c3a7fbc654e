"""The systems that `isadca evaluate` chooses from, as what they are: the loop with their methods, and the prior."""

from dataclasses import replace

import pytest
from conftest import DEMO

import isadca
from isadca.app import cli
from isadca.common.problem import Problem
from isadca.evaluation import systems
from isadca.loading.prior import load_prior
from isadca.networks import prior


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
    assert lacking["isadca"] == "has no IP-Adapter" and lacking["isadca-prior"].startswith("has no prior in it")
    assert systems.lacks(systems.SYSTEMS["isadca-prior"], replace(demo, ip_adapter=None), DEMO) == "has no IP-Adapter"
    assert not any(systems.lacks(system, demo, DEMO) for system in systems.SYSTEMS.values())
    with pytest.raises(Problem, match="has no prior in it or beside it.*weights/README.md"):
        draws("isadca-prior", demo, tmp_path)
    with pytest.raises(Problem, match="system is 'dalle', expected one of rival, ip-adapter"):
        systems.system_of("dalle")


def test_a_prior_of_another_width_asks_for_its_adapter(demo, tmp_path):
    (tmp_path / "prior").symlink_to(DEMO / "prior")
    with pytest.raises(Problem, match="128 wide.*vit-G"):
        draws("isadca-prior", replace(demo, ip_adapter=None), tmp_path)


# ---- vary --prior ------------------------------------------------------------------------------------------------

def test_vary_with_the_prior(demo, cat, tmp_path, capsys):
    """The image branch sees what the prior expects of the prompt; the recipe knows the prior and makes it again."""
    flags = ["-q", "--steps", "3", "--seed", "2"]
    picture = tmp_path / "a.png"
    assert cli.main(["vary", str(DEMO / "references/cat.png"), "a pig", "-o", str(picture), *flags,
                     "--prior", str(DEMO / "prior")]) == 0
    embeds = prior.embed_prompt(*load_prior(DEMO / "prior"), "a pig", seed=2)
    [expected] = isadca.vary(demo, isadca.invert(demo, cat, 3), "a pig", seeds=(2,), image_embeds=embeds)
    assert isadca.load_image(picture).tobytes() == expected.tobytes()
    [without] = isadca.vary(demo, isadca.invert(demo, cat, 3), "a pig", seeds=(2,))
    assert expected.tobytes() != without.tobytes()
    assert cli.main(["vary", "-q", "--recipe", str(picture), "-o", str(tmp_path / "b.png")]) == 0
    assert isadca.load_image(tmp_path / "b.png").tobytes() == expected.tobytes()
    capsys.readouterr()
    assert cli.main(["vary", str(picture), "a pig", "-o", str(picture), *flags, "--prior", str(tmp_path)]) == 2
    assert "prior" in capsys.readouterr().err
