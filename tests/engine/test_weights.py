"""The lines that say what a file of weights gave a model."""

from torch import nn

from fbn_plugin.engine.weights import loading_report


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        )
        self.head = nn.Linear(4, 2)


def test_what_was_loaded_left_and_not_used():
    loaded = {"body.0.weight", "body.1.weight", "body.1.bias", "body.2.weight"}
    unused = ["fc_w", "body.3.running_mean", "body.3.running_var"]
    assert loading_report(Net(), "x.pkl", loaded, unused) == [
        "x.pkl: 4 of the model's 11 tensors loaded",
        "norms: scale and shift of 1 of 2 loaded, running statistics of 0 of the 1 that have them",
        "as built, not from the file: body.1.running_mean, body.1.running_var, body.2.bias, body.3, head",
        "running statistics in the file and left out: 2; the norms have none",
        "in the file and not used: fc_w",
    ]
    assert len(loading_report(Net(), "x.pth", Net().state_dict().keys())) == 2
    many = loading_report(
        nn.ModuleList(Net() for _ in range(9)), "x", {f"{i}.head.bias" for i in range(9)}, list("abcdefgh")
    )
    assert many[-1] == "in the file and not used: a, b, c, d, e, f and 2 more" and many[-2].endswith("and 12 more")


def test_a_model_of_which_nothing_is_loaded():
    assert loading_report(Net(), "x", set())[2] == "as built, not from the file: the model"
