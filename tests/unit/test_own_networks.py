"""Networks that a callable returns: custom ones, and those of torchvision and timm."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvd_batchgrow import torchvision_shim
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model, forward_state
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.torchvision_shim import import_torchvision
from tests.helpers import job_tree

GROUP, NUM_CLASSES, SHAPE = 4, 5, (6, 7, 3)

NETS = """
    import collections, random
    import numpy as np
    import torch
    from torch import nn
    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d

    class Net(nn.Module):
        def __init__(self, num_classes, width=4, norm=nn.BatchNorm2d):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, width, 3), norm(width), nn.Linear(width, num_classes)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).mean((2, 3)))

    class Auxiliary(Net):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, logits) if self.training else logits

    class Twice(Net):
        def forward(self, x):
            return self.head(self.norm(self.norm(self.conv(x)).relu()).mean((2, 3)))

    class Frames(Net):
        def forward(self, x):
            return self.head(self.norm(torch.cat([self.conv(x)] * 3)).mean((2, 3))[:len(x)])

    class Beside(Net):
        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    class Still(Beside):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    class ByClass(Net):
        def train(self, mode=True):
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            return self

    class NoTrain(Net):
        def train(self, mode=True):
            raise OSError("no training today")

    def of_thousand(): return Net(1000)
    def by_keywords(**keywords): return Net(**keywords)
    def other_ghost(num_classes): return Net(num_classes, norm=lambda width: GhostBatchNorm2d(width, 2))
    def fails(num_classes): raise OSError("no weights here")
    def no_network(num_classes): return [Net(num_classes)]
    def frozen(num_classes): return Net(num_classes).requires_grad_(False)
    def none_at_all(num_classes): return nn.Flatten()

    def still_once(num_classes):
        net = Net(num_classes)
        net.norm.eval()
        return net

    def by_other_generators(num_classes):
        net = Net(num_classes)
        nn.init.constant_(net.conv.weight, random.random())
        nn.init.constant_(net.head.weight, np.random.random())
        return net

    CONSTANT = 3
