"""Own functions as denoisers and classifiers: what can be used, and one line for everything else."""

import importlib
import os
import sys
import types

import pytest
import torch

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.own import OwnFunctionError, call_own_function, function_id, own_function
from diffsmooth.pipeline.smoothing import build_base_classifier, weights_ids
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.fetch import file_sha256

CPU = torch.device("cpu")

MODULE = '''
import functools
import torch

VALUE = 7

def half_space(spec, device):
    return lambda x: torch.stack([-x.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

class Network(torch.nn.Module):
    """A class is called with (spec, device), like a function."""

    def __init__(self, spec, device):
        super().__init__()

    def forward(self, x):
        return half_space(None, None)(x)

class NoArguments:
    pass

class OfAPath:
    def __init__(self, path):
        pass

def of_images(x):
    pass

def of_three(spec, device, checkpoint):
    pass

def of_names(*, path):
    pass

def a_class(spec, device):
    return Network

def of_more(spec, device):
    return lambda x, temperature: half_space(spec, device)(x)

class Output:
    logits = None

def output(spec, device):
    return lambda x: Output()

def column_of_classes(spec, device):
    return lambda x: half_space(spec, device)(x).argmax(dim=1, keepdim=True)

instance = Network(None, None)
partial = functools.partial(half_space, device=None)
cached = functools.cache(half_space)
exec("def without_source(spec, device): return half_space(spec, device)")

def nothing(spec, device):
    pass

def raises(spec, device):
    raise ZeroDivisionError("first line\\nsecond line")

def exits(spec, device):
    raise SystemExit(3)

def classes(spec, device):
    return lambda x: half_space(spec, device)(x).argmax(dim=1)

def numbers(spec, device):
    return lambda x: [0.5] * len(x)

def one_too_few(spec, device):
    return lambda x: half_space(spec, device)(x)[:-1]

def fails_when_called(spec, device):
    return lambda x: x.undefined
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Provides a folder on sys.path and removes its modules afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text(MODULE)
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("tests.models:f", True), ("a:b", True), (":x", True), ("torchvision:resnet18", False), ("timm:x", False),
     ("mnist_cnn", False), ("none", False)],
)  # fmt: skip
def test_own_functions_are_distinguished_from_library_models(arch, expected):
    assert is_own(arch) is expected


@pytest.mark.parametrize("name", ["half_space", "Network"])
def test_a_function_or_a_class_is_identified_by_its_source_file(module, raw_spec, name):
    raw_spec["classifier"] = {"arch": f"own_module:{name}"}
    spec = load_spec(raw_spec)
    assert weights_ids(spec) == {"classifier.source": file_sha256(module / "own_module.py")}
    f = build_base_classifier(spec, "cpu")
    assert f(torch.zeros(3, 1, 4, 4)).shape == (3, 2)


NOT_IMPORTABLE = [
    ("os:system", "belongs to Python's standard library; use a function of your own"),
    ("builtins:print", "belongs to Python's standard library"),
    ("..:x", "does not consist of Python names; use the form package.module:function"),
    (":x", "does not consist of Python names"),
    ("own_module:", "does not consist of Python names"),
    ("own-module:x", "does not consist of Python names"),
    ("own_module:x:y", "does not consist of Python names"),
    ("own_module:x.y", "does not consist of Python names"),
    ("own module:x", "does not consist of Python names"),
    ("__main__:f", "notebook or script; move it to a .py file"),
    ("own_absent:f", "No module named 'own_absent'; name a function that Python can import"),
    ("own_module:absent", "has no attribute 'absent'; name a function"),
    ("own_module:VALUE", "is a int, not a Python function; name a function"),
    ("own_module:instance", "is a Network, not a Python function"),
    ("own_module:partial", "is a partial, not a Python function"),
    ("own_module:cached", "is a _lru_cache_wrapper, not a Python function"),
    ("own_syntax:f", r"importing own_syntax raised SyntaxError: "),
    ("own_division:f", r"importing own_division raised ZeroDivisionError: division by zero"),
    ("own_exit:f", r"importing own_exit raised SystemExit: 1"),
    ("own_import:f", "No module named 'own_dependency'"),
]


@pytest.mark.parametrize(("arch", "message"), NOT_IMPORTABLE)
@pytest.mark.parametrize("section", ["denoiser", "classifier"])
def test_functions_that_cannot_be_imported_give_one_line(module, raw_spec, section, arch, message):
    (module / "own_syntax.py").write_text("def f(:")
    (module / "own_division.py").write_text("1 / 0")
    (module / "own_exit.py").write_text("raise SystemExit(1)")
    (module / "own_import.py").write_text("import own_dependency")
    raw_spec[section] = {"arch": arch}
    with pytest.raises(UserError, match=message) as error:
        weights_ids(load_spec(raw_spec))
    assert repr(arch) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_standard_module_is_refused_before_it_is_imported(raw_spec):
    assert "antigravity" not in sys.modules
    with pytest.raises(UserError, match="standard library"):
        own_function("antigravity:fly")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("arch", ["own_module:without_source", "own_notebook:in_notebook"])
def test_functions_without_a_source_file_have_no_identity(module, monkeypatch, arch):
    notebook = types.ModuleType("own_notebook")
    # IPython compiles each cell under a name that is not a file
    exec(compile("def in_notebook(spec, device): pass", "<ipython-input-1>", "exec"), notebook.__dict__)
    monkeypatch.setitem(sys.modules, "own_notebook", notebook)
    assert own_function(arch)
    with pytest.raises(UserError, match=r"has no source file to identify it by; define the function in a \.py file"):
        function_id(arch)


FAILING = [
    ("nothing", "returned NoneType, which cannot be called; return a function or a module"),
    ("raises", r"raised ZeroDivisionError when called with \(spec, device\): first line"),
    ("exits", r"raised SystemExit when called with \(spec, device\): 3"),
    (
        "NoArguments",
        r"is the constructor of a class with the parameters \(\), but it is called with \(spec, device\); ",
    ),
    (
        "OfAPath",
        r"is the constructor of a class with the parameters \(path\), but .*; name a function of \(spec, device\) ",
    ),
    (
        "of_images",
        r"is a function with the parameters \(x\), but it is called with \(spec, device\); name a function of ",
    ),
    ("of_three", r"the parameters \(spec, device, checkpoint\), but .*that returns the network$"),
    ("of_names", r"the parameters \(\*, path\), but it is called with \(spec, device\)"),
    ("a_class", r"returned the class Network, not a network; return an instance, Network\(...\)"),
    (
        "of_more",
        r"parameters \(x, temperature\), but a classifier is called with \(x_BCHW\); return a function of these",
    ),
    (
        "classes",
        r"the classifier returned shape \(1,\) .*; it must return logits .*, not the classes; remove the argmax",
    ),
    ("column_of_classes", r"the classifier returned shape \(1, 1\) .*; remove the argmax"),
    ("output", "the classifier returned a Output; it must return a tensor, such as its logits"),
    ("one_too_few", r"the classifier returned shape \(0, 2\) for a batch of 1 images; it must return logits"),
    ("numbers", "the classifier returned a list; it must return a tensor"),
    ("fails_when_called", r"the classifier cannot process images of shape \(1, 4, 4\) \(AttributeError: .*undefined"),
]


@pytest.mark.parametrize(("name", "message"), FAILING)
def test_functions_that_fail_give_one_line(module, raw_spec, name, message):
    raw_spec["classifier"] = {"arch": f"own_module:{name}"}
    with pytest.raises(UserError, match=message) as error:
        build_base_classifier(load_spec(raw_spec), "cpu")
    assert "\n" not in str(error.value)


def test_denoisers_that_change_the_shape_are_refused(module, raw_spec):
    (module / "own_denoiser.py").write_text("def crop(spec, device):\n    return lambda x, sigma: x[:, :, 1:, 1:]\n")
    raw_spec["denoiser"] = {"arch": "own_denoiser:crop"}
    with pytest.raises(
        UserError, match=r"the denoiser returned shape \(1, 1, 3, 3\) for images of shape \(1, 1, 4, 4\)"
    ):
        build_base_classifier(load_spec(raw_spec), "cpu")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            "lambda sigma, x: x - sigma",
            r"parameters \(sigma, x\), but a denoiser gets the images first, as \(x_BCHW, sigma",
        ),
        (
            "lambda x: x",
            r"parameters \(x\), but a denoiser is called with \(x_BCHW, sigma\); return a function of these",
        ),
        ("lambda x, t, y: x", r"parameters \(x, t, y\), but a denoiser is called with \(x_BCHW, sigma\)"),
    ],
)
def test_denoisers_of_other_or_swapped_arguments_are_refused(module, raw_spec, network, message):
    (module / "own_denoiser.py").write_text(f"def make(spec, device):\n    return {network}\n")
    raw_spec["denoiser"] = {"arch": "own_denoiser:make"}
    with pytest.raises(UserError, match=message) as error:
        build_base_classifier(load_spec(raw_spec), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("network", ["lambda x, sigma, draws: x", "lambda *arguments: arguments[0]", "Keep()"])
def test_denoisers_may_take_draws_or_any_arguments(module, raw_spec, network):
    (module / "own_denoiser.py").write_text(
        "import torch\nclass Keep(torch.nn.Module):\n    def forward(self, images, s=None, *, scale=1):\n"
        f"        return images\ndef make(spec, device):\n    return {network}\n"
    )
    raw_spec["denoiser"] = {"arch": "own_denoiser:make"}
    f = build_base_classifier(load_spec(raw_spec), "cpu")
    assert f.denoise(torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)


def test_an_error_that_the_function_raises_for_its_user_is_kept(raw_spec, module):
    (module / "own_error.py").write_text(
        "from diffsmooth.pipeline.errors import UserError\n"
        "def f(spec, device):\n    raise UserError('no licence; buy one')\n"
    )
    with pytest.raises(UserError, match=r"^no licence; buy one$") as error:
        call_own_function("own_error:f", load_spec(raw_spec), CPU)
    assert not isinstance(error.value, OwnFunctionError)


def test_a_compiled_module_without_source_is_refused(module):
    import py_compile

    py_compile.compile(str(module / "own_module.py"), cfile=str(module / "own_compiled.pyc"))
    assert own_function("own_compiled:half_space")
    os.remove(module / "own_module.py")
    with pytest.raises(UserError, match="has no source file"):
        function_id("own_compiled:half_space")


def test_functools_wraps_keeps_the_identity_of_the_wrapper(module):
    (module / "own_wrapped.py").write_text(
        "import functools\nfrom own_module import half_space\n"
        "@functools.wraps(half_space)\ndef f(*arguments):\n    return half_space(*arguments)\n"
    )
    assert function_id("own_wrapped:f") == file_sha256(module / "own_wrapped.py")
