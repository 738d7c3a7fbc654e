"""One step of the loop by itself: the conditions of a run, the controls at a step."""

from isadca.attention import attend
from isadca.loop import Conditions, Controls, Options, conditions, predict


def condition(model, ref, run) -> Conditions:
    return conditions(model, ref, [run], Options())[0]


def predict_at(model, z, t, told, step, method):
    """The noise of one step, `step` being the replay's."""
    controls = Controls(z, t, 0, 6, method.lam_at(t, 1000), told, step.kv if step else {}, step.eps if step else None,
                        None, method, attend)
    return predict(model, controls)
