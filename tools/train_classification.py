"""Train or evaluate an image classifier: a timm model with any norm, described by a YAML file of configs/.

    python tools/train_classification.py --config-file configs/Digits/test_resnet_FBN.yaml
    python tools/train_classification.py --config-file ... --resume
    python tools/train_classification.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    torchrun --nproc-per-node 8 tools/train_classification.py --config-file configs/ImageNet/resnet50_FBN.yaml

`KEY VALUE` pairs at the end override the file, as in detectron2; `classification_config` in
fbn_plugin/engine/classification/config.py lists the keys. OUTPUT_DIR receives `metrics.json`, TensorBoard files,
`log.txt`, `config.yaml`, `run_info.json`, `results.json` and checkpoints (`model_final.pth`, and `model_best.pth` with
SOLVER.BEST_CHECKPOINT_METRIC); with --eval-only `evaluation.json`.
"""

import sys
from collections.abc import Sequence

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import RUN_ERRORS, import_modules, parse_config_arguments, stoppable, user_errors


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The command as it was typed, for the record."""
    return sys.argv if argv is None or list(argv) == sys.argv[1:] else [__file__, *argv]


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command line; return the last evaluation's metrics."""
    args = parse_config_arguments(__doc__, argv)
    with user_errors():
        from fbn_plugin.engine.classification.config import classification_config
        from fbn_plugin.engine.classification.trainer import ClassificationTrainer
        from fbn_plugin.engine.run import distributed
        from fbn_plugin.engine.run.config import load_config
        from fbn_plugin.engine.run.logging import setup_logging

        setup_logging()
        import_modules(args.imports)
        cfg = load_config(classification_config(), args.config_file, args.overrides)
    with stoppable(None if args.eval_only else cfg.OUTPUT_DIR):
        with user_errors():
            trainer = ClassificationTrainer(cfg, args.resume, args.eval_only, args.log_period, command_line(argv))
        with user_errors(*RUN_ERRORS):
            if args.eval_only:
                trainer.write_evaluation(result := trainer.evaluate())
            else:
                result = trainer.train()
        if distributed.is_main():
            print(trainer.describe(result))
        distributed.finish()
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
