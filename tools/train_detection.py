"""Train and evaluate torchvision's Mask R-CNN on COCO-format data, with the norms that a YAML file names.

    python tools/train_detection.py --config-file configs/... OUTPUT_DIR runs/fbn MODEL.RESNETS.NORM "FBN(t_sigma=4)"
    torchrun --nproc-per-node 8 tools/train_detection.py --config-file configs/... --resume

The vocabulary is detectron2's; ``KEY VALUE`` pairs override the file. OUTPUT_DIR receives ``metrics.json``, TensorBoard
files, ``log.txt``, ``config.yaml``, ``run_info.json``, checkpoints (``model_final.pth``), and the detections under
``inference/``; with ``--eval-only``, ``evaluation.json``, the detections and, where nothing was trained in OUTPUT_DIR,
the settings.
"""

import sys
from collections.abc import Sequence

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import RUN_ERRORS, import_modules, parse_config_arguments, stoppable, user_errors


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command line; return the last evaluation's metrics."""
    args = parse_config_arguments(__doc__, argv)
    with user_errors():
        from fbn_plugin.engine.run import distributed
        from fbn_plugin.engine.run.logging import setup_logging
        from fbn_plugin.engine.torchvision.config import load_detection_config
        from fbn_plugin.engine.torchvision.trainer import DetectionTrainer

        setup_logging()
        import_modules(args.imports)
        cfg = load_detection_config(args.config_file, args.overrides)
    with stoppable(None if args.eval_only else cfg.OUTPUT_DIR):
        with user_errors():
            trainer = DetectionTrainer(cfg, args.resume, args.eval_only, args.log_period)
        with user_errors(*RUN_ERRORS):
            if args.eval_only:
                trainer.write_evaluation(metrics := trainer.evaluate())
            else:
                metrics = trainer.train()
        distributed.finish()
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
