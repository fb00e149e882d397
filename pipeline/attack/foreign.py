"""Attacks by name: ours, those of foolbox (`foolbox.attacks.NAME`), and own functions (`package.module:function`).

An own function is called as function(model, x_CHW, label, eps) and returns an image x'_CHW. `model` maps x_BCHW to the
logarithms of the smoothed scores, BK: the mean of f over fresh EOT draws, with gradients if f has any. What lies
farther than eps from x, or outside of [0, 1], is projected. Votes decide later whether g is wrong there.
"""

import hashlib
import importlib
import importlib.metadata
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffsmooth.pipeline.attack.record import Attack
from diffsmooth.pipeline.attack.search import ATTACKS, Problem, Search, steps_by_votes
from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.own import OwnFunctionError, function_id, own_function

_FOOLBOX = "foolbox.attacks."
_LEAST_LOG = -1e4  # instead of the logarithm of 0
_LEAST_PATH = 2.5  # sum of the steps of projected gradient descent, in eps


def attack_code(name: str) -> dict[str, str]:
    """What identifies the code of an attack that is not ours; empty for ours.

    Raises: UserError for an unknown attack, a missing foolbox, and an own function that cannot be imported.
    """
    if name in ATTACKS:
        return {}
    if name.startswith(_FOOLBOX):
        _foolbox_attack(name)
        return {"foolbox": importlib.metadata.version("foolbox")}
    if is_own(name):
        return {"source": function_id(name, "--attack")}
    raise UserError(
        f"--attack {name} is unknown; choose one of {', '.join(ATTACKS)}, {_FOOLBOX}NAME, or name your own as "
        "package.module:function"
    )


def search_of(attack: Attack) -> Search:
    """The search of an attack. Raises: UserError as `attack_code`, and if its code differs from the attack's."""
    name = attack.attack
    if (code := attack_code(name)) != attack.code:
        raise UserError(
            f"the code of --attack {name} is {code} here and {attack.code} where the attack began; use that version"
        )
    if name in ATTACKS:
        return ATTACKS[name]
    return _foolbox_search(name) if name.startswith(_FOOLBOX) else _own_search(name)


class SmoothedModel(nn.Module):
    """x_BCHW in [0, 1] -> log of the mean scores over EOT draws, BK float32.

    One call uses the same draws for all images; with `fixed`, all calls do, so that the model is deterministic.
    """

    def __init__(self, problem: Problem, *, fixed: bool = False) -> None:
        super().__init__()
        self._problem = problem
        self._fixed_NCHW = problem.draws(problem.attack.draws) if fixed else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        problem, f = self._problem, self._problem.f
        noise_NCHW = problem.draws(problem.attack.draws) if self._fixed_NCHW is None else self._fixed_NCHW
        rows_RCHW = (x_BCHW[:, None] + noise_NCHW).flatten(0, 1)
        if x_BCHW.requires_grad:
            scores_RK = f.differentiable_log_scores(f.differentiable_denoise(rows_RCHW))
        else:
            scores_RK = torch.cat([f(chunk).double() for chunk in rows_RCHW.split(problem.batch)]).log()
        scores_BNK = scores_RK.reshape(len(x_BCHW), len(noise_NCHW), -1)
        return (scores_BNK.logsumexp(dim=1) - math.log(len(noise_NCHW))).clamp_min(_LEAST_LOG).float()


def _projected(problem: Problem, image: Any, eps: float, name: str) -> Tensor:
    """What an attack returned, within eps and the box. Raises: UserError for something else than an image."""
    if not isinstance(image, Tensor) or image.shape != problem.x_CHW.shape:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"--attack {name} returned {found}; it must return an image of {tuple(problem.x_CHW.shape)}")
    image = image.detach().to(problem.x_CHW)
    if not bool(image.isfinite().all()):
        raise UserError(f"--attack {name} returned an image that is not finite at sample {problem.index}")
    delta_CHW = image.clamp(0, 1) - problem.x_CHW
    return problem.x_CHW + delta_CHW * min(1.0, eps / max(float(delta_CHW.norm()), 1e-30))