"""

_numbers = itertools.count()


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a module into the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(text: str = NETS) -> str:
        name = f"nets_of_a_test_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write


def job_of(name: str, seed: int = 7, **model: Any) -> Job:
    return parse_job({**job_tree(), "seed": seed, "model": {"name": name, "ghost_batch": GROUP, **model}})


def build(name: str, seed: int = 7, **model: Any) -> Any:
    torch.manual_seed(3)
    return build_model(job_of(name, seed, **model), SHAPE, NUM_CLASSES)


def test_it_is_called_with_arguments_and_classes_and_its_norms_are_ghost_norms(nets: Callable[..., str]) -> None:
    net = build(f"{nets()}:Net", kwargs={"width": 8}, bn_momentum=0.25)
    assert net.conv.out_channels == 8
    assert net.head.out_features == NUM_CLASSES
    assert [(n.ghost_batch, n.momentum, n.num_features) for n in ghost_norms(net)] == [(GROUP, 0.25, 8)]
    x = torch.randn(2 * GROUP, 3, 6, 7)
    torch.testing.assert_close(net(x), torch.cat([net(part) for part in x.split(GROUP)]))


@pytest.mark.parametrize("name", ["Net", "by_keywords"])
def test_arguments_override_the_number_of_classes(name: str, nets: Callable[..., str]) -> None:
    with pytest.raises(JobError, match=r"num_classes=9\) returns \(2, 9\) for two samples .* must be logits \(2, 5\)"):
        build(f"{nets()}:{name}", kwargs={"num_classes": 9})


def test_the_first_weights_are_those_of_the_seed_and_the_trial_leaves_no_trace(nets: Callable[..., str]) -> None:
    module = nets()
    net, again = build(f"{module}:Net"), build(f"{module}:Net")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    torch.manual_seed(3)
    plain = sys.modules[module].Net(NUM_CLASSES)
    assert torch.equal(plain.conv.weight, net.conv.weight)
    assert torch.equal(net.norm.running_mean, torch.zeros(4))
    assert net.training
    torch.manual_seed(3)
    sys.modules[module].Net(NUM_CLASSES)
    expected = torch.rand(3)
    build(f"{module}:Net")
    assert torch.equal(torch.rand(3), expected)


def test_generators_of_python_and_numpy_are_seeded_by_the_job_and_restored(nets: Callable[..., str]) -> None:
    name = f"{nets()}:by_other_generators"
    random.seed(1)
    np.random.seed(1)
    expected = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]
    random.seed(1)
    np.random.seed(1)
    first, again, other = (build(name, seed) for seed in (7, 7, 8))
    for layer in ("conv", "head"):  # one layer draws from Python's generator, the other from NumPy's
        drawn = [float(getattr(net, layer).weight.detach().flatten()[0]) for net in (first, again, other)]
        assert drawn[0] == drawn[1] != drawn[2]
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Nett", {}, r"MODULE:Nett: MODULE does not define it; did you mean MODULE:Net\?"),
        ("CONSTANT", {}, "MODULE:CONSTANT: MODULE defines it as an int, which is not callable"),
        ("fails", {}, r"MODULE:fails\(num_classes=5\) failed: OSError: no weights here \(.*MODULE.py, line \d+\)"),
        ("by_keywords", {"depth": 3}, r"\(num_classes=5, depth=3\) failed: TypeError: .*'depth' .*MODULE.py, line"),
        ("no_network", {}, "MODULE:no_network must return a torch.nn.Module, returned list"),
        ("frozen", {}, "MODULE:frozen has no parameters to train"),
        ("none_at_all", {}, "MODULE:none_at_all has no parameters to train"),
        ("other_ghost", {}, "has a ghost norm of 2 samples; all ghost norms must have model.ghost_batch = 4"),
        ("of_thousand", {}, r"returns \(2, 1000\) for two samples of shape \(3, 6, 7\), in evaluation; must be logits"),
        ("Auxiliary", {}, r"returns tuple for two samples of shape \(3, 6, 7\), in training; must be logits \(2, 5\)"),
    ],
)
def test_callables_that_do_not_return_a_usable_network_are_refused(
    name: str, arguments: dict[str, Any], message: str, nets: Callable[..., str]
) -> None:
    module = nets()
    with pytest.raises(JobError, match=message.replace("MODULE", module)) as caught:
        build(f"{module}:{name}", kwargs=arguments)
    assert [fault.path for fault in caught.value.faults] == ["model.name"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Twice", r"a pass gives 4 ghost batches instead of 2 to norm norm; use a separate norm in each place"),
        ("Frames", r"a pass gives 6 ghost batches instead of 2 to norm norm; .* one row per sample"),
        ("Beside", r"a pass does not reach norm norm in training; remove it, or keep it in evaluation mode"),
    ],
)
def test_a_norm_must_process_each_ghost_batch_once(name: str, message: str, nets: Callable[..., str]) -> None:
    job = job_of(f"{nets()}:{name}")
    with pytest.raises(JobError, match=message):
        forward_state(job, build_model(job, SHAPE, NUM_CLASSES), SHAPE)


def test_a_norm_that_the_network_keeps_in_evaluation_may_be_anywhere(nets: Callable[..., str]) -> None:
    assert not build(f"{nets()}:Still").train().norm.training


@pytest.mark.parametrize("name", ["Still", "ByClass"])
def test_no_norm_is_reestimated_if_the_network_keeps_all_in_evaluation(name: str, nets: Callable[..., str]) -> None:
    name = f"{nets()}:{name}"
    assert not build(name).train().norm.training
    message = f"model.precise_bn_samples: has no effect: {name} keeps in evaluation mode all norms"
    with pytest.raises(JobError, match=message):
        build(name, precise_bn_samples=64)


def test_a_norm_that_only_the_constructor_puts_into_evaluation_is_refused(nets: Callable[..., str]) -> None:
    """Training would put it into training mode, and change the statistics that were to stay."""
    name = f"{nets()}:still_once"
    message = rf"model.name: {name} returns norms in evaluation mode \(norm\), .*; keep .*, or use model.freeze"
    with pytest.raises(JobError, match=message):
        build(name)
    assert not build(name, freeze=["norm.*"]).train().norm.training


def test_a_train_that_fails_is_refused_with_its_line(nets: Callable[..., str]) -> None:
    name = nets()
    message = rf"{name}:NoTrain: its train\(\) or eval\(\) failed: OSError: no training today \(.*{name}.py, line"
    with pytest.raises(JobError, match=message):
        build(f"{name}:NoTrain")


def test_arguments_that_the_signature_does_not_accept_are_refused_before_the_call(nets: Callable[..., str]) -> None:
    message = r"cannot call .*:Net\(num_classes=5, widht=8\): .*'widht'; it accepts \(num_classes, width=4, norm="
    with pytest.raises(JobError, match=f"model.kwargs: .*{message}"):
        build(f"{nets()}:Net", kwargs={"widht": 8})


def test_samples_that_it_does_not_accept_are_refused_with_the_line_that_failed(nets: Callable[..., str]) -> None:
    module = nets()
    with pytest.raises(JobError, match=rf"fails on two samples of shape \(54,\), in evaluation: .*{module}.py, line"):
        build_model(job_of(f"{module}:Net"), (54,), NUM_CLASSES)


def test_a_module_that_cannot_be_imported_is_refused(nets: Callable[..., str]) -> None:
    module = nets("import nowhere_to_be_found")
    with pytest.raises(JobError, match=rf"{module}:Net cannot be imported: ModuleNotFoundError: .*{module}.py, line 1"):
        build(f"{module}:Net")
    with pytest.raises(JobError, match=r"not_there.nets:Net cannot be imported: ModuleNotFoundError"):
        build("not_there.nets:Net")


@pytest.mark.parametrize("value", [float("inf"), {1, 2}, b"x"])
def test_arguments_are_plain_values(value: Any) -> None:
    with pytest.raises(JobError, match=r"model\.kwargs"):
        job_of("mynets:Net", kwargs={"a": value})


def test_arguments_affect_the_weights() -> None:
    first, same, other = (job_of("mynets:Net", kwargs={"a": [1, {"b": x}]}) for x in (2, 2, 3))
    assert first == same != other
    assert first.deciding(300) == same.deciding(300) != other.deciding(300)


# --- torchvision and timm -----------------------------------------------------------------------

_THERE = importlib.util.find_spec("torchvision") is not None


@pytest.mark.skipif(_THERE, reason="torchvision is installed")
@pytest.mark.parametrize(
    ("name", "packages"),
    [("torchvision.models:resnet50", "torchvision"), ("timm.models:inception_resnet_v2", "timm torchvision")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name: str, packages: str) -> None:
    command = re.escape(f"; pip install {packages} torch=={torch.__version__.split('+')[0]}")
    with pytest.raises(JobError, match=f"No module named 'torchvision'.*{command}$"):
        build(name)


def test_a_package_that_the_users_module_lacks_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking.py").write_text("import torchvision\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    command = re.escape(f"; pip install torchvision torch=={torch.__version__.split('+')[0]}")
    with pytest.raises(JobError, match=rf"lacking:Net cannot be imported: .*torchvision.*{command}$"):
        build("lacking:Net")


def write_torchvision(folder: Path, text: str) -> None:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(textwrap.dedent(text))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder from which torchvision is imported; unload it at the end."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    true_one = forget_torchvision()
    yield tmp_path
    forget_torchvision()
    sys.modules.update(true_one)


def forget_torchvision() -> dict[str, ModuleType]:
    """Return the imported modules of torchvision."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"}


