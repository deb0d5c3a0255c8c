#!/usr/bin/env python
"""Train and evaluate detectron2's models with filtered norms: detectron2's trainer and command line, after
``fbn_plugin.register()``.

    python tools/train_net.py --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_FBN.yaml --num-gpus 1
    python tools/train_net.py --config-file ... --num-gpus 2 MODEL.DEVICE cpu    # two processes on the CPU
    python tools/train_net.py --config-file ... --resume
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

Datasets are detectron2's, or COCO-format folders named ``FOLDER:SPLIT``. OUTPUT_DIR gets the config, the log,
metrics.json, TensorBoard events, checkpoints, run_info.json and the COCO results; ``--eval-only`` writes
evaluation.json and the COCO results there and, where nothing was trained in OUTPUT_DIR, the settings. With
TEST.AUG.ENABLED the evaluation at the end, or of ``--eval-only``, is made with test-time augmentation, too.

``--resume`` continues from the last checkpoint with the settings that the run began with, ``--resume auto`` from the
newest that is not damaged; on the CPU it ends with the same bits as a run that was never stopped.
"""

import interruption  # noqa: F401

from fbn_plugin import internals
from fbn_plugin.engine.run.cli import (
    add_import,
    add_log_period,
    add_resume_auto,
    import_modules,
    refuse_unknown_flags,
    stoppable,
    user_errors,
    with_resume_auto,
)

with user_errors():
    try:
        from detectron2.engine import default_argument_parser
    except ImportError as error:
        found = internals.is_installed("detectron2")
        missing = f"cannot be imported ({error})" if found else "is not installed"
        raise ValueError(
            f"this tool trains detectron2's models, and detectron2 {missing}; its install guide is at "
            "https://detectron2.readthedocs.io/tutorials/install.html (tools/train_detection.py does without it)"
        ) from None
    from fbn_plugin.engine.detectron2.config import prepare
    from fbn_plugin.engine.detectron2.processes import launch
    from fbn_plugin.engine.detectron2.trainer import run


@stoppable()
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = default_argument_parser(
        epilog="--num-gpus is the number of processes; with MODEL.DEVICE cpu they train on the CPU. --resume auto "
        "continues from the newest checkpoint that is not damaged."
    )
    parser.set_defaults(dist_url="auto")
    add_log_period(parser)
    add_resume_auto(parser)
    add_import(parser)
    args = parser.parse_args(with_resume_auto(argv))
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(
            f"--machine-rank must be from 0 to --num-machines - 1, got {args.machine_rank} of {args.num_machines}"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines wants --dist-url tcp://HOST:PORT of the first machine")
    with user_errors():
        refuse_unknown_flags(parser, args.opts)
        import_modules(args.imports)
        cfg = prepare(args)
    with stoppable(None if args.eval_only else cfg.OUTPUT_DIR):
        launch(
            run,
            (cfg, args),
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            cfg.MODEL.DEVICE,
            cfg.OUTPUT_DIR,
        )


if __name__ == "__main__":
    main()
