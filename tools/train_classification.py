"""Train or evaluate an image classifier: a timm model with any norm, described by a YAML file of configs/.

    python tools/train_classification.py --config-file configs/Digits/resnet_FBN.yaml
    python tools/train_classification.py --config-file ... --resume
    python tools/train_classification.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    torchrun --nproc-per-node 8 tools/train_classification.py --config-file configs/ImageNet/resnet50_FBN.yaml

`KEY VALUE` pairs at the end override the file, as in detectron2. All keys: fbn_plugin.engine.classification.get_cfg.
"""

import argparse

from fbn_plugin.engine.cli import UserError, add_config_arguments, user_errors


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    args = parser.parse_args(arguments)
    with user_errors():
        from fbn_plugin.engine import distributed
        from fbn_plugin.engine.classification import ClassificationTrainer, get_cfg
        from fbn_plugin.engine.config import load_config
        from fbn_plugin.engine.logging import setup_logging

        setup_logging()
        trainer = ClassificationTrainer(
            load_config(get_cfg(), args.config_file, args.overrides), args.resume, args.eval_only
        )
    with user_errors(UserError):
        result = trainer.evaluate() if args.eval_only else trainer.train()
    if distributed.is_main():
        print(trainer.describe(result))
    distributed.finish()


if __name__ == "__main__":
    main()
