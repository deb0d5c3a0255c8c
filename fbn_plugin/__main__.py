"""Run another project's script with the norms of fbn_plugin in every framework, without editing it.

    python -m fbn_plugin train.py --model resnet18 --model-kwargs norm_layer=fbn                # timm's
    python -m fbn_plugin tools/train_net.py --config-file ... MODEL.RESNETS.NORM 'FBN(t_sigma=4)'    # detectron2's
    python -m fbn_plugin --import my_norms.py -m my_project.train --epochs 3
    torchrun --nproc-per-node 2 -m fbn_plugin train.py ...

It calls fbn_plugin.register() and then runs SCRIPT, or with -m a module, as Python itself would: all that follows is
its command line. Processes that it starts by multiprocessing know the norms, too.
"""

import argparse
import sys
from collections.abc import Sequence

from fbn_plugin.engine.run.cli import add_import, show_held_warnings, user_errors
from fbn_plugin.engine.run.script import Script


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        behind = "; those of the script stand behind it" if message.startswith("unrecognized") else ""
        raise ValueError(message + behind)


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Our options, and from the script or the module on."""
    own = 0
    while own < len(argv) and argv[own].startswith("-") and argv[own] != "-m":
        own += 2 if argv[own] == "--import" else 1
    return argv[:own], argv[own:]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    own, rest = _split(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="python -m fbn_plugin",
        usage="%(prog)s [-h] [--import MODULE_OR_FILE] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_import(parser)
    with user_errors():
        args = parser.parse_args(own)
        is_module = rest[:1] == ["-m"]
        target, *arguments = rest[is_module:] or [None]
        if target is None:
            what = "-m wants the name of a module" if is_module else "no script is given"
            raise ValueError(f"{what}: python -m fbn_plugin SCRIPT ARGUMENTS; --help says more")
        script = Script(target, arguments, is_module, args.imports)
    show_held_warnings()
    script.run()


if __name__ == "__main__":
    main()