DESCRIBES = """
    import torch
    torch.library.register_fake("torchvision::nms")(lambda boxes, scores, threshold: boxes)
    torch.library.register_fake("torchvision::qnms")(lambda boxes, scores, threshold: boxes)
"""


@pytest.mark.skipif(_THERE, reason="torchvision is installed, and is tried itself")
def test_operators_that_are_missing_with_a_cpu_build_of_torch_are_declared(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchvision(stand_in, DESCRIBES)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeError, match="operator torchvision::nms does not exist"):
        import_torchvision()
    monkeypatch.setattr(torch.version, "cuda", None)
    import_torchvision()
    assert "torchvision" in sys.modules
    assert len(torchvision_shim._declared) == 1
    import_torchvision()
    assert len(torchvision_shim._declared) == 1


def test_another_failure_of_torchvision_is_raised(stand_in: Path) -> None:
    declared = len(torchvision_shim._declared)
    write_torchvision(stand_in, "raise RuntimeError('built for another torch')")
    with pytest.raises(RuntimeError, match="built for another torch"):
        import_torchvision()
    assert len(torchvision_shim._declared) == declared


@pytest.mark.skipif(not _THERE, reason="needs torchvision")
def test_resnet_50_has_its_parameters_and_ghost_norms_only() -> None:
    job = job_of("torchvision.models:resnet50", kwargs={"zero_init_residual": True})
    net = build_model(job, (64, 64, 3), 1000)
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    assert len(list(ghost_norms(net))) == 53
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


@pytest.mark.skipif(not _THERE, reason="needs torchvision")
def test_the_auxiliary_outputs_of_googlenet_in_training_are_refused() -> None:
    with pytest.raises(JobError, match=r"returns GoogLeNetOutputs for two samples .*, in training"):
        build_model(job_of("torchvision.models:googlenet", kwargs={"init_weights": False}), (64, 64, 3), 5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
def test_inception_resnet_v2_has_its_parameters_and_ghost_norms_only() -> None:
    net = build_model(job_of("timm.models:inception_resnet_v2"), (96, 96, 3), 1000)
    assert sum(p.numel() for p in net.parameters()) == 55_843_464
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
