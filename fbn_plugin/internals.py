"""All that this package uses of other packages and that they do not promise to keep: names that are not public, and
public ones that :func:`fbn_plugin.register` or a subclass puts its own in the place of. Only ``ops/eager.py`` has a
list of its own, of names that it can do without.

A release that drops a name is noticed here, at import, by a sentence that says which name, and which versions have it.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

# The versions that the tests have run with, the oldest and the newest.
VERSIONS = {
    "torch": "2.6 to 2.14",
    "torchvision": "0.21 to 0.29",
    "timm": "1.0.21 to 1.0.31",
    "detectron2": "0.6, as its repository has it",
    "fvcore": "0.1.5",
    "mmengine": "0.10.7",
    "mmcv": "2.1.0 and 2.2.0",
    "transformers": "5.24.0",
    "ultralytics": "8.4.190",
}

# Without one of these, what uses them cannot be right, and is not imported.
NEEDED = {
    "torch": (
        # the classes that a kind of layer has in common
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.batchnorm._NormBase",
        "torch.nn.modules.instancenorm._InstanceNorm",
        "torch.nn.modules.conv._ConvNd",
        "torch.nn.modules.conv._ConvTransposeNd",
        # overridden in layers/
        "torch.nn.BatchNorm2d._check_input_dim",
        # lent by layers/frozen_batch_norm.py
        "torch.nn.BatchNorm1d._check_input_dim",
        "torch.nn.BatchNorm3d._check_input_dim",
        "torch.nn.Module._load_from_state_dict",
        # replaced in frameworks/pytorch.py
        "torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__",
    ),
    "torchvision": (
        "torchvision.models.resnet.ResNet._make_layer",  # overridden in models/mask_rcnn.py
        # replaced in frameworks/torchvision.py, which exchanges the code of all builders that get_model knows, too
        "torchvision.models.detection.FasterRCNN.__init__",
        "torchvision.models.detection.RetinaNet.__init__",
        "torchvision.models.detection.FCOS.__init__",
        "torchvision.models.detection.ssd.SSD.__init__",
        "torchvision.models.detection.backbone_utils.resnet_fpn_backbone.__wrapped__",
        "torchvision.models.detection.backbone_utils.mobilenet_backbone.__wrapped__",
    ),
    "timm": (  # replaced in frameworks/timm.py
        "timm.layers.create_norm.get_norm_layer",
        "timm.layers.create_norm_act.get_norm_act_layer",
        "timm.layers.norm_act.convert_sync_batchnorm",
        "timm.layers.norm_act.freeze_batch_norm_2d",
        "timm.layers.norm_act.unfreeze_batch_norm_2d",
        "timm.layers.split_batchnorm.convert_splitbn_model",
        "timm.models.adapt_model_from_string",
        "timm.models.create_model",
        "timm.utils.model.reparameterize_model",
        # replaced in frameworks/timm_optimizers.py
        "timm.optim.param_groups_weight_decay",
        "timm.optim.param_groups_layer_decay",
    ),
    "detectron2": (  # replaced in frameworks/detectron2.py
        "detectron2.layers.batch_norm.get_norm",
        "detectron2.layers.FrozenBatchNorm2d.convert_frozen_batchnorm.__func__",
        "detectron2.modeling.meta_arch.retinanet.RetinaNetHead.__init__.__wrapped__",
        "detectron2.config.get_cfg",
        "detectron2.config.CfgNode.dump",
        "detectron2.engine.defaults.default_setup",
        "detectron2.solver.build.get_default_optimizer_params",
        "detectron2.data.detection_utils.read_image",  # replaced in engine/detectron2/data.py, while an image is read
    ),
    "transformers": ("transformers.modeling_utils.PreTrainedModel.post_init",),  # replaced in frameworks/huggingface.py
    "ultralytics": (
        "ultralytics.engine.model.Model.train",  # replaced in frameworks/ultralytics.py
        "ultralytics.models.yolo.detect.DetectionTrainer.get_model",  # overridden there
    ),
    "mmengine": ("mmengine.registry.MODELS.module_dict.pop",),  # by which frameworks/mmengine.py takes its norms out
}

# Without one of these, this is lost and the rest works.
OPTIONAL = {
    "torchvision.models.feature_extraction._get_leaf_modules_for_ops": "create_feature_extractor cannot trace models "
    "with norms of one's own",
    "torch.ao.quantization.fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD": "fuse_modules of "
    "torch.ao.quantization knows no norms of this package: convert to BN before",
    "timm.layers.create_norm._NORM_MAP": "fbn_plugin.param_groups does not know all norms of timm's",
    "timm.layers.create_norm_act._NORM_ACT_MAP": "fbn_plugin.param_groups does not know all norms of timm's",
    "mmengine.model.convert_sync_batchnorm": "a runner's sync_bn makes filtered norms plain ones",
    **dict.fromkeys(
        (
            "mmengine.model.efficient_conv_bn_eval.efficient_conv_bn_eval_forward",
            "mmcv.cnn.bricks.conv_module.efficient_conv_bn_eval_forward",
            "mmcv.cnn.fuse_conv_bn",
        ),
        "it is wrong for norms whose scale is more than their weight",
    ),
    **dict.fromkeys(
        (
            "timm.models._registry._model_entrypoints",
            "timm.models._registry._model_to_module",
            "timm.models._registry._model_with_tags",
            "timm.models._registry._model_pretrained_cfgs",
            "timm.models._registry._model_default_cfgs",
            "timm.models._registry._module_to_models",
        ),
        "fbn_plugin.unregister leaves traces of the papers' networks in timm",
    ),
}

# What instances have. Only the tests can look for these: there is no instance to ask at import.
ATTRIBUTES = {
    "torch.nn.Module": (
        "_modules",
        "_buffers",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ),
    "torch.nn.Conv2d": ("_conv_forward",),
    "torchvision.models.resnet.ResNet": ("_norm_layer",),
    "torch.utils.tensorboard.SummaryWriter": ("_get_file_writer",),  # overridden in engine/run/board.py
    "fvcore.common.registry.Registry": ("_obj_map",),
    "detectron2.engine.SimpleTrainer": ("_write_metrics",),
    "detectron2.utils.events.TensorboardXWriter": ("_writer",),
    "detectron2.evaluation.COCOEvaluator": (
        "_coco_api",
        "_derive_coco_results",
        "_eval_predictions",
        "_kpt_oks_sigmas",
    ),
}


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A folder of its name alone, such as the checkout that holds it, ``datasets``
    beside detectron2, or what Weights & Biases writes, is none: Python would import it as an empty package."""
    module = sys.modules.get(package)
    if module is not None:
        return getattr(module, "__file__", None) is not None or not hasattr(module, "__path__")
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def lookup(name: str) -> Any:
    """What is under a dotted name, its modules imported; None if it is not there."""
    found = importlib.import_module(name.partition(".")[0])
    path = found.__name__
    parts = name.split(".")
    for number, part in enumerate(parts[1:], 2):
        path += f".{part}"
        if number < len(parts) and isinstance(sys.modules.get(path), ModuleType):
            found = sys.modules[path]  # a function may have the name of its module, and hide it
            continue
        if not hasattr(found, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return None
        # in the midst of an import a package does not have its modules as attributes yet
        found = getattr(found, part, sys.modules.get(path))
    return found


def require(package: str) -> None:
    """Check that ``package``, one of ``NEEDED``, has what it is needed for.

    Raises:
        ImportError: a name is gone; names it, the version that is installed and the versions that have it.
    """
    if missing := [name for name in NEEDED[package] if lookup(name) is None]:
        raise ImportError(f"{package} {_version(package)} has no {', '.join(missing)}: {_tested(package)}")


def optional(name: str, default: Any = None) -> Any:
    """What is under one of the names of ``OPTIONAL``; ``default``, with a warning that says what is lost, if it is not
    there."""
    found = lookup(name)
    if found is None:
        package = name.partition(".")[0]
        message = f"{package} {_version(package)} has no {name}: {OPTIONAL[name]}; {_tested(package)}"
        warnings.warn(message, stacklevel=2)
        return default
    return found


def _tested(package: str) -> str:
    return f"fbn_plugin is tested with {package} {VERSIONS[package]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from its source folder, or of another name, as mmcv-lite
        return getattr(sys.modules.get(package), "__version__", "of an unknown version")


require("torch")  # as all of the package, importing any of it, comes by here first
