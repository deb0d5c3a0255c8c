"""What a checkpoint holds beside the weights: each part that is missing or of another kind is one sentence, before any
of it is used."""

import copy
import math

import pytest
import torch
from torch import nn

from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer, RandomState
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.refusals import check_state
from fbn_plugin.engine.run.states import check_optimizer


def checkpointer(folder, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "lr": 0.2}]
    optimizer = optimizer(groups, lr=0.1, **(options or {"momentum": 0.9}))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 0.9**iteration)
    scaler = torch.amp.GradScaler("cpu")
    return AtomicCheckpointer(
        model, str(folder), optimizer=optimizer, scheduler=scheduler, scaler=scaler, random=RandomState()
    )


def trained(folder, *arguments, **options):
    found = checkpointer(folder, *arguments, **options)
    for _ in range(2):
        found.model(torch.ones(4, 3)).square().sum().backward()
        found.checkpointables["optimizer"].step()
        found.checkpointables["scheduler"].step()
    found.save("model_0000001", iteration=1, seed=5)
    return torch.load(folder / "model_0000001.pth")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


# What is changed: the way to it, what stands there instead (... is: nothing), and words of the sentence.
PARTS = ("optimizer", "scheduler", "scaler", "random")
ODD = [
    *((name, ..., f"it has no {name}") for name in (*PARTS, "iteration", "seed")),
    *((name, value, f"its {name} does not fit this run") for name in PARTS for value in ([], 3, None, "x")),
    *(("iteration", value, "iteration must be a whole") for value in (-1, True, 1.0, math.nan, "1", None, 2**70, [1])),
    *(("seed", value, "seed must be a whole number") for value in (-5, False, 0.5, 2**200, torch.ones(1))),
    ("model", {"0.weight": 3}, "not all of its weights are tensors"),
    ("model", [], "of another model"),
    ("model", {0: torch.ones(1)}, "names must be text"),
    ("optimizer.state", ..., "state must be a mapping"),
    ("optimizer.state", [], "state must be a mapping, got a list of 0"),
    ("optimizer.state.7", {"momentum_buffer": torch.ones(2, 3)}, "by the numbers of parameters, got 7"),
    ("optimizer.state.weight", {"momentum_buffer": torch.ones(2, 3)}, "got 'weight'"),
    ("optimizer.state.0", [], "the state of parameter 0 must be a mapping"),
    ("optimizer.state.0.momentum_buffer", torch.ones(3, 2), "momentum_buffer of parameter 0 must be .*\\(2, 3\\)"),
    ("optimizer.state.0.momentum_buffer", torch.ones(2, 3, dtype=torch.long), "momentum_buffer of parameter 0"),
    ("optimizer.state.0.momentum_buffer", torch.ones(2, 3, 1), "momentum_buffer of parameter 0"),
    ("optimizer.state.0.momentum_buffer", "much", "must be a tensor .*got 'much'"),
    ("optimizer.state.0.momentum_buffer", math.nan, "got nan"),
    ("optimizer.state.0.momentum_buffer", torch.full((2, 3), math.nan), "of parameter 0 must be finite"),
    ("optimizer.param_groups", [], r"its groups have \[\] parameters, this run's \[2, 2\]"),
    ("optimizer.param_groups", {}, "param_groups must be a list"),
    ("optimizer.param_groups.0", 3, r"\['no', 2\] parameters"),
    ("optimizer.param_groups.0.params", [0], r"\[1, 2\] parameters"),
    ("optimizer.param_groups.0.params", [0, "1"], r"\['no', 2\]"),
    ("optimizer.param_groups.0.params", [0, 2], "a parameter is in it twice"),
    ("optimizer.param_groups.0.lr", ..., "a group must be a mapping with lr"),
    ("optimizer.param_groups.0.lr", "high", "lr must be a finite number, 0 or more, got 'high'"),
    ("optimizer.param_groups.0.lr", math.nan, "lr must be"),
    ("optimizer.param_groups.0.lr", -0.1, "lr must be"),
    ("optimizer.param_groups.0.momentum", [0.9], "momentum must be a finite number"),
    ("optimizer.param_groups.0.nesterov", 3, "nesterov must be True or False"),
    ("scheduler.last_epoch", ..., "it has no last_epoch"),
    ("scheduler.last_epoch", -1, "last_epoch must be a whole number, 0 or more"),
    ("scheduler.last_epoch", 1.5, "last_epoch must be"),
    ("scheduler.base_lrs", [0.1], "base_lrs must be a list of 2, got a list of 1"),
    ("scheduler.base_lrs", [0.1, math.inf], "base_lrs must be a finite number, got inf"),
    ("scaler.scale", ..., "it has no scale"),
    ("scaler.scale", "big", "scale must be a finite number"),
    ("scaler._growth_tracker", -3, "_growth_tracker must be"),
    ("random.ranks", ..., "mapping with a list 'ranks'"),
    ("random.ranks", [], "mapping with a list 'ranks'"),
    ("random.ranks.0", 3, "process 0 has no states of generators"),
    ("random.ranks.0.torch", ..., "process 0 has no states of generators"),
    ("random.ranks.0.torch", torch.zeros(10, dtype=torch.uint8), "process 0 .* torch's must be a tensor"),
    ("random.ranks.0.torch", torch.zeros(5056), "process 0 .* torch's must be a tensor"),
    ("random.ranks.0.torch", [1, 2], "torch's must be a tensor"),
    ("random.ranks.0.numpy", ("PCG64", [1] * 624, 3, 0, 0.0), "numpy's is none"),
    ("random.ranks.0.numpy", ("MT19937", [1] * 624, 10**6, 0, 0.0), "numpy's is none"),
    ("random.ranks.0.numpy", ("MT19937", [1] * 3, 3, 0, 0.0), "process 0 has no states"),
    ("random.ranks.0.numpy", ("MT19937", [-1] * 624, 3, 0, 0.0), "process 0 has no states"),
    ("random.ranks.0.numpy", ("MT19937", ["x"] * 624, 3, 0, 0.0), "process 0 has no states"),
    ("random.ranks.0.python", (3, [1] * 10, None), "process 0 has no states"),
    ("random.ranks.0.python", (3, [1] * 624 + [999], None), "process 0 has no states"),
    ("random.ranks.0.python", (3, [2**40] * 625, None), "process 0 has no states"),
    ("random.ranks.0.python", (3, [1] * 625, "g"), "process 0 has no states"),
    ("random.ranks.0.python", "state", "process 0 has no states"),
    ("random.ranks.0.cuda", "state", "cuda's is no row of bytes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "words"), ODD, ids=[f"{path}-{number}" for number, (path, *_) in enumerate(ODD)]
)
def test_what_is_missing_or_of_another_kind(content, tmp_path, path, value, words):
    content = copy.deepcopy(content)
    place = content
    *way, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    file = tmp_path / "model_0000001.pth"
    torch.save(content, file)
    found = checkpointer(tmp_path)
    before = copy.deepcopy(found.model.state_dict())
    with pytest.raises(ValueError, match=words) as error:
        check_state(str(file), found.load(str(file)), ("iteration", "seed"))
    assert str(error.value).startswith(f"checkpoint {file}") and "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    if path.partition(".")[0] not in ("iteration", "seed"):
        assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())


