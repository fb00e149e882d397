"""Attacks of foolbox and own functions."""

import importlib.metadata
import math

import pytest
import torch

from diffsmooth.pipeline.attack.foreign import attack_code
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import load_spec
from tests.attacking import attack_alone
from tests.models import make_run


def along_grey(model, x_CHW, label, eps):
    """An own attack: all pixels up or down, whichever the model likes less."""
    sign = 1.0 if label == 0 else -1.0
    assert model(x_CHW[None]).shape == (1, 2)
    return (x_CHW + sign * eps / x_CHW.numel() ** 0.5).clamp(0, 1)


def returns_text(model, x_CHW, label, eps):
    return "image"


def raises(model, x_CHW, label, eps):
    raise KeyError("oops")


@pytest.mark.parametrize("name", ["foolbox.attacks.L2PGD", "foolbox.attacks.L2DeepFoolAttack"])
def test_attacks_of_foolbox_are_proven_like_ours(made, name):
    spec, store = made
    code = {"foolbox": importlib.metadata.version("foolbox")}
    before = torch.random.get_rng_state()
    attack, samples = attack_alone(spec, store, range(2), attack=name, code=code, steps=4)
    assert torch.equal(before, torch.random.get_rng_state())  # its global randomness is a stream of its own
    exact = 4 * (0.5 - 100 / 255)
    uppers = [one.upper(attack.alpha) for one in samples]  # one of them may be unproven, at its level of alpha
    assert all(exact < upper for upper in uppers)
    assert min(uppers) <= 2.0


def test_hop_skip_jump_attacks_a_function_without_gradients(raw_spec, tmp_path):
    raw_spec["classifier"] = {"arch": "tests.models:rounded_half_space"}
    spec = load_spec(raw_spec)
    store = make_run(spec, tmp_path / "run", samples=1)
    name = "foolbox.attacks.HopSkipJumpAttack"
    code = {"foolbox": importlib.metadata.version("foolbox")}
    attack, (one,) = attack_alone(spec, store, range(1), attack=name, code=code, steps=3, draws=32)
    assert math.isfinite(one.upper(attack.alpha))


def test_an_own_attack(made):
    spec, store = made
    name = "tests.test_foreign:along_grey"
    attack, samples = attack_alone(spec, store, range(2), attack=name, code=attack_code(name))
    assert attack.id.startswith("along_grey-")
    assert all(one.upper(attack.alpha) < 0.6 for one in samples)
    for name, message in (
        ("tests.test_foreign:returns_text", "returned str; it must return an image"),
        ("tests.test_foreign:raises", "raised KeyError: 'oops'"),
    ):
        with pytest.raises(UserError, match=message):
            attack_alone(spec, store, range(1), attack=name, code=attack_code(name))


def test_an_attack_with_other_code_is_refused(made):
    spec, store = made
    with pytest.raises(UserError, match=r"the code of --attack .* is .* here and .* where the attack began"):
        attack_alone(spec, store, range(1), attack="tests.test_foreign:along_grey", code={"source": "0"})