@contextmanager
def _own_randomness(problem: Problem) -> Iterator[None]:
    """Give code that draws from torch's global generator a stream of its own, and restore the generator afterwards."""
    device = problem.f.device
    digest = hashlib.blake2b(f"{problem.attack.id}:{problem.attack.seed}:{problem.index}".encode(), digest_size=7)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(int.from_bytes(digest.digest(), "little"))
        if device.type == "cuda":
            torch.cuda.manual_seed(int.from_bytes(digest.digest(), "little"))
        yield


def _own_search(name: str) -> Search:
    function = own_function(name, "--attack", "(model, x_CHW, label, eps)")

    def search(problem: Problem, start_CHW: Tensor, eps: float) -> Tensor:
        with _own_randomness(problem), _failures(name):
            found = function(SmoothedModel(problem), problem.x_CHW.clone(), problem.label, eps)
        return _projected(problem, found, eps, name)

    return search


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """Report what the code of an attack raises in one line."""
    try:
        yield
    except (UserError, RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # code of others can raise anything
        raise OwnFunctionError(f"--attack {name} raised {type(error).__name__}: {first_line(error)}") from error


def _foolbox_attack(name: str) -> type[Any]:
    """The class of an attack of foolbox. Raises: UserError."""
    try:
        attacks = importlib.import_module("foolbox.attacks")
    except ImportError:
        raise UserError(
            f"--attack {name} needs the package foolbox; install it with pip install diffsmooth[attacks]"
        ) from None
    found = getattr(attacks, name.removeprefix(_FOOLBOX), None)
    if not inspect.isclass(found) or not issubclass(found, attacks.base.Attack):
        raise UserError(f"--attack {name}: foolbox has no such attack; choose a class of foolbox.attacks")
    return found


def _foolbox_search(name: str) -> Search:
    """Run an attack of foolbox with our number of steps, long enough to cross the ball, and else its own defaults.

    One that minimises the distance relies on a deterministic model, and is run once per sample: it gives a direction.
    """
    kind = _foolbox_attack(name)
    base = importlib.import_module("foolbox.attacks.base")
    foolbox = importlib.import_module("foolbox")
    accepted = inspect.signature(kind).parameters
    minimizes = issubclass(kind, base.MinimizationAttack)
    found: dict[int, tuple[Problem, Tensor]] = {}  # the image of minimal distance of the last problem

    def run(problem: Problem, **options: Any) -> Tensor:
        attack = problem.attack
        settings: dict[str, Any] = {"steps": attack.steps} if "steps" in accepted else {}
        if "rel_stepsize" in accepted:
            settings["rel_stepsize"] = max(_LEAST_PATH / attack.steps, accepted["rel_stepsize"].default)
        if "max_gradient_eval_steps" in accepted:  # each evaluation of ours is the mean of many draws
            settings |= {"initial_gradient_eval_steps": attack.draws, "max_gradient_eval_steps": 4 * attack.draws}
        x_1CHW, label_1 = problem.x_CHW[None], torch.tensor([problem.label], device=problem.f.device)
        with _own_randomness(problem), _failures(name):
            made = kind(**settings)
            model = foolbox.PyTorchModel(
                SmoothedModel(problem, fixed=minimizes).eval(), bounds=(0, 1), device=problem.f.device
            )
            if "starting_points" in inspect.signature(kind.run).parameters:
                start_CHW = steps_by_votes(problem, problem.x_CHW, attack.eps[0])
                if int(model(start_CHW[None]).argmax()) == problem.label:
                    return problem.x_CHW.clone()
                options["starting_points"] = start_CHW[None]
            raw, _, _ = made(model, x_1CHW, foolbox.criteria.Misclassification(label_1), **options)
        return raw[0]

    def search(problem: Problem, start_CHW: Tensor, eps: float) -> Tensor:
        if minimizes:
            if found.get(0, (None,))[0] is not problem:
                found[0] = (problem, run(problem, epsilons=None))
            nearest_CHW = _projected(problem, found[0][1], math.inf, name)
            return problem.at_distance(nearest_CHW - problem.x_CHW, eps)
        return _projected(problem, run(problem, epsilons=eps), eps, name)

    return search