def test_what_fits_is_taken(content, tmp_path):
    """With less and more than this version of PyTorch writes."""
    content = copy.deepcopy(content)
    content["scheduler"].pop("verbose", None)
    for group in content["optimizer"]["param_groups"]:
        del group["foreach"]
        group.update(decoupled=None, weight_decay=0.0)
    torch.save(content, tmp_path / "a.pth")
    rest = checkpointer(tmp_path).load(str(tmp_path / "a.pth"))
    assert rest == {"iteration": 1, "seed": 5}
    # of a run on the CPU, where nothing is scaled
    torch.save({**content, "scaler": {}}, tmp_path / "b.pth")
    assert checkpointer(tmp_path).load(str(tmp_path / "b.pth")) == rest
    # of another number of processes
    torch.save({**content, "random": {"ranks": [None, None]}}, tmp_path / "c.pth")
    assert checkpointer(tmp_path).load(str(tmp_path / "c.pth")) == rest
    # weights to start from need no such thing
    torch.save({"model": content["model"], "iteration": "?"}, tmp_path / "d.pth")
    checkpointer(tmp_path).load(str(tmp_path / "d.pth"), checkpointables=[])


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_other_optimizers(tmp_path, optimizer, options):
    state = trained(tmp_path, optimizer, **{"weight_decay": 0.1, **options})
    found = checkpointer(tmp_path, optimizer, **{"weight_decay": 0.1, **options})
    found.load(str(tmp_path / "model_0000001.pth"))
    own = found.checkpointables["optimizer"].state_dict()["state"]
    assert own.keys() == state["optimizer"]["state"].keys() and own[0].keys() == state["optimizer"]["state"][0].keys()
    with pytest.raises(UserError, match="its optimizer does not fit this run"):
        checkpointer(tmp_path, torch.optim.SGD, momentum=0.9).checkpointables and found.check_content(
            {**state, "optimizer": {**state["optimizer"], "param_groups": state["optimizer"]["param_groups"][:1]}}
        )


def test_lists_of_tensors_and_types_of_numbers():
    """As some of timm's optimizers have them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)
    optimizer.param_groups[0]["momentum_dtype"] = torch.bfloat16
    state = {"state": {0: {"Q": [torch.eye(2), None]}}, "param_groups": [{**optimizer.param_groups[0], "params": [0]}]}
    check_optimizer(optimizer, state)
    state["state"][0]["Q"][1] = "much"
    with pytest.raises(ValueError, match="Q of parameter 0 must be a tensor, a number or a list of tensors"):
        check_optimizer(optimizer, state)
